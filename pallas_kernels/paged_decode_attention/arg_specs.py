"""Named arguments shared by tests, benchmarks and the tuner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels._common.attended_specs import attended, normal


@dataclass(frozen=True)
class ArgSpec:
    """Sizes of a call and how its lists look.

    Attributes:
      name: short, unique, used as a test's id.
      batch, heads, kv_heads, head_dim, block, capacity: sizes (B, N, K, H, block, C).
      listed: P, or None for the form with ``lengths``.
      layers: length of the leading axis, or None for no such axis.
      lengths: valid tokens of each row; cycled over the batch.
      padding: fraction of the list that is -1, spread over it.
      bias: with a key bias.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    capacity: int
    listed: int | None = None
    layers: int | None = None
    lengths: tuple[int, ...] = ()
    padding: float = 0.0
    bias: bool = False
    tags: frozenset[str] = field(default=frozenset({"ci"}))

    def make(self, dtype: Any, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``paged_decode_attention`` for these sizes."""
        rng = np.random.default_rng(seed)
        q = normal(rng, self.batch, self.heads, self.head_dim)
        args: dict[str, Any] = {"q": jnp.asarray(q, dtype)}
        shape = (self.batch, self.kv_heads, self.capacity, self.block)
        form = {"layers": self.layers, "bias": self.bias}
        args |= attended(rng, shape, self.head_dim, dtype, **form)
        lengths = self.lengths or (self.capacity * self.block,)
        lengths = np.resize(np.asarray(lengths, np.int32), self.batch)
        if self.listed is None:
            return args | {"lengths": jnp.asarray(lengths)}
        slots = np.full((self.batch, self.kv_heads, self.listed), -1, np.int32)
        valid = np.zeros_like(slots)
        for b in range(self.batch):
            used = max(1, -(-int(lengths[b]) // self.block))
            for k in range(self.kv_heads):
                order = rng.permutation(used)[: self.listed].astype(np.int32)
                slots[b, k, : len(order)] = order
                slots[b, k] = rng.permutation(slots[b, k])
        slots[rng.random(slots.shape) < self.padding] = -1
        valid = np.clip(lengths[:, None, None] - slots * self.block, 0, self.block)
        valid = np.where(slots < 0, 0, valid).astype(np.int32)
        return args | {
            "slots": jnp.asarray(slots),
            "slot_lengths": jnp.asarray(valid),
        }


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("dense_g1", 2, 2, 2, 64, 16, 5, lengths=(61, 3)),
    ArgSpec("dense_g3_layers", 1, 9, 3, 64, 64, 12, layers=3, lengths=(700,)),
    ArgSpec("dense_g16_bias", 2, 32, 2, 128, 64, 9, lengths=(200, 513), bias=True),
    ArgSpec("dense_empty_row", 3, 4, 1, 64, 32, 4, lengths=(0, 1, 128)),
    ArgSpec("listed_g4", 2, 8, 2, 64, 32, 10, listed=6, lengths=(320, 100)),
    ArgSpec(
        "listed_g16_layers_bias",
        2,
        32,
        2,
        128,
        64,
        12,
        listed=8,
        layers=2,
        lengths=(700, 300),
        padding=0.3,
        bias=True,
    ),
    ArgSpec("listed_all_padding", 2, 6, 2, 64, 16, 4, listed=3, padding=1.0),
    ArgSpec("one_block", 1, 8, 1, 128, 128, 1, listed=1, lengths=(77,)),
    ArgSpec("head_dim_256", 1, 16, 2, 256, 64, 6, listed=5, lengths=(333,)),
    ArgSpec("listed_odd", 1, 9, 3, 64, 64, 40, listed=37, lengths=(2500,)),
    ArgSpec(
        "minicpm_b1_p96",
        1,
        32,
        2,
        128,
        64,
        2048,
        listed=96,
        tags=frozenset({"large"}),
    ),
    ArgSpec(
        "minicpm_b8_p96", 8, 32, 2, 128, 64, 512, listed=96, tags=frozenset({"large"})
    ),
    ArgSpec(
        "minicpm_b16_p96",
        16,
        32,
        2,
        128,
        64,
        512,
        listed=96,
        tags=frozenset({"large"}),
    ),
    ArgSpec(
        "minicpm_b64_p96",
        64,
        32,
        2,
        128,
        64,
        256,
        listed=96,
        tags=frozenset({"large"}),
    ),
)
