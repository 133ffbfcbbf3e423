"""Where this package keeps what it learns about a device."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.atomic_file import new_file


def cache_directory() -> Path:
    """``PALLAS_KERNELS_CACHE``, or ``pallas_kernels`` in the user's cache.

    Where a home is not known, its ``~`` is a name like any other, and nothing is found
    there.
    """
    chosen = os.environ.get("PALLAS_KERNELS_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen))
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "pallas_kernels"


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty when there is no such file, or when it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces a file as a whole; makes its folder.

    Raises:
      OSError: The place cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
