"""The fetch of listed blocks against its definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compute_on import compute_on
from kernel_cases import in_ci, slow_but

from pallas_kernels import host_gather
from pallas_kernels.host_gather.arg_specs import ARG_SPECS
from pallas_kernels.host_gather.operands import checked
from pallas_kernels.host_gather.pallas_triton import Config, host_gather_triton
from pallas_kernels.host_gather.reference import host_gather_reference
from pallas_kernels.lowering import cuda_lowering_text

CI_SPECS = in_ci(ARG_SPECS)
BY_NAME = {s.name: s for s in CI_SPECS}
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
    want = host_gather_reference(checked(**args))
    if host:
        args["blocks"] = to_host(args["blocks"])
    got = jax.jit(lambda a: host_gather(**a, implementation="xla"))(args)
    assert got.sharding.memory_kind != "pinned_host"
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("programs", slow_but({5}, (1, 5, 132)))
@specs
def test_triton_in_the_interpreter(spec, programs):
    args = spec.make("bfloat16")
    config = Config(programs=programs, part_bytes=4096)
    got = host_gather_triton(checked(**args), config=config, interpret=True)
    np.testing.assert_array_equal(
        got.astype(jnp.float32),
        host_gather_reference(checked(**args)).astype(jnp.float32),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@specs
def test_native_from_pinned_host_memory(spec, implementation, dtype):
    args = spec.make(dtype)
    want = host_gather_reference(checked(**args))
    args["blocks"] = to_host(args["blocks"])
    got = jax.jit(lambda a: host_gather(**a, implementation=implementation))(args)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
def test_pallas_lowers_for_more_than_2_to_the_31_elements(implementation):
    # A host store of 200 GiB.
    blocks = jax.ShapeDtypeStruct((6_553_600, 64, 2, 128), jnp.bfloat16)

    def f(blocks, indices):
        return host_gather(blocks, indices, implementation=implementation)

    indices = jax.ShapeDtypeStruct((3072,), jnp.int32)
    assert implementation in cuda_lowering_text(f, blocks, indices)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_undefined_rows_leave_the_others_right(implementation):
    args = BY_NAME["skips"].make("float32")
    want = host_gather_reference(checked(**args))
    if implementation == "xla":
        got = host_gather(**args, skipped="undefined", implementation="xla")
    else:
        got = host_gather_triton(checked(**args, skipped="undefined"), interpret=True)
    fetched = np.asarray(args["indices"]) >= 0
    assert not fetched.all()
    np.testing.assert_array_equal(got[fetched], want[fetched])


def reads_from_host(args, **settings):
    """The gather as the fetch of a decode step runs it: on a stream of its own."""
    blocks = to_host(args["blocks"])

    def fetch(blocks, indices):
        return host_gather(blocks, indices, **settings)

    beside = compute_on(
        fetch, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device
    )
    return jax.jit(beside)(blocks, args["indices"])


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [8, 16, 32])
@pytest.mark.parametrize("skipped", ["zero", "undefined"])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_native_on_a_stream_of_its_own(implementation, skipped, programs):
    args = BY_NAME["skips"].make("bfloat16")
    got = reads_from_host(
        args, programs=programs, skipped=skipped, implementation=implementation
    )
    want = np.asarray(host_gather_reference(checked(**args)))
    rows = np.asarray(args["indices"]) >= (0 if skipped == "undefined" else -1)
    np.testing.assert_array_equal(np.asarray(got)[rows], want[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_native_beyond_2_to_the_31_elements(implementation):
    rows, shape = 140_000, (64, 2, 128)  # 2.3e9 elements, 4.3 GiB
    number = jnp.arange(rows, dtype=jnp.int32) % 251
    make = jax.jit(
        lambda n: jnp.broadcast_to(
            n.astype(jnp.bfloat16)[:, None, None, None], (rows, *shape)
        ),
        out_shardings=jax.sharding.SingleDeviceSharding(
            jax.devices()[0], memory_kind="pinned_host"
        ),
    )
    blocks = make(number)
    indices = jnp.array([0, rows - 1, -1, 131_071, 131_072, 70_000], jnp.int32)
    got = jax.jit(lambda b, i: host_gather(b, i, implementation=implementation))(
        blocks, indices
    )
    want = np.where(np.asarray(indices) < 0, 0, np.asarray(indices) % 251)
    np.testing.assert_array_equal(
        np.asarray(got.astype(jnp.float32)).reshape(6, -1),
        np.broadcast_to(want[:, None], (6, 16384)).astype(np.float32),
    )


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
        ({"indices": jnp.zeros((2, 2), jnp.int32)}, "indices has shape"),
        ({"indices": jnp.zeros((2,))}, "indices has dtype"),
        ({"skipped": "nan"}, "skipped is 'nan'"),
        ({"count": jnp.int32(3)}, "skipped is 'zero' with a count"),
        ({"programs": 0}, "programs is 0"),
        ({"programs": -4}, "programs is -4"),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = CI_SPECS[0].make("float32") | change
    with pytest.raises(ValueError, match=re.escape(message)):
        host_gather(**args)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32])
def test_blocks_of_integers_are_gathered(dtype):
    """A host store may hold quantised blocks."""
    blocks = jnp.arange(-384, 384).astype(dtype).reshape(3, 256)
    indices = jnp.array([2, -1, 0], jnp.int32)
    want = np.stack([blocks[2], np.zeros(256, blocks.dtype), blocks[0]])
    for got in (
        host_gather(blocks, indices, implementation="xla"),
        host_gather_triton(checked(blocks, indices), interpret=True),
    ):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)


def test_entries_behind_the_count_are_not_looked_at():
    args = CI_SPECS[0].make("bfloat16")
    want = np.asarray(host_gather_reference(checked(**args)).astype(jnp.float32))[:4]
    options = {"count": jnp.int32(4), "skipped": "undefined"}
    got = host_gather(**args, **options, implementation="xla")
    np.testing.assert_array_equal(got[:4].astype(jnp.float32), want)
    got = host_gather_triton(checked(**args, **options), interpret=True)
    np.testing.assert_array_equal(got[:4].astype(jnp.float32), want)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
def test_a_count_lowers_for_cuda(implementation):
    def f(a, count):
        return host_gather(
            **a, count=count, skipped="undefined", implementation=implementation
        )

    text = cuda_lowering_text(f, CI_SPECS[0].make("bfloat16"), jnp.int32(3))
    assert implementation in text


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("count", [0, 1, 7, 10])
def test_a_count_natively(implementation, count):
    args = CI_SPECS[0].make("bfloat16")
    want = np.asarray(host_gather_reference(checked(**args)).astype(jnp.float32))
    args["blocks"] = to_host(args["blocks"])
    options = {"skipped": "undefined", "implementation": implementation}
    got = jax.jit(lambda a, n: host_gather(**a, count=n, **options))(
        args, jnp.int32(count)
    )
    got = np.asarray(got.astype(jnp.float32))
    np.testing.assert_array_equal(got[:count], want[:count])
