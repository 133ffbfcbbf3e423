"""Memory of the machine or of the container, as the kernel's files tell it."""

import pytest

from sparda_jax import runtime
from sparda_jax.machine import Limit, physical_memory

GIB = 2**30


def _root(folder, files: dict[str, str]):
    """A tree of fake kernel files. The answer for a root is kept: each has its own."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({}, None),
        ({"sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        ({"sys/fs/cgroup/memory.max": "max\n"}, None),
        ({f"{V1}/memory.limit_in_bytes": "8192\n"}, 8192),
        ({f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        (  # a group's own limit, version 2
            {
                "proc/self/cgroup": "0::/user.slice/job\n",
                "sys/fs/cgroup/user.slice/job/memory.max": "4096\n",
            },
            4096,
        ),
        (  # a smaller one above it
            {
                "proc/self/cgroup": "0::/user.slice/job\n",
                "sys/fs/cgroup/user.slice/memory.max": "1024\n",
                "sys/fs/cgroup/user.slice/job/memory.max": "4096\n",
            },
            1024,
        ),
        (  # version 1, with several controllers in a line
            {
                "proc/self/cgroup": "5:cpu,memory:/docker/abc\n3:pids:/other\n",
                f"{V1}/docker/abc/memory.limit_in_bytes": "2048\n",
                "sys/fs/cgroup/memory/other/memory.limit_in_bytes": "1\n",
            },
            2048,
        ),
        (  # the host's path, which the container does not see
            {
                "proc/self/cgroup": "5:memory:/docker/abc\n",
                f"{V1}/memory.limit_in_bytes": "2048\n",
            },
            2048,
        ),
        ({"proc/self/cgroup": "rubbish", "sys/fs/cgroup/memory.max": "lots"}, None),
    ],
)
def test_limits_of_control_groups(tmp_path, files, size):
    found = physical_memory(_root(tmp_path, files))
    if size is None:
        assert found.source == "this machine's memory"
        assert found.size > 2**20
    else:
        assert found == Limit(size, "this container's memory")


def test_the_pool_of_pinned_memory_heeds_the_container(monkeypatch, tmp_path):
    root = _root(tmp_path, {"sys/fs/cgroup/memory.max": f"{10 * GIB}\n"})
    limit = Limit(10 * GIB, "this container's memory")
    monkeypatch.setattr(runtime, "physical_memory", lambda: limit)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv(runtime.HOST_LIMIT, raising=False)
    runtime.configure_offload()
    assert runtime.os.environ[runtime.HOST_LIMIT] == "9"
    assert physical_memory(root).size <= 10 * GIB
