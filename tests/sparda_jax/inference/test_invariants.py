"""What must hold whatever the weights: the invariants of the architecture."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.lowering import cuda_lowering_text

LONG = [pytest.mark.slow, pytest.mark.long]
# `infllm_v2` differs from `sparda` by who chooses the blocks alone; the goldens hold
# `dense` and `nosa` in the default tests too.
ATTENTIONS = (
    pytest.param("dense", marks=LONG),
    "sparda",
    pytest.param("infllm_v2", marks=LONG),
    pytest.param("nosa", marks=pytest.mark.slow),
)
ATOL = 2e-5
# A first example compiles; the machine's speed is not what these tests are about.
EXAMPLES = settings(max_examples=8, deadline=None)


def _close(a, b):
    np.testing.assert_allclose(a, b, atol=ATOL, rtol=1e-5)


def _same_row(whole, row, got, got_row, first, count):
    """Tokens first … first + count − 1 of a row equal those of another result."""
    span = slice(first, first + count)
    _close(whole.logits[row, span], got.logits[got_row, :count])
    np.testing.assert_array_equal(
        whole.blocks[:, row, :, span], got.blocks[:, got_row, :, :count]
    )


@pytest.mark.parametrize("attention", ATTENTIONS[1:])
def test_all_blocks_selected_is_dense(runner, token_ids, attention):
    """A budget of all blocks, through the block lists, against dense attention."""
    ids = token_ids(500)
    # 8 blocks are present; the cache has room for 24, so lists are really made.
    sparse = runner(attention, block_budget=8)
    dense = runner("dense", nosa=attention == "nosa")
    assert sparse.settings.selector.lists_blocks(24, sparse.settings.sparse)
    got = sparse.prefill(sparse.empty(1), [ids], [0])
    expected = dense.prefill(dense.empty(1), [ids], [0])
    _close(got.logits[:, :500], expected.logits[:, :500])
    step = sparse.decode(got.cache, [5], [500])
    expected = dense.decode(expected.cache, [5], [500])
    _close(step.logits, expected.logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decode_row_is_prefill_row(runner, token_ids, attention):
    """Tokens fed one by one across block and window borders, against one prompt."""
    ids = token_ids(512, seed=2)
    run = runner(attention)
    whole = run.prefill(run.empty(1), [ids], [0])
    start = 440
    cache = run.prefill(run.empty(1), [ids[:start]], [0]).cache
    for position in range(start, 512):
        step = run.decode(cache, [ids[position]], [position])
        cache = step.cache
        _same_row(whole, 0, step, 0, position, 1)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padded_row_is_row_alone(runner, token_ids, attention):
    run = runner(attention)
    lengths = (512, 1, 333, 64, 31)
    rows = [token_ids(length, seed=length) for length in lengths]
    batch = run.prefill(run.empty(5), rows, [0] * 5)
    steps = run.decode(batch.cache, [7] * 5, lengths)
    for index, row in enumerate(rows):
        alone = run.prefill(run.empty(1), [row], [0])
        _same_row(batch, index, alone, 0, 0, len(row))
        step = run.decode(alone.cache, [7], [len(row)])
        _close(steps.logits[index], step.logits[0])
        np.testing.assert_array_equal(steps.blocks[:, index], step.blocks[:, 0])


@pytest.mark.parametrize(
    "attention", [*ATTENTIONS[:3], pytest.param("nosa", marks=LONG)]
)
@pytest.mark.parametrize(
    "tile_size",
    [
        pytest.param(64, marks=LONG),
        100,  # divides neither a block nor the prompt
        pytest.param(512, marks=LONG),
    ],
)
def test_any_tile_size_gives_the_same(runner, token_ids, attention, tile_size):
    run = runner(attention)
    ids = token_ids(500, seed=3)
    expected = run.prefill(run.empty(1), [ids], [0], tile_size=128)
    got = run.prefill(run.empty(1), [ids], [0], tile_size=tile_size)
    _same_row(expected, 0, got, 0, 0, 500)


@pytest.mark.parametrize("attention", ATTENTIONS)
# The shorter ones are as wide as the prompts of other tests: one program.
@pytest.mark.parametrize("longest", [256, pytest.param(500, marks=LONG)])
def test_appended_turn_is_one_prompt(runner, token_ids, attention, longest):
    run, lengths = runner(attention), st.integers(1, longest)

    @EXAMPLES
    @given(first=lengths, second=lengths)
    def check(first, second):
        ids = token_ids(first + second, seed=4)
        cache = run.prefill(run.empty(1), [ids[:first]], [0]).cache
        turn = run.prefill(cache, [ids[first:]], [first])
        width = 512 if longest == 256 else 1024
        whole = run.prefill(run.empty(1), [ids], [0], width=width)
        _same_row(whole, 0, turn, 0, first, second)

    check()


@EXAMPLES
@given(starts=st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_ragged_turns_keep_their_own_positions(runner, token_ids, starts):
    """Rows of different lengths each get a turn of a different length."""
    run = runner("sparda")
    starts = *starts, 1, 64, 100  # as many rows as in `test_padded_row_is_row_alone`
    rows = [token_ids(start + 30 + 15 * i, i) for i, start in enumerate(starts)]
    heads = [row[:start] for row, start in zip(rows, starts, strict=True)]
    tails = [row[start:] for row, start in zip(rows, starts, strict=True)]
    cache = run.prefill(run.empty(5), heads, [0] * 5).cache
    turn = run.prefill(cache, tails, starts)
    for index, row in enumerate(rows):
        whole = run.prefill(run.empty(1), [row], [0])
        start = starts[index]
        _same_row(whole, 0, turn, index, start, len(row) - start)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_scanned_is_unrolled(runner, token_ids, attention):
    ids = token_ids(300, seed=5)
    runs = [runner(attention, storage=name) for name in ("per_layer", "stacked")]
    results = [run.prefill(run.empty(1), [ids], [0]) for run in runs]
    _same_row(results[0], 0, results[1], 0, 0, 300)
    steps = [
        run.decode(result.cache, [9], [300])
        for run, result in zip(runs, results, strict=True)
    ]
    _same_row(steps[0], 0, steps[1], 0, 0, 1)


@pytest.mark.slow
@pytest.mark.long  # both against the reference: `test_model_goldens`
def test_literal_selection_differs_from_masked_somewhere(runner, token_ids):
    """The parity switch does what docs/algorithm.md §7.2 says, so it is not a no-op."""
    ids = token_ids(512, seed=6)
    masked, literal = (
        runner("sparda", block_budget=5, mask_future_blocks=flag)
        for flag in (True, False)
    )
    a = masked.prefill(masked.empty(1), [ids], [0]).blocks
    b = literal.prefill(literal.empty(1), [ids], [0]).blocks
    differs = np.any(np.asarray(a != b), axis=(0, 1, 2, 4))
    late = np.arange(512) % 64 >= 48
    assert differs[late].any()
    # Later layers see other inputs; the first one differs at late positions only.
    first = np.any(np.asarray(a[0] != b[0]), axis=(0, 1, 3))
    assert not first[~late].any()


def test_block_order_does_not_matter(runner, token_ids):
    """A shuffled slot list attends to the same keys."""
    from pallas_kernels.paged_decode_attention.api import paged_decode_attention

    rng = np.random.default_rng(0)
    kv = jnp.asarray(rng.standard_normal((1, 2, 6, 64, 2, 16)), jnp.float32)
    q = jnp.asarray(rng.standard_normal((1, 8, 16)), jnp.float32)
    slots = np.array([[[0, 2, 3, 5], [1, 2, 4, 5]]], np.int32)
    lengths = np.where(slots == 5, 17, 64).astype(np.int32)
    order = [2, 0, 3, 1]
    expected = paged_decode_attention(
        q, kv, slots=jnp.asarray(slots), slot_lengths=jnp.asarray(lengths)
    )
    got = paged_decode_attention(
        q,
        kv,
        slots=jnp.asarray(slots[..., order]),
        slot_lengths=jnp.asarray(lengths[..., order]),
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_no_buffer_grows_with_tokens_times_keys(runner):
    """Scratch of a 16k-token prefill is O(tile): far below one T×W float32 array."""
    from sparda_jax.inference.prefill import prefill
    from sparda_jax.models.rope import model_rope

    run = runner("sparda", storage="stacked")
    tokens, config = 16384, run.settings.config
    from sparda_jax.cache.resident import init_cache

    def whole(model, tokens, count):
        cache = init_cache(
            config,
            run.settings.sparse,
            run.settings.indices,
            batch=1,
            capacity=tokens.shape[1],
            dtype=jnp.float32,
            storage="stacked",
        )
        rope = model_rope(config, tokens.shape[1])
        carry = prefill(
            model,
            cache,
            tokens,
            jnp.zeros_like(count),
            count,
            rope,
            run.settings,
            tile_size=128,
        )
        return carry.hidden, carry.cache

    shape = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = jax.jit(whole).lower(run.model, shape, count).compile().memory_analysis()
    windows = tokens // 16
    score_matrix = config.num_kv_heads * tokens * windows * 4
    hidden = tokens * config.hidden_size * 4
    # Forecast, rotation and padded copies are a few times the hidden states.
    assert memory.temp_size_in_bytes < 8 * hidden
    assert memory.temp_size_in_bytes < score_matrix / 4


@pytest.mark.parametrize(
    ("attention", "kind", "kernels"),
    [
        pytest.param(
            "infllm_v2",
            "NVIDIA H200",
            {"block_scores_lse_triton", "block_scores_triton"},
            marks=LONG,
        ),
        ("sparda", "NVIDIA H200", {"block_scores_triton"}),
        ("sparda", "NVIDIA X100", set()),
    ],
)
def test_prefill_takes_the_kernels_recorded_for_the_device(
    runner, attention, kind, kernels
):
    """Lowered for a GPU with records, and for one without."""
    run = runner(attention)
    tokens = np.zeros((1, 256), np.int32)

    def whole(model, cache):
        chosen = dataclasses.replace(run, model=model)
        return chosen.prefill(cache, tokens, [0], width=256).logits

    cache = jax.eval_shape(lambda: run.empty(1))
    text = cuda_lowering_text(whole, run.model, cache, kind=kind)
    assert set(re.findall(r"block_scores_\w*triton", text)) == kernels
    assert ("triton" in text) == bool(kernels)
