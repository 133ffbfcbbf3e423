"""How the commands speak: notes, progress bars, figures."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm


def note(text: str) -> None:
    """Prints to standard error, whatever characters the text holds."""
    text = text.encode("utf-8", "backslashreplace").decode()
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(what: str, every: float = 10.0) -> Iterator[None]:
    """Notes what begins, and how long it has taken while it goes on.

    Args:
      what: What takes its time.
      every: Seconds between two notes.
    """
    begun, over = time.perf_counter(), threading.Event()
    note(f"{what} …")

    def tell() -> None:
        while not over.wait(every):
            note(f"{what}: {time.perf_counter() - begun:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def advance(bar: tqdm, steps: int) -> None:
    """`bar.update` without its result, as a callback wants it."""
    bar.update(steps)


def prefill_bar(total: int) -> tqdm:
    """A progress bar over the prompt's tokens."""
    return tqdm(total=total, desc="prefill", unit="tok", leave=False, disable=None)


def rate_text(value: float | None) -> str:
    """Tokens a second, or a dash where there were none to time."""
    return "–" if value is None else f"{value:.1f}"


def share_text(blocks: tuple[int, int]) -> str:
    """The share of (attended, present) blocks, or a dash where none were present."""
    attended, present = blocks
    return "–" if not present else f"{100 * attended / present:.0f} %"
