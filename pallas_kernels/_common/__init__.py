"""What the operations share: argument checks, dispatch, numerics."""
