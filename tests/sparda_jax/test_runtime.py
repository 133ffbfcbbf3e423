"""The runtime flags of offloaded KV, and the cache of compiled programs."""

import jax
import pytest

from sparda_jax import runtime
from sparda_jax.checks import ConfigError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """An environment of one's own."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    return monkeypatch


def _flags() -> list[str]:
    import os

    return os.environ["XLA_FLAGS"].split()


def test_flags_are_added_once():
    runtime.configure_offload()
    runtime.configure_offload()
    assert _flags() == ["--xla_cpu_enable_fast_math=false", runtime.COMMAND_BUFFERS]


def test_a_choice_of_the_user_stays(environment):
    environment.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    environment.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "7")
    runtime.configure_offload()
    assert _flags() == ["--xla_gpu_enable_command_buffer="]
    assert runtime.os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "7"


def test_pinned_memory_may_take_most_of_the_machine():
    runtime.configure_offload()
    limit = int(runtime.os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"])
    assert limit >= 1


def test_too_late_on_a_gpu_is_said(environment):
    environment.setattr(runtime, "_started", lambda: True)
    environment.setattr(runtime.jax, "default_backend", lambda: "gpu")
    with pytest.warns(RuntimeWarning, match="too late"):
        runtime.configure_offload()


def test_missing_flags_on_a_gpu_are_said(environment):
    environment.setattr(runtime.jax, "default_backend", lambda: "gpu")
    with pytest.warns(RuntimeWarning, match="will not overlap"):
        runtime.warn_if_serial()
    environment.setenv("XLA_FLAGS", runtime.COMMAND_BUFFERS)
    runtime.warn_if_serial()


def test_nothing_is_said_on_a_cpu():
    runtime.warn_if_serial()


@pytest.fixture
def no_cache():
    """JAX without a cache of programs, as a user's process begins; restored after."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    runtime.compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    runtime.compilation_cache.reset_cache()


def test_programs_are_kept_even_after_the_first_was_compiled(no_cache, tmp_path):
    jax.jit(lambda x: x + 1)(1.0).block_until_ready()
    folder = tmp_path / "programs"
    assert runtime.configure_cache(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x + 2)(1.0).block_until_ready()
    assert list(folder.iterdir())
    assert runtime.configure_cache() == folder, "what is set already stays"


def test_programs_are_kept_in_the_cache_directory(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARDA_CACHE", str(tmp_path))
    assert runtime.configure_cache() == tmp_path / "xla"


def test_a_place_that_cannot_be_written_to_is_said(no_cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/xla"):
        runtime.configure_cache(tmp_path / "file" / "xla")
    assert jax.config.jax_compilation_cache_dir is None
