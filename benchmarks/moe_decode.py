"""Decode with experts beside a dense model of the same active size, in one run.

    python -m benchmarks.moe_decode --model qwen3-30b-a3b --context 32768 --batch 1 4 16

The dense model has all of the other's shape but its MLP, which is as wide as the
experts that a token uses: it multiplies as much for a token. Weights are random, the
cache is resident and nothing is prefilled; both attend the lists that a real model
chose (`benchmarks.traced`). `read_gb` are the weights of a step's MLPs at the least: of
the experts that a batch of evenly spread tokens has in use, on the average.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import json_lines
from benchmarks.offload import (
    CHUNK,
    add_size_options,
    add_steps_option,
    decode_request,
    held_state,
    imposed_choice,
    mode_settings,
    time_steps,
)
from benchmarks.parsers import benchmark_parser
from benchmarks.traced import DEFAULT_TRACE
from sparda_jax.checks import integer, require
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option, add_option
from sparda_jax.config import ModelConfig, SparseConfig


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The model with one MLP a layer, as wide as the experts that a token uses."""
    return dataclasses.replace(
        config,
        name=f"{config.name}-dense",
        ffn_size=config.ffn_size * config.experts_per_token + config.shared_ffn_size,
        num_experts=0,
        experts_per_token=0,
        shared_ffn_size=0,
    )


def experts_in_use(config: ModelConfig, batch: int) -> float:
    """Experts of a layer that a step reads, on the average, if all are as likely."""
    unused = (1 - config.experts_per_token / config.num_experts) ** batch
    return config.num_experts * (1 - unused)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("moe_decode", __doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b", help="preset with experts")
    count = integer(1)
    add_size_options(parser)
    about = "tokens a row holds"
    add_option(parser, "--context", count, metavar="N", default=32768, help=about)
    add_option(
        parser,
        "--batch",
        count,
        many=True,
        metavar="B",
        default=[1, 4, 16],
        help="rows",
    )
    add_steps_option(parser)
    add_file_option(parser, "--out", help="also write JSON lines here")
    parser.set_defaults(
        miss=None,
        layer0="resident",
        route="auto",
        codec="exact",
        trace=DEFAULT_TRACE,
        profile=None,
        slots=1.0,
    )
    return parser


def _step_seconds(
    config: ModelConfig, sparse: SparseConfig, trace: Any, arguments: Any
) -> Iterator[tuple[int, list[float]]]:
    """Seconds of the steps of every batch."""
    import jax

    from sparda_jax.inference.generate import decode_loop_call
    from sparda_jax.models.weights import random_decoder

    new, mode = arguments.steps + 4 * CHUNK, "resident"
    model = random_decoder(config, "bfloat16", forecast=True)
    for batch in arguments.batch:
        choice = imposed_choice(arguments, trace, config, sparse, batch, new)
        cache, settings = mode_settings(
            config, sparse, mode, choice, arguments.slots, arguments
        )
        request = decode_request(config, batch, arguments.context, new)
        state = held_state(
            model, settings, batch, arguments.context, new, cache, choice.lists
        )
        lowered = decode_loop_call.lower(model, state, request, settings=settings)
        call = lowered.compile()
        seconds, _, state = time_steps(
            call, settings, model, state, request, mode, arguments
        )
        del state, call, lowered
        jax.clear_caches()
        yield batch, seconds


def _run(arguments: argparse.Namespace) -> None:
    import jax

    from sparda_jax.models.presets import get_preset
    from sparda_jax.planning.traces import read_trace

    preset = get_preset(arguments.model)
    experts = preset.shape(arguments.layers, 2 * arguments.context)
    require(
        experts.num_experts > 0, "--model", arguments.model, "a preset with experts"
    )
    trace = read_trace(arguments.trace)
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": arguments.model,
        "layers": experts.num_layers,
        "context": arguments.context,
    }
    expert = 3 * experts.hidden_size * experts.ffn_size * 2 * experts.num_layers
    dense = dense_twin(experts)
    read = {dense.name: lambda batch: dense.ffn_size / experts.ffn_size}
    read[experts.name] = lambda batch: experts_in_use(experts, batch)
    found: dict[tuple[str, int], float] = {}
    for config in (dense, experts):
        for batch, seconds in _step_seconds(config, preset.sparse, trace, arguments):
            median = statistics.median(seconds)
            found[config.name, batch] = median
            row = about | {
                "mlp": "dense" if config is dense else "experts",
                "batch": batch,
                "step_ms": median * 1e3,
                "least_ms": min(seconds) * 1e3,
                "most_ms": max(seconds) * 1e3,
                "tokens_per_second": batch / median,
                "read_gb": read[config.name](batch) * expert / 1e9,
            }
            if config is experts:
                row["times_dense"] = median / found[dense.name, batch]
            json_lines.say(row, arguments.out)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
