"""One training step: gradients over micro batches and devices, then the update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from sparda_jax.models.decoder import Decoder
from train.backbone import Batch, Settings, heads_gradient
from train.optimizer import TrainState
from train.sharding import AXIS, make_gather, model_specs


class StepMetrics(NamedTuple):
    """Figures of one step.

    Attributes:
      loss: By layer.
      gradient_norm: Of all heads together, before clipping.
      skipped, bad_in_a_row: As in `TrainState`, after the step.
    """

    loss: Float[Array, " L"]
    gradient_norm: Float[Array, ""]
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]


Gradients = Callable[[Decoder, Array, Batch], tuple[Array, Array, Array]]


def make_gradients(
    model: Decoder, settings: Settings, mesh: Mesh, *, fsdp: bool = False
) -> Gradients:
    """`heads_gradient` of a batch [A, B, T] over the mesh, summed; not jitted.

    The A micro batches are accumulated; B is shared by the devices.
    """
    gather = make_gather(model, mesh, fsdp=fsdp)
    specs = model_specs(model, mesh, fsdp=fsdp)

    def gradients(
        model: Decoder, heads: Array, batch: Batch
    ) -> tuple[Array, Array, Array]:
        def micro(sums: tuple, batch: Batch) -> tuple[tuple, None]:
            new = heads_gradient(model, heads, batch, settings, gather)
            return jax.tree.map(jnp.add, sums, new), None

        zeros = (
            jnp.zeros(heads.shape, jnp.float32),
            jnp.zeros(heads.shape[:1], jnp.float32),
            jnp.zeros((), jnp.float32),
        )
        if batch.tokens.shape[0] == 1:
            sums = heads_gradient(
                model, heads, jax.tree.map(lambda x: x[0], batch), settings, gather
            )
        else:
            sums = jax.lax.scan(micro, zeros, batch)[0]
        return jax.lax.psum(sums, AXIS) if mesh.size > 1 else sums

    return jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(specs, PartitionSpec(), PartitionSpec(None, AXIS)),
        out_specs=PartitionSpec(),
        # Nothing is differentiated through a collective, and the kernels inside carry
        # no annotations of what varies over the mesh.
        check_vma=False,
    )


Step = Callable[[Decoder, TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_step(
    model: Decoder,
    settings: Settings,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    fsdp: bool = False,
) -> Step:
    """The jitted step: (model, state, batch [A, B, T]) → (state, metrics).

    The A micro batches are accumulated; B is shared by the devices. The state is
    donated. A step whose loss or gradient is not finite leaves heads and optimizer as
    they were.

    Args:
      model: Only its shapes are used.
      settings: Model, geometry and loss.
      optimizer: For the heads.
      mesh: Of `make_mesh`.
      fsdp: The layers' weights are divided over the mesh.
    """
    spread = make_gradients(model, settings, mesh, fsdp=fsdp)

    def step(
        model: Decoder, state: TrainState, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        gradient, total, weight = spread(model, state.heads, batch)
        weight = jnp.maximum(weight, 1.0)
        gradient, loss = gradient / weight, total / weight
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient)))
        finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(loss))
        updates, moments = optimizer.update(gradient, state.optimizer, state.heads)
        heads = optax.apply_updates(state.heads, updates)

        def kept(new: Any, old: Any) -> Array:
            return jnp.where(finite, new, old)

        bad = (~finite).astype(jnp.int32)
        after = TrainState(
            heads=kept(heads, state.heads),
            optimizer=jax.tree.map(kept, moments, state.optimizer),
            step=state.step + 1,
            skipped=state.skipped + bad,
            bad_in_a_row=(state.bad_in_a_row + bad) * bad,
        )
        metrics = StepMetrics(loss, norm, after.skipped, after.bad_in_a_row)
        return after, metrics

    return jax.jit(step, donate_argnums=1)
