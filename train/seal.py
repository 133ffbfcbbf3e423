"""Seals of checkpoints: the hash of every file, written before it has its name.

A checkpoint that does not fit its seal is not what was written: a disk lost a part of
it, or somebody changed it. Reading it could fail in many ways, or give wrong numbers
without a word; the seal is compared before anything else looks at the files.
"""

import hashlib
import json
import pathlib

from pallas_kernels.atomic_file import synchronise
from sparda_jax.checkpoint.atomic import write_json

SEAL = "sealed.json"
# What a checkpoint consists of: a folder each. Orbax's notes beside and in them carry
# nothing of the run, and some are written later.
_PARTS = ("state", "data", "identity")
_NOTES = ("commit_success.txt",)


def _files(step: pathlib.Path) -> dict[str, pathlib.Path]:
    """All files that a seal names, by their place in the checkpoint."""
    return {
        path.relative_to(step).as_posix(): path
        for path in sorted(step.glob("*/**/*"))
        if path.is_file() and path.name not in _NOTES
    }


def _hash(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(step: pathlib.Path) -> None:
    """Writes the hashes of a checkpoint's files, which must all be there.

    Raises:
      OSError: A file cannot be read.
      CheckpointError: The seal cannot be written.
    """
    for path in _files(step).values():
        synchronise(path)
    hashes = {name: _hash(path) for name, path in _files(step).items()}
    write_json(step / SEAL, hashes)


def fault(step: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is whole.

    One without a seal, of a version that wrote none, is taken as it is if it has all
    its parts.
    """
    try:
        if not step.is_dir():
            return "is no directory"
        if not any(step.iterdir()):
            return "is empty"
        for part in _PARTS:
            if not (step / part).is_dir() or not any((step / part).iterdir()):
                return f"has no {part}"
        if not (step / SEAL).exists():
            return None
        hashes = json.loads((step / SEAL).read_bytes())
        found = _files(step)
        for name, wanted in hashes.items():
            if name not in found:
                return f"lacks {name}"
            if _hash(found[name]) != wanted:
                return f"has a changed {name}"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        return f"cannot be read: {reason[:200]}"
    return None
