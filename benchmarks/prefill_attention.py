"""Prefill attention to the lists of a real model: a tile of queries, kernel by kernel.

  python -m benchmarks.prefill_attention                      # 4,096 of 131,072 tokens
  python -m benchmarks.prefill_attention --layers 2 16 28 --tokens 1024 --trace FILE

The last `--tokens` of a prompt attend to the blocks that a trace lists for them in some
layers (`benchmarks.traced`), or, with `--agree N`, to random lists that N neighbours
share. Queries and keys are random: only lists change what attention costs. `read` is
how many blocks a kernel's group of tokens lists, `dense` the same tile without lists.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys

from benchmarks.parsers import benchmark_parser
from benchmarks.traced import DEFAULT_TRACE
from sparda_jax.checks import ConfigError, integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option, add_option


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("prefill_attention", __doc__)
    parser.add_argument("--model", default="minicpm4.1-8b", help="preset")
    count = integer(1)
    for name, check, default, metavar, text in (
        ("--context", count, 131072, "N", "tokens of the prompt"),
        ("--tokens", count, 4096, "T", "of them, whose queries are a tile"),
        ("--repeats", count, 10, "N", "timed calls of each"),
    ):
        add_option(parser, name, check, default=default, metavar=metavar, help=text)
    add_option(
        parser,
        "--layers",
        integer(0),
        many=True,
        default=[2, 16, 28],
        metavar="L",
        help="whose lists to take",
    )
    parser.add_argument(
        "--trace", type=pathlib.Path, default=DEFAULT_TRACE, help="whose lists to take"
    )
    add_option(
        parser,
        "--agree",
        count,
        metavar="N",
        help="instead of a trace: neighbours that share a list",
    )
    add_file_option(parser)
    return parser


def _lists(arguments, config, sparse):
    """Yields what the lists are called, and the lists [1, K, T, P]."""
    import jax.numpy as jnp

    from benchmarks.traced import prefill_lists
    from pallas_kernels.benchmarks.block_sparse_attention import selector_lists

    start = arguments.context - arguments.tokens
    if arguments.agree is not None:
        lists = selector_lists(
            arguments.context,
            config.num_kv_heads,
            sparse.largest_budget,
            sparse.block_size,
            local=sparse.local_blocks,
            drift=arguments.agree,
        )
        yield f"{arguments.agree} agree", lists[:, :, start:]
        return
    from benchmarks.imposed import lists_of

    lists = lists_of(arguments.trace, config, sparse, 1)
    assert lists is not None
    for layer in arguments.layers:
        found = prefill_lists(
            lists, layer, tokens=arguments.tokens, sparse=sparse, start=start
        )
        yield f"layer {layer}", jnp.asarray(found)


def _checked(arguments, config, sparse) -> None:
    block = sparse.block_size
    if arguments.context % block or arguments.tokens > arguments.context:
        raise ConfigError(
            f"context={arguments.context} is not allowed: it must be a multiple of "
            f"{block} and at least tokens={arguments.tokens}"
        )
    if arguments.agree is not None and arguments.context % 256:
        raise ConfigError(
            f"context={arguments.context} is not allowed: lists that neighbours share "
            "are drawn for multiples of 256"
        )
    for layer in arguments.layers:
        if layer >= config.num_layers:
            raise ConfigError(
                f"layers={layer} is not allowed: the model has {config.num_layers}"
            )


def _run(arguments: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.benchmarks.harness import compile_all, measure
    from pallas_kernels.block_sparse_attention.api import block_sparse_attention
    from pallas_kernels.block_sparse_attention.unions import tile_unions
    from sparda_jax.checkpoint.atomic import write_json
    from sparda_jax.models.presets import get_preset

    preset = get_preset(arguments.model)
    config, sparse = preset.model, preset.sparse
    _checked(arguments, config, sparse)
    gpu = jax.default_backend() == "gpu"
    forms = ("mosaic_gpu", "triton") if gpu else ("xla",)
    dtype = jnp.bfloat16 if gpu else jnp.float32
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    block, blocks = sparse.block_size, arguments.context // sparse.block_size
    keys = jax.random.split(jax.random.key(0))
    q = jax.random.normal(keys[0], (1, arguments.tokens, heads, width), dtype)
    kv = jax.random.normal(keys[1], (1, kv_heads, blocks, block, 2, width), dtype)
    start = jnp.full((1,), arguments.context - arguments.tokens, jnp.int32)
    group = min(16, max(1, 128 // (heads // kv_heads)))

    def attend(q, kv, start, lists, form):
        return block_sparse_attention(
            q, kv, q_start=start, block_indices=lists, implementation=form
        )

    rows: list[dict] = []
    figures = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": arguments.model,
        "context": arguments.context,
        "tokens": arguments.tokens,
        "trace": arguments.trace.name if arguments.agree is None else None,
        "rows": rows,
    }
    named = dict(_lists(arguments, config, sparse))
    cases = [(name, lists, form) for name, lists in named.items() for form in forms]
    cases += [("dense", None, form) for form in forms]
    programs = compile_all(
        [
            (functools.partial(attend, form=form), (q, kv, start, lists))
            for _, lists, form in cases
        ]
    )
    for (name, lists, form), program in zip(cases, programs, strict=True):
        read = float(arguments.context // block)
        if lists is not None:
            unions = functools.partial(
                tile_unions, blocks=blocks, block=block, tokens=group
            )
            read = float(jax.jit(unions)(lists, start).count.mean())
        timing = measure(
            f"{name}, {form}, {read:.0f} blocks read by {group} tokens",
            program,
            *(q, kv, start, lists),
            repeats=arguments.repeats,
        )
        rows.append(dataclasses.asdict(timing) | {"lists": name, "form": form})
        rows[-1]["read"] = read
        if arguments.json:
            write_json(arguments.json, figures)
    if not any(row["seconds"] for row in rows):
        raise SystemExit("nothing was measured")


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
