"""The compile cache: bounded, keyed by everything static, safe under threads."""

import concurrent.futures
import dataclasses
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patience import PATIENCE

import sparda_jax as sj
from sparda_jax.engine import compile_cache
from sparda_jax.engine.compile_cache import (
    PROGRAMS,
    BoundedCache,
    Programs,
    side_by_side,
)


def test_what_was_not_used_for_longest_makes_room():
    cache = BoundedCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0


def test_threads_that_want_one_value_make_it_once():
    cache, together, made = BoundedCache(4), threading.Barrier(8), []

    def make():
        made.append(threading.get_ident())
        return len(made)

    def want(_):
        together.wait(PATIENCE)
        return cache.get_or_make("key", make)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(want, range(8))) == [1] * 8
    assert len(made) == 1


def test_a_failure_leaves_nothing():
    cache = BoundedCache(4)

    def fail():
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            cache.get_or_make("key", fail)
    assert len(cache) == 0
    assert cache.get_or_make("key", lambda: 5) == 5


def test_threads_have_the_settings_of_who_starts_them():
    here, seen = jax.devices()[0], []

    def look():
        config = jax.config
        settings = config.jax_threefry_partitionable, config.jax_default_device
        seen.append((*settings, config.jax_default_matmul_precision))

    with jax.threefry_partitionable(False), jax.default_device(here):
        with jax.default_matmul_precision("highest"), side_by_side() as start:
            start(look)
    assert seen == [(False, here, "highest")]


def test_what_has_not_begun_when_the_user_stops_never_does(monkeypatch):
    stopped, begun = threading.Event(), []

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait)

    monkeypatch.setattr(compile_cache, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(compile_cache.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt), side_by_side() as start:
        start(stopped.wait, PATIENCE)
        start(begun.append, "further")
        raise KeyboardInterrupt
    assert begun == []


def _scaled(x, *, factor):
    return x * factor


@dataclasses.dataclass(frozen=True)
class _WithOption:
    """A function that is compiled with an option of its own, as one of a mesh is."""

    name: str

    @property
    def compiler_options(self):
        return {self.name: False}

    def __call__(self, x):
        return x + 1


def test_a_function_is_compiled_with_its_options():
    x = jnp.float32(1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_thing"):
        Programs().get(_WithOption("xla_no_such_thing"), (x,), {})
    of_a_mesh = _WithOption("xla_gpu_enable_latency_hiding_scheduler")
    program, _ = Programs().get(of_a_mesh, (x,), {})
    assert program(x) == 2


def _with_triton(x):
    message = "The Pallas Triton backend is deprecated and will be removed"
    warnings.warn(message, DeprecationWarning, stacklevel=1)
    return x + 1


def test_a_kernel_traced_under_other_filters_is_lowered_in_silence():
    """JAX keeps a layer's trace; what its kernels silenced may be gone by then."""
    program, _ = Programs().get(_with_triton, (jnp.zeros(3),), {})
    assert program(jnp.zeros(3)).tolist() == [1, 1, 1]


def test_programs_are_keyed_by_all_that_is_static():
    programs = Programs(8)
    two = jnp.arange(2.0)
    for arguments, factor in (
        ((two,), 2),
        ((two,), 3),
        ((jnp.arange(3.0),), 2),
        ((jnp.arange(2),), 2),
    ):
        program, seconds = programs.get(_scaled, arguments, {"factor": factor})
        assert seconds > 0
        np.testing.assert_array_equal(program(*arguments), arguments[0] * factor)
    with jax.default_matmul_precision("bfloat16"):
        programs.get(_scaled, (two,), {"factor": 2})
    assert programs.compiled == len(programs) == 5
    _, seconds = programs.get(_scaled, (two + 1,), {"factor": 2})
    assert seconds == 0 and programs.compiled == 5


def _draw(seed):
    return jax.random.normal(jax.random.key(seed[0]), (5,))


@pytest.mark.parametrize(
    ("setting", "other"),
    [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", None)],
)
def test_a_changed_random_generator_meets_no_old_program(setting, other):
    programs, seed = Programs(4), (jnp.arange(1, 2, dtype=jnp.uint32),)
    usual = getattr(jax.config, setting)
    drawn = programs.get(_draw, seed, {})[0](*seed)
    try:
        jax.config.update(setting, not usual if other is None else other)
        changed = programs.get(_draw, seed, {})[0](*seed)
        np.testing.assert_array_equal(changed, _draw(*seed))
        assert not np.array_equal(changed, drawn)
    finally:
        jax.config.update(setting, usual)
    programs.get(_draw, seed, {})
    assert programs.compiled == len(programs) == 2


def test_the_number_of_programs_is_bounded():
    programs = Programs(2)
    for factor in range(4):
        programs.get(_scaled, (jnp.arange(2.0),), {"factor": factor})
    assert (len(programs), programs.compiled) == (2, 4)


@pytest.mark.slow
@pytest.mark.long  # small programs: `test_programs_are_keyed_by_all_that_is_static`
def test_forward_of_a_replaced_model_is_its_own(token_ids):
    """Shapes alone are no key: the budget of the second model must count."""
    sparse = sj.SparseConfig(local_blocks=1, init_blocks=0, block_budget=2)
    options = {"attention": "infllm_v2", "storage": "stacked"}
    first = sj.load("tiny", sparse=sparse, **options)
    ids = token_ids(300)
    narrow = sj.forward(first, ids)
    wide = dataclasses.replace(
        first, sparse=dataclasses.replace(sparse, block_budget=4)
    )
    fresh = sj.load("tiny", sparse=wide.sparse, **options)
    replaced = sj.forward(wide, ids)
    assert np.abs(np.asarray(replaced) - np.asarray(narrow)).max() > 1e-4
    compiled = PROGRAMS.compiled
    # Another model of the same shape: the same program, its own weights.
    np.testing.assert_array_equal(replaced, sj.forward(fresh, ids))
    other = dataclasses.replace(
        first, model=jax.tree.map(lambda weights: weights * 0.9, first.model)
    )
    assert np.abs(np.asarray(sj.forward(other, ids) - narrow)).max() > 1e-4
    assert PROGRAMS.compiled == compiled
