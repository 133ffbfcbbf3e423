"""What one token's block lists are, by layer and kv head, and what they are worth.

The row goes through the model as `forecast_measure` runs it. Of one of its tokens are
kept: the place that forecast and own query give each block, and the attention mass that
the block truly holds. So a missed block can be taken apart.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.checks import integer, require
from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.forecast_measure import (
    MeasurePlan,
    block_mass,
    block_places,
    filled_index,
    walk_layers,
)
from sparda_jax.inference.layer import LayerBlock
from sparda_jax.models.block import before_attention
from sparda_jax.models.rope import RopeCosSin
from sparda_jax.sparse.index import TokenKV


@dataclasses.dataclass(frozen=True, eq=False)
class TokenChoices:
    """The choices of one token, in every layer and for every kv head.

    Attributes:
      token: Its position.
      budget: Blocks of a list.
      forecast_place, own_place: The block's place in the order of the forecast and of
        the layer's own query, 0 the best; forced blocks come first.
      mass: Attention probability that the block truly holds, the mean over the query
        heads of the kv head.
      optional: Whether a block is there to be chosen: begun, and not forced [M].
    """

    token: int
    budget: int
    forecast_place: Int[np.ndarray, "L K M"]
    own_place: Int[np.ndarray, "L K M"]
    mass: Float[np.ndarray, "L K M"]
    optional: Bool[np.ndarray, " M"]

    @property
    def forecast(self) -> Bool[np.ndarray, "L K M"]:
        """Chosen blocks that the forecast lists."""
        return (self.forecast_place < self.budget) & self.optional

    @property
    def own(self) -> Bool[np.ndarray, "L K M"]:
        """Chosen blocks that the own query lists."""
        return (self.own_place < self.budget) & self.optional

    def worst_miss(self) -> tuple[int, int, int] | None:
        """(layer, kv head, block) of the missed block with the most mass.

        Missed is what the own query lists and the forecast does not; None for nothing.
        """
        missed = np.where(self.own & ~self.forecast, self.mass, -1.0)
        if missed.max() < 0:
            return None
        layer, head, block = np.unravel_index(missed.argmax(), missed.shape)
        return int(layer), int(head), int(block)


@functools.partial(jax.jit, static_argnames="settings")
def _layer_choices(
    block: LayerBlock,
    hidden: Float[Array, "1 T D"],
    before: Float[Array, "1 T D"],
    rope_cos_sin: RopeCosSin,
    token: Int[Array, ""],
    settings: LayerSettings,
) -> tuple[Int[Array, "K M"], Int[Array, "K M"], Float[Array, "K M"]]:
    """Places by forecast and own query, and the true mass, of one token's blocks."""
    config, sparse, selector = settings.config, settings.sparse, settings.selector
    x, q, k, v, key_bias = before_attention(block.weights, config, hidden, rope_cos_sin)
    source = jnp.where(block.number == 0, x, before)
    forecast = selector.next_query(block.next_query, source, rope_cos_sin)
    index = filled_index(settings, TokenKV(k, v, key_bias, q))
    tokens = hidden.shape[1]
    blocks = -(-tokens // sparse.block_size)
    state = TileState(
        start=token[None],
        count=jnp.ones((1,), jnp.int32),
        length=jnp.full((1,), tokens, jnp.int32),
        rope_cos_sin=rope_cos_sin,
        num_blocks=blocks,
        decoding=False,
        layer=block.number,
    )
    own_q, own_forecast = (
        jax.lax.dynamic_slice_in_dim(y, token, 1, axis=1) for y in (q, forecast)
    )
    seen = state.selection(index, 0, forecast=own_forecast)
    ahead = selector.ranking(seen, config, sparse, settings.implementation)
    seen = state.selection(index, 0, q=own_q)
    own = settings.own_query.ranking(seen, config, sparse, settings.implementation)
    room = blocks * sparse.block_size - tokens
    keys = jnp.swapaxes(jnp.pad(k, ((0, 0), (0, room), (0, 0), (0, 0))), 1, 2)[0]
    bias = None
    if key_bias is not None:
        bias = jnp.swapaxes(jnp.pad(key_bias, ((0, 0), (0, room), (0, 0))), 1, 2)[0]
    mass = block_mass(own_q[0], keys, bias, token[None], sparse.block_size)[:, 0]
    of_group = mass.reshape(config.num_kv_heads, config.group_size, -1).mean(1)
    return block_places(ahead[0])[:, 0], block_places(own[0])[:, 0], of_group


def token_choices(
    lm: LanguageModel,
    ids: Sequence[int] | np.ndarray,
    token: int,
    plan: MeasurePlan,
) -> TokenChoices:
    """Reads off one token's choices while a row goes through the model.

    Args:
      lm: Loaded with a selector that needs Forecast heads.
      ids: The row.
      token: The position of a token that has more blocks than the budget.
      plan: Of `forecast_measure.make_plan` for the row's length.

    Raises:
      ConfigError: If the token is none of the row's, or the budget holds its context.
    """
    sparse = lm.sparse
    own = integer(0, len(ids) - 1)("token", token) // sparse.block_size
    least = plan.budget * sparse.block_size
    require(own >= plan.budget, "token", token, f"at least {least}, behind the budget")
    layers = [
        _layer_choices(
            *(passed.block, passed.hidden, passed.before, passed.rope_cos_sin),
            jnp.int32(token),
            lm.settings,
        )
        for passed in walk_layers(lm, ids, plan)
    ]
    ahead, own_place, mass = (np.stack(x) for x in zip(*layers, strict=True))
    block = np.arange(mass.shape[-1])
    optional = (block >= sparse.init_blocks) & (block < own - sparse.local_blocks)
    return TokenChoices(token, plan.budget, ahead, own_place, mass, optional)
