"""The linter of host operands: planted violations, and the real pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from sparda_jax.cache.lint import lint_host_operands
from sparda_jax.cache.memory import host_sharding, host_zeros, to_device, to_host
from sparda_jax.cache.routes import named_route
from sparda_jax.mesh import MeshConfig


@pytest.fixture(scope="module")
def store():
    """Eight blocks in host memory."""
    return host_zeros((8, 4, 2, 64), jnp.float32)


def _slice(store, index=1):
    return lax.dynamic_slice_in_dim(store, index, 1, 0)


def _in_a_loop(store):
    return lax.fori_loop(0, 3, lambda i, x: x + jnp.sum(to_device(store[i] * 2)), 0.0)


def _in_a_branch(store):
    return lax.cond(True, lambda: to_device(store + 1), lambda: to_device(store))


def _on_a_mesh(function):
    whole = PartitionSpec()
    return jax.shard_map(
        function,
        mesh=MeshConfig().devices,
        in_specs=whole,
        out_specs=whole,
        check_vma=False,
    )


VIOLATIONS = {
    "arithmetic": (lambda s: to_device(s + 1), "add"),
    "gather": (lambda s: to_device(s[to_host(jnp.asarray([1, 2]))]), "gather"),
    "scatter": (
        lambda s: s.at[to_host(jnp.asarray([1]))].set(to_host(jnp.ones((4, 2, 64)))),
        "scatter",
    ),
    "reduction": (lambda s: jnp.sum(s), "reduce_sum"),
    "slice used on the host": (lambda s: to_device(_slice(s) * 2), "mul"),
    "slice that stays": (lambda s: _slice(s), "not moved to the device"),
    "in a loop": (_in_a_loop, "mul"),
    "in a branch": (_in_a_branch, "add"),
    "in a jitted part": (lambda s: jax.jit(lambda x: to_device(x * 2))(s), "mul"),
    "on a device of a mesh": (_on_a_mesh(lambda s: to_device(s * 2)), "mul"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_planted_violations_are_found(store, name):
    function, named = VIOLATIONS[name]
    found = lint_host_operands(jax.jit(function).trace(store).jaxpr)
    assert found
    assert any(named in line for line in found), found


def _allowed(store):
    block = to_device(_slice(store.reshape(8, -1), 3)).reshape(1, 4, 2, 64)
    store = lax.dynamic_update_slice_in_dim(store, to_host(block + 1), 5, 0)
    store = lax.fori_loop(
        0,
        2,
        lambda i, s: lax.dynamic_update_slice_in_dim(s, to_host(block), i, 0),
        store,
    )
    return lax.optimization_barrier(store), block


def test_what_is_allowed_passes(store):
    for function in (_allowed, _on_a_mesh(_allowed)):
        assert lint_host_operands(jax.jit(function).trace(store).jaxpr) == []


def test_dynamic_slice_route_passes():
    numbers = np.arange(1, 8 * 4 * 2 * 64 + 1, dtype=np.float32)
    store = jax.device_put(numbers.reshape(8, 4, 2, 64), host_sharding())
    rows = jnp.asarray([3, -1, 0, -1], jnp.int32)
    into = jnp.zeros((4, 4, 2, 64))

    def fetch(store, rows, into):
        route = named_route("dynamic_slice")
        return route.fetch(store, rows, jnp.int32(3), into, on_side_stream=False)

    got = jax.jit(fetch)(store, rows, into)
    np.testing.assert_array_equal(got[::2], np.asarray(store)[[3, 0]])
    assert not got[1::2].any()
    assert got.sharding.memory_kind != store.sharding.memory_kind
    assert lint_host_operands(jax.jit(fetch).trace(store, rows, into).jaxpr) == []
