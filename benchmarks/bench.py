"""`sparda bench`: time to first token, time a token, bytes and limits, by way to run.

Every cell is one request through `sj.generate`, with random prompt ids: real weights by
`--model`, random ones of a preset's shape by `--random`. With random weights the block
lists are those of no text: take `python -m benchmarks.trace` and `benchmarks.offload`
where the share of misses matters. Cells that cannot fit the memory limit are found by
the planner and said, not tried.
"""

import argparse
import dataclasses
import datetime
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from sparda_jax.checks import (
    FLOAT_DTYPES,
    Check,
    ConfigError,
    choice,
    file_to_write,
    integer,
    number,
    path,
    require,
)
from sparda_jax.cli.cache_options import add_codec_option, add_device_blocks_option
from sparda_jax.cli.console import note
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser, add_option
from sparda_jax.mesh import MeshConfig
from sparda_jax.sparse.selectors import selector_names

_EXAMPLES = """\
examples:
  sparda bench --model smollm2-135m --context 1024 4096
      dense, own query and forecast, resident and offloaded
  sparda bench --random minicpm4.1-8b --context 131072 --batch best --hbm 80 \\
      --device-blocks auto
      best against best: each way with as many rows as fit, and slots in what is left
  sparda bench serve --model smollm2-135m --concurrency 4
      requests against a server: sparda bench serve --help
  sparda bench --json a.json; sparda bench --compare a.json b.json
      two runs, cell by cell
"""


def _one_group(field: str, value: object) -> MeshConfig:
    mesh = MeshConfig.parse(field, value)
    require(mesh.data == 1, field, mesh.text, "data=1: a cell is planned for one group")
    return mesh


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = Parser(
        prog="sparda bench",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    add_option(
        source,
        "--model",
        path,
        metavar="M",
        help="preset name, GGUF file, safetensors directory or hub id (smollm2-135m)",
    )
    add_option(
        source, "--random", path, metavar="PRESET", help="random weights of this shape"
    )
    add_option(
        source,
        "--compare",
        path,
        metavar="A.json",
        help="compare two files of figures, this one and the argument behind it",
    )
    parser.add_argument("second", nargs="?", metavar="B.json", help="with --compare")
    add_option(
        parser, "--layers", integer(2), metavar="N", help="fewer layers (with --random)"
    )
    add_option(
        parser,
        "--forecast",
        path,
        metavar="F",
        help="Forecast weights (with --model): a file or 'from_query'",
    )
    add_option(
        parser,
        "--dtype",
        choice(*FLOAT_DTYPES),
        words=FLOAT_DTYPES,
        help="of weights and cache (float32 on a CPU, bfloat16 elsewhere)",
    )
    for name, default, words, help in (
        ("attention", "dense,infllm_v2,sparda", "A,…", "ways to choose blocks"),
        ("cache", "resident,offload", "C,…", "where KV lives"),
        ("context", "1024", "N,…", "prompt tokens of a row"),
        ("batch", "1", "B,…", "rows; 'best' is as many as fit"),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", default=default.split(","), metavar=words, help=help
        )
    add_device_blocks_option(parser)
    add_codec_option(parser)
    add_option(
        parser,
        "--new",
        integer(2),
        metavar="N",
        default=32,
        help="output tokens of a row",
    )
    add_option(
        parser, "--calls", integer(1), metavar="N", default=3, help="timed calls a cell"
    )
    size = number(above=0, most=2**30)
    add_option(
        parser,
        "--hbm",
        size,
        metavar="GiB",
        help="device memory to keep within (what the device says)",
    )
    add_option(
        parser,
        "--host",
        size,
        metavar="GiB",
        help="host memory for KV blocks (half of the machine's)",
    )
    add_option(
        parser,
        "--mesh",
        _one_group,
        metavar="model=N",
        help="share every layer over N devices (one device); memory is then of each",
    )
    add_option(
        parser,
        "--seed",
        integer(0, 2**32 - 1),
        metavar="N",
        default=0,
        help="of the prompts",
    )
    written = file_to_write
    add_option(parser, "--json", written, metavar="FILE", help="write the figures here")
    add_option(
        parser,
        "--plot",
        written,
        metavar="FILE.png",
        help="draw tokens/s (needs sparda-jax[eval])",
    )
    return parser


def _several(
    field: str,
    values: Sequence[str],
    check: Check[Any],
    words: tuple[str, ...] = (),
) -> list:
    """Each value of an option that takes several, checked."""
    found = []
    for value in values:
        if value in words:
            found.append(value)
            continue
        digits = value.isdecimal() and len(value) < 20
        try:
            found.append(check(field, int(value) if digits else value))
        except ConfigError as error:
            known = "".join(f" or {word!r}" for word in words)
            raise ConfigError(f"{error}{known}") from None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; also behind `sparda bench`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["serve"]:
        from benchmarks.load import main as serve

        return run_command(lambda: serve(argv[1:]), prefix="sparda: ")
    return run_command(lambda: _bench(argv), prefix="sparda: ")


def _bench(argv: Sequence[str] | None) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.compare is not None or arguments.second is not None:
        _compare(arguments)
        return
    attentions = _several("--attention", arguments.attention, choice(*selector_names()))
    caches = _several("--cache", arguments.cache, choice("resident", "offload"))
    contexts = _several("--context", arguments.context, integer(1))
    batches = _several("--batch", arguments.batch, integer(1), words=("best",))
    if arguments.layers is not None and arguments.random is None:
        raise ConfigError("--layers needs --random")
    if arguments.forecast is not None and arguments.random is not None:
        raise ConfigError(
            "--forecast is not allowed with --random: its heads are random"
        )
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    from sparda_jax.runtime import configure_offload

    configure_offload()
    _run(arguments, attentions, caches, contexts, batches)


def _compare(arguments: argparse.Namespace) -> None:
    from benchmarks.figures import compare, read_figures

    if arguments.compare is None or arguments.second is None:
        raise ConfigError("--compare needs two files: --compare A.json B.json")
    second = path("B.json", arguments.second)
    print(compare(read_figures(arguments.compare), read_figures(second)))


def _check_plot(file: str) -> None:
    from sparda_jax.evaluation import plots

    if pathlib.Path(file).suffix != ".png":
        raise ConfigError(f"--plot={file!r} is not allowed: it must end in .png")
    if not plots.available():
        raise ConfigError("--plot needs matplotlib: pip install 'sparda-jax[eval]'")


def language_model(arguments: argparse.Namespace):
    """The model, with Forecast heads."""
    import sparda_jax as sj
    from sparda_jax.engine.model import LanguageModel
    from sparda_jax.loading import default_dtype
    from sparda_jax.models.presets import get_preset
    from sparda_jax.models.sharding import random_on_mesh
    from sparda_jax.models.weights import random_decoder
    from sparda_jax.sparse.selectors import get_selector

    mesh = getattr(arguments, "mesh", None)
    if arguments.random is None:
        model = arguments.model or "smollm2-135m"
        return sj.load(
            model,
            attention="sparda",
            forecast=arguments.forecast,
            dtype=arguments.dtype,
            mesh=mesh,
        )
    preset = get_preset(arguments.random, "--random")
    shape = preset.shape(arguments.layers, 2**21)
    dtype = arguments.dtype or default_dtype()
    if mesh is None:
        model = random_decoder(shape, dtype, forecast=True)
    else:
        model = random_on_mesh(shape, mesh, dtype)
    return LanguageModel(
        model=model,
        config=shape,
        sparse=preset.sparse,
        selector=get_selector("sparda"),
        tokenizer=None,
        fingerprint=None,
        mesh=mesh,
    )


def _run(
    arguments: argparse.Namespace,
    attentions: list[str],
    caches: list[str],
    contexts: list[int],
    batches: list,
) -> None:
    import jax
    import numpy as np

    import sparda_jax as sj
    from benchmarks.cells import (
        Limits,
        largest_batch,
        measure,
        ways,
        with_hidden_shares,
    )
    from benchmarks.figures import Figures, plot, table
    from sparda_jax.checkpoint.atomic import write_json

    lm = language_model(arguments)
    note("bench: measuring this machine's rates (seconds)")
    dtype = str(lm.model.embedding[...].dtype)
    rates = sj.measure_rates(
        block_size=lm.sparse.block_size, head_dim=lm.config.head_dim, dtype=dtype
    ).rates
    hbm, host = _memory(arguments.hbm, arguments.host)
    limits = Limits(hbm, host, rates)
    rng = np.random.default_rng(arguments.seed)
    cells = []
    slots, codec = arguments.device_blocks, arguments.host_codec
    run = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "version": sj.__version__,
        "model": lm.config.name,
        "layers": lm.config.num_layers,
        "weights": "random" if arguments.random else "real",
        "dtype": dtype,
        "budget": lm.sparse.block_budget,
        "device_blocks": arguments.device_blocks or "a list's length",
        "host_codec": codec,
        "mesh": None if lm.mesh is None else lm.mesh.text,
        "hbm_gib": hbm,
        "host_gib": host,
        "rates": dataclasses.asdict(rates),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    figures = Figures(run, ())
    every = ways(attentions, caches, slots, codec)
    planned = len(contexts) * len(batches) * len(every)
    for context in contexts:
        for batch in batches:
            for way in every:
                rows = batch
                if batch == "best":
                    rows = max(
                        1, largest_batch(lm, way, limits, context, arguments.new)
                    )
                note(
                    f"bench: cell {len(cells) + 1} of {planned}: {way}, {context} "
                    f"tokens, batch {rows} (compiles, then {arguments.calls} calls)"
                )
                prompts = rng.integers(0, lm.config.vocab_size, (rows, context))
                cells.append(
                    measure(
                        lm,
                        way,
                        limits,
                        context=context,
                        batch=rows,
                        new=arguments.new,
                        calls=arguments.calls,
                        prompts=prompts,
                    )
                )
                jax.clear_caches()
                figures = Figures(run, tuple(with_hidden_shares(cells)))
                if arguments.json is not None:
                    write_json(arguments.json, figures.record())
    print(
        f"{run['model']}, {run['layers']} layers, {run['weights']} weights, {dtype}, "
        f"budget {run['budget']}, {run['device']}, "
        + (f"mesh {run['mesh']}, " if run["mesh"] else "")
        + f"JAX {run['jax']}, {run['date']}"
        + (f", slots {run['device_blocks']}" if "offload" in caches else "")
        + (f", blocks in {codec}" if codec != "exact" and "offload" in caches else "")
    )
    print(table(figures))
    if arguments.plot is not None:
        plot(figures, pathlib.Path(arguments.plot))


def _memory(hbm: float | None, host: float | None) -> tuple[float, float]:
    """GiB of the device and of the host that a request may take."""
    import jax

    from sparda_jax.machine import physical_memory

    found = physical_memory()
    machine = 8.0 if found is None else found.size / 2**30
    stats = jax.devices()[0].memory_stats() or {}
    device = stats.get("bytes_limit")
    return (
        hbm or (machine / 2 if device is None else device / 2**30),
        host or machine / 2,
    )


if __name__ == "__main__":
    raise SystemExit(main())
