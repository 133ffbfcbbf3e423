"""How the commands speak: notes, progress bars, figures."""

import sys

from tqdm import tqdm


def note(text: str) -> None:
    """Prints to standard error, whatever characters the text holds."""
    text = text.encode("utf-8", "backslashreplace").decode()
    print(text, file=sys.stderr, flush=True)


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
