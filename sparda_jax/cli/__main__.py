"""The `sparda` command, also as `python -m sparda_jax`: imports, then runs it."""

from sparda_jax.cli.starting import interrupt_ends


def main() -> int:
    """Runs the command; returns its exit status."""
    with interrupt_ends("sparda: interrupted"):
        from sparda_jax.cli.main import main as run
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
