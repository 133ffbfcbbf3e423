"""Tensor types of GGUF files."""

import dataclasses

import gguf
import ml_dtypes
import numpy as np
import pytest

from sparda_jax.checkpoint import dequantize
from sparda_jax.checkpoint.source import open_checkpoint
from sparda_jax.checkpoint.tensors import fingerprint

Types = gguf.GGMLQuantizationType


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


@pytest.mark.parametrize(
    ("kind", "supported"),
    [(Types.Q4_K, True), (Types.Q6_K, True), (Types.IQ4_NL, True), (Types.I8, False)],
)
def test_can_dequantize(kind, supported):
    assert dequantize.can_dequantize(kind) == supported
