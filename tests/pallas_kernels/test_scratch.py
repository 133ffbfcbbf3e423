"""What operations say they need beside their operands, and what the compiler takes."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import block_sparse_attention, paged_decode_attention, select_blocks
from pallas_kernels.block_scores import api as scores
from pallas_kernels.block_sparse_attention import api as prefill
from pallas_kernels.paged_decode_attention import api as decode

B, T, N, K, H, M, P = 2, 300, 8, 2, 64, 32, 8
WINDOWS, BLOCK = 127, 64


def shape(*size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


ATTENTION = {"batch": B, "kv_heads": K, "head_dim": H, "block": BLOCK, "itemsize": 4}


def _prefill(listed):
    arrays = {
        "q": shape(B, T, N, H),
        "kv": shape(B, K, M, BLOCK, 2, H),
        "q_start": shape(B, dtype=jnp.int32),
    }
    if listed:
        arrays["block_indices"] = shape(B, K, T, listed, dtype=jnp.int32)
    said = prefill.scratch_bytes(
        tokens=T, heads=N, blocks=M, listed=listed, **ATTENTION
    )
    return block_sparse_attention, arrays, said


def _decode(listed, scales=0):
    dtype = jnp.int8 if scales else jnp.float32
    arrays = {"q": shape(B, N, H), "kv": shape(B, K, M, BLOCK, 2, H, dtype=dtype)}
    if scales:
        arrays["scales"] = shape(B, K, M, scales)
        arrays["tail"] = shape(B, K, BLOCK, 2, H)
        arrays["tail_lengths"] = shape(B, dtype=jnp.int32)
    lists = shape(B, K, listed or 1, dtype=jnp.int32)
    if listed:
        arrays |= {"slots": lists, "slot_lengths": lists}
    else:
        arrays["lengths"] = shape(B, dtype=jnp.int32)
    said = decode.scratch_bytes(capacity=M, listed=listed, scales=scales, **ATTENTION)
    return paged_decode_attention, arrays, said


def _scores(softmax):
    heads = N if softmax else K
    arrays = {
        "query": shape(B, T, heads, H),
        "compressed_keys": shape(B, K, WINDOWS, H),
        "q_start": shape(B, dtype=jnp.int32),
    }
    sizes = {"tokens": T, "heads": heads, "windows": WINDOWS, "blocks": M}
    said = scores.scratch_bytes(
        batch=B,
        kv_heads=K,
        head_dim=H,
        itemsize=4,
        per_block=4,
        **sizes,
    )
    call = functools.partial(select_blocks, blocks=M, budget=P, softmax=softmax)
    return call, arrays, said


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(lambda: _prefill(P), id="prefill-lists"),
        pytest.param(lambda: _decode(P), id="decode-lists"),
        pytest.param(lambda: _scores(True), id="select-softmax"),
        pytest.param(
            lambda: _decode(P, 256), id="decode-lists-8-bits", marks=pytest.mark.slow
        ),
        pytest.param(lambda: _prefill(None), id="prefill", marks=pytest.mark.slow),
        pytest.param(lambda: _decode(None), id="decode", marks=pytest.mark.slow),
        pytest.param(lambda: _scores(False), id="select", marks=pytest.mark.slow),
    ],
)
def test_scratch_is_about_what_the_compiler_takes(case):
    call, arrays, said = case()
    call = functools.partial(call, implementation="xla")
    memory = jax.jit(call).lower(**arrays).compile().memory_analysis()
    # Layouts and the fusion of neighbours are the compiler's business.
    assert 0.4 * said <= memory.temp_size_in_bytes <= 1.6 * said
