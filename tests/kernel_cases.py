"""Cases and checks that the kernel tests share."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels._common.tolerances import relative_error, tolerance
from pallas_kernels._common.triton import MAX_TILE_BYTES


def on_device(kind, platform="cuda"):
    """A context in which calls lower for a device that is not at hand."""
    device = AbstractDevice(kind, None, platform)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def in_ci(specs):
    """The specs that tests run; the others are for benchmarks."""
    return [spec for spec in specs if "ci" in spec.tags]


def combinations(specs, *dtypes, quick):
    """Spec x dtype; only the first dtype of the specs named in ``quick`` is not slow.

    The rest repeats the same code paths.
    """
    return [
        pytest.param(
            spec,
            dtype,
            id=f"{spec.name}-{dtype}",
            marks=() if spec.name in quick and dtype == dtypes[0] else pytest.mark.slow,
        )
        for spec in in_ci(specs)
        for dtype in dtypes
    ]


def slow_but(quick, values):
    """Parameters of which only those in ``quick`` run by default."""
    return [
        pytest.param(value, marks=() if value in quick else pytest.mark.slow)
        for value in values
    ]


def refused_by_triton(spec, dtype):
    """Whether a tile of keys is larger than Triton was seen to hold."""
    tile = spec.block * spec.head_dim * jnp.dtype(dtype).itemsize
    return tile > MAX_TILE_BYTES


def assert_attention_matches(got, want, dtype):
    """Compares output and log-sum-exp with the reference's."""
    for x, ref, name in zip(got, want, ("out", "lse"), strict=True):
        error = relative_error(x, ref)
        assert error <= tolerance(dtype), f"{name}: relative error {error:.2e}"
