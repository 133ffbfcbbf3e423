"""From a request to its result: what is behind `generate`, `stream`, `forward`."""
