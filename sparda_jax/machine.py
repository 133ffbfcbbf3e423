"""What this machine, or the container on it, has of memory."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator

_ROOT = pathlib.Path("/")


@dataclasses.dataclass(frozen=True)
class Limit:
    """Bytes that may be used, and who says so."""

    size: int
    source: str

    def __str__(self) -> str:
        return f"{self.source} ({size_text(self.size)})"


def size_text(size: int) -> str:
    """Bytes as a short text; GiB are 2^30."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1024:.1f} KiB"


def _control_groups(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files that may limit this process, of control groups in version 1 and 2.

    The limits of a group hold for the groups in it, so those above count as well. In a
    container the group's own path may not be there: then the top of the mounted tree
    is the container's.
    """
    places = {
        "": (root / "sys/fs/cgroup", "memory.max"),
        "memory": (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    }
    for mount, name in places.values():
        yield mount / name
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            if controller in places:
                mount, name = places[controller]
                folder = mount
                for part in pathlib.PurePosixPath(path).parts[1:]:
                    folder = folder / part
                    yield folder / name


@functools.cache
def physical_memory(root: pathlib.Path = _ROOT) -> Limit | None:
    """The machine's memory, or what a container may use of it; None if not told.

    Args:
      root: Where the files of the kernel are looked for.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    found = Limit(total, "this machine's memory")
    for path in _control_groups(root):
        try:
            text = path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
        # Without a limit there is "max", or in version 1 a number near 2^63.
        if text.isdigit() and int(text) < found.size:
            found = Limit(int(text), "this container's memory")
    return found
