import dataclasses
import json
import math
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.checkpoint.source import open_checkpoint
from sparda_jax.checkpoint.tensors import fingerprint
from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.models import spec

LISTS = {"short_factors": (1.0, 1.5, 2.0, 3.0), "long_factors": (1.0, 2.0, 4.0, 8.0)}
ROPES = {
    "plain": RopeConfig(theta=5e5),
    "linear": RopeConfig(kind="linear", factor=2.0),
    "llama3": RopeConfig(kind="llama3", factor=8.0, original_max=64, theta=5e5),
    "yarn": RopeConfig(
        kind="yarn", factor=4.0, original_max=64, beta_fast=16.0, attention_factor=1.25
    ),
    "longrope": RopeConfig(kind="longrope", original_max=64, longrope_max=256, **LISTS),
    "divisors": RopeConfig(
        kind="longrope",
        original_max=256,
        longrope_max=256,
        attention_factor=1.0,
        **LISTS,
    ),
}
FEATURES = {
    "llama": {},
    "untied": {"tie_embeddings": False, "bos_id": 1, "eos_ids": (2, 5)},
    "biases": {"attention_bias": True, "output_bias": True},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3 biases": {"qk_norm": True, "attention_bias": True, "output_bias": True},
    "nosa": {"key_bias": True, "tie_embeddings": False},
    # 1.4/√7 and 32/3 are no round numbers: both must come back exactly.
    "minicpm": {
        "embed_scale": 12.0,
        "residual_scale": 1.4 / math.sqrt(7),
        "logits_divisor": 32 / 3,
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_round_trip(kit, feature):
    config = dataclasses.replace(kit.config, **FEATURES[feature])
    tensors = kit.tensors(config)
    save_hf(kit.folder / "out", config, tensors)
    source = open_checkpoint(kit.folder / "out")
    assert source.config == config
    assert source.tokenizer is None
    assert source.sparse is None
    loaded = source.load()
    assert list(loaded) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
        assert loaded[name].dtype == np.float32
        assert source.tensors[name].shape == array.shape
    assert source.fingerprint == fingerprint(tensors)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_round_trip(kit, rope):
    config = dataclasses.replace(kit.config, rope=ROPES[rope])
    save_hf(kit.folder / "out", config, kit.tensors(config))
    assert open_checkpoint(kit.folder / "out").config == config


def test_bfloat16_shards_forecast_tokenizer_and_sparse(kit):
    gguf = open_checkpoint(kit.tiny_gguf())
    tensors = gguf.load() | kit.forecast(gguf.config)
    sparse = SparseConfig(local_blocks=4, block_budget=10, dense_len=512)
    save_hf(
        kit.folder / "out",
        gguf.config,
        tensors,
        gguf.tokenizer,
        sparse=sparse,
        dtype="bfloat16",
        shard_bytes=10_000,
    )
    names = {path.name for path in (kit.folder / "out").iterdir()}
    assert "model.safetensors.index.json" in names
    assert "model-00002-of-00007.safetensors" in names
    assert all("." != name[0] for name in names)
    source = open_checkpoint(kit.folder / "out")
    assert source.config == gguf.config
    assert source.sparse == sparse
    loaded = source.load()
    assert set(loaded) == set(tensors)
    for name, array in loaded.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, tensors[name].astype(ml_dtypes.bfloat16))
    # The hash is of the values: rounded ones are another model's; its Forecast is not
    # part of it.
    rounded = {
        n: loaded[n].astype(np.float32) for n, _ in spec.base_shapes(source.config)
    }
    assert source.fingerprint == fingerprint(rounded) == fingerprint(loaded)
    assert source.fingerprint != gguf.fingerprint
    text = "hello <|im_end|> 12 é"
    for special in (False, True):
        ids = source.tokenizer.encode(text, special=special)
        assert ids == gguf.tokenizer.encode(text, special=special)
    message = [{"role": "user", "content": "hello"}]
    assert source.tokenizer.chat(message) == gguf.tokenizer.chat(message)
    for tokenizer in (source.tokenizer, gguf.tokenizer):
        assert tokenizer.chat(message, tools=[{}, {}]) == "2"
    assert source.tokenizer.eos_ids == gguf.tokenizer.eos_ids
    assert source.tokenizer.bos_id == gguf.tokenizer.bos_id
    assert not source.tokenizer.add_bos


def test_fingerprint_tells_models_apart(kit):
    tensors = kit.tensors(kit.config)
    first = fingerprint(tensors)
    assert len(first) == 64
    assert first == fingerprint(dict(reversed(tensors.items())))
    assert first == fingerprint(tensors | kit.forecast(kit.config))
    name = spec.EMBEDDING
    changed = tensors[name].copy()
    changed[-1, -1] += 1
    assert first != fingerprint(tensors | {name: changed})
    assert first != fingerprint(tensors | {name: tensors[name].T})
    assert first != fingerprint({n: a for n, a in tensors.items() if n != name})


@pytest.mark.parametrize("name", ["minicpm_tiny", "nosa_tiny"])
def test_reference_models(golden, tmp_path, name):
    """The reference's own tiny models: names, config.json, Forecast heads."""
    arrays = golden(name)
    values = json.loads(str(arrays["config_json"]))
    stored = {key[2:]: arrays[key] for key in arrays.keys() if key[:2] == "w/"}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    source = open_checkpoint(tmp_path)
    config = source.config
    assert (config.num_layers, config.head_dim, config.key_bias) == (
        3,
        16,
        name == "nosa_tiny",
    )
    assert source.sparse.block_budget == (8 if name == "minicpm_tiny" else 9)
    assert source.sparse.local_blocks == 2
    assert source.sparse.dense_len == -1
    assert "use_q_future_for_topk" in source.ignored_sparse_keys
    # The last layer's Forecast has nothing to select for.
    last = layout.future_name(2)
    assert last in stored and last not in source.tensors
    assert layout.future_name(1) in source.tensors
    for key, array in source.load().items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, stored[key])
    if name == "minicpm_tiny":
        assert config.embed_scale == 3.0
        assert config.residual_scale == 1.4 / math.sqrt(3)
        assert config.logits_divisor == 4.0
        assert config.rope.longrope_max == config.rope.original_max == 2048
    else:
        assert source.sparse.query_blocks == 3


def _config(kit, saved, **changes) -> ModelConfig:
    kit.edit_json(saved / "config.json", lambda values: values.update(changes))
    return open_checkpoint(saved).config


def test_new_style_rope(kit, saved):
    new = {"rope_type": "llama3", "rope_theta": 3e5, "factor": 2.0}
    new |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    new |= {"original_max_position_embeddings": 32}
    config = _config(kit, saved, rope_parameters=new, rope_theta=None)
    assert config.rope == RopeConfig(
        kind="llama3", theta=3e5, factor=2.0, original_max=32
    )


def test_old_style_rope(kit, saved):
    config = _config(kit, saved, rope_scaling={"type": "linear", "factor": 2})
    assert config.rope == RopeConfig(kind="linear", factor=2.0)


def test_yarn_stretches_the_context(kit, saved):
    """Qwen's max_position_embeddings is the length before; others' the one after."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    config = _config(kit, saved, rope_scaling=yarn)
    assert (config.max_context, config.rope.original_max) == (1024, 256)
    assert config.rope.attention_factor is None
    yarn |= {"original_max_position_embeddings": 64, "mscale": 1, "mscale_all_dim": 0.5}
    config = _config(kit, saved, rope_scaling=yarn)
    assert config.max_context == 256
    log = math.log(4.0)
    assert config.rope.attention_factor == (0.1 * log + 1) / (0.05 * log + 1)


def test_tying_follows_the_weights_where_the_file_is_silent(kit, saved):
    assert not _config(kit, saved, tie_word_embeddings=None).tie_embeddings


def test_a_stored_head_that_differs_is_kept_whatever_the_file_says(kit, saved):
    """Many fine-tuned models say they are tied, and hold a head of their own.

    The head that was trained must not be dropped (public report vllm#51063).
    """
    assert not _config(kit, saved, tie_word_embeddings=True).tie_embeddings
    stored = safetensors.numpy.load_file(saved / "model.safetensors")
    source = open_checkpoint(saved)
    np.testing.assert_array_equal(source.tensors[spec.HEAD](), stored[spec.HEAD])

    def last_element(tensors):
        tensors[spec.HEAD] = tensors[spec.EMBEDDING].copy()
        tensors[spec.HEAD][-1, -1] += 1

    _edit_tensors(saved, last_element)
    assert not open_checkpoint(saved).config.tie_embeddings

    def same(tensors):
        tensors[spec.HEAD] = tensors[spec.EMBEDDING].astype(np.float16)
        tensors[spec.EMBEDDING] = tensors[spec.HEAD].astype(np.float32)

    _edit_tensors(saved, same)
    source = open_checkpoint(saved)
    assert source.config.tie_embeddings
    assert spec.HEAD not in source.tensors


def test_a_tied_model_may_hold_the_head_alone(kit, saved):
    stored = safetensors.numpy.load_file(saved / "model.safetensors")
    _edit_tensors(saved, lambda tensors: tensors.pop(spec.EMBEDDING))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight .* is missing"):
        _config(kit, saved, tie_word_embeddings=False)
    assert _config(kit, saved, tie_word_embeddings=True).tie_embeddings
    source = open_checkpoint(saved)
    np.testing.assert_array_equal(source.tensors[spec.EMBEDDING](), stored[spec.HEAD])


def test_head_dim_and_kv_heads_have_defaults(kit):
    config = dataclasses.replace(kit.config, num_kv_heads=4)
    save_hf(kit.folder / "m", config, kit.tensors(config))
    changes = {"head_dim": None, "num_key_value_heads": None}
    assert _config(kit, kit.folder / "m", **changes) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma', allowed: one of llama, qwen2"),
        ({"model_type": None}, "model_type = None"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"attention_bias": True}, "q_proj.bias of shape .* is missing"),
        ({"attention_bias": 1}, "attention_bias = 1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"hidden_size": "x"}, "hidden_size = 'x'"),
        ({"hidden_size": -1}, "hidden_size = -1"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"num_attention_heads": 3}, "num_heads=3"),
        ({"num_hidden_layers": 40}, "layers.2.* is missing"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000"),
        ({"num_hidden_layers": 1}, "is of layer 0|not part"),
        ({"intermediate_size": 65}, r"gate_proj.weight has shape \[64, 32\], wanted"),
        ({"vocab_size": 5}, "embed_tokens.weight has shape|token id"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"rope_theta": float("inf")}, "rope_theta = inf"),
        ({"max_position_embeddings": None}, "max_position_embeddings = None"),
        ({"rope_scaling": "x"}, "rope_scaling = 'x'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type = 'mrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor = None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor = 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "finetuned": 1}},
            "rope_scaling.finetuned = 1",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}},
            "truncate = False",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "factor": 2}},
            "long_factor = None",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1],
                    "long_factor": [1],
                }
            },
            "longrope_factor|short_factors",
        ),
        ({"eos_token_id": [1, "a"]}, "eos_token_id"),
        ({"eos_token_id": 10**6}, "1000000"),
        ({"sparse_config": {"use_nope": True}}, "sparse_config.use_nope = True"),
        ({"sparse_config": {"window_size": 100}}, "sparse_config.window_size = 100"),
        ({"sparse_config": {"topk": 0}}, "sparse_config.topk = 0"),
        ({"sparse_config": {"topk": 1}}, "sparse_config: SparseConfig.block_budget"),
        ({"sparse_config": 3}, "sparse_config = 3"),
        ({"model_type": "minicpm"}, "scale_emb = None"),
        ({"model_type": "qwen2"}, "q_proj.bias of shape .* is missing"),
        ({"model_type": "qwen3"}, "q_norm.weight of shape .* is missing"),
    ],
)
def test_refused_configs(kit, saved, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        _config(kit, saved, **changes)
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


def _edit_tensors(saved, change):
    path = saved / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("model.norm.weight", None, r"model.norm.weight of shape \[32\] is missing"),
        ("lm_head.weight", None, "lm_head.weight of shape .* is missing"),
        ("model.norm.weight", np.ones(31, np.float32), r"\[31\], wanted \[32\]"),
        ("model.norm.weight", np.ones(32, np.int32), "type I32, allowed: F32"),
        ("model.layers.0.self_attn.o_proj.bias", np.ones(32, "f4"), "o_proj.bias"),
        ("model.layers.0.mlp.gate_proj.bias", np.ones(64, "f4"), "gate_proj.bias"),
        ("model.layers.0.self_attn.A", np.ones(2, "f4"), "delta.weight of shape"),
        (layout.future_name(0), None, "Forecast tensor .* is missing"),
        (layout.CURRENT, np.ones((2, 2), "f4"), r"\[2, 2\], wanted \[16, 32\]"),
        (layout.future_name(7), np.ones((16, 32), "f4"), "is of layer 7"),
    ],
)
def test_refused_tensors(saved, name, array, message):
    def change(tensors):
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array

    _edit_tensors(saved, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved)


def test_derived_tables_are_left_out(saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit_tensors(saved, lambda tensors: tensors.update({name: np.ones(4, "f4")}))
    assert name not in open_checkpoint(saved).tensors


def test_a_single_file_goes_before_an_index(saved):
    """A model that was saved again, over the shards that it came in."""
    index = {"weight_map": {spec.FINAL_NORM: "old.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(saved).load()


def test_missing_files(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        open_checkpoint(saved)
    with pytest.raises(CheckpointError, match="the directory that holds it"):
        (saved / "model.safetensors").write_bytes(b"x")
        open_checkpoint(saved / "model.safetensors")


def _raiser(error):
    def fail(*_, **__):
        raise error

    return fail


def test_nothing_is_left_of_a_failed_write(kit, monkeypatch):
    tensors = kit.tensors(kit.config)

    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr(safetensors.numpy, "save_file", _raiser(full))
        with pytest.raises(CheckpointError, match="cannot be written: No space left"):
            save_hf(kit.folder / "out", kit.config, tensors)
    assert list(kit.folder.iterdir()) == []
    with monkeypatch.context() as patch:
        error = safetensors.SafetensorError("I/O error: full")
        patch.setattr(safetensors.numpy, "save_file", _raiser(error))
        with pytest.raises(CheckpointError, match="cannot be written: I/O error: full"):
            save_hf(kit.folder / "out", kit.config, tensors)
    with pytest.raises(CheckpointError, match="is missing"):
        save_hf(kit.folder / "out", kit.config, {})
    with pytest.raises(CheckpointError, match="unknown is not part of the model"):
        save_hf(kit.folder / "out", kit.config, tensors | {"unknown": np.ones(1)})
    both = dataclasses.replace(kit.config, qk_norm=True, attention_bias=True)
    with pytest.raises(CheckpointError, match="attention_bias and qk_norm; allowed"):
        save_hf(kit.folder / "out", both, kit.tensors(both))
    assert list(kit.folder.iterdir()) == []
    (kit.folder / "out").mkdir()
    save_hf(kit.folder / "out", kit.config, tensors)
    with pytest.raises(CheckpointError, match="exists, allowed: a new or an empty"):
        save_hf(kit.folder / "out", kit.config, tensors)
    umask = os.umask(0)
    os.umask(umask)
    assert (kit.folder / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_arrays_are_views_that_jax_takes(saved):
    array = open_checkpoint(saved).tensors[spec.FINAL_NORM]()
    assert not array.flags.writeable
    assert not array.flags.owndata
    np.testing.assert_array_equal(np.asarray(jax.numpy.asarray(array)), array)


def test_hub_id_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"sparda-jax\[hub\]"):
        open_checkpoint("some/model")


def test_hub_id(monkeypatch, saved):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(saved))
    assert open_checkpoint("some/model").config.name == "tiny"

    error = RuntimeError("no\nnetwork")
    monkeypatch.setattr(hub, "snapshot_download", _raiser(error))
    with pytest.raises(CheckpointError, match="the hub gave no model: no network"):
        open_checkpoint("some/model")


def test_tokenizer_of_another_model(kit):
    """Tokens without a row of weights: refused, but for those added afterwards."""
    tokenizer = open_checkpoint(kit.tiny_gguf()).tokenizer
    for vocab, added in ((264, False), (265, True)):
        config = dataclasses.replace(kit.config, vocab_size=vocab)
        folder = kit.folder / f"m{vocab}"
        save_hf(folder, config, kit.tensors(config), tokenizer)
        if not added:
            with pytest.raises(CheckpointError, match="the tokenizer has 265 tokens"):
                open_checkpoint(folder)
            continue

        def add_padding(values):
            token = values["added_tokens"][0] | {"id": 265, "content": "<pad>"}
            values["added_tokens"].append(token)

        kit.edit_json(folder / "tokenizer.json", add_padding)
        source = open_checkpoint(folder)
        assert source.tokenizer.vocab_size == 266
