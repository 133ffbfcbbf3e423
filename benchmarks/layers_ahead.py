"""What a Forecast finds one, two or more layers ahead, on a real model and text.

    python -m benchmarks.layers_ahead --model smollm2-135m --context 4096
    python -m benchmarks.layers_ahead --model qwen.gguf --context 30720 --ahead 1 2 3

A text is prefilled and its last tokens are decoded as they stand in it, offloaded, with
`exactness="verify"`: the layers' own queries decide what is attended, so that every run
has the same hidden states, and the Forecast only fetches. For each `layers_ahead` and
number of slots are printed the share of the blocks that own queries choose by score
which the Forecast had listed (recall), and the blocks that were fetched, in % of the
listed ones: ahead, beside compute, and waited for, because the Forecast had not listed
them. `reuse` sends the list of the layer before instead, which needs no parameters, and
`none` prefetches nothing. Only layers that all of them look ahead for count.
"""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.fed_text import feed_text
from benchmarks.parsers import add_document_options, benchmark_parser
from benchmarks.trace import text_ids
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import integer
from sparda_jax.cli.ending import run_command
from sparda_jax.config import CacheConfig

if TYPE_CHECKING:
    import sparda_jax as sj

# Steps whose fetches are not counted: slots begin with the prompt's last list alone.
_WARM = 16


def measure(
    lm: "sj.LanguageModel", ids: list[int], decode: int, cache: CacheConfig, first: int
) -> dict[str, float]:
    """Recall and traffic of one way.

    Args:
      lm: The model, with the attention that chooses.
      ids: The text.
      decode: Tokens that are decoded.
      cache: An offloaded one.
      first: The first layer that counts.

    Returns:
      `recall`, and `ahead` and `waited_for` in shares of the listed blocks.
    """
    _, steps = feed_text(
        *(lm, ids, decode, cache),
        of_prompt=None,
        of_step=lambda _, carry: carry.fetches,
    )
    counted = {
        name: int(np.asarray(getattr(steps, name))[_WARM:, first:].sum())
        for name in ("hits", "fetched", "repaired", "recall_hits", "recall_total")
    }
    layers = lm.config.num_layers - first
    listed = (decode - _WARM) * layers * lm.config.num_kv_heads
    listed *= lm.sparse.largest_budget
    # On demand every fetch is waited for.
    waited = counted["repaired"] if cache.exactness == "verify" else counted["fetched"]
    found = counted["recall_hits"] / max(1, counted["recall_total"])
    return {
        "recall": found,
        "ahead": (counted["fetched"] - waited) / listed,
        "waited_for": waited / listed,
    }


def _ways(ahead: list[int]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, attention and what is said of the cache."""
    verify: dict[str, Any] = {"exactness": "verify"}
    return [
        *((f"forecast, {n}", "sparda", verify | {"layers_ahead": n}) for n in ahead),
        ("reuse", "reuse", verify),
        ("none", "infllm_v2", {}),
    ]


def _run(arguments: argparse.Namespace) -> None:
    from sparda_jax.runtime import configure_offload

    configure_offload()
    import jax

    import sparda_jax as sj

    integer(2 * _WARM)("--decode", arguments.decode)
    for number in arguments.ahead:
        integer(1, 8)("--ahead", number)
    lm = sj.load(arguments.model, attention="sparda")
    ids = text_ids(lm, arguments)
    # The first layer that every way looks ahead for; layer 0 is resident.
    first = 1
    figures: dict[str, Any] = {
        "model": lm.config.name,
        "text": pathlib.Path(arguments.text).name,
        "context": len(ids),
        "decode": arguments.decode,
        "budget": lm.sparse.largest_budget,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(lm.model.embedding[...].dtype),
        "ways": {},
    }
    names = "".join(f"{f'C = {size:g}x':>18}" for size in arguments.slots)
    print(
        f"{figures['model']}, {figures['text']}, {len(ids)} tokens, the last "
        f"{arguments.decode} decoded, {figures['dtype']}, {figures['device']}, JAX "
        f"{jax.__version__}; fetched, in % of the listed blocks: ahead + waited for"
    )
    print(f"{'prefetched':14}{'recall':>8}{names}", flush=True)
    for name, attention, way in _ways(arguments.ahead):
        with_it = sj.with_attention(lm, attention)
        row = {}
        for size in arguments.slots:
            slots = round(size * lm.sparse.largest_budget)
            cache = CacheConfig(kind="offload", device_blocks=slots, **way)
            row[f"{size:g}"] = measure(with_it, ids, arguments.decode, cache, first)
        figures["ways"][name] = row
        recall = max(cell["recall"] for cell in row.values())
        cells = "".join(
            f"{cell['ahead']:10.1%} +{cell['waited_for']:6.1%}" for cell in row.values()
        )
        print(f"{name:14}{recall:8.1%}{cells}", flush=True)
        if arguments.json is not None:
            write_json(arguments.json, figures)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("layers_ahead", __doc__)
    add_document_options(parser)
    parser.add_argument("--decode", type=int, default=128, help="tokens decoded")
    parser.add_argument("--ahead", type=int, nargs="+", default=[1, 2])
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures every way."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
