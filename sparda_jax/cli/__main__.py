"""`python -m sparda_jax.cli` is the `sparda` command."""

from sparda_jax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
