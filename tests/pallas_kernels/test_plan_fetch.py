"""Plans of fetches against their definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import plan_fetch
from pallas_kernels._common.lowering import cuda_lowering_text
from pallas_kernels.plan_fetch.arg_specs import ARG_SPECS
from pallas_kernels.plan_fetch.pallas_triton import plan_fetch_triton
from pallas_kernels.plan_fetch.reference import plan_fetch_reference

CI_SPECS = [s for s in ARG_SPECS if "ci" in s.tags]
specs = pytest.mark.parametrize("spec", CI_SPECS, ids=lambda s: s.name)


def _same(got, want):
    count = int(want.count)
    for name, a, b in zip(want._fields, got, want, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if name in ("rows", "places"):
            a, b = a[:count], b[:count]
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("seed", [0, 1])
@specs
def test_xla(spec, seed):
    args = spec.make(seed)
    got = jax.jit(lambda a: plan_fetch(**a, implementation="xla"))(args)
    _same(got, plan_fetch_reference(**args))


@specs
def test_triton_in_the_interpreter(spec):
    args = spec.make()
    got = plan_fetch_triton(**args, interpret=True)
    _same(got, plan_fetch_reference(**args))


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@specs
def test_triton_lowers_for_cuda(spec, x64):
    def f(a):
        return plan_fetch(**a, implementation="triton")

    assert "triton" in cuda_lowering_text(f, spec.make(), x64=x64)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda s: s.name)
def test_native(spec, implementation):
    args = spec.make()
    got = jax.jit(lambda a: plan_fetch(**a, implementation=implementation))(args)
    _same(got, plan_fetch_reference(**args))


def test_refusals():
    args = CI_SPECS[0].make()
    with pytest.raises(NotImplementedError, match="no plan_fetch"):
        plan_fetch(**args, implementation="mosaic_gpu")
    many = {"held": jnp.zeros((6, 300), jnp.int32), "used": jnp.zeros((6, 300), int)}
    many = {name: x.astype(jnp.int32) for name, x in many.items()}
    with pytest.raises(NotImplementedError, match="at most 256 slots"):
        plan_fetch_triton(**args | many, interpret=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"listed": jnp.zeros((6,), jnp.int32)}, "listed has shape"),
        ({"used": jnp.zeros((6, 2), jnp.int32)}, "used has shape"),
        ({"listed": jnp.zeros((6, 17), jnp.int32)}, "1 <= P <= C"),
        ({"stamp": jnp.zeros((5,), jnp.int32)}, "stamp has shape"),
        ({"base": jnp.zeros((6,), jnp.float32)}, "base has dtype"),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = CI_SPECS[0].make() | change
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_fetch(**args)
