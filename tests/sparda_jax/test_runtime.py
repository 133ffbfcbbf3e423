"""The runtime flags of offloaded KV: set once, never twice, and missed when absent."""

import pytest

from sparda_jax import runtime


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
