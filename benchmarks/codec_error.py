"""What 8-bit blocks, or 8-bit key means, cost on a real model and a real text.

    python -m benchmarks.codec_error --model smollm2-135m --context 4096
    python -m benchmarks.codec_error --model qwen.gguf --context 30720 --passkeys 20
    python -m benchmarks.codec_error --of slots
    python -m benchmarks.codec_error --of keys

The text is prefilled with `codec="exact"` and with `codec="int8"` (of slots:
`"int8_slots"`), or with `compressed_keys` of one and the other; its last tokens are
decoded one by one as they stand in it, and passkeys are asked for. Printed are the
error of stored K and V by layer (root mean square over that of the values), the
perplexity of the decoded tokens, how often both caches have the same likeliest token,
the divergence of their distributions, the share of the scored blocks that both choose,
and passkeys found. Layer 0 is offloaded as well, so that it is counted.
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from benchmarks.fed_text import feed_text
from benchmarks.parsers import benchmark_parser
from benchmarks.trace import text_ids
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option
from sparda_jax.config import CacheConfig

if TYPE_CHECKING:
    import sparda_jax as sj
    from sparda_jax.cache.host_store import HostStore

EXACT = CacheConfig(kind="offload", layer0="offload")
INT8 = dataclasses.replace(EXACT, codec="int8")
INT8_SLOTS = dataclasses.replace(EXACT, codec="int8_slots")


# What is compared: models and where their KV is kept.
type Ways = tuple[tuple["sj.LanguageModel", CacheConfig], ...]


class Run(NamedTuple):
    """What a text gave with one codec.

    Attributes:
      blocks: The full host blocks behind prefill.
      logs: Log-probabilities before each decoded token.
      lists: Block lists of each decoded token, −1 padded.
    """

    blocks: Float[np.ndarray, "L K M block 2 H"]
    logs: Float[np.ndarray, "T V"]
    lists: Int[np.ndarray, "T L K P"]


def run_text(
    lm: "sj.LanguageModel", ids: list[int], decode: int, cache: CacheConfig
) -> Run:
    """Prefills a text but for its last tokens, and decodes those as they stand.

    Args:
      lm: A loaded model.
      ids: The text.
      decode: Tokens that are decoded.
      cache: An offloaded one.
    """
    import jax
    import jax.numpy as jnp

    from sparda_jax.models.decoder import logits

    def of_step(model, carry):
        scores = logits(model, carry.hidden[:, 0])[0].astype(jnp.float32)
        return jax.nn.log_softmax(scores), carry.blocks[:, 0, :, 0]

    found: list[Float[np.ndarray, "L K M block 2 H"]] = []
    full = (len(ids) - decode) // lm.sparse.block_size
    _, (logs, lists) = feed_text(
        *(lm, ids, decode, cache),
        of_prompt=None,
        of_step=of_step,
        between=lambda kept: found.append(stored_blocks(kept.store, full)),
    )
    return Run(found[0], np.asarray(logs), np.asarray(lists))


def stored_blocks(
    store: "HostStore", blocks: int
) -> Float[np.ndarray, "L K M block 2 H"]:
    """The first row's first blocks of every layer, as they are decoded.

    Read by a program: NumPy's view of a pinned array would forbid to donate it.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def read(store: "HostStore", layer: jax.Array) -> jax.Array:
        return store.read(layer, 0, blocks, row=0)[0, 0].astype(jnp.float32)

    layers = range(store.lead[0])
    return np.stack([np.asarray(read(store, jnp.int32(layer))) for layer in layers])


def error_by_layer(
    exact: Float[np.ndarray, "L K M block 2 H"],
    rounded: Float[np.ndarray, "L K M block 2 H"],
) -> Float[np.ndarray, "L two"]:
    """Root mean square error of K and V over their root mean square, by layer.

    Args:
      exact: Blocks as they are.
      rounded: The same, rounded once.
    """
    found = []
    for before, after in zip(exact, rounded, strict=True):
        before, after = before.astype(np.float64), after.astype(np.float64)
        axes = (0, 1, 2, 4)
        found.append(np.sqrt(((after - before) ** 2).sum(axes) / (before**2).sum(axes)))
    return np.stack(found)


def passkeys(ways: "Ways", context: int, count: int) -> dict[str, int]:
    """Passkeys found in either way, and how often both said the same."""
    import sparda_jax as sj
    from sparda_jax.evaluation.passkey import passkey_task

    tokenizer = ways[0][0].tokenizer
    assert tokenizer is not None
    found = {"exact": 0, "int8": 0, "same_tokens": 0, "asked": count}
    for number in range(count):
        depth = number / max(1, count - 1)
        task = passkey_task(tokenizer, tokens=context, depth=depth, seed=number)
        said = []
        for name, (lm, cache) in zip(("exact", "int8"), ways, strict=True):
            how = dataclasses.replace(lm, cache=cache)
            out = sj.generate(how, [list(task.ids)], max_new_tokens=12)
            said.append(out.tokens[0])
            found[name] += task.solved_by(out.texts[0])
        found["same_tokens"] += said[0] == said[1]
    return found


def compare(
    exact: Run, rounded: Run, ids: list[int], lm: "sj.LanguageModel"
) -> dict[str, Any]:
    """What the two runs differ by."""
    sparse = lm.sparse
    steps = exact.logs.shape[0]
    errors = error_by_layer(exact.blocks, rounded.blocks)
    # A token's scores are for the next one, which the text names.
    asked = np.asarray(ids[-steps + 1 :])
    at = np.arange(steps - 1)
    first, second = (run.logs.astype(np.float64) for run in (exact, rounded))
    divergence = (np.exp(first) * (first - second)).sum(-1)
    own = (len(ids) - steps + np.arange(steps)) // sparse.block_size
    scored = (exact.lists >= sparse.init_blocks) & (
        exact.lists < own[:, None, None, None] - sparse.local_blocks
    )
    both = (exact.lists[..., :, None] == rounded.lists[..., None, :]).any(-1)
    return {
        "k_error": errors[:, 0].tolist(),
        "v_error": errors[:, 1].tolist(),
        "perplexity": {
            "exact": float(np.exp(-first[at, asked].mean())),
            "int8": float(np.exp(-second[at, asked].mean())),
        },
        "same_likeliest": float((first.argmax(-1) == second.argmax(-1)).mean()),
        "divergence": {
            "mean": float(divergence.mean()),
            "most": float(divergence.max()),
        },
        "same_blocks": float((both & scored).sum() / max(1, scored.sum())),
        "tokens": steps,
    }


def report(figures: dict[str, Any]) -> str:
    """The figures as a page of Markdown."""
    k, v = (np.asarray(figures[name]) for name in ("k_error", "v_error"))
    exact, rounded = (figures["perplexity"][name] for name in ("exact", "int8"))
    keys = figures["passkeys"]
    rows = [
        ("K, error by layer: least, mean, most", _spread(k)),
        ("V, error by layer: least, mean, most", _spread(v)),
        ("perplexity, exact / int8", f"{exact:.4f} / {rounded:.4f}"),
        ("same likeliest token", f"{figures['same_likeliest']:.2%}"),
        (
            "divergence, mean / most",
            f"{figures['divergence']['mean']:.1e} / {figures['divergence']['most']:.1e}"
            " nats",
        ),
        ("scored blocks that both choose", f"{figures['same_blocks']:.2%}"),
        (
            "passkeys, exact / int8, same answer",
            f"{keys['exact']} / {keys['int8']}, {keys['same_tokens']} of "
            f"{keys['asked']}",
        ),
    ]
    head = (
        f"{figures['model']}, {figures['text']}, {figures['context']:,} tokens, the "
        f"last {figures['tokens']} decoded, {figures['attention']}, "
        f"{figures['dtype']}, {figures['device']}, JAX {figures['jax']}"
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    by_layer = "\n".join(
        f"| {layer} | {a:.3%} | {b:.3%} |"
        for layer, (a, b) in enumerate(zip(k, v, strict=True))
    )
    return (
        f"{head}\n\n| | |\n|---|---|\n{table}\n\n| layer | K | V |\n|---|---|---|\n"
        f"{by_layer}"
    )


def _spread(errors: Float[np.ndarray, " L"]) -> str:
    return f"{errors.min():.3%}, {errors.mean():.3%}, {errors.max():.3%}"


def _run(arguments: argparse.Namespace) -> None:
    from sparda_jax.runtime import configure_offload

    configure_offload()
    import jax

    import sparda_jax as sj

    for name in ("context", "passkeys"):
        integer(0)(f"--{name}", getattr(arguments, name))
    integer(2)("--decode", arguments.decode)
    lm = sj.load(arguments.model, attention=arguments.attention)
    ids = text_ids(lm, arguments)
    ways: Ways = ((lm, EXACT), (lm, INT8_SLOTS if arguments.of == "slots" else INT8))
    if arguments.of == "keys":
        sparse = dataclasses.replace(lm.sparse, compressed_keys="int8")
        ways = ((lm, EXACT), (dataclasses.replace(lm, sparse=sparse), EXACT))
    exact, rounded = (
        run_text(how, ids, arguments.decode, cache) for how, cache in ways
    )
    figures = {
        "model": lm.config.name,
        "text": pathlib.Path(arguments.text).name,
        "context": len(ids),
        "of": arguments.of,
        "attention": lm.selector.name,
        "dtype": str(lm.model.embedding[...].dtype),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **compare(exact, rounded, ids, lm),
        "passkeys": passkeys(ways, arguments.context, arguments.passkeys),
    }
    if arguments.json is not None:
        write_json(arguments.json, figures)
    print(report(figures))


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("codec_error", __doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--attention", default="sparda")
    parser.add_argument(
        "--of",
        choices=["blocks", "slots", "keys"],
        default="blocks",
        help="what is rounded: host blocks, they and device slots, or key means",
    )
    parser.add_argument("--text", default="code", help="prose, code or a text file")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--decode", type=int, default=256)
    parser.add_argument("--passkeys", type=int, default=10)
    add_file_option(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Compares the codecs."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
