"""Decode with experts is timed beside a dense model of the same active size."""

import json

import pytest

from benchmarks import moe_decode
from benchmarks.moe_decode import (
    Round,
    dense_twin,
    experts_in_use,
    figures,
    times_dense,
)
from sparda_jax.models.presets import get_preset
from sparda_jax.models.spec import num_parameters


def test_the_dense_model_has_as_wide_an_mlp_as_a_token_uses():
    experts = get_preset("qwen3-30b-a3b").model
    dense = dense_twin(experts)
    assert dense.ffn_size == 8 * 768 and dense.dense_mlp
    unused = 120 * 3 * experts.hidden_size * experts.ffn_size
    router = experts.hidden_size * experts.num_experts
    left = num_parameters(experts) - experts.num_layers * (unused + router)
    assert num_parameters(dense) == left


def test_experts_in_use_are_those_of_a_token_and_at_most_all():
    experts = get_preset("qwen3-30b-a3b").model
    assert experts_in_use(experts, 1) == pytest.approx(8)
    assert experts_in_use(experts, 2) == pytest.approx(15.5)
    assert experts_in_use(experts, 1000) == pytest.approx(128)


def test_a_preset_without_experts_is_refused(capsys):
    assert moe_decode.main(["--model", "tiny"]) == 2
    assert "--model='tiny' is not allowed" in capsys.readouterr().err


def test_a_call_beside_its_steps_is_what_two_calls_of_a_round_tell_apart():
    one = Round(short=3 + 8 * 2, long=3 + 48 * 2, steps=48)
    assert one.call == pytest.approx(3)
    found = figures([one, Round(16, 96, 48), Round(16, 144, 48)], batch=4)
    assert found["step_ms"] == pytest.approx(99 / 48 * 1e3)
    assert (found["least_ms"], found["most_ms"]) == (2e3, 3e3)
    assert found["tokens_per_second"] == pytest.approx(4 * 48 / 99)


def test_a_moment_that_disturbs_both_leaves_their_ratio():
    dense = [Round(8, 48, 48), Round(24, 144, 48), Round(8, 48, 48)]
    experts = [Round(16, 96, 48), Round(48, 288, 48), Round(20, 120, 48)]
    assert times_dense(dense, experts) == {
        "times_dense": 2.0,
        "times_dense_least": 2.0,
        "times_dense_most": 2.5,
        "times_dense_by_least": 2.0,
    }


@pytest.mark.slow
def test_both_are_timed_for_every_batch(tmp_path):
    out = tmp_path / "rows.jsonl"
    words = "--model tiny-moe --context 8192 --batch 1 2 --steps 9 --rounds 2 --out"
    words = words.split()
    assert moe_decode.main([*words, str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["mlp"], row["batch"]) for row in rows] == [
        *(("dense", 1), ("experts", 1)),
        *(("dense", 2), ("experts", 2)),
    ]
    dense, experts = rows[0]["rounds_ms"], rows[1]["rounds_ms"]
    ratios = [b / a for a, b in zip(dense, experts, strict=True)]
    assert rows[1]["times_dense"] == pytest.approx(sum(ratios) / 2)
    assert rows[1]["read_gb"] == rows[0]["read_gb"] < rows[3]["read_gb"]
