"""Compressed keys against their definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import combinations, in_ci

from pallas_kernels import compress_keys
from pallas_kernels._common.tolerances import relative_error, tolerance
from pallas_kernels.compress_keys.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.compress_keys.pallas_triton import compress_keys_triton
from pallas_kernels.compress_keys.reference import compress_keys_reference


def keys(length, dtype="float32", head_dim=64, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((2, 2, length, head_dim)), dtype)


CI_SPECS = in_ci(ARG_SPECS)
NAMES = {spec.name for spec in CI_SPECS}
specs = pytest.mark.parametrize("spec", CI_SPECS, ids=lambda s: s.name)


def assert_matches(got, args, dtype):
    want = compress_keys_reference(**args)
    assert got.shape == want.shape
    assert got.dtype == jnp.dtype(dtype)
    if want.size:
        assert relative_error(got, want) <= tolerance(dtype)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        *combinations(
            ARG_SPECS, "float32", "float16", quick={s.name for s in CI_SPECS}
        ),
        *combinations(ARG_SPECS, "bfloat16", quick={"minicpm"}),
    ],
)
def test_matches_reference(spec, dtype):
    args = spec.make(dtype)
    assert_matches(compress_keys(**args), args, dtype)


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


@pytest.mark.parametrize(
    ("spec", "dtype"),
    combinations(ARG_SPECS, "float32", quick={"minicpm", "too_short", "pairs"}),
)
def test_triton_in_the_interpreter(spec, dtype):
    args = spec.make(dtype)
    assert_matches(compress_keys_triton(**args, interpret=True), args, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@pytest.mark.parametrize(
    "spec", [*CI_SPECS, ArgSpec("long", 2, 2, 4100, 128)], ids=lambda s: s.name
)
def test_native(spec, implementation, dtype):
    args = spec.make(dtype)
    sizes = {name: args[name] for name in ("kernel_size", "kernel_stride")}
    f = jax.jit(lambda x: compress_keys(x, **sizes, implementation=implementation))
    got = f(args["keys"])
    assert_matches(got, args, dtype)
    np.testing.assert_array_equal(got, f(args["keys"]))


def test_refusals():
    with pytest.raises(NotImplementedError, match="needs a head dim"):
        compress_keys(keys(64, head_dim=40), implementation="mosaic_gpu")
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
