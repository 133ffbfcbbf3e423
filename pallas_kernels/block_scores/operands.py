"""What every back end of block scoring takes, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common import validation
from pallas_kernels.block_scores.rule import Rule


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Queries of T consecutive positions a row, means of windows, and the rule.

    Source: InfLLM-V2 and SparDA, as ``rule.py`` states them.

    Attributes:
      query: Forecast (N = K) or own queries, in the dtype of the keys.
      compressed_keys: means of windows, of a stack of layers.
      q_start: int32, position of the first query of each row.
      num_windows: int32, complete windows of each row.
      layer: int32, which layer of the stack.
      rule: sizes and form; a trace fixes it.
    """

    query: Float[Array, "B T N H"]
    compressed_keys: Float[Array, "L B K W H"]
    q_start: Int[Array, " B"]
    num_windows: Int[Array, " B"]
    layer: Int[Array, ""]
    rule: Rule = field(metadata={"static": True})

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.compressed_keys.shape[2]

    @property
    def groups(self) -> int:
        """G, query heads of a kv head."""
        return self.query.shape[2] // self.kv_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.query.shape[-1]


def checked(
    query, compressed_keys, q_start, num_windows, layer, softmax, scale, **sizes
) -> Scoring:
    """Checks arguments of ``block_scores`` and brings them to one form.

    Raises:
      ValueError: on shapes, dtypes or sizes other than the operation names.
    """
    validation.require_shape("query", query, (None,) * 4, "B T N H")
    validation.require_float("query", query)
    batch, tokens, heads, head_dim = query.shape
    if tokens < 1:
        raise ValueError("query holds no token (T = 0); T must be at least 1")
    rank = 4 if layer is None else 5
    if compressed_keys.ndim != rank:
        raise ValueError(
            f"compressed_keys has shape {tuple(compressed_keys.shape)} with "
            f"layer={layer!r}; it must be [B K W H], with a leading L axis exactly "
            "when layer is given"
        )
    if layer is None:
        compressed_keys = compressed_keys[None]
    layer = validation.layer_index(layer, compressed_keys.shape[0])
    validation.require_shape(
        "compressed_keys",
        compressed_keys,
        (None, batch, None, None, head_dim),
        "L B K W H",
    )
    validation.require_dtype("compressed_keys", compressed_keys, query.dtype)
    kv_heads, windows = compressed_keys.shape[2:4]
    groups = validation.require_groups(heads, kv_heads)
    if groups > 1 and not softmax:
        raise ValueError(
            f"query has {heads} heads for {kv_heads} kv heads; the raw form takes one "
            "head a kv head (softmax=True sums the heads' weights)"
        )
    validation.require_shape("q_start", q_start, (batch,), "B")
    validation.require_integer("q_start", q_start)
    if num_windows is None:
        num_windows = jnp.full((batch,), windows, jnp.int32)
    validation.require_shape("num_windows", num_windows, (batch,), "B")
    validation.require_integer("num_windows", num_windows)
    if scale is None and not softmax:
        scale = 1.0
    rule = Rule(
        softmax=softmax,
        scale=validation.require_scale(scale, head_dim),
        **sizes,
    )
    return Scoring(
        query=query,
        compressed_keys=compressed_keys,
        q_start=q_start.astype(jnp.int32),
        num_windows=num_windows.astype(jnp.int32),
        layer=layer,
        rule=rule,
    )
