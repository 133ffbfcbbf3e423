"""The fetch of listed blocks against its definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import host_gather
from pallas_kernels._common.lowering import cuda_lowering_text
from pallas_kernels.host_gather.arg_specs import ARG_SPECS
from pallas_kernels.host_gather.pallas_triton import Config, host_gather_triton
from pallas_kernels.host_gather.reference import host_gather_reference

CI_SPECS = [s for s in ARG_SPECS if "ci" in s.tags]
specs = pytest.mark.parametrize("spec", CI_SPECS, ids=lambda s: s.name)


def to_host(x):
    device = jax.devices()[0]
    kind = "pinned_host"
    return jax.device_put(
        x, jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
    )


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@specs
def test_xla(spec, host):
    args = spec.make("float32")
    want = host_gather_reference(**args)
    if host:
        args["blocks"] = to_host(args["blocks"])
    got = jax.jit(lambda a: host_gather(**a, implementation="xla"))(args)
    assert got.sharding.memory_kind != "pinned_host"
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("programs", [1, 5, 132])
@specs
def test_triton_in_the_interpreter(spec, programs):
    args = spec.make("bfloat16")
    config = Config(programs=programs, part_bytes=4096)
    got = host_gather_triton(**args, config=config, interpret=True)
    np.testing.assert_array_equal(
        got.astype(jnp.float32), host_gather_reference(**args).astype(jnp.float32)
    )


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
@specs
def test_pallas_lowers_for_cuda(spec, implementation, x64):
    def f(a):
        return host_gather(**a, programs=16, implementation=implementation)

    text = cuda_lowering_text(f, spec.make("bfloat16"), x64=x64)
    assert ("mosaic_gpu" if implementation == "mosaic_gpu" else "triton") in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@specs
def test_native_from_pinned_host_memory(spec, implementation, dtype):
    args = spec.make(dtype)
    want = host_gather_reference(**args)
    args["blocks"] = to_host(args["blocks"])
    got = jax.jit(lambda a: host_gather(**a, implementation=implementation))(args)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_no_entry():
    blocks = jnp.ones((3, 16, 64))
    out = host_gather(blocks, jnp.zeros((0,), jnp.int32))
    assert out.shape == (0, 16, 64)


def test_refuses_without_a_device():
    args = CI_SPECS[0].make("float32")
    if jax.default_backend() == "gpu":
        pytest.skip("there is a device")
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        host_gather(**args, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": jnp.zeros((3,))}, "blocks has shape"),
        ({"blocks": jnp.zeros((3, 4), jnp.int32)}, "blocks has dtype"),
        ({"indices": jnp.zeros((2, 2), jnp.int32)}, "indices has shape"),
        ({"indices": jnp.zeros((2,))}, "indices has dtype"),
        ({"programs": 0}, "programs is 0"),
        ({"programs": -4}, "programs is -4"),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = CI_SPECS[0].make("float32") | change
    with pytest.raises(ValueError, match=re.escape(message)):
        host_gather(**args)
