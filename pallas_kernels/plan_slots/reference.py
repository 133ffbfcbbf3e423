"""The definition of the plan, a row and a block at a time."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.plan_slots.operands import Slots
from pallas_kernels.plan_slots.plan import SlotPlan


def plan_slots_reference(operands: Slots) -> SlotPlan:
    """Computes the result in NumPy."""
    lead, rows, budget = operands.lead, operands.rows, operands.budget
    row_blocks = operands.row_blocks
    blocks, last_used, listed = (
        np.array(x).reshape(rows, -1)
        for x in (operands.blocks, operands.last_used, operands.listed)
    )
    step, tail_block = (
        np.asarray(x).reshape(rows) for x in (operands.step, operands.tail_block)
    )
    source, target = int(operands.source), int(operands.target)
    slots = np.full((rows, budget), -1, np.int32)
    sources, targets = np.full((2, budget, rows), -1, np.int32)
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
