"""Paged decode attention in XLA: what CPUs run, and every device can.

Algorithm: without a slot list, an online softmax over chunks of consecutive slots;
the number of chunks follows the longest row, so capacity that is not in use costs
nothing. One chunk that is all of it is read without a loop: XLA would copy in front of
a loop what it reads (4 % of a step of one row among eight). With a list, chunks of
listed slots are gathered straight out of the stack of layers (the layer index is part
of the gather), so that the bytes read do not depend on capacity either.

Layout: logits are [G, keys]. For few query heads a group they are multiplied and summed
in one fusion with the read of the keys, which a CPU's threads share; the same as a
matrix product is fused into a scalar loop that one thread runs.

Limits: none on sizes; not differentiable in reverse mode, the loop length being
dynamic (``block_sparse_attention`` with T = 1 is).

Measured, as the product of keys and a thin matrix, on 2 cores of an AMD EPYC with about
15 GB/s of memory bandwidth between them (jax 0.12.0.1, float32, N = 9, K = 3, H = 64,
in a jitted loop over 30 layers whose keys do not fit in cache): 2,048 keys dense
0.5-0.6 ms a layer, of which the 3.1 MB read alone need 0.2-0.3 ms; 16 listed blocks of
64, at any capacity, 0.3 ms. The sums take 0.83 of that at 2,048 keys and 0.86 at 8,064,
lists 0.91 (least of 25 interleaved pairs, 2 busy cores of a Xeon, the same jax;
processor time 0.88, 0.86, 1.02). Tried: keys and values in one operand of 2H columns
(no faster), one slice a block (slower), a copy of the keys before the product (no
faster than the sums), larger chunks, two loops over half of the keys each (run one
after the other).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import (
    NEG_INF,
    cdiv,
    einsum_f32,
    finite_or_zero,
    in_32_bit,
    softmax_finish,
)
from pallas_kernels.commit_blocks.int8 import decoded
from pallas_kernels.paged_decode_attention.operands import Decode

# Keys in one step of the loop: a chunk of K and V stays in a core's L2 cache.
CHUNK_KEYS = 512
# A list is gathered whole up to this many keys; beyond it, in steps of this size.
GATHER_KEYS = 2048
# Query heads of a group up to which logits are sums and no matrix product.
MOST_SUMMED = 8


def _chunk_slots(count: int, block: int, listed: bool) -> int:
    """Slots of a chunk, of ``count`` in all."""
    return max(1, min(count, (GATHER_KEYS if listed else CHUNK_KEYS) // block))


def scratch_bytes(
    *,
    batch: int,
    kv_heads: int,
    head_dim: int,
    block: int,
    capacity: int,
    listed: int | None,
    itemsize: int,
    scales: int = 0,
) -> int:
    """Device bytes that a call needs beside its operands and its result.

    Args:
      batch: B.
      kv_heads: K.
      head_dim: H.
      block: tokens of a slot.
      capacity: C.
      listed: P, or None for the form with ``lengths``.
      itemsize: bytes of a number of ``q``.
      scales: S, where slots are in 8 bits.

    Returns:
      What the XLA form holds at its widest point: a chunk of keys and values; of slots
      in 8 bits the chunk as it is stored as well, and decoded before keys and values
      are taken apart. Pallas forms need less.
    """
    count = capacity if listed is None else listed
    chunk = _chunk_slots(count, block, listed is not None)
    numbers = 2 * block * head_dim
    stored = numbers * (1 + itemsize) + 4 * scales if scales else 0
    return batch * kv_heads * chunk * (numbers * itemsize + stored)


def _products(
    keys: Float[Array, "B K S H"], query: Float[Array, "B K G H"]
) -> Float[Array, "B K G S"]:
    """Every query times every key of its kv head, in float32."""
    if query.shape[2] > MOST_SUMMED:
        return einsum_f32("bksh,bkgh->bkgs", keys, query)
    wide = keys.astype(jnp.float32)[:, :, None]
    return (wide * query.astype(jnp.float32)[:, :, :, None]).sum(-1)


@in_32_bit
def paged_decode_attention_xla(
    operands: Decode,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Computes the output in the dtype of ``q`` and the float32 log-sum-exp."""
    q, kv, key_bias, layer = operands.q, operands.kv, operands.key_bias, operands.layer
    slots, slot_lengths = operands.slots, operands.slot_lengths
    batch, heads, head_dim = q.shape
    kv_heads, capacity, block = kv.shape[2:5]
    groups, stored = operands.groups, operands.stored
    scales = 0 if stored is None else stored.scales.shape[-1]
    query = q.reshape(batch, kv_heads, groups, head_dim)

    def attend(carry, keys, values, bias, valid):
        # keys, values: B K S H; bias, valid: B K S or broadcastable to it.
        top, total, acc = carry
        logits = operands.scale * _products(keys, query)
        if bias is not None:
            logits = logits + bias[:, :, None]
        logits = jnp.where(valid[:, :, None], logits, NEG_INF)
        new_top = jnp.maximum(top, logits.max(-1))
        shift = finite_or_zero(new_top)
        weights = jnp.exp(logits - shift[..., None])
        fade = jnp.exp(top - shift)
        values = jnp.where(valid[..., None], values, 0)
        update = einsum_f32("bkgs,bksh->bkgh", weights.astype(values.dtype), values)
        return new_top, total * fade + weights.sum(-1), acc * fade[..., None] + update

    def values_of(whole, scale):
        # B K slots block 2 H of integers; B K slots S.
        both = decoded(whole, scale, q.dtype)
        shape = (batch, kv_heads, -1, head_dim)
        return both[..., 0, :].reshape(shape), both[..., 1, :].reshape(shape)

    if slots is None:
        lengths = operands.lengths
        assert lengths is not None
        chunk = _chunk_slots(capacity, block, listed=False)
        steps = 1
        if chunk < capacity:
            steps = cdiv(jnp.clip(lengths.max(), 0, capacity * block), chunk * block)

        def load(step):
            # The last chunk is moved back to stay inside; what it repeats is masked.
            start = jnp.minimum(step * chunk, capacity - chunk)

            def cut(x, *rest):
                at = (layer, 0, 0, start, *(0,) * len(rest))
                return lax.dynamic_slice(x, at, (1, batch, kv_heads, chunk, *rest))[0]

            def take(which):
                part = lax.dynamic_slice(
                    kv,
                    (layer, 0, 0, start, 0, which, 0),
                    (1, batch, kv_heads, chunk, block, 1, head_dim),
                )
                return part.reshape(batch, kv_heads, chunk * block, head_dim)

            position = start * block + jnp.arange(chunk * block)
            valid = (position >= step * chunk * block) & (position < lengths[:, None])
            bias = None
            if key_bias is not None:
                bias = cut(key_bias, block).reshape(batch, kv_heads, chunk * block)
            if stored is not None:
                held = cut(kv, block, 2, head_dim), cut(stored.scales, scales)
                return *values_of(*held), bias, valid[:, None]
            return take(0), take(1), bias, valid[:, None]

    else:
        assert slot_lengths is not None
        listed = operands.listed
        chunk = _chunk_slots(listed, block, listed=True)
        steps = cdiv(listed, chunk)
        padding = ((0, 0), (0, 0), (0, steps * chunk - listed))
        slots = jnp.pad(slots, padding, constant_values=-1)
        slot_lengths = jnp.pad(slot_lengths, padding)
        row = jnp.arange(batch)[:, None, None]
        head = jnp.arange(kv_heads)[:, None]

        def load(step):
            index = lax.dynamic_slice_in_dim(slots, step * chunk, chunk, 2)
            length = lax.dynamic_slice_in_dim(slot_lengths, step * chunk, chunk, 2)
            length = jnp.where((index >= 0) & (index < capacity), length, 0)
            valid = jnp.arange(block) < length[..., None]

            def take(x, *tail):
                part = x.at[layer, row, head, index, :, *tail].get(mode="clip")
                return part.reshape(batch, kv_heads, chunk * block, *part.shape[4:])

            bias = None if key_bias is None else take(key_bias)
            valid = valid.reshape(batch, kv_heads, chunk * block)
            if stored is not None:
                at = (layer, row, head, index)
                held = (x.at[at].get(mode="clip") for x in (kv, stored.scales))
                return *values_of(*held), bias, valid
            return take(kv, 0), take(kv, 1), bias, valid

    carry = (
        jnp.full((batch, kv_heads, groups), NEG_INF),
        jnp.zeros((batch, kv_heads, groups)),
        jnp.zeros((batch, kv_heads, groups, head_dim)),
    )
    if stored is not None:
        tail = stored.tail[layer]
        grown = jnp.arange(block) < stored.tail_lengths[:, None, None]
        carry = attend(carry, tail[..., 0, :], tail[..., 1, :], None, grown)
    if isinstance(steps, int) and steps == 1:
        carry = attend(carry, *load(0))
    else:
        carry = lax.fori_loop(0, steps, lambda i, c: attend(c, *load(i)), carry)
    top, total, acc = carry
    out, lse = softmax_finish(acc, total, top)
    out = out.reshape(batch, heads, head_dim).astype(q.dtype)
    return out, lse.reshape(batch, heads)
