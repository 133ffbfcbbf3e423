"""lm-eval's `local-completions` gets the log-probabilities of `forward`.

The harness is heavy, and no part of the tests' extra: pip install 'lm_eval[api]'.
"""

import dataclasses

import jax
import numpy as np
import pytest
from serving_client import KEY

import sparda_jax as sj


@pytest.mark.slow
def test_log_likelihoods_are_those_of_forward(server):
    clients = pytest.importorskip(
        "lm_eval.models.openai_completions", reason="lm_eval[api] is not installed"
    )
    from lm_eval.api.instance import Instance  # pyrefly: ignore

    client = clients.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="tiny-served",
        auth_token=KEY,
        tokenizer_backend="remote",
        batch_size=2,
    )
    pairs = [("ab the in", " on"), ("the", " stop op"), ("a" * 200, "bc in")]
    requests = [
        Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)
    ]
    found = client.loglikelihood(requests)
    resident = dataclasses.replace(server.lm, cache=sj.CacheConfig())
    encode = server.lm.tokenizer.encode
    for (context, rest), (total, greedy) in zip(pairs, found, strict=True):
        ids, before = encode(context + rest), len(encode(context))
        scores = np.asarray(jax.nn.log_softmax(sj.forward(resident, ids)))
        own = [float(scores[i - 1, ids[i]]) for i in range(before, len(ids))]
        assert total == pytest.approx(sum(own), abs=1e-3)
        best = [int(scores[i - 1].argmax()) for i in range(before, len(ids))]
        assert greedy == (best == ids[before:])
