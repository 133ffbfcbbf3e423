"""Decode with experts is timed beside a dense model of the same active size."""

import json

import pytest

from benchmarks import moe_decode
from benchmarks.moe_decode import dense_twin, experts_in_use
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


@pytest.mark.slow
def test_both_are_timed_for_every_batch(tmp_path):
    out = tmp_path / "rows.jsonl"
    words = "--model tiny-moe --context 8192 --batch 1 2 --steps 8 --out".split()
    assert moe_decode.main([*words, str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["mlp"], row["batch"]) for row in rows] == [
        *(("dense", 1), ("dense", 2)),
        *(("experts", 1), ("experts", 2)),
    ]
    assert rows[2]["times_dense"] == rows[2]["step_ms"] / rows[0]["step_ms"]
    assert rows[2]["read_gb"] == rows[0]["read_gb"] < rows[3]["read_gb"]
