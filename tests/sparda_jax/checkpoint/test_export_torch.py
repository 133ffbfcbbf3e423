"""What is exported, opened by those who read it: PyTorch and transformers."""

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.checkpoint.export import export_forecast_file
from sparda_jax.checkpoint.forecast import ForecastWeights
from sparda_jax.config import SparseConfig

# Of their own imports.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SPARSE = SparseConfig(local_blocks=4, block_budget=12)


def _weights(config) -> ForecastWeights:
    rng = np.random.default_rng(0)
    size = config.num_kv_heads * config.head_dim
    shape = (config.num_layers, size, config.hidden_size)
    values = rng.standard_normal(shape).astype(np.float32)
    return ForecastWeights(values[1:], values[0], None, SPARSE)


def test_torch_opens_the_references_checkpoint(kit, tmp_path):
    """Safely, strictly, under the reference's names.

    Source: docs/algorithm.md §1.3.
    """
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    config, wanted = kit.config, _weights(kit.config)
    hidden, size = config.hidden_size, config.num_kv_heads * config.head_dim

    class Attention(torch.nn.Module):
        def __init__(self, first: bool):
            super().__init__()
            self.q_future_proj = torch.nn.Linear(hidden, size, bias=False)
            if first:
                self.q_curr_proj = torch.nn.Linear(hidden, size, bias=False)

    class Layer(torch.nn.Module):
        def __init__(self, first: bool):
            super().__init__()
            self.self_attn = Attention(first)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layers = [Layer(index == 0) for index in range(config.num_layers)]
            self.layers = torch.nn.ModuleList(layers)

    class Causal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model()

    for suffix in ("pt", "safetensors"):
        path = tmp_path / f"heads.{suffix}"
        export_forecast_file(path, wanted, base="a model")
        if suffix == "pt":
            held = torch.load(path, weights_only=True)
            assert held["step"] == 0 and held["base_model_path"] == "a model"
            assert held["sparse_config"]["topk"] > 0
            state = held["model_state_dict"]
        else:
            state = safetensors.load_file(path)
        module = Causal()
        module.load_state_dict(state, strict=True)
        x = np.random.default_rng(1).standard_normal((5, hidden)).astype(np.float32)
        first = module.model.layers[0].self_attn
        got = first.q_curr_proj(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(got, x @ wanted.current.T, atol=1e-5)
        np.testing.assert_array_equal(
            first.q_future_proj.weight.detach().numpy(), wanted.future[0]
        )


def test_transformers_opens_the_whole_model(kit, tmp_path):
    """An exported directory gives the logits that it gives here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = kit.config
    *_, out = kit.exported(tmp_path, _weights(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, torch_dtype=torch.float32, local_files_only=True
    )
    ids = np.random.default_rng(2).integers(3, config.vocab_size, 40)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids[None])).logits[0].numpy()
    ours = sj.forward(sj.load(out, dtype="float32"), ids.tolist())
    np.testing.assert_allclose(np.asarray(ours), logits, rtol=2e-3, atol=2e-3)
