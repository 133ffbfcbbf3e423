"""A problem to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem to tune.

    Attributes:
      when: sizes written to the record; the entry serves calls that match them.
      operands: arrays for ``run``.
      run: takes an implementation's name, a config or None, and the operands.
      configs: candidates by implementation.
      links: operations chained in one call of ``run``.
      order: what ``dispatch`` can tell calls like this one by; where its fastest
        implementation is not that of all cases together, the record says so.
      check: as ``run``; what is compared with the XLA form, ``run`` itself if None.
    """

    when: dict[str, int]
    operands: tuple[Any, ...]
    run: Callable[..., Any]
    configs: dict[str, Sequence[Any]]
    links: int = 1
    order: dict[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[..., Any] | None = None
