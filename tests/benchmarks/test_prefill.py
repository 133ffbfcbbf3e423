"""What the prefill benchmark counts and imposes, against brute force."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import prefill


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


def test_groups_of_tokens_choose_the_same_blocks_and_others_do_not():
    real = np.zeros((1, 2, 12, 64), np.float32)
    real[..., 0], real[..., 60:] = np.inf, -np.inf
    positions = jnp.arange(12)[None] + 8
    scores = np.asarray(prefill.agreeing_scores(jnp.asarray(real), positions, 4))
    assert np.all(np.isposinf(scores[..., 0])) and np.all(np.isneginf(scores[..., 60:]))
    drawn = scores[..., 1:60]
    assert drawn.min() >= 0 and drawn.max() < 1
    best = np.argsort(-drawn, axis=-1)[..., :8]
    chosen = [[set(best[0, head, t]) for t in range(12)] for head in range(2)]
    for head in range(2):
        for t in range(12):
            same = chosen[head][t] == chosen[head][t // 4 * 4]
            assert same, (head, t)
        assert len({frozenset(c) for c in chosen[head]}) == 3
    assert chosen[0] != chosen[1]


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
    assert prefill.part_of(kernel) == part


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
