"""Tasks, selectors on them, and reports."""
