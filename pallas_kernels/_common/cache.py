"""Where this package keeps what it learns about a device."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_directory() -> Path:
    """``PALLAS_KERNELS_CACHE``, or ``pallas_kernels`` in the user's cache."""
    chosen = os.environ.get("PALLAS_KERNELS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pallas_kernels"


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty when there is no such file, or when it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> bool:
    """Replaces a file as a whole; says whether the place could be written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            json.dump(value, file, indent=1)
        Path(file.name).replace(path)
    except OSError:
        return False
    return True
