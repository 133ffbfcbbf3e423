"""A layer of experts beside one MLP of the same active size, in one run.

    python -m benchmarks.moe --model qwen3-30b-a3b
    XLA_FLAGS=--xla_gpu_experimental_use_ragged_dot_grouped_gemm=true \\
        python -m benchmarks.moe --model qwen3-30b-a3b

Random weights, inputs whose experts are spread evenly. Times are medians of calls that
run the layer several times in a loop; bytes are those of the experts in use. `temp` is
what a form's program needs beside its arguments and results, by the compiler.
"""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.parsers import benchmark_parser
from sparda_jax.checks import integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_option
from sparda_jax.loading import default_dtype
from sparda_jax.models import experts as moe
from sparda_jax.models.layers import swiglu
from sparda_jax.models.presets import get_preset

_CALLS = 7


def _seconds(layer, x: Array, *weights: Array, repeats: int) -> dict[str, float | None]:
    """Seconds of one application of the layer, and its memory."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(layer, x, *weights):
        def again(_, x):
            y = layer(x, *weights)
            return (x + y * jnp.asarray(1e-3, y.dtype)).astype(x.dtype)

        return jax.lax.fori_loop(0, repeats, again, x)

    program = run.lower(layer, x, *weights).compile()
    found = program.memory_analysis()
    temp = None if found is None else found.temp_size_in_bytes
    jax.block_until_ready(run(layer, x, *weights))
    times = []
    for _ in range(_CALLS):
        begun = time.perf_counter()
        jax.block_until_ready(run(layer, x, *weights))
        times.append((time.perf_counter() - begun) / repeats)
    return {
        "median_s": statistics.median(times),
        "most_s": max(times),
        "temp_bytes": temp,
    }


def main() -> None:
    """Runs the command."""
    parser = benchmark_parser("moe", __doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b", help="preset with experts")
    for name, default, about in (
        ("--tokens", [1, 4, 16, 1024, 4096], "sizes"),
        ("--together", [1, 8, 32, 128], "tiles"),
    ):
        add_option(
            parser,
            name,
            integer(1),
            metavar="N",
            many=True,
            default=default,
            help=about,
        )
    add_option(
        parser, "--repeats", integer(1), metavar="N", default=20, help="timed calls"
    )
    arguments = parser.parse_args()
    config, dtype = get_preset(arguments.model).model, default_dtype()
    hidden, ffn, used = config.hidden_size, config.ffn_size, config.experts_per_token
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*shape: int) -> Array:
        return (0.02 * jax.random.normal(next(keys), shape)).astype(dtype)

    router = draw(hidden, config.num_experts) * 50
    gate_up = draw(config.num_experts, hidden, 2 * ffn)
    down = draw(config.num_experts, ffn, hidden)
    wide_in, wide_out = draw(hidden, 2 * ffn * used), draw(ffn * used, hidden)

    def experts(form, x, router, gate_up, down):
        routes = moe.route(x, router, used, normalize=config.normalize_router)
        return form(x, routes, gate_up, down)

    for tokens in arguments.tokens:
        x = jax.random.normal(jax.random.key(tokens), (tokens, hidden))
        x = x.astype(dtype)
        routes = moe.route(x, router, used, normalize=True)
        in_use = int(jnp.unique(routes.experts).size)
        forms = {"ragged_dot": moe.grouped_mlp}
        for together in arguments.together:
            form = functools.partial(moe.tiled_mlp, together=together)
            forms[f"tiled by {together}"] = form
        if tokens * used < config.num_experts:
            forms["chosen"] = moe.chosen_mlp
        found = {
            name: _seconds(
                functools.partial(experts, form),
                *(x, router, gate_up, down),
                repeats=arguments.repeats,
            )
            for name, form in forms.items()
        }
        found["dense of the active size"] = _seconds(
            swiglu, x, wide_in, wide_out, repeats=arguments.repeats
        )
        size = 3 * hidden * ffn * jnp.dtype(dtype).itemsize
        print(
            json.dumps(
                {
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    "model": arguments.model,
                    "tokens": tokens,
                    "experts_in_use": in_use,
                    "bytes_in_use": in_use * size,
                    "dense_bytes": used * size,
                    **found,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
