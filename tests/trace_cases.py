"""A block trace for tests: lists that drift and come back, as real ones do."""

import numpy as np

from sparda_jax.planning.traces import BlockTrace


def drifting_trace(
    *,
    layers: int = 2,
    kv_heads: int = 2,
    tokens: int = 4000,
    prefill: int = 40,
    decode: int = 80,
    seed: int = 0,
) -> BlockTrace:
    """A trace whose scores are a slow random walk of each block, budget 16 = 1+3+12."""
    random = np.random.default_rng(seed)
    count, size = prefill + decode, 64
    own = (tokens + np.arange(count)) // size
    blocks = int(own[-1]) + 1
    lead = (layers, kv_heads)
    scores = random.normal(size=(*lead, blocks))
    liking = random.normal(size=(*lead, blocks))
    listed = np.zeros((*lead, count, blocks), bool)
    block = np.arange(blocks)
    for token in range(count):
        scores = 0.95 * scores + 0.3 * random.normal(size=scores.shape)
        forced = (block < 1) | ((block >= own[token] - 2) & (block <= own[token]))
        rank = np.where(forced, np.inf, scores + liking)
        rank = np.where(block <= own[token], rank, -np.inf)
        best = np.argsort(-rank, axis=-1)[..., :16]
        np.put_along_axis(listed[:, :, token], best, True, axis=-1)
    return BlockTrace(
        model="walk",
        text="none",
        attention="infllm_v2",
        forecast="",
        tokens=tokens,
        prefill=prefill,
        block_size=size,
        init_blocks=1,
        local_blocks=2,
        block_budget=16,
        listed=listed,
    )
