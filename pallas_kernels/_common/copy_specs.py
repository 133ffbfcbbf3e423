"""Sizes of a call that copies listed blocks, for tests, benchmarks and the tuner."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CopySpec:
    """Sizes of a call.

    Attributes:
      name: short, unique, used as a test's id.
      rows: rows of the array that is listed from (R).
      block: shape of one block.
      count: entries of the list (J).
      skipped: fraction of the entries that is -1.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    rows: int
    block: tuple[int, ...]
    count: int
    skipped: float = 0.0
    tags: frozenset[str] = field(default=frozenset({"ci"}))
