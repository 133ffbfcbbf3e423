"""Ctrl-C while a command still imports what it needs."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator


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
