"""Key means in 8 bits: what is kept, however the tokens come."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.compression import compress_keys
from sparda_jax.sparse.index import IndexShape, NewTokens, TokenKV
from sparda_jax.sparse.indices.key_means import KeyMeans

SPARSE = SparseConfig(local_blocks=2, block_budget=6, query_blocks=2)
INT8 = dataclasses.replace(SPARSE, compressed_keys="int8")
LENGTHS = np.array([230, 97], np.int32)


def _keys():
    k = np.random.default_rng(0).standard_normal((2, 256, 2, 16)).astype(np.float32)
    k[:, :, :, 3] *= 30  # a channel that is larger than the others
    k[:, 96:160] = 0
    return jnp.asarray(k)


def _appended(k, pieces, sparse):
    """The state of layer 1 of 2, with tokens that come in pieces."""
    part, start = KeyMeans(), 0
    state = part.init(IndexShape(2, 2, 2, 4, 16, jnp.float32), sparse)

    @jax.jit
    def append(state, piece, held, count):
        new = NewTokens(TokenKV(piece, piece, None), 1, held, count)
        return part.append(state, new, sparse)

    for size in pieces:
        piece = k[:, start : start + size]
        held, count = np.minimum(start, LENGTHS), np.clip(LENGTHS - start, 0, size)
        state = append(state, piece, held, count)
        start += size
    return state


def test_a_window_is_rounded_once_however_its_tokens_come():
    k = _keys()
    whole = _appended(k, (256,), INT8)
    pieces = _appended(k, (100, *(1,) * 40, 116), INT8)
    exact = _appended(k, (256,), SPARSE)
    assert whole.whole.dtype == jnp.int8
    means = np.asarray(compress_keys(k, SPARSE))
    for row, length in enumerate(LENGTHS):
        count = (length - 32) // 16 + 1
        at = np.s_[1, row, :, :count]
        np.testing.assert_array_equal(whole.whole[at], pieces.whole[at])
        np.testing.assert_array_equal(whole.scales[at], pieces.scales[at])
        held = np.asarray(exact.windows[at])
        np.testing.assert_allclose(held, means[row, :, :count], rtol=1e-5, atol=1e-6)
        # The oracle, in NumPy.
        scales = np.abs(held).max(-1) * np.float32(1 / 127)
        quotient = held / np.where(scales > 0, scales, 1)[..., None]
        expected = np.clip(np.round(quotient), -127, 127)
        np.testing.assert_array_equal(whole.whole[at], expected)
        np.testing.assert_array_equal(whole.scales[at], scales)
        error = np.abs(np.asarray(whole.windows[at]) - held)
        assert (error <= scales[..., None] * 0.5001).all() and error.max() > 0
        assert not whole.whole[0].any(), "another layer"


def test_few_queries_are_scored_as_by_the_windows_themselves():
    state = _appended(_keys(), (256,), INT8)
    layer = type(state)(*(part[1] for part in state))
    query = np.random.default_rng(1).standard_normal((2, 1, 2, 16)).astype(np.float32)
    expected = np.einsum("btkh,bkwh->bktw", query, np.asarray(layer.windows))
    found = layer.scores(jnp.asarray(query))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_it_takes_little_more_than_half():
    shape = IndexShape(1, 1, 2, 2048, 128, jnp.bfloat16)
    sizes = [
        sum(x.nbytes for x in KeyMeans().init(shape, sparse))
        for sparse in (SPARSE, INT8)
    ]
    assert sizes[1] < 0.52 * sizes[0]
