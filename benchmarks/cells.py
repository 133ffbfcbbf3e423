"""Runs one request in one way, through the public calls, and says what it cost."""

import dataclasses
import statistics
from typing import Literal, cast

import jax
import numpy as np

import sparda_jax as sj
from benchmarks.figures import Cell
from sparda_jax.checks import ConfigError
from sparda_jax.config import HostCodec
from sparda_jax.engine.model import LanguageModel
from sparda_jax.planning.plan import Option, Plan
from sparda_jax.sparse.selectors import get_selector

_Times = list[tuple[float, float, float]]


@dataclasses.dataclass(frozen=True)
class Way:
    """How to run: an attention, where the KV lives, and when blocks are fetched.

    Attributes:
      attention: A selector's name.
      cache: "resident" or "offload".
      prefetch: "lookahead", "none", or "" for a resident cache.
      slots: Of an offloaded cache, as `CacheConfig.device_blocks`.
      codec: Of an offloaded cache, as `CacheConfig.codec`.
    """

    attention: str
    cache: str
    prefetch: str = ""
    slots: int | Literal["auto"] | None = None
    codec: HostCodec = "exact"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.attention, self.cache, self.prefetch)))

    def config(self, limits: "Limits") -> sj.CacheConfig:
        """The cache's configuration; slots that fill the device fill the limit."""
        if self.cache == "resident":
            return sj.CacheConfig()
        return sj.CacheConfig(
            kind="offload",
            prefetch="lookahead" if self.prefetch == "lookahead" else "none",
            device_blocks=self.slots,
            codec=self.codec,
            device_limit=int(limits.hbm_gib * 2**30),
            host_limit=int(limits.host_gib * 2**30),
        )


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a cell must fit in, and the machine that its bound is made with.

    Attributes:
      hbm_gib, host_gib: Device and host memory.
      rates: The machine's.
    """

    hbm_gib: float
    host_gib: float
    rates: sj.Rates


def ways(
    attentions: list[str],
    caches: list[str],
    slots: int | Literal["auto"] | None = None,
    codec: HostCodec = "exact",
) -> list[Way]:
    """All ways to run; an attention that forecasts is offloaded in both."""
    found = []
    for attention in attentions:
        if "resident" in caches:
            found.append(Way(attention, "resident"))
        if "offload" in caches:
            if get_selector(attention).looks_ahead:
                found.append(Way(attention, "offload", "lookahead", slots, codec))
            found.append(Way(attention, "offload", "none", slots, codec))
    return found


def planned(
    lm: LanguageModel,
    way: Way,
    limits: Limits,
    context: int,
    batch: int,
    new: int,
    miss: float = 0.1,
) -> Plan:
    """The plan of a cell's request."""
    return sj.plan(
        lm.config,
        context=context + new,
        hbm_gib=limits.hbm_gib,
        host_gib=limits.host_gib,
        rates=limits.rates,
        batch=batch,
        attention=way.attention,
        sparse=lm.sparse,
        cache=way.config(limits),
        miss=miss,
        dtype=str(lm.model.embedding[...].dtype),
        max_new_tokens=new,
        prefill_chunk=None,
        mesh=lm.mesh,
    )


def option_of(plan: Plan, way: Way) -> Option:
    """The plan's option for a way."""
    return plan.resident if way.cache == "resident" else plan.offload


def largest_batch(
    lm: LanguageModel, way: Way, limits: Limits, context: int, new: int
) -> int:
    """The largest batch that fits; 0 if not even one row does."""
    plan = planned(lm, way, limits, context, 1, new)
    best = plan.resident_best if way.cache == "resident" else plan.offload_best
    return 0 if best is None else best.batch


def measure(
    lm: LanguageModel,
    way: Way,
    limits: Limits,
    *,
    context: int,
    batch: int,
    new: int,
    calls: int,
    prompts: np.ndarray,
) -> Cell:
    """Measures a cell, unless it cannot fit or is refused.

    Args:
      lm: The model; its attention and cache do not matter.
      way: How to run.
      limits: What it must fit in.
      context, batch, new: Prompt tokens a row, rows, output tokens a row.
      calls: Timed calls, after one that compiles.
      prompts: int [rows, tokens] of at least that many.
    """
    cell = Cell(way.attention, way.cache, way.prefetch, context, batch, "measured")
    option = option_of(planned(lm, way, limits, context, batch, new), way)
    cell = dataclasses.replace(
        cell,
        planned_device_bytes=option.memory.device,
        host_bytes=option.memory.host,
    )
    if not option.fits:
        need = f"{option.memory.device / 2**30:.2f} GiB on the device"
        host = f"{option.memory.host / 2**30:.2f} GiB of host memory"
        return dataclasses.replace(
            cell, status="does not fit", reason=f"it needs {need}, {host}"
        )
    chosen = sj.with_attention(lm, way.attention, cache=way.config(limits))
    rows = prompts[:batch, :context]
    try:
        stats = [
            sj.generate(chosen, rows, max_new_tokens=new, ignore_eos=True).stats
            for _ in range(calls + 1)
        ][1:]
    except ConfigError as error:
        return dataclasses.replace(cell, status="refused", reason=str(error))
    return _with_figures(cell, lm, way, limits, stats, new)


def _with_figures(
    cell: Cell,
    lm: LanguageModel,
    way: Way,
    limits: Limits,
    stats: list[sj.GenerateStats],
    new: int,
) -> Cell:
    steps = new - 1
    first = [s.prefill_seconds or 0.0 for s in stats]
    step = [(s.decode_seconds or 0.0) / steps for s in stats]
    median = statistics.median(step)
    offload, miss = stats[-1].offload, 0.0
    if offload is not None and offload.hit_rate is not None:
        miss = 1 - offload.hit_rate
    plan = planned(lm, way, limits, cell.context, cell.batch, new, miss)
    limit = option_of(plan, way).step.bound
    memory = jax.devices()[0].memory_stats() or {}
    return dataclasses.replace(
        cell,
        reason=stats[-1].policy,
        first_token_ms=statistics.median(first) * 1e3,
        prefill_tokens_per_second=stats[-1].prompt_tokens / statistics.median(first),
        token_ms=median * 1e3,
        token_ms_least=min(step) * 1e3,
        token_ms_most=max(step) * 1e3,
        tokens_per_second=cell.batch / median,
        steps=steps,
        calls=len(stats),
        block_share=stats[-1].decode_block_share,
        miss_share=None if offload is None else miss,
        link_bytes_per_step=None if offload is None else offload.fetched_bytes / steps,
        limit_ms=limit * 1e3,
        limit_share=share_of_limit(limit, median),
        peak_device_bytes=memory.get("peak_bytes_in_use"),
    )


def share_of_limit(limit: float, seconds: float) -> float | None:
    """How much of the possible speed was reached; None if the limit was passed.

    Then the machine's rates were measured too low (a busy or small machine), and the
    limit is none.
    """
    return limit / seconds if limit <= seconds else None


def _hidden_share(ahead: Cell, waits: Cell, none: Cell) -> float | None:
    """How much of the waiting look-ahead saves; None where nothing waits.

    Something waits if every step on demand was longer than every resident one.
    """
    times = [
        (cell.token_ms, cell.token_ms_least, cell.token_ms_most)
        for cell in (ahead, waits, none)
    ]
    if any(value is None for cell in times for value in cell):
        return None
    (step, _, _), (longest, least, _), (shortest, _, most) = cast(_Times, times)
    return (longest - step) / (longest - shortest) if least > most else None


def with_hidden_shares(cells: list[Cell]) -> list[Cell]:
    """Fills in how much of the waiting look-ahead hides, where all three cells ran."""
    by_key = {cell.key: cell for cell in cells}
    found = []
    for cell in cells:
        if cell.prefetch == "lookahead":
            beside = (cell.context, cell.batch)
            waits = by_key.get((f"{cell.attention} offload none", *beside))
            none = by_key.get((f"{cell.attention} resident", *beside))
            if waits is not None and none is not None:
                share = _hidden_share(cell, waits, none)
                cell = dataclasses.replace(cell, hidden_share=share)
        found.append(cell)
    return found
