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
      batch, tokens, heads, kv_heads, head_dim, block, blocks: sizes (B, T, N, K, H,
        block, M).
      listed: P, or None for causal attention without lists.
      local: how many of the P blocks are the token's own and those before it, as
        every selector forces them; block 0 is forced too. 0 draws lists at random.
      drift: tokens after which the rest of the list is drawn anew (neighbouring
        tokens select nearly the same blocks).
      start: ``q_start`` of each row; cycled over the batch.
      layers: length of the leading axis, or None for no such axis.
      padding: fraction of the list that is -1, spread over it.
      bias: with a key bias.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    blocks: int
    listed: int | None = None
    local: int = 0
    drift: int = 1
    start: tuple[int, ...] = (0,)
    layers: int | None = None
    padding: float = 0.0
    bias: bool = False
    tags: frozenset[str] = field(default=frozenset({"ci"}))

    def make(self, dtype: Any, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``block_sparse_attention`` for these sizes."""
        rng = np.random.default_rng(seed)
        start = np.resize(np.asarray(self.start, np.int32), self.batch)
        q_shape = (self.batch, self.tokens, self.heads, self.head_dim)
        args: dict[str, Any] = {
            "q": jnp.asarray(normal(rng, *q_shape), dtype),
            "q_start": jnp.asarray(start),
        }
        shape = (self.batch, self.kv_heads, self.blocks, self.block)
        form = {"layers": self.layers, "bias": self.bias}
        args |= attended(rng, shape, self.head_dim, dtype, **form)
        if self.listed is not None:
            args["block_indices"] = jnp.asarray(self.lists(start, rng))
        return args

    def lists(self, start: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws ``block_indices``: forced blocks, then blocks at random, shuffled."""
        assert self.listed is not None
        size = (self.batch, self.kv_heads, self.tokens, self.listed)
        lists = np.full(size, -1, np.int32)
        for b in range(self.batch):
            for k in range(self.kv_heads):
                for first in range(0, self.tokens, self.drift):
                    order = rng.permutation(self.blocks).astype(np.int32)
                    for t in range(first, min(first + self.drift, self.tokens)):
                        own = min((start[b] + t) // self.block, self.blocks - 1)
                        near = np.arange(max(0, own - self.local + 1), own + 1)
                        forced = np.union1d(near, [0]) if self.local else []
                        forced = np.asarray(forced, np.int32)[-self.listed :]
                        rest = order[: self.listed + forced.size]
                        if self.local:
                            rest = order[order <= own]
                        rest = rest[~np.isin(rest, forced)]
                        row = np.concatenate([forced, rest])[: self.listed]
                        lists[b, k, t, : row.size] = row
        lists = rng.permuted(lists, axis=-1)
        lists[rng.random(lists.shape) < self.padding] = -1
        return lists


_LARGE = frozenset({"large"})

ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("dense_g1", 2, 40, 2, 2, 64, 16, 5, start=(0, 37)),
    ArgSpec("dense_g3_layers", 1, 70, 9, 3, 64, 64, 9, start=(450,), layers=3),
    ArgSpec("dense_g16_bias", 2, 24, 32, 2, 128, 32, 8, start=(0, 130), bias=True),
    ArgSpec("dense_capacity", 1, 17, 4, 1, 64, 16, 40, start=(5,)),
    ArgSpec("random_g4", 2, 48, 8, 2, 64, 16, 12, listed=4, start=(100, 0)),
    ArgSpec("random_padded", 1, 33, 9, 3, 64, 32, 9, listed=6, padding=0.5),
    ArgSpec("nothing_listed", 1, 20, 4, 2, 64, 16, 4, listed=2, padding=1.0),
    ArgSpec(
        "local_g16_layers_bias",
        1,
        64,
        32,
        2,
        128,
        64,
        12,
        listed=6,
        local=3,
        drift=8,
        start=(600,),
        layers=2,
        padding=0.1,
        bias=True,
    ),
    ArgSpec("local_g3", 1, 300, 9, 3, 64, 64, 16, listed=5, local=2, drift=16),
    ArgSpec("one_block", 1, 64, 8, 1, 128, 128, 1, listed=1),
    ArgSpec("one_token", 2, 1, 16, 2, 128, 64, 6, listed=4, start=(300, 10)),
    ArgSpec("head_dim_256", 1, 32, 16, 2, 256, 64, 5, listed=4, start=(250,)),
    ArgSpec(
        "minicpm_128k",
        1,
        131072,
        32,
        2,
        128,
        64,
        2048,
        listed=96,
        local=33,
        drift=64,
        tags=_LARGE,
    ),
)
