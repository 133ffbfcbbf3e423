"""Perplexity against NumPy on all logits."""

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.evaluation.perplexity import perplexity


def test_it_is_the_logits_own():
    sparse = sj.SparseConfig(local_blocks=1, block_budget=3)
    lm = sj.load("tiny", attention="infllm_v2", sparse=sparse, storage="stacked")
    ids = np.random.default_rng(0).integers(2, 128, 600)
    logits = np.asarray(sj.forward(lm, ids.tolist()), np.float64)[:-1]
    own = np.take_along_axis(logits, ids[1:, None], axis=-1)[:, 0]
    surprises = np.log(np.exp(logits).sum(-1)) - own
    for first in (1, 192):
        expected = np.exp(surprises[first - 1 :].mean())
        assert perplexity(lm, [ids], first=first) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(sj.ConfigError, match="must be below the 600 tokens"):
        perplexity(lm, [ids], first=600)
