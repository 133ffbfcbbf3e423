"""lm-eval's `local-completions` gets the log-probabilities of `forward`.

`make test-slow` installs it without what its tasks and metrics require.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from serving_client import run_client

import sparda_jax as sj

# Reads pairs of context and continuation, writes log-likelihoods.
_LOGLIKELIHOODS = """
import json, os, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, pairs = sys.argv[1], json.loads(sys.argv[2])
client = LocalCompletionsAPI(  # its tokenizer wants the key itself
    base_url=url, model="tiny-served", tokenizer_backend="remote", batch_size=2,
    auth_token=os.environ["OPENAI_API_KEY"],
)
requests = [Instance("loglikelihood", {}, tuple(p), i) for i, p in enumerate(pairs)]
print("found", json.dumps(client.loglikelihood(requests)))
"""


@pytest.mark.slow
def test_lm_eval_gets_the_log_likelihoods_of_forward(server, lm_eval_python):
    pairs = [("ab the in", " on"), ("the", " stop op"), ("a" * 200, "bc in")]
    url = f"{server.url}/v1/completions"
    script = ("-c", _LOGLIKELIHOODS, url, json.dumps(pairs))
    found = json.loads(run_client(*lm_eval_python, *script).partition("found ")[2])
    resident = dataclasses.replace(server.lm, cache=sj.CacheConfig())
    encode = server.lm.tokenizer.encode
    for (context, rest), (total, greedy) in zip(pairs, found, strict=True):
        # As lm-eval joins a pair: a token that stands over both ends with the first.
        ids, before = encode(context), len(encode(context))
        ids += encode(context + rest)[before:]
        scores = np.asarray(jax.nn.log_softmax(sj.forward(resident, ids)))
        own = [float(scores[i - 1, ids[i]]) for i in range(before, len(ids))]
        assert total == pytest.approx(sum(own), abs=1e-3)
        best = [int(scores[i - 1].argmax()) for i in range(before, len(ids))]
        assert greedy == (best == ids[before:])
