"""Figures of `sparda bench`: their schema, and files of them read, shown, compared.

A file is JSON: `schema`, `run` (device, JAX version, model, dtype, weights, date,
limits) and `cells`, a list of records with the fields of `Cell`. What was not measured
is null.
"""

import dataclasses
import pathlib
from typing import Any

from sparda_jax.checkpoint.files import read_json
from sparda_jax.checks import ConfigError, shown

SCHEMA = "sparda-bench/1"
_MOST = 1e30


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to run one request.

    Attributes:
      attention, cache, prefetch: How it ran; `prefetch` is "" for a resident cache.
      context, batch: Prompt tokens of each row, and rows.
      status: "measured", or why not: "does not fit", "refused".
      reason: Of a cell that was not measured, and what `auto` decided of one that was.
      first_token_ms: Median time of the whole prefill, first token included.
      prefill_tokens_per_second: Prompt tokens of all rows over it.
      token_ms, token_ms_least, token_ms_most: Of a decode step of all rows: the median
        call's, and the fastest and slowest call's.
      tokens_per_second: Output tokens of all rows.
      steps: Decode steps of a call.
      calls: Timed calls.
      block_share: KV blocks that decode read, of those present.
      miss_share: Listed blocks that were fetched, of those listed.
      link_bytes_per_step: Bytes that crossed the link towards the device.
      hidden_share: Share of the time that waiting for fetches costs which look-ahead
        hides; from this cell and those on demand and resident with the same request.
      limit_ms, limit_share: The least step time by the machine's measured rates with
        these misses, and that over the measured time; the share is null where the
        measured time is shorter, so that the rates were no bound.
      peak_device_bytes: Highest so far in this process, where the device says it.
      planned_device_bytes, host_bytes: The planner's.
    """

    attention: str
    cache: str
    prefetch: str
    context: int
    batch: int
    status: str
    reason: str = ""
    first_token_ms: float | None = None
    prefill_tokens_per_second: float | None = None
    token_ms: float | None = None
    token_ms_least: float | None = None
    token_ms_most: float | None = None
    tokens_per_second: float | None = None
    steps: int = 0
    calls: int = 0
    block_share: float | None = None
    miss_share: float | None = None
    link_bytes_per_step: float | None = None
    hidden_share: float | None = None
    limit_ms: float | None = None
    limit_share: float | None = None
    peak_device_bytes: int | None = None
    planned_device_bytes: int | None = None
    host_bytes: int | None = None

    @property
    def name(self) -> str:
        """Attention, cache and prefetch in words."""
        return " ".join(filter(None, (self.attention, self.cache, self.prefetch)))

    @property
    def key(self) -> tuple[str, int, int]:
        """What makes two cells comparable."""
        return self.name, self.context, self.batch


@dataclasses.dataclass(frozen=True)
class Figures:
    """A run of `sparda bench`.

    Attributes:
      run: Where and with what it ran.
      cells: In the order in which they ran.
    """

    run: dict[str, Any]
    cells: tuple[Cell, ...]

    def record(self) -> dict[str, Any]:
        """As it is written."""
        cells = [dataclasses.asdict(cell) for cell in self.cells]
        return {"schema": SCHEMA, "run": self.run, "cells": cells}


def read_figures(path: str) -> Figures:
    """Reads a file of figures.

    Raises:
      ConfigError: If there is none, or it is not of this schema.
      CheckpointError: If it cannot be read.
    """
    record = read_json(path)
    if record is None:
        raise ConfigError(f"{shown(path)}: no such file")
    if record.get("schema") != SCHEMA:
        raise ConfigError(
            f"{shown(path)} is not of schema {SCHEMA!r}: it says "
            f"{shown(record.get('schema'))}"
        )
    run, cells = record.get("run"), record.get("cells")
    if not isinstance(run, dict) or not isinstance(cells, list):
        raise ConfigError(f"{shown(path)} holds no run or no cells")
    return Figures(run, tuple(_cell(path, cell) for cell in cells))


_FIELDS = {field.name: field for field in dataclasses.fields(Cell)}


def _cell(path: str, record: Any) -> Cell:
    if not isinstance(record, dict) or record.keys() != _FIELDS.keys():
        raise ConfigError(f"{shown(path)}: {shown(record)} is no cell of {SCHEMA!r}")
    for name, value in record.items():
        kind = _FIELDS[name].type
        text, empty = kind is str, value is None
        allowed: tuple[type, ...] = (str,) if text else (int,)
        if "float" in str(kind):
            allowed = (int, float)
        fine = isinstance(value, allowed) and not isinstance(value, bool)
        # JSON's integers have no bound, and Python's JSON takes NaN.
        fine = fine and (isinstance(value, str) or abs(value) < _MOST)
        if not fine and not (empty and "None" in str(kind)):
            raise ConfigError(f"{shown(path)}: {name}={shown(value)} is not allowed")
    return Cell(**record)


def _number(value: float | None, form: str = ".1f", scale: float = 1.0) -> str:
    return "–" if value is None else format(value * scale, form)


def table(figures: Figures) -> str:
    """The cells as a table."""
    lines = [
        f"{'how':34} {'context':>8} {'batch':>5} {'first, ms':>10} {'ms/step':>8} "
        f"{'least … most':>17} {'tokens/s':>9} {'blocks':>7} {'missed':>7} "
        f"{'MB/step':>8} {'hidden':>7} {'limit':>6}"
    ]
    for cell in figures.cells:
        head = f"{cell.name:34} {cell.context:8} {cell.batch:5} "
        if cell.status != "measured":
            lines.append(f"{head}{cell.status}: {cell.reason}")
            continue
        least, most = _number(cell.token_ms_least), _number(cell.token_ms_most)
        lines.append(
            f"{head}{_number(cell.first_token_ms):>10} {_number(cell.token_ms):>8} "
            f"{f'{least} … {most}':>17} {_number(cell.tokens_per_second):>9} "
            f"{_number(cell.block_share, '.0%'):>7} "
            f"{_number(cell.miss_share, '.1%'):>7} "
            f"{_number(cell.link_bytes_per_step, '.2f', 1e-6):>8} "
            f"{_number(cell.hidden_share, '.0%'):>7} "
            f"{_number(cell.limit_share, '.0%'):>6}"
        )
    return "\n".join([*lines, *best_lines(figures)])


def best_lines(figures: Figures) -> list[str]:
    """Best against best: the most tokens/s of resident and of offloaded cells."""
    lines = []
    for context in sorted({cell.context for cell in figures.cells}):
        best: dict[str, Cell] = {}
        for cell in figures.cells:
            rate = cell.tokens_per_second
            if cell.context == context and rate is not None:
                held = best.get(cell.cache)
                if held is None or rate > (held.tokens_per_second or 0.0):
                    best[cell.cache] = cell
        if len(best) == 2:
            rates = [best[kind].tokens_per_second or 0.0 for kind in _KINDS]
            lines.append(
                f"{context} tokens, best against best: offload "
                f"{rates[1] / rates[0]:.2f}x ({best['offload'].name}, batch "
                f"{best['offload'].batch}, {rates[1]:.1f} tokens/s; "
                f"{best['resident'].name}, batch {best['resident'].batch}, "
                f"{rates[0]:.1f})"
            )
    return lines


_KINDS = ("resident", "offload")


def compare(first: Figures, second: Figures) -> str:
    """Cells of two runs side by side, as the second over the first.

    Raises:
      ConfigError: If they have no measured cell in common.
    """
    others = {cell.key: cell for cell in second.cells if cell.status == "measured"}
    lines = [
        f"{'how':34} {'context':>8} {'batch':>5} {'first token':>22} {'ms/step':>22}"
    ]
    for cell in first.cells:
        other = others.get(cell.key)
        if cell.status != "measured" or other is None:
            continue
        pairs = (
            _ratio(cell.first_token_ms, other.first_token_ms),
            _ratio(cell.token_ms, other.token_ms),
        )
        lines.append(
            f"{cell.name:34} {cell.context:8} {cell.batch:5} {pairs[0]:>22} "
            f"{pairs[1]:>22}"
        )
    if len(lines) == 1:
        raise ConfigError("--compare: the two files have no measured cell in common")
    differ = [
        f"note: {name} differs: {shown(first.run.get(name))}, {shown(value)}"
        for name, value in second.run.items()
        if name not in ("date", "rates") and first.run.get(name) != value
    ]
    return "\n".join([*lines, *differ])


def _ratio(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return "–"
    return f"{before:.1f} → {after:.1f} ({after / before:.2f}x)"


def plot(figures: Figures, path: pathlib.Path) -> None:
    """Tokens/s by batch and context, for light and for dark pages.

    Raises:
      ConfigError: If matplotlib is not installed.
    """
    from sparda_jax.evaluation import plots

    series: dict[str, list[plots.Point]] = {}
    contexts = {cell.context for cell in figures.cells}
    by_batch = len({cell.batch for cell in figures.cells}) > 1
    for cell in figures.cells:
        if cell.tokens_per_second is None:
            continue
        apart = cell.context if by_batch else cell.batch
        name = cell.name
        if len(contexts) > 1 and by_batch:
            name = f"{name}, {apart} tokens"
        x = float(cell.batch if by_batch else cell.context)
        points = series.setdefault(name, [])
        points.append(plots.Point(x, cell.tokens_per_second))
    plots.save(
        path,
        lambda figure: plots.lines(
            figure,
            series,
            xlabel="rows" if by_batch else "prompt tokens",
            ylabel="tokens/s",
            title=f"{figures.run['model']}, {figures.run['device']}",
            log_x=True,
        ),
    )
