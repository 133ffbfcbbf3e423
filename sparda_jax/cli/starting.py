"""Ctrl-C while a command still imports what it needs, and while it runs."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator

# After which an interrupt that would be lost comes again.
_AGAIN_SECONDS = 0.05


@contextlib.contextmanager
def interrupt_ends(line: str) -> Generator[None]:
    """Until the block ends, Ctrl-C prints `line` and ends the process with status 130.

    An exception would not do: it would be raised within other packages' imports, and
    some of them catch it. Where Ctrl-C is ignored, or somebody else's business, it
    stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield
        return

    def end(*_: object) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _come_again() -> None:
    """Sends the main thread a Ctrl-C, a moment later."""
    main = threading.main_thread().ident
    again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
    again.daemon = True
    again.start()


@contextlib.contextmanager
def interrupt_is_heeded() -> Generator[None]:
    """Until the block ends, every Ctrl-C is a `KeyboardInterrupt` that is not lost.

    Python only prints an error of what a garbage collection, a destructor or a weak
    reference calls; JAX calls a function at every collection, which may take a tenth of
    the time of a command that makes many lists. Such a Ctrl-C comes again. Where Ctrl-C
    is ignored, or somebody else's business, it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield
        return
    told = sys.unraisablehook

    def lost(error: "sys.UnraisableHookArgs") -> None:
        if issubclass(error.exc_type, KeyboardInterrupt):
            _come_again()
        else:
            told(error)

    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = told
