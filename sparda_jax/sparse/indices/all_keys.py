"""Every key of a layer, on the device: what an oracle looks at."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.index import IndexPart, IndexShape, NewTokens


class Keys(NamedTuple):
    """Keys by position.

    Attributes:
      k: Post-RoPE keys [layers, B, K, S, H], S tokens of capacity.
      bias: NOSA's c [layers, B, K, S] float32, or None.
    """

    k: Float[Array, "layers B K S H"]
    bias: Float[Array, "layers B K S"] | None


@dataclasses.dataclass(frozen=True)
class AllKeys(IndexPart):
    """The keys once more: half as much memory again as a resident KV cache takes.

    Attributes:
      biased: The model has NOSA's key bias.
    """

    biased: bool

    def init(self, shape: IndexShape, sparse: SparseConfig) -> Keys:
        """As `IndexPart.init`."""
        lead = (shape.layers, shape.batch, shape.kv_heads)
        lead = (*lead, shape.blocks * sparse.block_size)
        return Keys(
            k=jnp.zeros((*lead, shape.head_dim), shape.dtype),
            bias=jnp.zeros(lead, jnp.float32) if self.biased else None,
        )

    def append(self, state: Keys, new: NewTokens, sparse: SparseConfig) -> Keys:
        """As `IndexPart.append`."""
        tokens, layer, start, count = new
        batch, steps, kv_heads, _ = tokens.k.shape
        step, rows = jnp.arange(steps), jnp.arange(batch)[:, None, None]
        heads = jnp.arange(kv_heads)
        position = jnp.where(
            step < count[:, None], start[:, None] + step, state.k.shape[3]
        )
        at = (layer, rows, heads, position[:, :, None])
        bias = state.bias
        if bias is not None:
            assert tokens.key_bias is not None
            bias = bias.at[at].set(tokens.key_bias, mode="drop")
        k = state.k.at[at].set(tokens.k.astype(state.k.dtype), mode="drop")
        return Keys(k, bias)
