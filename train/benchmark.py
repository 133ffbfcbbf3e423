"""`python -m train.benchmark`: a training step against a plain dense forward pass.

Both run the same layers on the same tokens in the same process. The forward pass is
causal attention without selection, without the head; the step makes the teacher, the
loss, all gradients and the optimizer's update as well. On a GPU the forward pass
attends by cuDNN, and the step by the kernels that are recorded for the device, or
named.

    python -m train.benchmark --model minicpm4.1-8b --seq-len 32768 --layers 4 \
        --implementation mosaic_gpu --run-length 64 --out result.json

Every phase is reported as it ends, on stderr, and what is known so far is written to
`--out`: a run that is cut off still tells something.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.block_sparse_attention import api as attention_op
from pallas_kernels.dispatch import candidates
from sparda_jax.checks import integer
from sparda_jax.cli.options import HelpFormatter, Parser, add_file_option, add_option
from sparda_jax.config import ModelConfig
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.presets import get_preset
from sparda_jax.models.spec import layer_shapes
from sparda_jax.models.weights import random_decoder
from train.backbone import Batch, LayerView, Settings, attend, run_backbone
from train.command import run_command
from train.config import PUBLISHED_LOSS, LossConfig, OptimizerConfig
from train.init import initial_heads
from train.metrics import keep_json
from train.optimizer import initial_state, make_optimizer
from train.sharding import make_mesh
from train.step import make_step
from train.tiles import Documents

LOSSES = {
    "reference": LossConfig(mask_short_rows=True),
    "published": PUBLISHED_LOSS,
}


class Report:
    """What is known so far: shown on stderr and kept in a file."""

    def __init__(self, out: pathlib.Path | None):
        """Opens a report; `out` may be None."""
        self.values: dict[str, Any] = {}
        self._out, self._begin = out, time.perf_counter()

    def add(self, phase: str, **values: Any) -> None:
        """Ends a phase."""
        self.values.update(values)
        seconds = time.perf_counter() - self._begin
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        print(f"[{seconds:7.1f} s] {phase} {shown}", file=sys.stderr, flush=True)
        keep_json(self._out, self.values)


def _compiled(report: Report, name: str, jitted: Any, *args: Any) -> Callable:
    """Compiles ahead of time; tells the time that took and the memory of a run."""
    begin = time.perf_counter()
    lowered = jitted.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    report.add(
        f"{name} compiled:",
        **{
            f"{name}_trace_s": round(traced - begin, 2),
            f"{name}_compile_s": round(time.perf_counter() - traced, 2),
            f"{name}_arguments_gb": round(memory.argument_size_in_bytes / 1e9, 3),
            f"{name}_temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 3),
        },
    )
    return compiled


def _timed(
    report: Report, name: str, run: Callable[[], object], repeats: int, flops: float
) -> float:
    """Median seconds of `repeats` runs after one more."""
    times = []
    for number in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
        if number == 0:
            report.add(f"{name} ran once:", **{f"{name}_first_s": round(times[0], 4)})
    median = statistics.median(times[1:])
    report.add(
        f"{name} timed:",
        **{
            f"{name}_s": round(median, 4),
            f"{name}_least_s": round(min(times[1:]), 4),
            f"{name}_most_s": round(max(times[1:]), 4),
        },
        **({f"{name}_tflops": round(flops / median / 1e12, 1)} if flops else {}),
    )
    return median


def dense_flops(config: ModelConfig, batch: int, tokens: int) -> float:
    """Of the forward pass: products with weights, and causal attention."""
    queries = config.num_heads * config.head_dim
    shapes = layer_shapes(config).values()
    weights = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    attention = 2 * queries * tokens  # scores and values, half of the square
    return 2.0 * batch * tokens * config.num_layers * (weights + attention)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m train.benchmark", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="preset, random weights"
    )
    for name, default, about in (
        ("--seq-len", 4096, "tokens of a row"),
        ("--batch", 1, "rows"),
        ("--layers", None, "fewer layers than the preset's"),
        ("--repeats", 3, "timed calls"),
    ):
        add_option(parser, name, integer(1), metavar="N", default=default, help=about)
    parser.add_argument("--attention", choices=("blocks", "masked"), default="blocks")
    parser.add_argument("--implementation", choices=("mosaic_gpu", "triton", "xla"))
    parser.add_argument(
        "--dense",
        choices=("cudnn", "own"),
        help="attention of the forward pass; cudnn on a GPU",
    )
    parser.add_argument(
        "--teacher",
        choices=("kernel", "tiles"),
        default="kernel",
        help="kernel: where there is one for the device",
    )
    parser.add_argument(
        "--loss",
        choices=tuple(LOSSES),
        default="reference",
        help="the reference's, or that of the published weights",
    )
    parser.add_argument(
        "--run-length",
        type=int,
        default=1,
        help="every token is repeated so often, so that neighbours choose alike, as in "
        "text; with 1 every token of these random weights chooses for itself",
    )
    add_file_option(parser, "--out", help="JSON file, kept up to date")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; prints one JSON object."""
    options = _arguments(arguments)
    preset = get_preset(options.model)
    config = preset.model
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    cpu = jax.default_backend() == "cpu"
    dense_by = options.dense or ("own" if cpu else "cudnn")
    settings = Settings(
        config,
        preset.sparse,
        LOSSES[options.loss],
        options.implementation,
        masked_attention=options.attention == "masked",
        whole_rows=options.teacher == "kernel",
    )
    count = options.batch * options.seq_len
    report = Report(options.out)
    report.add(
        "started:",
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        model=options.model,
        layers=config.num_layers,
        seq_len=options.seq_len,
        tokens=count,
        run_length=options.run_length,
        loss=options.loss,
        attention=options.attention,
        dense=dense_by,
        implementation=options.implementation,
        attention_kernels=candidates(attention_op.OP, options.implementation),
        teacher_kernels=settings.teacher_kernels or "tiles",
    )
    dtype = jnp.float32 if cpu else jnp.bfloat16
    model = random_decoder(config, jnp.dtype(dtype), storage="stacked")
    heads = initial_heads(model, "from_query", 0)
    jax.block_until_ready((jax.tree.leaves(model), heads))
    report.add("weights made", dtype=str(jnp.dtype(dtype)))

    shape = (1, options.batch, -(-options.seq_len // options.run_length))
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    tokens = jnp.repeat(tokens, options.run_length, axis=-1)[..., : options.seq_len]
    rows = Documents.whole_rows(options.batch, options.seq_len)
    batch = Batch(tokens, Documents(rows.start[None], rows.end[None]))
    plain = dataclasses.replace(settings, masked_attention=False)

    def all_blocks(view: LayerView) -> tuple[Array, tuple[()]]:
        if dense_by == "own" or view.key_bias is not None:
            return attend(view, None, plain), ()
        attended = jax.nn.dot_product_attention(
            view.q, view.k, view.v, is_causal=True, implementation="cudnn"
        )
        return attended, ()

    @jax.jit
    def forward(model: Decoder, heads: Array, batch: Batch) -> Array:
        row = jax.tree.map(lambda x: x[0], batch)
        return run_backbone(model, heads, row, plain, all_blocks)[0]

    run = _compiled(report, "dense_forward", forward, model, heads, batch)
    flops = dense_flops(config, options.batch, options.seq_len)
    dense = _timed(
        report,
        "dense_forward",
        lambda: run(model, heads, batch),
        options.repeats,
        flops,
    )

    optimizer = make_optimizer(OptimizerConfig())
    state = [initial_state(jnp.array(heads), optimizer)]
    jitted = make_step(model, settings, optimizer, make_mesh(1))
    step = _compiled(report, "step", jitted, model, state[0], batch)

    def one_step() -> Array:
        state[0], metrics = step(model, state[0], batch)
        return metrics.loss

    trained = _timed(report, "step", one_step, options.repeats, 0.0)
    report.add(
        "done:",
        step_tokens_per_s=round(count / trained, 1),
        ratio=round(trained / dense, 3),
    )
    print(json.dumps(report.values))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
