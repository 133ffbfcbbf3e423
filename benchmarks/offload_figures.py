"""Rows of figures of `benchmarks.offload`, and what they say together."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparda_jax.cache.settings import LayerSettings
    from sparda_jax.config import CacheConfig
    from sparda_jax.planning.rates import Rates

# Steps of a timed chunk.
CHUNK = 8
HEAD = (
    f"{'mode':16} {'batch':>5} {'slots':>5} {'step, ms':>9} {'least':>7} {'most':>7} "
    f"{'tokens/s':>9} {'fetched, MB':>11} {'of lists':>8} {'bound, ms':>9} "
    f"{'reached':>7} {'compile, s':>10}"
)


def row_of(
    mode: str,
    way: "tuple[CacheConfig, LayerSettings]",
    rounds: Sequence[Sequence[float]],
    fetched: float,
    capacity: int,
    rates: "Rates",
    arguments: argparse.Namespace,
    batch: int,
) -> dict[str, Any]:
    """The figures of one mode.

    Args:
      mode: Its name.
      way: Its cache and how its layers run.
      rounds: Seconds a step of every timed chunk, by round.
      fetched: Blocks a step.
      capacity: Tokens of room in a row.
      rates: The machine.
      arguments: The command's.
      batch: Rows.
    """
    import jax.numpy as jnp

    from sparda_jax.planning.step import step_time

    cache, settings = way
    config, sparse, offload = settings.config, settings.sparse, settings.offload
    block_bytes = stored = sparse.block_size * 2 * config.head_dim * 2
    if offload is not None:
        shape = (sparse.block_size, 2, config.head_dim)
        stored = offload.codec.bytes_per_block(shape, jnp.bfloat16)
    listed = batch * config.num_kv_heads * config.num_layers * sparse.largest_budget
    seconds = [taken for one in rounds for taken in one]
    median = statistics.median(seconds)
    bound = step_time(
        settings,
        cache,
        rates,
        batch=batch,
        capacity=capacity,
        context=arguments.context,
        dtype=jnp.bfloat16,
        miss=fetched / listed,
    )
    return {
        "mode": mode,
        "batch": batch,
        "step_ms": median * 1e3,
        "least_ms": min(seconds) * 1e3,
        "most_ms": max(seconds) * 1e3,
        "rounds_ms": [statistics.median(one) * 1e3 for one in rounds],
        "tokens_per_second": batch / median,
        "steps": len(seconds) * CHUNK,
        "fetched_mb": fetched * stored / 1e6,
        "fetched_share": fetched / listed,
        "attended_gb": listed * block_bytes / 1e9,
        "bound_ms": bound.bound * 1e3,
        "bound_by": bound.bound_by,
        "bound_share": bound.bound / median,
        "planned_ms": bound.seconds * 1e3,
    }


def line(row: Mapping[str, Any]) -> str:
    """A row below `HEAD`; its rounds stand behind it."""
    rounds = row["rounds_ms"]
    shown = " ".join(f"{one:.2f}" for one in rounds)
    more = f"  rounds {shown}" if rounds[1:] else ""
    return (
        f"{row['mode']:16} {row['batch']:5} {row['slots'] or '':>5} "
        f"{row['step_ms']:9.2f} {row['least_ms']:7.2f} {row['most_ms']:7.2f} "
        f"{row['tokens_per_second']:9.1f} {row['fetched_mb']:11.1f} "
        f"{row['fetched_share']:8.3f} {row['bound_ms']:9.2f} "
        f"{row['bound_share']:7.0%} {row['compile_s']:10.1f}{more}"
    )


def hidden(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What offload adds where each layer waits, and what looking ahead hides of it.

    Of rows of one batch, against the resident cache whose blocks a Forecast chooses; by
    medians, and by the shortest chunks, which other work on the host lengthens least.
    """
    modes = {row["mode"]: row for row in rows if row["slots"] is None}
    resident = modes.get("resident-sparda")
    if resident is None:
        return []
    lines = []
    for slots in dict.fromkeys(row["slots"] for row in rows if row["slots"]):
        of = {row["mode"]: row for row in rows if row["slots"] == slots}
        waiting = of.get("sparda-none")
        if waiting is None:
            continue
        for mode, row in of.items():
            if not mode.startswith("sparda") or row is waiting:
                continue
            said = []
            for key in ("step_ms", "least_ms"):
                added = waiting[key] - resident[key]
                gone = waiting[key] - row[key]
                share = f"{gone / added:.0%}" if added > 0 else "nothing"
                said.append(f"{share} of {added:.2f} ms")
            lines.append(
                f"batch {row['batch']}, slots {slots}, {mode} hides {said[0]} that "
                f"offload adds (by the shortest chunks {said[1]})"
            )
    return lines
