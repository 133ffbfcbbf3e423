"""The harness's requests: log-likelihoods that add up, answers that end where asked."""

import dataclasses
import math

import numpy as np
import pytest
from evaluation_cases import character_tokenizer

import sparda_jax as sj
from sparda_jax.config import ConfigError
from sparda_jax.evaluation import lm_harness
from sparda_jax.evaluation.token_scores import TokenScores


@pytest.fixture(scope="module")
def lm():
    return dataclasses.replace(sj.load("tiny"), tokenizer=character_tokenizer())


@pytest.fixture
def scored(monkeypatch):
    """Every token's surprise is its own id; even ones are the likeliest."""
    seen = []

    def score(lm, ids):
        seen.append(list(ids))
        rest = np.asarray(ids[1:], np.float32)
        return TokenScores(rest, rest % 2 == 0)

    monkeypatch.setattr(lm_harness, "score_tokens", score)
    return seen


def _ids(lm, text):
    return lm.tokenizer.encode(text)


def test_only_the_continuation_counts(lm, scored):
    total, greedy = lm_harness.loglikelihood(lm, "The sky is", " blue")
    assert total == -sum(_ids(lm, " blue"))
    assert greedy == all(n % 2 == 0 for n in _ids(lm, " blue"))
    assert scored[0] == _ids(lm, "The sky is blue")
    # A blank at the context's end belongs to the continuation.
    assert lm_harness.loglikelihood(lm, "The sky is ", "blue")[0] == total
    # tiny has no BOS: its end token stands before a text without a context.
    assert lm_harness.loglikelihood(lm, "", "blue")[0] == -sum(_ids(lm, "blue"))
    assert scored[-1] == [1, *_ids(lm, "blue")]
    with pytest.raises(ConfigError, match="continuation has 0 tokens"):
        lm_harness.loglikelihood(lm, "x", "")


def test_windows_count_each_token_once(lm, scored):
    text = "".join(chr(97 + n % 26) for n in range(10_000))
    assert lm_harness.rolling_loglikelihood(lm, text) == -sum(_ids(lm, text))
    assert [len(ids) for ids in scored] == [4096, 4096, 1811]
    assert scored[1][0] == scored[0][-1]


def test_too_long_a_context_loses_its_beginning(lm, scored):
    lm_harness.loglikelihood(lm, "ab " * 3000, "c")
    (ids,) = scored
    assert len(ids) == 4096 and ids[-1] == _ids(lm, "c")[0]


def test_generation_takes_the_harness_arguments(lm, monkeypatch):
    seen = {}

    def generate(lm, prompts, **options):
        seen.update(options, length=len(prompts[0]))
        return type("Out", (), {"texts": ["answer"]})

    monkeypatch.setattr(lm_harness, "generate", generate)
    arguments = {"until": ["\n", ""], "do_sample": False, "temperature": 0.7}
    given = {**arguments, "max_gen_toks": 9}
    assert lm_harness.generate_until(lm, "x" * 5000, given) == "answer"
    assert seen == {"max_new_tokens": 9, "stop": ["\n"], "length": 4087}
    seen.clear()
    given = {"until": "a", "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    lm_harness.generate_until(lm, "x", given)
    assert seen["temperature"] == 0.7 and seen["top_p"] == 0.9
    with pytest.raises(ConfigError, match="beams=3 is not allowed"):
        lm_harness.generate_until(lm, "x", {"beams": 3})


def test_without_the_harness(lm, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError, match=r"sparda-jax\[lm-eval\]"):
        lm_harness.harness_model(lm)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_real_harness_runs_a_task(lm):
    """Its own evaluator, on documents that stand here: no data set is fetched."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model = lm_harness.harness_model(lm)
    pairs = [("The sky is", " blue"), ("Grass", " is green")]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    answers = model.loglikelihood(asked)
    logits = np.asarray(sj.forward(lm, _ids(lm, "The sky is blue")))
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tail = _ids(lm, " blue")
    rows = logs[-1 - len(tail) : -1]
    wanted = rows[np.arange(len(tail)), tail].sum()
    assert answers[0][0] == pytest.approx(float(wanted), abs=1e-3)
    rolling = Instance("loglikelihood_rolling", {}, ("blue",), 0)
    assert model.loglikelihood_rolling([rolling])[0] == pytest.approx(
        lm_harness.loglikelihood(lm, "", "blue")[0], abs=1e-4
    )
    until = Instance("generate_until", {}, ("abc", {"max_gen_toks": 4}), 0)
    (text,) = model.generate_until([until])
    assert text == sj.generate(lm, [_ids(lm, "abc")], max_new_tokens=4).texts[0]
    assert math.isfinite(answers[1][0])
