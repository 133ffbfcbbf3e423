"""Named arguments shared by tests, benchmarks and the tuner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class ArgSpec:
    """Sizes of a call.

    Attributes:
      name: short, unique, used as a test's id.
      batch, tokens, heads, kv_heads, head_dim, windows, blocks: sizes.
      start: ``q_start`` of each row; cycled over the batch.
      complete: ``num_windows`` of each row, or None for all.
      softmax: the softmax form.
      local: forced blocks up to the query's own.
      layers: length of the leading axis, or None for no such axis.
      budget: P.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: int
    blocks: int
    start: tuple[int, ...] = (0,)
    complete: tuple[int, ...] | None = None
    softmax: bool = False
    local: int = 2
    layers: int | None = None
    budget: int = 6
    tags: frozenset[str] = field(default=frozenset({"ci"}))

    def make(self, dtype: Any, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``block_scores`` for these sizes."""
        rng = np.random.default_rng(seed)
        lead = () if self.layers is None else (self.layers,)
        shape = (*lead, self.batch, self.kv_heads, self.windows, self.head_dim)
        query = (self.batch, self.tokens, self.heads, self.head_dim)
        args: dict[str, Any] = {
            "query": jnp.asarray(rng.standard_normal(query, dtype=np.float32), dtype),
            "compressed_keys": jnp.asarray(
                rng.standard_normal(shape, dtype=np.float32), dtype
            ),
            "q_start": jnp.asarray(
                np.resize(np.asarray(self.start, np.int32), self.batch)
            ),
            "blocks": self.blocks,
            "softmax": self.softmax,
            "local_blocks": self.local,
        }
        if self.complete is not None:
            complete = np.resize(np.asarray(self.complete, np.int32), self.batch)
            args["num_windows"] = jnp.asarray(complete)
        if self.layers is not None:
            args["layer"] = jnp.int32(self.layers - 1)
        return args


_LARGE = frozenset({"large"})

ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("raw", 2, 70, 2, 2, 64, 63, 16, start=(0, 900)),
    ArgSpec("raw_decode", 2, 1, 3, 3, 64, 127, 32, start=(2040, 700), layers=2),
    ArgSpec("raw_ragged", 2, 33, 2, 2, 128, 70, 17, start=(1000,), complete=(41, 66)),
    ArgSpec("raw_no_window", 1, 20, 1, 1, 64, 3, 1, complete=(0,)),
    ArgSpec("softmax_g4", 2, 50, 8, 2, 64, 63, 16, start=(0, 800), softmax=True),
    ArgSpec(
        "softmax_g16_layers",
        1,
        33,
        32,
        2,
        128,
        90,
        23,
        start=(1400,),
        softmax=True,
        layers=2,
        complete=(87,),
    ),
    ArgSpec("softmax_g3", 1, 40, 9, 3, 64, 127, 32, start=(2000,), softmax=True),
    ArgSpec("softmax_decode", 2, 1, 16, 1, 64, 40, 11, start=(660, 31), softmax=True),
    ArgSpec(
        "forecast_128k",
        1,
        131072,
        2,
        2,
        128,
        8191,
        2048,
        local=33,
        budget=96,
        tags=_LARGE,
    ),
    ArgSpec(
        "own_query_128k",
        1,
        131072,
        32,
        2,
        128,
        8191,
        2048,
        softmax=True,
        local=33,
        budget=96,
        tags=_LARGE,
    ),
)
