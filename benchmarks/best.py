"""The best resident batch against the best offloaded one, in one run on one device.

    python -m benchmarks.best --context 131072 --minutes 8 --json best.json
    python -m benchmarks.best --plot best.png best.json [later.json ...]

Batches are as large as fit: the resident one by the device's memory, the offloaded ones
by host memory and, with `device_blocks="auto"`, by what is left of the device's for
slots. Of those that fit, the ones are run for which the plan's step time (bandwidths
measured in the same run, misses of the trace's curve at that number of slots) promises
most; what was planned stands beside what was measured. Then come smaller batches, for
the curve. Cells are run in rounds, of a round the largest host store first, until the
minutes are over, and the file is written after each.

Lists are a real model's (`benchmarks.traced`), weights and KV bytes arbitrary, and
nothing is prefilled: memory for it is left free as if it were. Cells:

  resident     own queries choose, all KV on the device
  own query    offloaded, own queries choose, each layer waits
  sparda       offloaded, Forecast, one layer ahead
  sparda int8  the same with host blocks in 8 bits
  sparda int8 keys  the same with key means in 8 bits as well
  sparda int8 slots  the same with device slots in 8 bits as well
  own query int8 slots  the same slots, own queries choose, each layer waits
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import offload
from benchmarks.parsers import benchmark_parser
from benchmarks.traced import DEFAULT_TRACE
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checkpoint.files import read_json
from sparda_jax.checks import ConfigError, integer, number
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option, add_option

if TYPE_CHECKING:
    from sparda_jax.config import HostCodec, ModelConfig, SparseConfig
    from sparda_jax.planning.misses import MissCurve
    from sparda_jax.planning.rates import Rates

_NEW, _PIECE = 256, 8192
# Tokens/s that the reference published at 128k on an H100, with their batches.
PUBLISHED = {"published baseline": (4, 189.5), "published SparDA": (64, 1000.0)}
_NAMES: Mapping[tuple[str, "HostCodec", str], str] = {
    ("resident", "exact", "exact"): "resident",
    ("sparse", "exact", "exact"): "own query",
    ("sparda", "exact", "exact"): "sparda",
    ("sparda", "int8", "exact"): "sparda int8",
    ("sparda", "int8", "int8"): "sparda int8 keys",
    ("sparda", "int8_slots", "int8"): "sparda int8 slots",
    ("sparse", "int8_slots", "int8"): "own query int8 slots",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A batch in one way.

    Attributes:
      mode: As `benchmarks.offload` names it.
      codec: Of host blocks.
      keys: Of key means.
      batch: Rows.
      slots: C; 0 for a resident cache.
      planned_ms: The step time by the plan.
      host_gib: Of the host store.
      layer0: Where layer 0's KV lives.
    """

    mode: str
    codec: "HostCodec"
    keys: str
    batch: int
    slots: int
    planned_ms: float
    host_gib: float
    layer0: str = "resident"

    @property
    def name(self) -> str:
        """Of its curve."""
        return _NAMES[self.mode, self.codec, self.keys]

    @property
    def promise(self) -> float:
        """Tokens a second by the plan."""
        return self.batch / self.planned_ms * 1e3


def _with_keys(sparse: "SparseConfig", keys: str) -> "SparseConfig":
    return dataclasses.replace(
        sparse, compressed_keys="int8" if keys == "int8" else "exact"
    )


@dataclasses.dataclass(frozen=True)
class Planner:
    """What fits, and what it promises.

    Attributes:
      config, sparse: The model.
      context: Tokens of every row, output included.
      rates: The machine, measured.
      misses: Of the trace.
      layer0: Where layer 0's KV lives, as `CacheConfig` has it.
    """

    config: "ModelConfig"
    sparse: "SparseConfig"
    context: int
    rates: "Rates"
    misses: "MissCurve"
    layer0: Literal["auto", "resident", "offload"] = "auto"

    def cell(self, mode: str, codec: "HostCodec", keys: str, batch: int) -> Cell | None:
        """The cell with as many slots as fit; None if the batch does not."""
        from sparda_jax.cache.settings import LayerSettings
        from sparda_jax.config import CacheConfig
        from sparda_jax.inference.shapes import plan_shapes, tile_tokens
        from sparda_jax.planning.auto import offload_settings
        from sparda_jax.planning.limits import memory_limits, shortfall
        from sparda_jax.planning.slots import fill_slots
        from sparda_jax.planning.step import step_time
        from sparda_jax.sparse.selectors import get_selector

        resident = mode == "resident"
        selector = get_selector("sparda" if mode == "sparda" else "infllm_v2")
        cache = CacheConfig(
            kind="resident" if resident else "offload",
            device_blocks=None if resident else "auto",
            layer0=self.layer0,
            codec=codec,
        )
        how = LayerSettings(
            self.config,
            _with_keys(self.sparse, keys),
            selector,
            offload=offload_settings(cache, selector),
        )
        limits = memory_limits(cache)
        device = None if limits.device is None else limits.device.size
        prompt = self.context - _NEW
        shapes = plan_shapes(
            min(prompt, _PIECE),
            farthest_start=(prompt - 1) // _PIECE * _PIECE,
            longest=prompt,
            max_new=_NEW,
            tile_size=tile_tokens("gpu", device),
            block_size=self.sparse.block_size,
            batch=batch,
        )
        filled, memory = fill_slots(
            how,
            cache,
            limits,
            batch=batch,
            shapes=shapes,
            dtype="bfloat16",
            storage="per_layer",
            forecast=True,
        )
        if shortfall(memory, limits) is not None:
            return None
        room = shapes.capacity // self.sparse.block_size
        slots = 0 if resident else filled.slots(room, 1)
        step = step_time(
            how,
            filled,
            self.rates,
            batch=batch,
            capacity=shapes.capacity,
            context=self.context,
            dtype="bfloat16",
            miss=0.0 if resident else self.misses.share(slots, self.sparse),
        )
        planned_ms, host = step.seconds * 1e3, memory.host / 2**30
        where = "resident" if resident else filled.layer0
        return Cell(mode, codec, keys, batch, slots, planned_ms, host, where)

    def best(self, mode: str, codec: "HostCodec", keys: str, most: int) -> list[Cell]:
        """Cells of a way: what promises most, then smaller batches.

        Batches beyond 16 go in steps of 4: a batch is worth no more care.
        """
        from sparda_jax.planning.limits import largest_batch

        of = functools.cache(functools.partial(self.cell, mode, codec, keys))
        top = min(largest_batch(lambda batch: of(batch) is not None), most)
        sizes = {size for size in range(4, top + 1, 4)} | {1, 2, top}
        cells = [cell for size in sizes if size and (cell := of(size)) is not None]
        if not cells:
            return []
        first = max(cells, key=lambda cell: cell.promise)
        rest = [first.batch // part for part in (2, 4)]
        smaller = [cell for size in rest if size and (cell := of(size)) is not None]
        return [first, *smaller]


def cells_by_worth(
    planner: Planner, most: int, ways: Iterable[str] = tuple(_NAMES.values())
) -> Iterator[Cell]:
    """First the best of every way, then smaller batches.

    Of each round the resident one comes first, which is what all others are compared
    with, then the largest host store: pinned memory is not given back, and a store fits
    in what one before it took, but not beside it.
    """
    found = [
        planner.best(mode, codec, keys, most)
        for (mode, codec, keys), name in _NAMES.items()
        if name in set(ways)
    ]
    for place in range(max(map(len, found), default=0)):
        round_ = [way[place] for way in found if place < len(way)]
        yield from sorted(
            round_, key=lambda cell: (cell.slots > 0, -cell.host_gib, -cell.promise)
        )


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows say, in lines."""
    lines = [
        f"{'way':20} {'batch':>5} {'C':>5} {'step, ms':>9} {'tokens/s':>9} "
        f"{'planned':>8} {'of plan':>7} {'missed':>7} {'host, GiB':>9}"
    ]
    lines += [
        f"{row['name']:20} {row['batch']:5} {row['c'] or '':>5} {row['step_ms']:9.2f} "
        f"{row['tokens_per_second']:9.1f} {row['planned_ms']:8.2f} "
        f"{row['planned_ms'] / row['step_ms']:7.0%} {row['fetched_share']:7.3f} "
        f"{row['host_gib']:9.1f}"
        for row in rows
    ]

    def best(resident: bool) -> dict[str, Any] | None:
        found = [row for row in rows if (row["name"] == "resident") == resident]
        return max(found, key=lambda row: row["tokens_per_second"], default=None)

    mine, other = best(False), best(True)
    if mine is not None and other is not None:
        ratio = mine["tokens_per_second"] / other["tokens_per_second"]
        planned = mine["batch"] / mine["planned_ms"]
        planned /= other["batch"] / other["planned_ms"]
        lines.append(
            f"best against best: {mine['name']}, batch {mine['batch']}, "
            f"{mine['tokens_per_second']:.0f} tokens/s against resident, batch "
            f"{other['batch']}, {other['tokens_per_second']:.0f}: {ratio:.2f}x (the "
            f"plan: {planned:.2f}x)"
        )
    return lines


def draw(figures: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws tokens/s against batch, with the reference's published points.

    Raises:
      ConfigError: If matplotlib is not installed.
    """
    from sparda_jax.evaluation import plots

    series: dict[str, list[plots.Point]] = {}
    for row in figures["rows"]:
        point = plots.Point(
            row["batch"],
            row["tokens_per_second"],
            row["batch"] / row["most_ms"] * 1e3,
            row["batch"] / row["least_ms"] * 1e3,
        )
        series.setdefault(row["name"], []).append(point)
    if figures["context"] == 131072:
        for name, (batch, speed) in PUBLISHED.items():
            series[name] = [plots.Point(batch, speed)]
    plots.save(
        path,
        lambda figure: plots.lines(
            figure,
            series,
            xlabel="batch",
            ylabel="tokens/s",
            title=f"{figures['model']}, {figures['context']:,} tokens, one "
            f"{figures['device']}",
        ),
    )


def _measured(arguments: argparse.Namespace) -> None:
    """Runs the cells until the time is over."""
    from sparda_jax.runtime import configure_offload

    configure_offload()
    # JAX's default is three quarters, which says nothing of what a card can hold.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    import jax

    from sparda_jax.models.presets import get_preset
    from sparda_jax.models.weights import random_decoder
    from sparda_jax.planning.measure import measure_rates
    from sparda_jax.planning.misses import curve_of
    from sparda_jax.planning.traces import read_trace

    begun = time.perf_counter()
    preset, trace = get_preset(arguments.model), read_trace(arguments.trace)
    config = preset.shape(arguments.layers, 2 * arguments.context)
    rates = measure_rates(route=arguments.route).rates
    model = random_decoder(config, "bfloat16", forecast=True)
    planner = Planner(
        config,
        preset.sparse,
        arguments.context,
        rates,
        curve_of(trace),
        arguments.layer0,
    )
    rows: list[dict[str, Any]] = []
    figures = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": arguments.model,
        "layers": config.num_layers,
        "context": arguments.context,
        "trace": arguments.trace.name,
        "rates": dataclasses.asdict(rates),
        "rows": rows,
        "not_run": [],
    }
    cells = list(cells_by_worth(planner, arguments.most, arguments.ways))
    longest = pinned = 0.0
    while cells:
        spent = time.perf_counter() - begun
        if spent + longest > 60 * arguments.minutes:
            break
        cell = cells.pop(0)
        print(f"{spent:4.0f} s: {cell}", flush=True)
        row = _run_cell(model, preset.sparse, cell, arguments, rates, trace)
        if cell.host_gib <= pinned or not cell.slots:
            # Pinning takes minutes, and what is pinned serves the cells behind it.
            longest = max(longest, time.perf_counter() - begun - spent)
        pinned = max(pinned, cell.host_gib)
        less = cell.batch - 1 - cell.batch // 16
        if row is not None:
            rows.append(row)
        elif less and (smaller := planner.cell(cell.mode, cell.codec, cell.keys, less)):
            cells.insert(0, smaller)  # more was planned than there was room for
        figures["not_run"] = [dataclasses.asdict(rest) for rest in cells]
        if row is not None:
            print(summary([row])[1], flush=True)
            if arguments.json is not None:
                write_json(arguments.json, figures)
    if not rows:
        raise SystemExit("nothing was measured")
    print("\n".join(summary(rows)))
    if arguments.json is not None:
        write_json(arguments.json, figures)


def _run_cell(
    model, sparse, cell: Cell, arguments, rates, trace
) -> dict[str, Any] | None:
    """One cell's figures; None if it failed, which must not hide the others."""
    sparse = _with_keys(sparse, cell.keys)
    how = argparse.Namespace(
        **{
            **vars(arguments),
            "codec": cell.codec,
            "layer0": cell.layer0,
            "miss": None,
            "profile": None,
            "rounds": 1,
            "gather_programs": [None],
        },
        slots=[cell.slots / sparse.largest_budget],
    )
    try:
        (row,) = offload.measure_batch(
            model, sparse, cell.batch, [cell.mode], how, rates, trace
        )
    except ConfigError:
        raise
    except Exception as error:  # device memory, mostly
        print(f"failed: {error!r}"[:300], flush=True)
        return None
    return {
        **row,
        "name": cell.name,
        "codec": cell.codec,
        "c": cell.slots,
        "layer0": cell.layer0,
        "planned_ms": cell.planned_ms,
        "host_gib": cell.host_gib,
    }


def _run(arguments: argparse.Namespace) -> None:
    if arguments.plot is None:
        if arguments.figures:
            raise ConfigError(
                f"figures={str(arguments.figures[0])!r} is not allowed without --plot: "
                "there is nothing to draw it to"
            )
        _measured(arguments)
        return
    if not arguments.figures:
        raise ConfigError("--plot needs the file of an earlier run's --json")
    runs = [_figures_of(path) for path in arguments.figures]
    for run in runs:
        print("\n".join(summary(run["rows"])))
    draw(of_all(runs), arguments.plot)


def _figures_of(path: pathlib.Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or not found.get("rows"):
        raise ConfigError(
            f"figures={str(path)!r} is not allowed: it must be a file that --json wrote"
        )
    return found


def of_all(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of several runs as one; a later run's cell is in an earlier one's place.

    Raises:
      ConfigError: If they are not of one device, model and context.
    """
    cells: dict[tuple[str, int], Any] = {}
    for run in runs:
        for name in ("device", "model", "context"):
            if run[name] != runs[0][name]:
                raise ConfigError(
                    f"figures of {name} {run[name]!r} are not allowed beside those of "
                    f"{runs[0][name]!r}: a plot is of one {name}"
                )
        cells |= {(row["name"], row["batch"]): row for row in run["rows"]}
    return {**runs[0], "rows": list(cells.values())}


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("best", __doc__)
    parser.add_argument("figures", nargs="*", type=pathlib.Path, help="for --plot")
    add_file_option(parser, "--plot", help="a PNG to draw instead")
    parser.add_argument("--model", default="minicpm4.1-8b", help="preset")
    for name, check, metavar, default, text in (
        ("--context", integer(1), "N", 131072, "tokens of a row"),
        ("--layers", integer(1), "L", None, "fewer layers than the preset has"),
        ("--most", integer(1), "B", 96, "largest batch to look at"),
        ("--minutes", number(above=0), "M", math.inf, "begin no cell after them"),
    ):
        add_option(parser, name, check, metavar=metavar, default=default, help=text)
    names = tuple(_NAMES.values())
    parser.add_argument("--ways", nargs="+", default=names, choices=names)
    parser.add_argument(
        "--layer0", default="auto", choices=["auto", "resident", "offload"]
    )
    offload.add_steps_option(parser)
    parser.add_argument("--route", default="auto")
    parser.add_argument("--trace", type=pathlib.Path, default=DEFAULT_TRACE)
    add_file_option(parser, help="write figures here")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark, or draws what it found."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
