"""Ctrl-C while a command still imports what it needs, and while it runs."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Generator
from types import FrameType

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


def _is_lost(frame: FrameType | None) -> bool:
    """Whether an error that is raised here is only printed, as one of a destructor is.

    JAX calls a function at every garbage collection, which may take a tenth of the time
    of a command that makes many lists.
    """
    ignored = {getattr(call, "__code__", None) for call in gc.callbacks}
    while frame is not None:
        if frame.f_code in ignored or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    """As Python's own handler; where its error would be lost, a moment later."""
    if not _is_lost(frame):
        raise KeyboardInterrupt
    main = threading.main_thread().ident
    again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, number))
    again.daemon = True
    again.start()


@contextlib.contextmanager
def interrupt_is_heeded() -> Generator[None]:
    """Until the block ends, every Ctrl-C is a `KeyboardInterrupt` that is not lost.

    Where Ctrl-C is ignored, or somebody else's business, it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
