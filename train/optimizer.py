"""The optimizer of the Forecast matrices, and what a run carries from step to step.

Only Forecast matrices have optimizer state, and they are float32 whatever the model's
type is (docs/algorithm.md §7.7).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sparda_jax.models.by_layer import by_layer
from train.config import OptimizerConfig

# Of the mean second moment of an input: directions that inputs hardly take.
_RIDGE = 1e-3


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
      heads: Forecast matrices by consuming layer, float32 (`models.forecast`).
      optimizer: State of the optax transformation.
      step: Steps taken, skipped ones among them.
      skipped: Steps that were skipped because something was not finite.
      bad_in_a_row: How many of the latest steps were skipped.
    """

    heads: Float[Array, "L D KRH"]
    optimizer: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up of at most a tenth of the steps, then the schedule."""
    warmup = min(config.warmup_steps, config.steps // 10)
    rest = max(1, config.steps - warmup)
    end = config.lr * config.final_fraction
    after = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final_fraction),
        "linear": optax.linear_schedule(config.lr, end, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    # Step 0 already moves: the ramp ends at the peak after `warmup` steps.
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, max(1, warmup - 1))
    return optax.join_schedules((ramp, after), (warmup,))


class Whitened(NamedTuple):
    """State of `whitened`.

    Attributes:
      root: Inputs times it are white, by layer; identities until `with_inputs`.
      inner: State of the transformation inside.
    """

    root: Float[Array, "L D D"]
    inner: Any


def whitened(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on heads V of whitened inputs, W = root · V being the real ones.

    Inputs of a layer are far from alike in size: a few directions have nearly all of
    it. Adam moves every number of a matrix alike, which shakes what the large
    directions answer long before it moves the small ones.
    """

    def init(params: Any) -> Whitened:
        layers, hidden, _ = params.shape
        root = jnp.broadcast_to(jnp.eye(hidden), (layers, hidden, hidden))
        return Whitened(root, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Array, Whitened]:
        del params
        dot = functools.partial(jnp.matmul, precision="highest")
        # The roots are symmetric: the same one leads there and back.
        moved, held = inner.update(dot(state.root, updates), state.inner)
        return dot(state.root, jnp.asarray(moved)), Whitened(state.root, held)

    return optax.GradientTransformation(init, update)


def with_inputs(
    state: Any, square: Float[np.ndarray, "L D D"], *, progress: bool = False
) -> Any:
    """An optimizer's state with the roots of the inputs' second moments.

    Args:
      state: Of an optimizer with `whiten`.
      square: XᵀX of what the heads read, summed over tokens (`train.init`).
      progress: Show a bar.
    """

    def root(moments: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(moments)
        # Whatever the number of tokens, the mean input has size 1.
        values = np.maximum(values, 0.0) / np.trace(moments) * len(moments)
        return ((vectors / np.sqrt(values + _RIDGE)) @ vectors.T).astype(np.float32)

    found = by_layer(root, square, what="whitening inputs", progress=progress)
    roots = jnp.asarray(np.stack(found))

    def filled(part: Any) -> Any:
        return part._replace(root=roots) if isinstance(part, Whitened) else part

    return jax.tree.map(filled, state, is_leaf=lambda x: isinstance(x, Whitened))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind one clip over the gradient of all heads (docs/algorithm.md §5.6)."""
    if config.whiten:
        moved = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
        if config.clip:
            moved = optax.chain(optax.clip_by_global_norm(config.clip), moved)
        return optax.chain(
            whitened(moved),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(learning_rate(config)),
        )
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def initial_state(
    heads: Float[Array, "L D KRH"], optimizer: optax.GradientTransformation
) -> TrainState:
    """State before the first step."""

    def zero() -> Array:
        return jnp.zeros((), jnp.int32)

    return TrainState(heads, optimizer.init(heads), zero(), zero(), zero())
