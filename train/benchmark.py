"""`python -m train.benchmark`: a training step against a plain dense forward pass.

Both run the same layers on the same tokens in the same process. The forward pass is
causal attention without selection, without the head; the step makes the teacher, the
loss, all gradients and the optimizer's update as well.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparda_jax.config import ModelConfig
from sparda_jax.models.decoder import Decoder, DecoderLayer
from sparda_jax.models.presets import get_preset
from train.config import LossConfig, OptimizerConfig
from train.loss import Documents
from train.step import (
    Batch,
    LayerView,
    Settings,
    attend,
    initial_heads,
    initial_state,
    make_mesh,
    make_optimizer,
    make_step,
    run_backbone,
)


def random_decoder(config: ModelConfig, dtype: jnp.dtype) -> Decoder:
    """Random stacked weights of a shape without biases or extra norms."""
    hidden, ffn, layers = config.hidden_size, config.ffn_size, config.num_layers
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    shapes = {
        "attention_norm": (hidden,),
        "qkv": (hidden, queries + 2 * keys),
        "out": (queries, hidden),
        "mlp_norm": (hidden,),
        "gate_up": (hidden, 2 * ffn),
        "down": (ffn, hidden),
    }

    def draw(seed: int, *shape: int) -> Array:
        if len(shape) < 3 and shape[-1] == hidden and shape[0] == layers:
            return jnp.ones(shape, dtype)
        return 0.02 * jax.random.normal(jax.random.key(seed), shape, dtype)

    stacked = {
        name: draw(seed, layers, *shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    table = draw(len(shapes), config.vocab_size, hidden)
    norm = jnp.ones((hidden,), dtype)
    first = DecoderLayer({name: x[:1] for name, x in stacked.items()})
    model = Decoder(config, table, [first], norm, None)
    model.layers = DecoderLayer(stacked)
    return model


def _median_seconds(run: Callable[[], object], repeats: int) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; prints one JSON object."""
    parser = argparse.ArgumentParser("python -m train.benchmark", description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m", help="preset, random weights"
    )
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", choices=("blocks", "masked"), default="blocks")
    parser.add_argument("--implementation")
    options = parser.parse_args(arguments)
    preset = get_preset(options.model)
    config = preset.model
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = random_decoder(config, jnp.dtype(dtype))
    settings = Settings(
        config,
        preset.sparse,
        LossConfig(mask_short_rows=True),
        options.implementation,
        masked_attention=options.attention == "masked",
    )
    shape = (1, options.batch, options.seq_len)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    rows = Documents.whole_rows(*shape[1:])
    batch = Batch(tokens, Documents(rows.start[None], rows.end[None]))
    optimizer = make_optimizer(OptimizerConfig())
    heads = initial_heads(model, "from_query", 0)
    step = make_step(model, settings, optimizer, make_mesh(1))
    state = [initial_state(jnp.array(heads), optimizer)]

    def one_step() -> Array:
        state[0], metrics = step(model, state[0], batch)
        return metrics.loss

    plain = dataclasses.replace(settings, masked_attention=False)

    def all_blocks(view: LayerView) -> tuple[Array, tuple[()]]:
        return attend(view, None, plain), ()

    @jax.jit
    def forward(model: Decoder, heads: Array, batch: Batch) -> Array:
        row = jax.tree.map(lambda x: x[0], batch)
        return run_backbone(model, heads, row, plain, all_blocks)[0]

    dense = _median_seconds(lambda: forward(model, heads, batch), options.repeats)
    trained = _median_seconds(one_step, options.repeats)
    count = options.batch * options.seq_len
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": options.model,
        "layers": config.num_layers,
        "tokens": count,
        "dense_forward_s": round(dense, 4),
        "step_s": round(trained, 4),
        "step_tokens_per_s": round(count / trained, 1),
        "ratio": round(trained / dense, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
