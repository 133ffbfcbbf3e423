"""Every candidate of an operation's cases: compiled, compared with XLA, timed."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels._common.devices import current_device_kind
from pallas_kernels._common.tolerances import relative_error, tolerance
from pallas_kernels.benchmarks.harness import Timing, compile_side_by_side, measure
from pallas_kernels.tuning.case import Case
from pallas_kernels.tuning.cases import CASES
from pallas_kernels.tuning.record import case_orders, default_order


def _best(
    case: Case, name: str, want: Any, limit: Timing
) -> tuple[dict[str, Any] | None, float]:
    """The record's entry of the fastest candidate that is right, and its error."""
    best, worst = None, 0.0
    configs = case.configs[name]
    calls = [functools.partial(case.run, name, config) for config in configs]
    programs = compile_side_by_side(calls, case.operands)
    for config, compiled in zip(configs, programs, strict=True):
        title = f"{case.when} {name} {config}"
        if isinstance(compiled, Exception):
            print(f"{title} failed: {compiled}"[:300], flush=True)
            continue
        timing = measure(title, compiled, *case.operands, links=case.links)
        if timing.seconds is None:
            continue
        if case.check is None:
            got = compiled(*case.operands)
        else:
            got = jax.jit(functools.partial(case.check, name, config))(*case.operands)
        error = max(
            relative_error(x, y)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        )
        # A chain of layers adds up the rounding of each of them.
        if error > 2 * tolerance(case.operands[0].dtype):
            print(f"  wrong: relative error {error:.1e}", flush=True)
            continue
        worst = max(worst, error)
        if best is None or timing.seconds < best[0]:
            best = (timing.seconds, config, timing.spread)
    if best is None:
        return None, worst
    seconds, config, spread = best
    entry = {
        "when": case.when,
        "config": {} if config is None else dataclasses.asdict(config),
        "milliseconds": round(seconds * 1e3, 5),
        "spread": round(spread or 0.0, 3),
        "xla_milliseconds": limit.seconds and round(limit.seconds * 1e3, 5),
    }
    if case.order:
        entry["order"] = case.order
    return entry, worst


class _Found:
    """What a run has found, and what is left to do."""

    def __init__(self, todo: list[dict[str, Any]]):
        self._todo = todo
        self._configs: dict[str, list[dict[str, Any]]] = {}
        self._numerics: dict[str, float] = {}
        self._failed: list[dict[str, Any]] = []

    def add(self, entry: dict[str, Any] | None, error: float) -> None:
        """Takes in the result of what is next."""
        done = self._todo.pop(0)
        name = done["implementation"]
        if entry is None:
            self._failed.append(done)
            return
        self._configs.setdefault(name, []).append(entry)
        self._numerics[name] = max(self._numerics.get(name, 0.0), error)

    def record(self) -> dict[str, Any]:
        """The record so far."""
        default = default_order(self._configs, self._failed)
        return {
            "device": current_device_kind(),
            "jax": jax.__version__,
            "default": default,
            "orders": case_orders(self._configs, default),
            "relative_error_against_xla": dict(self._numerics),
            "configs": {name: list(x) for name, x in self._configs.items()},
            "failed": list(self._failed),
            "unfinished": list(self._todo),
        }


def _baseline(case: Case) -> tuple[Timing, Any]:
    """XLA's time, and the result that the others are compared with."""
    f = jax.jit(functools.partial(case.run, "xla", None))
    f = f.lower(*case.operands).compile()
    limit = measure(f"{case.when} xla", f, *case.operands, links=case.links)
    if case.check is None:
        return limit, f(*case.operands)
    check = jax.jit(functools.partial(case.check, "xla", None))
    return limit, check(*case.operands)


def tune(
    op: str,
    small: bool = False,
    *,
    implementations: Collection[str] = (),
    only: Sequence[Mapping[str, int]] = (),
    on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Tunes one operation and returns its record.

    Args:
      op: one of ``CASES``.
      small: tiny sizes, to try the tuner itself.
      implementations: those to tune; all if empty.
      only: sizes of the cases to tune, each a part of ``Case.when``; all if empty.
      on_progress: called with the record so far after each implementation of a case.

    Returns:
      What ``--write`` puts into the JSON file.

    Raises:
      ValueError: when there is nothing to tune.
    """
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:4.0f} s] {text}", flush=True)

    cases = [
        case
        for case in CASES[op](small)
        if not only or any(part.items() <= case.when.items() for part in only)
    ]
    todo = [
        (case, name)
        for case in cases
        for name in case.configs
        if not implementations or name in implementations
    ]
    if not todo:
        raise ValueError(
            f"only is {list(only)} and implementations {list(implementations)}; no "
            f"case of {op} is left"
        )
    found = _Found([{"implementation": name, "when": c.when} for c, name in todo])
    for number, case in enumerate(cases, 1):
        say(f"{op}, case {number} of {len(cases)}: {case.when}")
        limit, want = _baseline(case)
        for name in (name for of, name in todo if of is case):
            say(f"{name}: {len(case.configs[name])} candidates")
            found.add(*_best(case, name, want, limit))
            on_progress(found.record())
    say("done")
    return found.record()
