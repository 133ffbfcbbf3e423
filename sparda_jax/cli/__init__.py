"""The `sparda` command; `main.main` runs it."""
