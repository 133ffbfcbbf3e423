"""Compressed keys, scores, pooling and selection against the reference's arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import RopeConfig, SparseConfig
from sparda_jax.models.presets import get_preset
from sparda_jax.models.rope import Rope, apply_rope, rope_cos_sin_at, rope_frequencies
from sparda_jax.sparse.block_scores import (
    forecast_block_scores,
    own_query_block_scores,
)
from sparda_jax.sparse.compression import (
    CompressedKeys,
    append_windows,
    compress_keys,
)
from sparda_jax.sparse.selection import (
    SelectionTile,
    constrain_by_importance,
    force_blocks,
    forecast_scores,
    own_query_scores,
    pool_to_blocks,
    sorted_blocks,
    top_blocks,
)
from sparda_jax.sparse.selectors import get_selector

LONG = [pytest.mark.slow, pytest.mark.long]
# One program each, as in a layer.
_append = jax.jit(append_windows, static_argnames="sparse")
_compress = jax.jit(compress_keys, static_argnums=1)
_own_scores = jax.jit(own_query_scores, static_argnums=1)
_scores = jax.jit(forecast_scores, static_argnums=1)
_own_blocks = jax.jit(own_query_block_scores, static_argnums=1)
_blocks = jax.jit(forecast_block_scores, static_argnums=1)

UNIT = SparseConfig(local_blocks=2, block_budget=8, query_blocks=3)
LENGTH = 1000
BLOCKS = 16


def _incremental(k, chunks, width, sparse=UNIT):
    """Windows of k [S, K, H] appended in chunks of the given sizes."""
    keys = CompressedKeys(
        windows=jnp.zeros((1, 1, k.shape[1], width, k.shape[2])),
        halves=jnp.zeros((1, 1, k.shape[1], 2, k.shape[2])),
    )
    start = 0
    for size in chunks:
        piece = jnp.asarray(k[None, start : start + size], jnp.float32)
        keys = _append(
            keys,
            0,
            piece,
            start=jnp.array([start]),
            count=jnp.array([size]),
            sparse=sparse,
        )
        start += size
    return keys


def _part(windows):
    """A layer's part of an index, of one row: windows [K, W, H]."""
    windows = jnp.asarray(windows, jnp.float32)[None]
    return CompressedKeys(windows, jnp.zeros((*windows.shape[:2], 2, windows.shape[3])))


def _tile(q=None, forecast=None, *, windows, positions, length, decoding=False, c=None):
    """A tile of one sequence from arrays without a batch axis."""
    steps = len(positions)
    dim = windows.shape[-1]
    q = np.zeros((steps, windows.shape[0], dim), np.float32) if q is None else q
    width = BLOCKS * UNIT.windows_per_block
    pad = [(0, 0), (0, width - windows.shape[1]), (0, 0)]
    index = {"key_means": _part(np.pad(windows, pad))}
    if c is not None:
        index["importance"] = _part(np.pad(c, pad[:2])[..., None])
    return SelectionTile(
        q=jnp.asarray(q, jnp.float32)[None],
        forecast=None if forecast is None else jnp.asarray(forecast, jnp.float32)[None],
        positions=jnp.asarray(positions, jnp.int32)[None],
        length=jnp.array([length]),
        index=index,
        num_blocks=BLOCKS,
        decoding=decoding,
    )


@pytest.fixture(scope="module")
def unit(golden):
    return golden("units_tiny")


@pytest.fixture(scope="module")
def windows(unit):
    """Compressed keys of the 1000-token sequence [K, W, H]."""
    return np.swapaxes(unit["ck/out_1000"], 0, 1)


@pytest.mark.parametrize(
    "length",
    [
        # The others: `test_windows_kept_token_by_token_equal_whole_at_every_length`.
        pytest.param(length, marks=() if length in (5, 32, 47, 1000) else LONG)
        for length in (5, 31, 32, 47, 48, 63, 64, 1000)
    ],
)
def test_compressed_keys(unit, length):
    k = unit["ck/k"][:length].astype(np.float32)
    expected = np.swapaxes(unit[f"ck/out_{length}"], 0, 1)
    whole = _compress(jnp.asarray(k)[None], UNIT)[0]
    np.testing.assert_allclose(whole, expected, atol=1e-6)
    count = expected.shape[1]
    kept = _incremental(k, [length], 64).windows[0, 0, :, :count]
    np.testing.assert_allclose(kept, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rope", "length"),
    [
        ("plain", "plain", 64),
        ("long_short", "longrope", 64),
        ("long_long", "longrope", 128),
    ],
)
def test_rope_tables(unit, golden, name, rope, length):
    import json

    config = RopeConfig()
    if rope == "longrope":
        scaling = json.loads(str(golden("minicpm_tiny")["config_json"]))["rope_scaling"]
        config = RopeConfig(
            kind="longrope",
            original_max=64,
            longrope_max=64 if name == "long_short" else 128,
            short_factors=tuple(scaling["short_factor"]),
            long_factors=tuple(scaling["long_factor"]),
        )
    inv_freq, scale = rope_frequencies(config, 16, length)
    angles = np.arange(64)[:, None] * np.concatenate((inv_freq, inv_freq))
    np.testing.assert_allclose(
        np.cos(angles) * scale, unit[f"rope/{name}_cos"], atol=3e-6
    )
    np.testing.assert_allclose(
        np.sin(angles) * scale, unit[f"rope/{name}_sin"], atol=3e-6
    )
    if name == "long_long":
        x = jnp.asarray(np.swapaxes(unit["rope/x"], 0, 1))[None]
        positions = jnp.arange(64)[None]
        rope = Rope(jnp.asarray(inv_freq), jnp.float32(scale))
        got = apply_rope(x, rope_cos_sin_at(rope, positions))[0]
        expected = np.swapaxes(unit["rope/y_long_long"], 0, 1)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_own_query_scores_of_prefill_and_decode(unit):
    k, q = unit["s1/k"], unit["s1/q"]
    kbar = np.swapaxes(unit["s1/kbar"], 0, 1)
    whole = _compress(jnp.asarray(k)[None], UNIT)[0]
    np.testing.assert_allclose(whole, kbar, atol=1e-6)
    tile = _tile(q, windows=kbar, positions=np.arange(300), length=300)
    scores = _own_scores(tile, UNIT)[0, :, :, :17]
    np.testing.assert_allclose(scores, unit["s1/P"], atol=1e-5)
    last = _tile(q[-1:], windows=kbar, positions=[299], length=300, decoding=True)
    scores = _own_scores(last, UNIT)[0, :, :, :17]
    np.testing.assert_allclose(scores, unit["s1/P_decode_last"], atol=1e-5)


def test_forecast_scores_and_pooling(unit, windows):
    rows = unit["fc/rows"]
    literal = SparseConfig(
        local_blocks=2, block_budget=8, query_blocks=3, mask_future_blocks=False
    )
    tile = _tile(
        forecast=unit["fc/phi"][rows], windows=windows, positions=rows, length=LENGTH
    )
    scores = _scores(tile, literal)
    np.testing.assert_allclose(
        scores[0, :, :, : windows.shape[1]], unit["fc/R_prefill"], atol=1e-4
    )
    own = (tile.positions // 64)[:, None]
    pooled = force_blocks(pool_to_blocks(scores, 4), own, literal)
    np.testing.assert_allclose(pooled[0], unit["fc/pool_prefill"], atol=1e-4)


def test_own_query_pooling(unit, windows):
    rows = unit["fc/rows"]
    tile = _tile(unit["own/q"][rows], windows=windows, positions=rows, length=LENGTH)
    literal = SparseConfig(
        local_blocks=2, block_budget=8, query_blocks=3, mask_future_blocks=False
    )
    scores = _own_scores(tile, literal)
    np.testing.assert_allclose(
        scores[0, :, :, : windows.shape[1]], unit["own/P"], atol=1e-5
    )
    own = (tile.positions // 64)[:, None]
    pooled = force_blocks(pool_to_blocks(scores, 4), own, literal)
    np.testing.assert_allclose(pooled[0], unit["own/pool"], atol=1e-5)


def _lists(tile, sparse, scores):
    return np.asarray(_all_lists(tile, sparse, scores))[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _all_lists(tile, sparse, scores):
    own = (tile.positions // sparse.block_size)[:, None]
    pooled = force_blocks(pool_to_blocks(scores(tile, sparse), 4), own, sparse)
    if tile.importance is not None:
        count = (tile.length[0] - 32) // 16 + 1
        finished = jnp.arange(tile.importance.shape[-1]) < count
        importance = jnp.where(finished, tile.importance, -jnp.inf)
        pooled = constrain_by_importance(pooled, importance, own, sparse)
    return sorted_blocks(top_blocks(pooled, own, tile.length, sparse))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("source", ["own", "fc"])
def test_selection_lists(unit, windows, source, masked):
    import dataclasses

    sparse = dataclasses.replace(UNIT, mask_future_blocks=masked)
    arrays = {"q": unit["own/q"]} if source == "own" else {"forecast": unit["fc/phi"]}
    tile = _tile(**arrays, windows=windows, positions=np.arange(LENGTH), length=LENGTH)
    scores = _own_scores if source == "own" else _scores
    suffix = "_fm" if masked and source == "fc" else ""
    expected = unit[f"{source}/sel_K8{suffix}"]
    np.testing.assert_array_equal(_lists(tile, sparse, scores), expected)
    own = (tile.positions // sparse.block_size)[:, None]
    fast = _own_blocks if source == "own" else _blocks
    lists = top_blocks(fast(tile, sparse), own, tile.length, sparse)
    np.testing.assert_array_equal(np.asarray(sorted_blocks(lists))[0], expected)


@pytest.mark.parametrize(
    ("source", "masked"),
    [
        ("own", True),
        ("fc", False),
        pytest.param("own", False, marks=LONG),
        pytest.param("fc", True, marks=LONG),
    ],
)
def test_block_scores_of_a_tile_equal_pooled_window_scores(
    unit, windows, source, masked
):
    """The form that prefill runs against the readable one, in the middle of a row."""
    import dataclasses

    sparse = dataclasses.replace(UNIT, mask_future_blocks=masked)
    where = slice(200, 290)
    arrays = {"q": unit["own/q"]} if source == "own" else {"forecast": unit["fc/phi"]}
    arrays = {name: array[where] for name, array in arrays.items()}
    tile = _tile(**arrays, windows=windows, positions=np.arange(640, 730), length=735)
    own = (tile.positions // sparse.block_size)[:, None]
    scores = _own_scores if source == "own" else _scores
    want = force_blocks(pool_to_blocks(scores(tile, sparse), 4), own, sparse)
    fast = _own_blocks if source == "own" else _blocks
    got = np.asarray(fast(tile, sparse))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_a_named_kernel_is_not_replaced(unit, windows):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a device")
    tile = _tile(
        forecast=unit["fc/phi"],
        windows=windows,
        positions=np.arange(LENGTH),
        length=LENGTH,
    )
    with pytest.raises(NotImplementedError, match="triton needs a CUDA device"):
        get_selector("sparda").select(tile, get_preset("tiny").model, UNIT, "triton")


def test_decode_selection_equals_golden(unit, windows):
    tile = _tile(
        forecast=unit["fc/phi"][-1:],
        windows=windows,
        positions=[LENGTH - 1],
        length=LENGTH,
        decoding=True,
    )
    got = _lists(tile, UNIT, _scores)
    np.testing.assert_array_equal(got, unit["fc/sel_decode_K8"])


@pytest.mark.parametrize(
    ("name", "source", "masked"),
    [
        ("own", "own", True),
        ("forecast", "fc", False),
        ("forecast_fm", "fc", True),
    ],
)
def test_nosa_two_stage_lists(unit, windows, name, source, masked):
    import dataclasses

    v = unit["nosa/v"]
    gate = jax.nn.softplus(v.reshape(LENGTH, -1) @ unit["nosa/delta"].T)
    c = unit["nosa/A"] * np.asarray(gate)
    np.testing.assert_allclose(c, unit["nosa/c"], atol=1e-5)
    pooled = _compress(jnp.asarray(c)[None, :, :, None], UNIT)[0, :, :, 0]
    np.testing.assert_allclose(pooled, unit["nosa/c_pooled"], atol=1e-5)
    sparse = dataclasses.replace(UNIT, block_budget=9, mask_future_blocks=masked)
    arrays = {"q": unit["own/q"]} if source == "own" else {"forecast": unit["fc/phi"]}
    tile = _tile(
        **arrays,
        windows=windows,
        positions=np.arange(LENGTH),
        length=LENGTH,
        c=unit["nosa/c_pooled"],
    )
    scores = _own_scores if source == "own" else _scores
    got = _lists(tile, sparse, scores)
    np.testing.assert_array_equal(got, unit[f"nosa/sel_{name}"])


def test_windows_kept_token_by_token_equal_whole_at_every_length(unit):
    """1 … 200 tokens, one by one; the raw tail's length is implied by the count."""
    k = unit["ck/k"][:200].astype(np.float32)
    whole = np.asarray(_compress(jnp.asarray(k)[None], UNIT)[0])
    keys = _incremental(k, [], 16)

    step = jax.jit(
        lambda keys, piece, start: append_windows(
            keys, 0, piece, start=start, count=jnp.array([1]), sparse=UNIT
        )
    )
    for length in range(1, 201):
        piece = jnp.asarray(k[None, length - 1 : length])
        keys = step(keys, piece, jnp.array([length - 1]))
        count = max(0, (length - 32) // 16 + 1)
        np.testing.assert_allclose(
            keys.windows[0, 0, :, :count], whole[:, :count], atol=1e-6
        )
        # The growing half holds exactly the tokens behind the last whole half.
        tail = k[length // 16 * 16 : length].sum(0)
        np.testing.assert_allclose(keys.halves[0, 0, :, 1], tail, atol=1e-5)
