"""The `sparda` command, as `python -m sparda_jax`."""

from sparda_jax.cli.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
