import dataclasses
import os
import pathlib
import struct
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.checkpoint import dequantize
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


def test_unpermutation_is_the_one_of_the_specification(kit):
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


@pytest.mark.parametrize(
    "kind",
    [
        Types.Q4_0,
        Types.Q4_1,
        Types.Q5_0,
        Types.Q5_1,
        Types.Q8_0,
        Types.F16,
        Types.BF16,
    ],
)
def test_stored_types(kit, kind):
    """Arrays are the library's own, whole and by samples."""
    tensors = kit.gguf_tensors(kit.config, kit.tensors(kit.config), permute=True)
    kinds = {name: kind for name in tensors if not name.endswith("norm.weight")}
    path = kit.write_gguf(kit.metadata(kit.config), tensors, kinds=kinds)
    source = open_checkpoint(path)
    plain = {Types.F16: np.float16, Types.BF16: ml_dtypes.bfloat16}
    value = source.tensors["model.layers.0.mlp.up_proj.weight"]()
    assert value.dtype == plain.get(kind, np.float32)
    stored = gguf.quantize(tensors["blk.0.ffn_up.weight"], kind)
    np.testing.assert_array_equal(
        value.astype(np.float32), gguf.dequantize(stored, kind)
    )
    assert source.fingerprint == fingerprint(source.load(workers=1))


@pytest.mark.parametrize(
    "kind",
    [Types.Q4_0, Types.Q4_1, Types.Q5_1, Types.Q8_0, Types.Q4_K, Types.Q6_K],
)
def test_fast_dequantisation_is_exact(kind):
    """Every byte pattern, infinite and NaN scales too, over more than one chunk."""
    rng = np.random.default_rng(0)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (48, 64 * block_bytes), dtype=np.uint8)
    found = dequantize.dequantize(raw, kind)
    assert found.shape == (48, 64 * per_block)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw, kind)
    np.testing.assert_array_equal(found, wanted)


def _library_types() -> list[Types]:
    """Types that the library dequantises; it says so for a block of zeros."""
    found = []
    for kind, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


@pytest.mark.parametrize("kind", _library_types(), ids=lambda kind: kind.name)
def test_every_type_that_the_library_dequantises_is_read(kit, kind):
    """From the file to the arrays, whole and by samples."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    config = dataclasses.replace(kit.config, hidden_size=256, num_layers=1)
    tensors = kit.gguf_tensors(config, kit.tensors(config), permute=True)
    rng = np.random.default_rng(0)
    shape = (64, 256 // per_block * block_bytes)
    raw = rng.integers(0, 256, shape, dtype=np.uint8)
    tensors["blk.0.ffn_up.weight"] = raw
    metadata = kit.metadata(config) | {"llama.attention.key_length": 8}
    path = kit.write_gguf(metadata, tensors, raw_kinds={"blk.0.ffn_up.weight": kind})
    loader = open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"]
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw, kind).reshape(64, 256).astype(np.float32)
        found = loader().astype(np.float32)
        np.testing.assert_array_equal(found, wanted)
        places = np.array([0, 17, 255, 256, 16383])
        sampled = loader.sample(places)
    np.testing.assert_array_equal(sampled, wanted.reshape(-1)[places])


def _split(kit, count, changes=None):
    """A model in `count` files, the metadata in the first one; paths in order."""
    tensors = kit.gguf_tensors(kit.config, kit.tensors(kit.config), permute=True)
    names = sorted(tensors)
    paths = []
    for number in range(count):
        held = names[number::count]
        metadata = kit.metadata(kit.config) if number == 0 else {}
        metadata |= {"split.no": number, "split.count": count}
        metadata["split.tensors.count"] = len(names)
        metadata |= (changes or {}).get(number, {})
        paths.append(
            kit.write_gguf(
                metadata,
                {name: tensors[name] for name in held},
                name=f"big-{number + 1:05d}-of-{count:05d}.gguf",
            )
        )
    return paths


def test_split_files_are_one_model(kit):
    paths = _split(kit, 3)
    whole = open_checkpoint(kit.tiny_gguf())
    for path in paths:
        source = open_checkpoint(path)
        assert source.config == whole.config
        assert source.fingerprint == whole.fingerprint
        assert source.tokenizer.encode("hello") == whole.tokenizer.encode("hello")
    loaded = open_checkpoint(paths[0]).load()
    for name, array in whole.load().items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: {"split.count": 3}}, "00002-of-00002.gguf: GGUF split.count = 3"),
        ({1: {"split.no": 0}}, "00002-of-00002.gguf: GGUF split.no = 0, allowed: 1"),
        ({0: {"split.count": -1}}, "split.count = -1"),
        ({0: {"split.count": True}}, "split.count = True"),
        ({0: {"split.count": 9}}, "split.count = 9, .*NAME-00001-of-00009.gguf"),
        ({0: {"split.tensors.count": 5}}, "split.tensors.count = 5, allowed: 20"),
    ],
)
def test_split_files_that_do_not_fit(kit, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(_split(kit, 2, changes)[0])


def test_split_files_missing_or_mixed_up(kit):
    paths = _split(kit, 2)
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"split\.no = 1, allowed: 0 in part 1"):
        open_checkpoint(paths[1])
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*is missing.*part 1 of"):
        open_checkpoint(paths[1])
    first = _split(kit, 2)[0]
    twice = {"split.no": 1, "split.count": 2}
    held = kit.gguf_tensors(kit.config, kit.tensors(kit.config), permute=True)
    kit.write_gguf(twice, held, name=paths[1].name)
    with pytest.raises(CheckpointError, match=r"is in big-00001-of-00002\.gguf as"):
        open_checkpoint(first)


@pytest.mark.parametrize(
    ("kind", "supported"),
    [(Types.Q4_K, True), (Types.Q6_K, True), (Types.IQ4_NL, True), (Types.I8, False)],
)
def test_can_dequantize(kind, supported):
    assert dequantize.can_dequantize(kind) == supported


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
        ({"llama.expert_count": 8}, "expert_count = 8"),
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
        ({"blk.0.ffn_gate_exps.weight": np.ones(4, np.float32)}, "ffn_gate_exps"),
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


@pytest.fixture(scope="module")
def intact(session_kit) -> bytes:
    return session_kit.tiny_gguf().read_bytes()


def _try(folder: pathlib.Path, content: bytes) -> bool:
    """Opens and loads; only CheckpointError may come out. True if it went well."""
    path = folder / "fuzz.gguf"
    path.write_bytes(content)
    try:
        source = open_checkpoint(path)
    except CheckpointError as error:
        assert len(str(error)) < 2000
        return False
    source.load(workers=1)
    if source.tokenizer is not None:
        source.tokenizer.decode(source.tokenizer.encode("hello, world"))
    return True


def _positions(content: bytes) -> list[int]:
    """Places of every kind: all of the first 3 kB, the tensor entries, and the data."""
    entries = content.index(b"token_embd.weight")
    return [
        *range(1, 1500, 7),
        *range(entries - 40, entries + 1200, 5),
        *range(entries + 1200, len(content), 9001),
    ]


def test_truncation(session_kit, intact):
    assert _try(session_kit.folder, intact)
    for position in [*_positions(intact)[::2], len(intact) - 1]:
        assert not _try(session_kit.folder, intact[:position])


def _overwrite(content: bytes, position: int, value: int) -> bytes:
    damaged = bytearray(content)
    damaged[position : position + 8] = struct.pack("<Q", value)
    return bytes(damaged[: len(content)])


NUMBERS = [2**64 - 1, 2**63, 2**40, 2**32 - 1, 2**27, 0]


@pytest.mark.parametrize("value", NUMBERS)
def test_huge_and_zero_numbers_anywhere(session_kit, intact, value):
    for position in _positions(intact)[::4]:
        _try(session_kit.folder, _overwrite(intact, position, value))


def test_huge_numbers_take_no_memory(session_kit, intact):
    """Few places, as counting memory makes opening ten times as slow."""
    tracemalloc.start()
    for number, position in enumerate(_positions(intact)[::12]):
        value = NUMBERS[number % len(NUMBERS)]
        _try(session_kit.folder, _overwrite(intact, position, value))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
        min_size=1,
        max_size=8,
    )
)
def test_random_damage(session_kit, intact, changes):
    damaged = bytearray(intact)
    header = intact.index(b"token_embd.weight") + 1200
    for place, value in changes:
        damaged[int(place * header)] = value
    _try(session_kit.folder, bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes(session_kit, content):
    _try(session_kit.folder, b"GGUF\3\0\0\0" + content)


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
