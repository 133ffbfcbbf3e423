"""`python -m train.ablate`: ways to train heads, side by side on the same batches.

    python -m train.ablate --config configs/smollm2_distill_gpu.py --steps 100

Every variant changes one thing of the configuration, or of the reference's loss. One
pass of the frozen backbone serves all of them: layers attend to the blocks that their
own queries choose, so that the hidden states are the same for every variant, and the
teachers are made once. The on-policy variant, whose hidden states are its own, has a
pass of its own on the same batches. Prints one JSON object with the held-out recall.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.config import ConfigError, SparseConfig
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.forecast import project_forecast
from train.config import (
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    load_config,
    with_overrides,
)
from train.loss import (
    Documents,
    attend_listed,
    forecast_routing,
    head_scores,
    join_tiles,
    layer_keys,
    num_blocks,
    padded_heads,
    row_losses,
    row_weights,
    stream_tiles,
    teach,
    tile_queries,
    tile_size,
)
from train.run import Run
from train.step import (
    Batch,
    LayerView,
    Settings,
    head_gradient,
    initial_heads,
    learning_rate,
    make_optimizer,
    run_backbone,
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train: first heads, loss and learning rate."""

    init: str
    loss: LossConfig
    optimizer: OptimizerConfig


def variants(config: TrainConfig, steps: int) -> dict[str, Variant]:
    """The configuration's own way, the reference's, and one change at a time.

    Heads that begin far from their end take the reference's learning rate.
    """
    ours, own = config.loss, dataclasses.replace(config.optimizer, steps=steps)
    fast = dataclasses.replace(own, lr=OptimizerConfig().lr)
    reference = LossConfig(tile=ours.tile)
    changes: dict[str, dict[str, Any]] = {
        "floor 0": {"floor": 0.0},
        "short rows masked": {"mask_short_rows": True},
        "position weighting": {"position_weight": "context"},
        "student pooled": {"student": "blocks"},
        "deployed teacher": {"teacher": "deployed"},
    }
    found = {
        "ours": Variant(config.init, ours, own),
        "ours, from_query": Variant("from_query", ours, fast),
        "ours, kaiming": Variant("kaiming", ours, fast),
        "reference": Variant("from_query", reference, fast),
        "reference, kaiming": Variant("kaiming", reference, fast),
    }
    for name, change in changes.items():
        loss = dataclasses.replace(reference, **change)
        found[f"reference, {name}"] = Variant("from_query", loss, fast)
    return found


class LayerOut(NamedTuple):
    """Of one layer: what attention gives, and sums of all variants."""

    attended: Float[Array, "B T N H"]
    d_phi: Float[Array, "B T VK H"]
    total: Float[Array, " V"]
    weight: Float[Array, " V"]


def several_losses(
    view: LayerView,
    phi: Float[Array, "B T VK H"],
    documents: Documents,
    *,
    sparse: SparseConfig,
    losses: tuple[LossConfig, ...],
    on_policy: bool,
) -> LayerOut:
    """Losses and gradients of several forecasts of one layer, and its attention.

    Args:
      view: The layer.
      phi: Forecasts of all variants, one after the other along the heads.
      documents: Which tokens belong together.
      sparse: Block geometry and budget.
      losses: One a variant.
      on_policy: Attend to what the first variant forecasts, instead of what the
        layer's own queries choose.
    """
    batch, tokens, heads, _ = view.q.shape
    kv_heads = view.k.shape[2]
    deployed = LossConfig(teacher="deployed")
    grids = {loss.teacher: loss for loss in (*losses, deployed)}
    keys = {
        name: layer_keys(view.k, documents, None, sparse=sparse, loss=loss)
        for name, loss in grids.items()
    }
    size = losses[0].tile
    size = size or tile_size(batch, tokens, heads, jax.default_backend())
    cut = tile_queries(view.q, phi, documents, size)[1]
    plain, values = padded_heads(view.k, sparse), padded_heads(view.v, sparse)
    slots = min(sparse.block_budget, num_blocks(tokens, sparse))

    def one_tile(index: Array, reach: int) -> tuple[Array, ...]:
        everything = cut(index)
        near = {n: k.before(reach, grids[n], sparse) for n, k in keys.items()}
        scores = head_scores(everything.q, plain[:, :, :reach])
        own = teach(everything, near["deployed"], sparse=sparse, loss=deployed)
        teachers = {("deployed", "max"): own}
        totals, weights, slopes = [], [], []
        for number, loss in enumerate(losses):
            phi = everything.phi[:, :, number * kv_heads : (number + 1) * kv_heads]
            queries, held = everything._replace(phi=phi), near[loss.teacher]
            align = loss.align if loss.teacher == "fine" else "max"
            kind = (loss.teacher, align)
            if kind not in teachers:
                teachers[kind] = teach(
                    queries, held, sparse=sparse, loss=loss, token_scores=scores
                )
            weight = row_weights(queries, sparse=sparse, loss=loss)

            def total(
                phi, queries=queries, held=held, kind=kind, loss=loss, weight=weight
            ) -> Array:
                rows = row_losses(
                    queries._replace(phi=phi),
                    held,
                    teachers[kind],
                    slots=slots,
                    sparse=sparse,
                    loss=loss,
                )
                return jnp.sum(rows * weight[:, None])

            value, slope = jax.value_and_grad(total)(queries.phi)
            totals.append(value)
            weights.append(jnp.sum(weight) * kv_heads)
            slopes.append(slope)
        routing = own.routing
        if on_policy:
            first = everything._replace(phi=everything.phi[:, :, :kv_heads])
            routing = forecast_routing(first, near["deployed"], sparse=sparse)
        attended = attend_listed(
            scores, values[:, :, :reach], routing, everything, sparse
        )
        slope = jnp.concatenate(slopes, axis=2)
        return attended, slope, jnp.stack(totals), jnp.stack(weights)

    attended, slope, total, weight = stream_tiles(
        one_tile, tokens=tokens, size=size, sparse=sparse
    )
    return LayerOut(
        join_tiles(attended, 1, tokens),
        join_tiles(slope, 1, tokens),
        total.sum(0),
        weight.sum(0),
    )


def make_trainer(
    settings: Settings,
    losses: tuple[LossConfig, ...],
    optimizer: optax.GradientTransformation,
    *,
    on_policy: bool,
) -> Callable:
    """A jitted (model, heads, moments, batch, rates) → the next heads and moments.

    Heads are [V, L, D, KH], batches [A, B, T] and learning rates [V]; `optimizer` has
    the rate 1.
    """
    config, count = settings.config, len(losses)

    def gradients(model: Decoder, heads: Array, batch: Batch) -> tuple[Array, Array]:
        def on_layer(view: LayerView) -> tuple[Array, tuple[Array, Array]]:
            phi = [project_forecast(view.source, w, view.turn) for w in view.head]
            out = several_losses(
                view,
                jnp.concatenate(phi, axis=2),
                batch.documents,
                sparse=settings.sparse,
                losses=losses,
                on_policy=on_policy,
            )
            slopes = jnp.split(out.d_phi, count, axis=2)
            weight = jnp.maximum(out.weight, 1.0)
            matrices = [head_gradient(view.source, d, view.turn) for d in slopes]
            mean = jnp.stack(matrices) / weight[:, None, None]
            return out.attended, (mean, out.total / weight)

        by_layer = jnp.swapaxes(heads, 0, 1)
        mean, loss = run_backbone(model, by_layer, batch, settings, on_layer)[1]
        return jnp.swapaxes(mean, 0, 1), loss.T

    @jax.jit
    def step(
        model: Decoder, heads: Array, moments: Any, batch: Batch, rates: Array
    ) -> tuple[Array, Any, Array]:
        parts = jax.lax.map(lambda part: gradients(model, heads, part), batch)
        gradient, loss = jax.tree.map(lambda x: x.mean(0), parts)
        updates, moments = jax.vmap(optimizer.update)(gradient, moments, heads)
        scale = rates[:, None, None, None]
        updates = jax.tree.map(lambda x: x * scale, updates)
        after: Any = optax.apply_updates(heads, updates)
        return after, moments, loss.mean(-1)

    assert not config.key_bias, "variants are compared for models without a key bias"
    return step


def ablate(
    run: Run, chosen: dict[str, Variant], steps: int, save: str | None = None
) -> dict[str, Any]:
    """Trains all variants and returns their held-out metrics before and after.

    The heads of the variant called `save` are written to the run's directory.
    """
    unit = dataclasses.replace(run.config.optimizer, lr=1.0, schedule="constant")
    optimizer = make_optimizer(dataclasses.replace(unit, warmup_steps=0))
    first = {
        how: initial_heads(run.lm.model, how, run.config.seed)
        for how in ("from_query", "kaiming")
    }
    run.fit_heads()
    first["regression"] = run.state.heads
    groups = [(tuple(chosen), False), (("ours",), True)]
    found: dict[str, Any] = {}

    def measure(heads: Array) -> dict[str, Any]:
        return run.evaluate(run.model, heads, run.held_out).means()

    for how, heads in first.items():
        found[f"untrained {how}"] = measure(jnp.array(heads))
    for names, on_policy in groups:
        losses = tuple(chosen[name].loss for name in names)
        step = make_trainer(run.settings, losses, optimizer, on_policy=on_policy)
        heads = jnp.stack([jnp.array(first[chosen[name].init]) for name in names])
        moments = jax.vmap(optimizer.init)(heads)
        rows = run.batches()
        rates = [learning_rate(chosen[name].optimizer) for name in names]
        begin, loss = time.monotonic(), None
        for number in range(steps):
            now = jnp.asarray([rate(number) for rate in rates], jnp.float32)
            heads, moments, loss = step(run.model, heads, moments, next(rows), now)
        assert loss is not None
        jax.block_until_ready(heads)
        seconds = time.monotonic() - begin
        for index, name in enumerate(names):
            label = f"{name}, on-policy" if on_policy else name
            found[label] = {"loss": float(loss[index]), **measure(heads[index])}
            print(label, json.dumps(found[label]), file=sys.stderr, flush=True)
            if label == save:
                state = run.state._replace(heads=heads[index], step=jnp.int32(steps))
                run.export(state, None, "ablated.safetensors")
        found[f"seconds, {len(names)} variants"] = round(seconds, 1)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser("python -m train.ablate", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="extend", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--save", metavar="NAME", help="write this variant's heads")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        config = with_overrides(load_config(options.config), options.set)
        run = Run(config)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = variants(config, options.steps)
    names = options.only or list(chosen)
    chosen = {name: chosen[name] for name in names}
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "steps": options.steps,
        "global_batch": config.optimizer.global_batch,
        "seq_len": config.data.seq_len,
        "variants": ablate(run, chosen, options.steps, options.save),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
