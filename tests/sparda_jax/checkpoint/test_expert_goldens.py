"""Models with experts give the logits that transformers gives.

`moe_tiny.npz` holds, of each model, the config.json that transformers 5.24 wrote, names
and shapes of the tensors beside it and the logits of 40 tokens. The weights are drawn
here as they were there.
"""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import sparda_jax as sj
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.checkpoint.source import open_checkpoint

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens" / "moe_tiny.npz"
NAMES = ("qwen3_moe", "qwen3_moe_unnormalized", "mixtral", "qwen2_moe")


def _write(folder: pathlib.Path, name: str) -> tuple[pathlib.Path, dict]:
    with np.load(GOLDENS) as goldens:
        values, shapes = (
            json.loads(str(goldens[f"{name}.{part}"])) for part in ("config", "names")
        )
    rng, tensors = np.random.default_rng(7), {}
    for key in sorted(shapes):
        drawn = rng.standard_normal(shapes[key]).astype(np.float32)
        tensors[key] = 1 + 0.1 * drawn if drawn.ndim == 1 else 0.3 * drawn
    folder.mkdir()
    safetensors.numpy.save_file(
        {key: np.asarray(array, np.float32) for key, array in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(values))
    return folder, tensors


LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    "name",
    [
        # As the first, but for what `test_every_form_gives_the_oracles_sum` has too.
        pytest.param(name, marks=LONG if name in ("qwen3_moe_unnormalized",) else ())
        for name in NAMES
    ],
)
def test_logits_are_those_of_transformers(name, tmp_path):
    folder, _ = _write(tmp_path / name, name)
    with np.load(GOLDENS) as goldens:
        ids, wanted = goldens["ids"], goldens[f"{name}.logits"]
    lm = sj.load(folder, storage="stacked", dtype="float32")
    np.testing.assert_allclose(sj.forward(lm, ids), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_written_directory_is_the_same_model(name, tmp_path):
    folder, tensors = _write(tmp_path / name, name)
    source = open_checkpoint(folder)
    save_hf(tmp_path / "again", source.config, source.load())
    again = open_checkpoint(tmp_path / "again")
    assert again.config == source.config
    assert again.fingerprint == source.fingerprint
    stored = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert {key: array.shape for key, array in stored.items()} == {
        key: array.shape for key, array in tensors.items()
    }
    for key, array in tensors.items():
        np.testing.assert_array_equal(stored[key], array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 9}, r"experts\.8\..*weight is missing"),
        (
            {"num_local_experts": 7},
            r"mlp\.gate\.weight has .* wanted \[7, 32\]",
        ),
        ({"num_experts": 4}, "num_local_experts = 8, allowed: num_experts, 4"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"num_experts_per_tok": 9}, "experts_per_token=9"),
        ({"moe_intermediate_size": 23}, r"experts\.gate_proj.*wanted \[8, 23, 32\]"),
        ({"model_type": "qwen3"}, "num_local_experts"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, tmp_path):
    folder, _ = _write(tmp_path / "m", "qwen3_moe")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(sj.CheckpointError, match=message):
        open_checkpoint(folder)
