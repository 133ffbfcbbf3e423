"""What the prefill benchmark counts and imposes, against brute force."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from trace_cases import drifting_trace

from benchmarks import imposed, parts, prefill
from benchmarks.traced import map_trace, prefill_lists
from sparda_jax.config import SparseConfig
from sparda_jax.models.presets import get_preset
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors import get_selector


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 24, 25, 61])
def test_keys_read_are_those_of_a_loop(tokens):
    block, budget = 8, 3
    wanted = dense = 0
    for token in range(tokens):
        own = token // block
        first = max(0, own - (budget - 1))
        wanted += token - first * block + 1
        dense += token + 1
    assert prefill.keys_read(tokens, block, budget) == wanted
    assert prefill.keys_read(tokens, block, None) == dense


def test_neighbours_take_the_list_of_the_first_of_them():
    real = np.arange(2 * 10 * 3).reshape(1, 2, 10, 3)
    lists = np.asarray(imposed.agreeing_lists(jnp.asarray(real), 4))
    assert lists.shape == real.shape
    for token in range(10):
        np.testing.assert_array_equal(lists[:, :, token], real[:, :, token // 4 * 4])


def test_a_trace_is_imposed_on_tokens_and_layers():
    trace = drifting_trace()
    lists = map_trace(trace, layers=2, rows=1, kv_heads=2, scored=trace.scored)
    sparse = SparseConfig(block_budget=16, local_blocks=2)
    selector = imposed.imposing(get_selector("random"), lists)

    def chosen(first, layer):
        tile = SelectionTile(
            q=jnp.zeros((1, 32, 2, 4)),
            forecast=None,
            positions=first + jnp.arange(32)[None],
            length=jnp.asarray([first + 32]),
            index={},
            num_blocks=512,
            decoding=False,
            layer=layer,
        )
        blocks = selector.select(tile, get_preset("minicpm4.1-8b").model, sparse)
        return np.sort(np.asarray(blocks))

    for first, layer in ((16384, 0), (16384, 1), (16416, 1)):
        wanted = prefill_lists(lists, layer, tokens=32, sparse=sparse, start=first)
        found = chosen(first, layer)
        np.testing.assert_array_equal(found, np.sort(wanted)[..., -found.shape[-1] :])


def test_in_decode_a_row_alone_takes_the_lists_of_the_first():
    trace = drifting_trace()
    lists = map_trace(trace, layers=2, rows=1, kv_heads=2, scored=trace.scored)
    sparse = SparseConfig(block_budget=16, local_blocks=2)
    base = get_selector("random")
    model = get_preset("minicpm4.1-8b").model

    def chosen(selector, positions):
        tile = SelectionTile(
            q=jnp.zeros((len(positions), 1, 2, 4)),
            forecast=None,
            positions=jnp.asarray(positions)[:, None],
            length=jnp.asarray(positions) + 1,
            index={},
            num_blocks=512,
            decoding=True,
            layer=1,
        )
        return np.sort(np.asarray(selector.select(tile, model, sparse)))[:, :, 0]

    found = chosen(imposed.imposing(base, lists, decode=True), [16384] * 3)
    wanted = prefill_lists(lists, 1, tokens=1, sparse=sparse, start=16384)
    wanted = np.sort(wanted)[0, :, 0, -found.shape[-1] :]
    np.testing.assert_array_equal(found[0], wanted)
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()
    alone = chosen(imposed.imposing(base, lists, decode=True), [16384])
    np.testing.assert_array_equal(alone[0], found[0])
    np.testing.assert_array_equal(
        chosen(imposed.imposing(base, lists), [16384]), chosen(base, [16384])
    )


def test_gaps_lie_between_what_ends_last_and_what_begins_next():
    events = [
        ("s", "a_1", 0.0, 10.0),
        ("s", "b_2", 2.0, 3.0),
        ("s", "c_3", 1010.0, 5.0),
        ("s", "a_4", 1015.0, 5.0),
        ("s", "c_5", 3020.0, 5.0),
    ]
    [gap] = parts.largest_gaps(events, 4)
    assert (gap["behind"], gap["before"], gap["times"]) == ("a", "c", 2)
    assert (gap["milliseconds"], gap["longest_ms"]) == (3.0, 2.0)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("gemm_fusion_dot_12", "products"),
        ("nvjet_tst_128x256_64x4", "products"),
        ("block_scores_triton", "selection"),
        ("choose_blocks_triton", "choice"),
        ("sort_7", "choice"),
        ("block_sparse_attention_mosaic_gpu", "attention"),
        ("loop_convert_fusion_3", "rest"),
    ],
)
def test_kernels_belong_to_parts(kernel, part):
    assert parts.part_of(kernel) == part


def test_first_calls_side_by_side_are_over_before_anything_is_timed():
    seen, lock = [], threading.Lock()

    def first(name):
        with lock:
            seen.append(name)
        if name == "wrong":
            raise ValueError(name)
        return name.upper()

    a, wrong, b = prefill.begin_together(first, ["a", "wrong", "b"])
    assert seen[0] == "a" and sorted(seen) == ["a", "b", "wrong"]
    assert [a(), b()] == ["A", "B"]
    with pytest.raises(ValueError, match="wrong"):
        wrong()


def test_ratios_name_what_is_faster():
    row = {"context": 64, "batch": 1, "tile": 8}
    rows = [
        row | {"attention": "dense", "cache": "resident", "median_ms": 30.0},
        row | {"attention": "sparda", "cache": "resident", "median_ms": 10.0},
        row | {"attention": "sparda", "cache": "offload", "median_ms": 12.5},
    ]
    lines = prefill.ratios(rows)
    assert lines == [
        "64 tokens, batch 1: sparda resident is 3.000 times as fast as dense resident",
        "64 tokens, batch 1: sparda offload is 0.800 times as fast as sparda resident",
    ]
