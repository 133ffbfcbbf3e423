"""The optimizer of the Forecast matrices, and what a run carries from step to step.

Only Forecast matrices have optimizer state, and they are float32 whatever the model's
type is (specification §8.22).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from train.config import OptimizerConfig


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


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind one clip over the gradient of all heads (§5.6)."""
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
