"""Compressed keys against their definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compress_keys
from pallas_kernels._common.lowering import cuda_lowering_text
from pallas_kernels._common.tolerances import relative_error, tolerance
from pallas_kernels.compress_keys.pallas_triton import compress_keys_triton
from pallas_kernels.compress_keys.reference import compress_keys_reference


def keys(length, dtype="float32", head_dim=64, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((2, 2, length, head_dim)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(32, 16), (16, 16), (64, 16), (2, 1)])
def test_matches_reference(sizes, dtype):
    x = keys(150, dtype)
    size, stride = sizes
    got = compress_keys(x, kernel_size=size, kernel_stride=stride)
    want = compress_keys_reference(x, kernel_size=size, kernel_stride=stride)
    assert got.dtype == x.dtype
    assert relative_error(got, want) <= tolerance(dtype)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 100))
def test_every_length(length):
    x = keys(length)
    got = compress_keys(x)
    windows = max(0, (length - 32) // 16 + 1)
    assert got.shape == (2, 2, windows, 64)
    for m in range(windows):
        mean = np.asarray(x)[:, :, 16 * m : 16 * m + 32].mean(2)
        np.testing.assert_allclose(got[:, :, m], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [20, 32, 200])
def test_triton_in_the_interpreter(length):
    x = keys(length)
    got = compress_keys_triton(x, kernel_size=32, kernel_stride=16, interpret=True)
    want = compress_keys_reference(x, kernel_size=32, kernel_stride=16)
    assert got.shape == want.shape
    if want.size:
        assert relative_error(got, want) <= tolerance("float32")


def test_triton_lowers_for_cuda():
    def f(x):
        return compress_keys(x, implementation="triton")

    assert "triton" in cuda_lowering_text(f, keys(100, "bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_native(implementation):
    x = keys(4100, "bfloat16", 128)
    got = jax.jit(lambda x: compress_keys(x, implementation=implementation))(x)
    want = compress_keys_reference(x, kernel_size=32, kernel_stride=16)
    assert relative_error(got, want) <= tolerance("bfloat16")


def test_refusals():
    with pytest.raises(NotImplementedError, match="bound by memory bandwidth"):
        compress_keys(keys(64), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="needs a head dim"):
        compress_keys(keys(64, head_dim=48), implementation="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 24}, "kernel_size is 24"),
        ({"kernel_stride": 0}, "kernel_stride is 0"),
        ({"kernel_size": -32}, "kernel_size is -32"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compress_keys(keys(64), **change)
