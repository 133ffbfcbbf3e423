"""Loaders of single arrays, and the fingerprint of a set of arrays."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from sparda_jax.checkpoint.layout import parse_forecast_name

_SAMPLES = 1024


@runtime_checkable
class TensorLoader(Protocol):
    """Reads one array of a file when it is called, or a few elements of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        ...

    def __call__(self) -> np.ndarray:
        """Returns the array: float32, float16 or bfloat16, [out, in] for linears."""
        ...

    def sample(self, indices: np.ndarray) -> np.ndarray:
        """Returns the float32 elements at flat `indices`, as calling would give them.

        It reads little more than these elements.
        """
        ...


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """An array that a file holds as it is; `view` is a memory map of it.

    Calling returns the read-only view: its pages are read when they are used, and are
    the file's own, so that a large model is in memory once.
    """

    view: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.view.shape

    def __call__(self) -> np.ndarray:
        """Returns the array."""
        return self.view

    def sample(self, indices: np.ndarray) -> np.ndarray:
        """Returns the float32 elements at flat `indices`."""
        return self.view.reshape(-1)[indices].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class StackedTensor:
    """Arrays of one shape that a file holds one by one, as one with a leading axis."""

    parts: tuple[TensorLoader, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (len(self.parts), *self.parts[0].shape)

    def __call__(self) -> np.ndarray:
        """Returns the array."""
        return np.stack([part() for part in self.parts])

    def sample(self, indices: np.ndarray) -> np.ndarray:
        """Returns the float32 elements at flat `indices`."""
        part, inner = np.divmod(indices, math.prod(self.parts[0].shape))
        out = np.empty(len(indices), np.float32)
        for number in np.unique(part):
            here = part == number
            out[here] = self.parts[number].sample(inner[here])
        return out


def _sample_indices(size: int) -> np.ndarray:
    if size <= _SAMPLES:
        return np.arange(size, dtype=np.int64)
    return np.arange(_SAMPLES, dtype=np.int64) * (size - 1) // (_SAMPLES - 1)


def _digest(
    names: Iterable[str],
    shape_of: Callable[[str], tuple[int, ...]],
    sample: Callable[[str, np.ndarray], np.ndarray],
) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        if parse_forecast_name(name) is not None:
            continue
        shape = tuple(int(n) for n in shape_of(name))
        digest.update(f"{name} {shape}\n".encode())
        elements = sample(name, _sample_indices(int(np.prod(shape, dtype=np.int64))))
        digest.update(np.ascontiguousarray(elements, dtype="<f4").tobytes())
    return digest.hexdigest()


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash that tells one base model from another, whatever file it came from.

    sha256 over, sorted by name and without the Forecast tensors: name, shape and the
    float32 values of at most 1024 evenly spaced elements. Equal arrays give equal
    hashes from GGUF and from a float32 safetensors export; arrays that were rounded on
    the way (float32 to bfloat16) do not.

    Args:
      arrays: Hugging Face names to arrays as loaded; the head is left out when tied.

    Returns:
      64 hexadecimal digits.
    """
    return _digest(
        arrays,
        lambda name: arrays[name].shape,
        lambda name, at: np.asarray(arrays[name]).reshape(-1)[at].astype(np.float32),
    )


def fingerprint_of_loaders(loaders: Mapping[str, TensorLoader]) -> str:
    """`fingerprint` of the arrays that `loaders` would give, reading samples only."""
    return _digest(
        loaders,
        lambda name: loaders[name].shape,
        lambda name, at: loaders[name].sample(at),
    )
