"""Models that are split into several GGUF files, `NAME-00001-of-00003.gguf` and on."""

import pathlib
import re

import numpy as np

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.gguf_header import GGUFHeader, read_header
from sparda_jax.checkpoint.gguf_tensor import GGUFTensor

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII)


def _split_fail(header: GGUFHeader, key: str, allowed: str) -> CheckpointError:
    value = header.metadata.get(f"split.{key}")
    return CheckpointError(
        f"{header.path}: GGUF split.{key} = {show(value)}, allowed: {allowed}"
    )


def _count(header: GGUFHeader) -> int:
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise _split_fail(header, "count", "a number of files")
    return max(count, 1)


def _tensors(header: GGUFHeader) -> dict[str, GGUFTensor]:
    data = np.asarray(np.memmap(header.path, np.uint8, "r"))
    return {
        name: GGUFTensor(header.path, data, info)
        for name, info in header.tensors.items()
    }


def _read_part(path: pathlib.Path, number: int, count: int) -> GGUFHeader:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing: it is part {number} of {count}")
    part = read_header(path)
    if _count(part) != count:
        raise _split_fail(part, "count", f"{count}, as in the other parts")
    if part.metadata.get("split.no") != number - 1:
        raise _split_fail(part, "no", f"{number - 1} in part {number}")
    return part


def read_parts(header: GGUFHeader) -> tuple[GGUFHeader, dict[str, GGUFTensor]]:
    """The first part, which holds the metadata, and the tensors of all parts.

    Args:
      header: Of any part, or of a file that is a whole model.

    Returns:
      The header with the model's metadata, and tensors by GGUF name.

    Raises:
      CheckpointError: A part is missing, damaged or of another model.
    """
    count = _count(header)
    if count == 1:
        return header, _tensors(header)
    match = _PART.fullmatch(header.path.name)
    if match is None or int(match[3]) != count:
        raise _split_fail(
            header, "count", f"1, or in a file named NAME-00001-of-{count:05d}.gguf"
        )
    first, tensors = None, {}
    for number in range(1, count + 1):
        name = f"{match[1]}-{number:05d}-of-{count:05d}.gguf"
        part = _read_part(header.path.with_name(name), number, count)
        first = first or part
        for name, tensor in _tensors(part).items():
            if name in tensors:
                raise CheckpointError(
                    f"{part.path}: tensor {show(name)} is in "
                    f"{tensors[name].path.name} as well"
                )
            tensors[name] = tensor
    assert first is not None
    wanted = first.metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise _split_fail(first, "tensors.count", f"{len(tensors)}, as the parts hold")
    return first, tensors
