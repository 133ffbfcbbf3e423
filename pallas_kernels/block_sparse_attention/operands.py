"""What every back end of block-sparse attention takes, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common import validation
from pallas_kernels._common.operands import Attended


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prefill(Attended):
    """Queries of T consecutive positions a row, their blocks and their lists.

    Source: the second stage of InfLLM-V2 at prefill (reference implementation
    NVlabs/SparDA, ``infllmv2_sparse_attention.py``).

    Attributes:
      q: queries in the dtype of ``kv``; head n reads kv head n // (N // K).
      q_start: int32, position of the first query of each row.
      block_indices: int32, blocks that each token reads, -1 for padding; None for all
        up to its own position.
    """

    q: Float[Array, "B T N H"]
    q_start: Int[Array, " B"]
    block_indices: Int[Array, "B K T P"] | None

    @property
    def groups(self) -> int:
        """G, query heads of a kv head."""
        return self.q.shape[2] // self.kv_heads

    @property
    def listed(self) -> int | None:
        """P; None without lists."""
        return None if self.block_indices is None else self.block_indices.shape[-1]


def checked(
    q, kv, *, q_start, block_indices=None, layer=None, key_bias=None, scale=None
) -> Prefill:
    """Checks arguments of ``block_sparse_attention`` and brings them to one form.

    Raises:
      ValueError: on shapes or dtypes other than those that the operation names.
    """
    validation.require_shape("q", q, (None, None, None, None), "B T N H")
    batch, tokens = q.shape[:2]
    if tokens < 1:
        raise ValueError("q holds no token (T = 0); T must be at least 1")
    attended = validation.attended(q, kv, layer, key_bias, scale)
    validation.require_shape("q_start", q_start, (batch,), "B")
    validation.require_integer("q_start", q_start)
    if block_indices is not None:
        size = (batch, attended["kv"].shape[2], tokens, None)
        validation.require_shape("block_indices", block_indices, size, "B K T P")
        validation.require_integer("block_indices", block_indices)
        if block_indices.shape[-1] < 1:
            raise ValueError("block_indices lists no block (P = 0); P must be >= 1")
        block_indices = block_indices.astype(jnp.int32)
    return Prefill(
        q=q,
        q_start=q_start.astype(jnp.int32),
        block_indices=block_indices,
        **attended,
    )
