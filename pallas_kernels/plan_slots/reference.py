"""The definition of the plan, a row and a block at a time."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.plan_slots.plan import SlotPlan


def plan_slots_reference(
    blocks: np.ndarray,
    last_used: np.ndarray,
    page_table: np.ndarray,
    listed: np.ndarray,
    step: np.ndarray,
    tail_block: np.ndarray,
    source: int,
    target: int,
) -> SlotPlan:
    """Computes the result in NumPy; arguments as those of the operation."""
    lead, budget = listed.shape[:-1], listed.shape[-1]
    rows = int(np.prod(lead))
    blocks, last_used = (
        np.array(x, np.int32).reshape(rows, -1) for x in (blocks, last_used)
    )
    listed = np.asarray(listed).reshape(rows, budget)
    step, tail_block = (np.asarray(x).reshape(rows) for x in (step, tail_block))
    slots = np.full((rows, budget), -1, np.int32)
    sources, targets = np.full((2, budget, rows), -1, np.int32)
    row_blocks = np.shape(page_table)[-1]
    pages = np.full((rows, row_blocks), -1, np.int32)
    fetched = hits = bound = 0
    for r in range(rows):
        asked = {int(b) for b in listed[r] if b >= 0}
        victims = sorted(
            (s for s, b in enumerate(blocks[r]) if b not in asked),
            key=lambda s: (blocks[r, s] >= 0, last_used[r, s], s),
        )
        held = {int(b): s for s, b in enumerate(blocks[r]) if b >= 0}
        missing = 0
        for p, block in enumerate(int(b) for b in listed[r]):
            if block < 0:
                continue
            if block in held:
                slot = held[block]
                hits += 1
            else:
                slot = victims[missing]
                if block < tail_block[r]:
                    sources[missing, r] = source + r * row_blocks + block
                    targets[missing, r] = target + r * blocks.shape[1] + slot
                    bound = max(bound, rows * (missing + 1))
                    fetched += 1
                missing += 1
            slots[r, p] = slot
            blocks[r, slot], last_used[r, slot] = block, step[r]
        for slot, block in enumerate(blocks[r]):
            if block >= 0:
                pages[r, block] = slot
    results = (
        slots.reshape(*lead, budget),
        blocks.reshape(*lead, -1),
        last_used.reshape(*lead, -1),
        pages.reshape(*lead, -1),
        sources.reshape(-1),
        targets.reshape(-1),
        *(np.int32(count) for count in (bound, fetched, hits)),
    )
    return SlotPlan(*map(jnp.asarray, results))
