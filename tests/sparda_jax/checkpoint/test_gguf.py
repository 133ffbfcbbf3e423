import dataclasses
import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.gguf_header import read_header
from sparda_jax.checkpoint.source import open_checkpoint
from sparda_jax.checkpoint.tensors import fingerprint
from sparda_jax.config import RopeConfig

Types = gguf.GGMLQuantizationType


def test_llama_rows_are_unpermuted(kit):
    tensors = kit.tensors(kit.config)
    path = kit.write_gguf(
        kit.metadata(kit.config), kit.gguf_tensors(kit.config, tensors, permute=True)
    )
    source = open_checkpoint(path)
    assert source.config == kit.config
    assert source.path == path
    assert source.sparse is None
    loaded = source.load()
    assert set(loaded) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
        assert source.tensors[name].shape == array.shape
    assert source.fingerprint == fingerprint(tensors) == fingerprint(loaded)


def test_unpermutation_is_the_inverse_of_the_formats_permutation(kit):
    """reshape (n, H/2, 2, in), swap axes 1 and 2."""
    tensors = kit.tensors(kit.config)
    plain = kit.gguf_tensors(kit.config, tensors, permute=False)
    source = open_checkpoint(kit.write_gguf(kit.metadata(kit.config), plain))
    stored = plain["blk.1.attn_k.weight"]
    wanted = stored.reshape(2, 4, 2, 32).swapaxes(1, 2).reshape(16, 32)
    loaded = source.tensors["model.layers.1.self_attn.k_proj.weight"]()
    np.testing.assert_array_equal(loaded, wanted)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_biases_and_untied_head(kit, arch):
    config = dataclasses.replace(kit.config, attention_bias=True, tie_embeddings=False)
    tensors = kit.tensors(config)
    metadata = kit.metadata(config, arch)
    stored = kit.gguf_tensors(config, tensors, permute=arch == "llama")
    source = open_checkpoint(kit.write_gguf(metadata, stored, arch=arch))
    assert source.config == config
    for name, array in source.load().items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)
    assert source.fingerprint == fingerprint(tensors)


def _open(kit, metadata, extra=None, arch="llama"):
    tensors = kit.gguf_tensors(kit.config, kit.tensors(kit.config), permute=True)
    tensors.update(extra or {})
    kept = {name: array for name, array in tensors.items() if array is not None}
    return open_checkpoint(kit.write_gguf(metadata, kept, arch=arch))


def _rope(kit, settings, extra=None):
    metadata = kit.metadata(kit.config)
    metadata |= {f"llama.rope.scaling.{key}": value for key, value in settings.items()}
    return _open(kit, metadata, extra).config.rope


def test_rope_scaling(kit):
    assert _rope(kit, {"type": "none", "factor": 4.0}) == RopeConfig()
    linear = RopeConfig(kind="linear", factor=4.0)
    assert _rope(kit, {"type": "linear", "factor": 4.0}) == linear
    assert _rope(kit, {"factor": 4.0}) == linear
    yarn = _rope(kit, {"type": "yarn", "factor": 4.0, "original_context_length": 64})
    assert (yarn.kind, yarn.factor, yarn.original_max) == ("yarn", 4.0, 64)
    assert yarn.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_rope_divisors(kit):
    """Llama 3's ready divisors, which no key of the metadata tells of."""
    divisors = np.array([1, 1, 3.5, 8], np.float32)
    rope = _rope(kit, {}, {"rope_freqs.weight": divisors})
    assert rope.kind == "longrope"
    assert rope.short_factors == rope.long_factors == (1.0, 1.0, 3.5, 8.0)
    assert rope.attention_factor == 1.0
    lists = {
        "rope_factors_short.weight": divisors,
        "rope_factors_long.weight": divisors * 2,
    }
    rope = _rope(kit, {"original_context_length": 128, "attn_factor": 1.5}, lists)
    assert rope.long_factors == (2.0, 2.0, 7.0, 16.0)
    assert (rope.original_max, rope.attention_factor) == (128, 1.5)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has shape"):
        _rope(kit, {}, {"rope_freqs.weight": divisors[:3]})
    with pytest.raises(CheckpointError, match="needs the tensors"):
        _rope(kit, {"type": "longrope"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "expert_used_count = None"),
        (
            {"llama.expert_count": 8, "llama.expert_used_count": 9},
            "experts_per_token=9",
        ),
        ({"llama.expert_shared_count": 1}, "expert_shared_count = 1"),
        ({"llama.attention.sliding_window": 64}, "sliding_window = 64"),
        ({"llama.attention.key_length": 16}, "attn_q.weight|shape"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count = 4"),
        ({"llama.block_count": 0}, "block_count = 0"),
        ({"llama.block_count": 2**32 - 1}, "block_count"),
        ({"llama.block_count": 3}, "layers.2.input_layernorm.weight .* is missing"),
        ({"llama.block_count": 1}, "is not part of this model"),
        ({"llama.context_length": None}, "context_length = None"),
        ({"llama.attention.head_count": 3}, "head"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon = nan"),
        ({"llama.rope.freq_base": -1.0}, "freq_base = -1.0"),
        ({"llama.rope.scaling.type": "dynamic"}, "type = 'dynamic'"),
        ({"llama.vocab_size": 7}, "vocab_size = 7"),
        ({"general.alignment": 3}, "general.alignment = 3"),
        ({"split.count": 2}, "split.count = 2"),
        ({"tokenizer.ggml.model": "llama"}, "scores = None, allowed: one score"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merges = 'a b c'"),
        ({"tokenizer.ggml.merges": ["ab cd"]}, "merges"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "tokens = 2.*distinct"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type = 1"),
        ({"tokenizer.ggml.eos_token_id": 100000}, "eos_token_id = 100000"),
        ({"tokenizer.chat_template": 3}, "chat_template = 3"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token = 1"),
    ],
)
def test_refused_metadata(kit, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        _open(kit, kit.metadata(kit.config) | changes)
    assert "model.gguf" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blk.1.attn_k.weight": None}, r"layers.1.self_attn.k_proj.weight of shape"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        ({"blk.0.ffn_gate_exps.weight": np.ones(4, np.float32)}, "experts.gate_proj"),
        (
            {"blk.0.attn_output.bias": np.ones(32, np.float32)},
            "1.self_attn.o_proj.bias",
        ),
        ({"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}, "not part of this"),
        ({"blk.0.ffn_down.bias": np.ones(32, np.float32)}, "ffn_down.bias"),
        ({"blk.00.attn_norm.weight": np.ones(32, np.float32)}, "blk.00.attn_norm"),
        (
            {"blk.0.ffn_up.weight": np.ones((32, 64), np.float32)},
            r"mlp.up_proj.weight has shape \[32, 64\], wanted \[64, 32\]",
        ),
        (
            {"blk.0.attn_q.bias": np.ones(32, np.float32)},
            "self_attn.k_proj.bias of shape .* is missing",
        ),
        ({"blk.0.ffn_up.weight": np.ones((64, 32), np.int8)}, "type I8"),
    ],
)
def test_refused_tensors(kit, extra, message):
    with pytest.raises(CheckpointError, match=message):
        _open(kit, kit.metadata(kit.config), extra)


def test_other_architectures_are_named(kit):
    with pytest.raises(CheckpointError, match="= 'gemma3', allowed: llama, qwen2"):
        _open(kit, kit.metadata(kit.config, "gemma3"), arch="gemma3")


def test_file_without_tokenizer(kit):
    metadata = {
        key: value
        for key, value in kit.metadata(kit.config).items()
        if not key.startswith("tokenizer.")
    }
    source = _open(kit, metadata)
    assert source.tokenizer is None
    assert source.config.eos_ids == ()


def test_bos_is_in_the_config_only_if_it_is_added(kit):
    metadata = kit.metadata(kit.config)
    assert _open(kit, metadata).config.bos_id is None
    added = _open(kit, metadata | {"tokenizer.ggml.add_bos_token": True})
    assert added.config.bos_id == added.tokenizer.bos_id == 1


@pytest.mark.parametrize("name", ["nothing.gguf", "a\0b"])
def test_no_such_file(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"no such file|no valid path"):
        open_checkpoint(tmp_path / name)


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a regular file"):
        open_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"GG", "truncated"),
        (b"not a model file at all", "magic"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "tensor count"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), "key count"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture = None"),
    ],
)
def test_no_gguf(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def _metadata_file(value: bytes) -> bytes:
    key = struct.pack("<Q", 1) + b"k"
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IQ", 8, 2**62), "needs 4611686018427387904 bytes"),
        (struct.pack("<IIQ", 9, 8, 2**61), "element count"),
        (struct.pack("<IIQ", 9, 0, 2**40), "element count"),
        (struct.pack("<IIQ", 9, 9, 1), "element type"),
        (struct.pack("<I", 77), "type of 'k' = 77"),
        (struct.pack("<IQ", 8, 2) + b"\xff\xfe", "UTF-8"),
        (struct.pack("<IIQQ", 9, 8, 1, 2**63), "past the end"),
    ],
)
def test_lying_lengths(tmp_path, value, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(_metadata_file(value) + bytes(64))
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_huge_array_is_refused_before_it_is_read(tmp_path):
    """A sparse file of real size: the count fits, but no header has so many."""
    path = tmp_path / "x.gguf"
    path.write_bytes(_metadata_file(struct.pack("<IIQ", 9, 8, 2**27)))
    with open(path, "r+b") as file:
        file.truncate(2**31)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="array elements in the header"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_bool_arrays_hold_bools(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(_metadata_file(struct.pack("<IIQ", 9, 7, 3) + b"\0\x01\x07"))
    assert read_header(path).metadata["k"].tolist() == [False, True, True]


@pytest.mark.network
def test_smollm2(smollm2_path):
    source = open_checkpoint(smollm2_path)
    config = source.config
    assert (config.num_layers, config.hidden_size, config.ffn_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_context) == (49152, 8192)
    assert config.rope == RopeConfig(theta=100000.0)
    assert config.rms_norm_eps == 1e-5
    assert config.tie_embeddings
    assert (config.bos_id, config.eos_ids) == (None, (2, 0))
    arrays = source.load()
    assert sum(array.size for array in arrays.values()) == 134_515_008
    assert source.fingerprint == fingerprint(arrays)
