"""One device beside several: decode with KV in host memory, kv heads over the devices.

    python -m benchmarks.mesh --model llama-3.1-8b --context 32768 --batch 4 --devices 2

Random weights, training-free Forecast heads and random prompts: the misses are not
those of a trained model, and are printed. Prefill and decode run twice; the first time
compiles. With --cache resident nothing is fetched.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

import sparda_jax as sj
from sparda_jax.engine.model import LanguageModel
from sparda_jax.loading import default_dtype
from sparda_jax.mesh import MeshConfig
from sparda_jax.models.presets import get_preset
from sparda_jax.models.sharding import place_decoder
from sparda_jax.models.weights import random_decoder
from sparda_jax.sparse.selectors import get_selector


def _model(arguments: argparse.Namespace, mesh: MeshConfig | None) -> LanguageModel:
    preset = get_preset(arguments.model)
    dtype = default_dtype()
    model = random_decoder(preset.model, dtype, forecast=True)
    if mesh is not None:
        model = place_decoder(model, preset.model, mesh)
    return LanguageModel(
        model=model,
        config=preset.model,
        sparse=preset.sparse,
        selector=get_selector("sparda"),
        tokenizer=None,
        fingerprint=None,
        cache=sj.CacheConfig(kind=arguments.cache),
        mesh=mesh,
    )


def measure(arguments: argparse.Namespace, mesh: MeshConfig | None) -> dict:
    """Figures of the second of two equal calls."""
    lm = _model(arguments, mesh)
    rng = np.random.default_rng(0)
    length = arguments.context - arguments.tokens
    prompts = rng.integers(0, lm.config.vocab_size, (arguments.batch, length))
    for _ in range(2):
        out = sj.generate(lm, prompts, max_new_tokens=arguments.tokens, ignore_eos=True)
    stats = out.stats
    assert stats.decode_seconds is not None
    figures = {
        "mesh": "one device" if mesh is None else mesh.text,
        "prefill_s": stats.prefill_seconds,
        "decode_tokens_per_s": arguments.batch
        * (arguments.tokens - 1)
        / stats.decode_seconds,
        "decode_blocks": list(stats.decode_blocks),
    }
    if stats.offload is not None:
        figures |= {
            "route": stats.offload.route,
            "misses": stats.offload.misses,
            "hits": stats.offload.hits,
            "fetched_gb_per_s": stats.offload.fetched_bytes
            / stats.decode_seconds
            / 1e9,
        }
    return figures


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mesh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="llama-3.1-8b", help="preset")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of the output")
    parser.add_argument("--cache", default="offload", help="resident or offload")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines")
    arguments = parser.parse_args()
    sj.configure_offload()
    lines = []
    for mesh in (None, MeshConfig(model=arguments.devices)):
        device = jax.devices()[0].device_kind
        about = {"device": device, "jax": jax.__version__} | {
            name: getattr(arguments, name)
            for name in ("model", "context", "batch", "tokens", "cache")
        }
        lines.append(json.dumps(about | measure(arguments, mesh)))
        print(lines[-1], flush=True)
        if arguments.out is not None:
            arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
