"""Decode with experts beside a dense model of the same active size, in one run.

    python -m benchmarks.moe_decode --model qwen3-30b-a3b --context 32768 --batch 1 4 16

The dense model has all of the other's shape but its MLP, which is as wide as the
experts that a token uses: it multiplies as much for a token. Weights are random, the
cache is resident and nothing is prefilled; both attend the lists that a real model
chose (`benchmarks.traced`). `read_gb` are the weights of a step's MLPs at the least: of
the experts that a batch of evenly spread tokens has in use, on the average.

Both are held at once and decode on one state. Every round times both, so what disturbs
a moment falls on both: a call of eight steps and a call of `--steps`, which is what
`step_ms` is of (the median, with the least and the most). `call_ms` is what a call
takes beside its steps, by the two of a round. `times_dense` is the median of the
rounds' ratios, with the least and the most of them; `times_dense_by_least` is the least
step over the least.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import json_lines
from benchmarks.offload import (
    CHUNK,
    add_size_options,
    decode_request,
    held_state,
    imposed_choice,
    mode_settings,
)
from benchmarks.parsers import benchmark_parser
from benchmarks.traced import DEFAULT_TRACE, begin_rows
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
    steps = {"metavar": "N", "default": 48, "help": "of a round's long call"}
    add_option(parser, "--steps", integer(CHUNK + 1), **steps)
    rounds = {"metavar": "N", "default": 8, "help": "of each model"}
    add_option(parser, "--rounds", count, **rounds)
    add_file_option(parser, "--out", help="also write JSON lines here")
    parser.set_defaults(
        miss=None,
        layer0="resident",
        route="auto",
        codec="exact",
        trace=DEFAULT_TRACE,
        slots=1.0,
    )
    return parser


class Round(NamedTuple):
    """What one model took in one round.

    Attributes:
      short: Seconds of a call of `CHUNK` steps.
      long: Seconds of a call of `steps`.
      steps: Of the long call.
    """

    short: float
    long: float
    steps: int

    @property
    def step(self) -> float:
        """Seconds a step of the long call."""
        return self.long / self.steps

    @property
    def call(self) -> float:
        """Seconds of a call beside its steps."""
        more = (self.long - self.short) / (self.steps - CHUNK)
        return self.short - CHUNK * more


def figures(rounds: Sequence[Round], batch: int) -> dict[str, Any]:
    """What one model's rounds show.

    Args:
      rounds: Its own.
      batch: Rows of a step.
    """
    steps = [one.step for one in rounds]
    return {
        "step_ms": statistics.median(steps) * 1e3,
        "least_ms": min(steps) * 1e3,
        "most_ms": max(steps) * 1e3,
        "call_ms": statistics.median(one.call for one in rounds) * 1e3,
        "rounds_ms": [step * 1e3 for step in steps],
        "tokens_per_second": batch / statistics.median(steps),
    }


def times_dense(dense: Sequence[Round], experts: Sequence[Round]) -> dict[str, float]:
    """How much longer a step with experts takes, round by round and at the least.

    Args:
      dense: Rounds of the dense model.
      experts: Those of the other, in the same order.
    """
    pairs = zip(dense, experts, strict=True)
    ratios = [other.step / one.step for one, other in pairs]
    least = min(one.step for one in experts) / min(one.step for one in dense)
    return {
        "times_dense": statistics.median(ratios),
        "times_dense_least": min(ratios),
        "times_dense_most": max(ratios),
        "times_dense_by_least": least,
    }


def _timed_rounds(
    models: dict[ModelConfig, Any],
    sparse: SparseConfig,
    trace: Any,
    batch: int,
    arguments: argparse.Namespace,
) -> dict[ModelConfig, list[Round]]:
    """Every model's rounds at one batch; all of them decode on one state."""
    import jax
    import jax.numpy as jnp

    from sparda_jax.inference.generate import decode_loop_call

    new, mode, context = arguments.steps + 4 * CHUNK, "resident", arguments.context
    state: Any = None
    calls = {}
    for config, model in models.items():
        choice = imposed_choice(arguments, trace, config, sparse, batch, new)
        cache, settings = mode_settings(
            config, sparse, mode, choice, arguments.slots, arguments
        )
        request = decode_request(config, batch, context, new)
        if state is None:
            state = held_state(
                model, settings, batch, context, new, cache, choice.lists
            )
        # One after the other: kernels of products are chosen by timing them.
        lowered = decode_loop_call.lower(model, state, request, settings=settings)
        calls[config] = functools.partial(lowered.compile(), model), request

    def timed(config: ModelConfig) -> Round:
        nonlocal state
        call, request = calls[config]
        state, taken = begin_rows(state, context), []
        for steps in (CHUNK, arguments.steps):
            jax.block_until_ready(state)
            begun = time.perf_counter()
            state = call(state, request._replace(steps=jnp.int32(steps)))
            jax.block_until_ready(state.done)
            taken.append(time.perf_counter() - begun)
        return Round(*taken, steps=arguments.steps)

    found: dict[ModelConfig, list[Round]] = {config: [] for config in models}
    order = list(models)
    for config in order:
        timed(config)
    for _ in range(arguments.rounds):
        for config in order:
            found[config].append(timed(config))
        order.reverse()
    return found


def _run(arguments: argparse.Namespace) -> None:
    import jax

    from sparda_jax.models.presets import get_preset
    from sparda_jax.models.weights import random_decoder
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
        "steps": arguments.steps,
    }
    expert = 3 * experts.hidden_size * experts.ffn_size * 2 * experts.num_layers
    dense = dense_twin(experts)
    models = {
        config: random_decoder(config, "bfloat16", forecast=True)
        for config in (dense, experts)
    }
    for batch in arguments.batch:
        found = _timed_rounds(models, preset.sparse, trace, batch, arguments)
        jax.clear_caches()
        read = {
            dense: dense.ffn_size / experts.ffn_size,
            experts: experts_in_use(experts, batch),
        }
        for config, rounds in found.items():
            row = about | {
                "mlp": "dense" if config is dense else "experts",
                "batch": batch,
                **figures(rounds, batch),
                "read_gb": read[config] * expert / 1e9,
            }
            if config is experts:
                row |= times_dense(found[dense], rounds)
            json_lines.say(row, arguments.out)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
