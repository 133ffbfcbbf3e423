"""A linter of traced programs: what may touch an array in host memory.

On a GPU, XLA turns arithmetic, gathers and scatters on host operands into computation
on the host, slow and easy to miss; on a CPU nothing shows, because the compiler drops
the annotation. So the rule is checked on the program itself: a host array may be sliced
(and the slice must go straight to the device), updated by a slice that comes from the
device, reshaped, moved, passed through control flow, and given to a kernel.
"""

from collections.abc import Iterator, Sequence

import jax
from jax.extend import core

from sparda_jax.cache.memory import in_host_memory

_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})
_SLICES = frozenset({"dynamic_slice", "slice"})
_MOVES = frozenset({"device_put", "dynamic_update_slice", "optimization_barrier"})
# Primitives that only carry programs: those are linted themselves.
_CONTROL = frozenset(
    {
        "while",
        "scan",
        "cond",
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vmap_call",
        "compute_on",
        "shard_map",
    }
)
# A kernel reads the operand in place; its body is not XLA's business.
_KERNELS = frozenset({"pallas_call", "core_map", "run_state", "mpmd_map"})


def lint_host_operands(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> list[str]:
    """Operations on host operands that XLA would turn into host computation.

    Args:
      jaxpr: A traced program, e.g. `jax.jit(f).trace(...).jaxpr`.

    Returns:
      One line per violation; none for a program that is as it should be.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return list(_violations(inner, ()))


def _violations(jaxpr: core.Jaxpr, path: Sequence[str]) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = list(_inner_programs(eqn))
        if name not in _KERNELS:
            for program in inner:
                yield from _violations(program, (*path, name))
        on_host = [v for v in eqn.invars if _is_host(v)]
        if not on_host:
            continue
        where = "/".join((*path, name))
        types = ", ".join(str(v.aval) for v in on_host)
        if name in _SLICES:
            yield from _slice_violations(jaxpr, eqn, where)
        elif name in _KERNELS | _CONTROL and inner:
            continue
        elif name not in _RESHAPES | _MOVES | _KERNELS:
            yield f"{where}: {name} on a host operand ({types})"


def _slice_violations(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, where: str
) -> Iterator[str]:
    """A slice of a host array must go to the device and nowhere else."""
    waiting = list(eqn.outvars)
    while waiting:
        value = waiting.pop()
        users = [e for e in jaxpr.eqns if any(v is value for v in e.invars)]
        if any(v is value for v in jaxpr.outvars) or not users:
            yield f"{where}: a slice of a host array is not moved to the device"
        for user in users:
            name = user.primitive.name
            if name in _RESHAPES:
                waiting.extend(user.outvars)
            elif name != "device_put":
                yield f"{where}: a slice of a host array flows into {name}"


def _inner_programs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _is_host(value: core.Var | core.Literal) -> bool:
    return isinstance(value.aval, jax.core.ShapedArray) and in_host_memory(value.aval)
