"""One tensor of a GGUF file, read when it is asked for."""

import dataclasses
import math
import pathlib

import gguf
import ml_dtypes
import numpy as np

from sparda_jax.checkpoint.dequantize import dequantize
from sparda_jax.checkpoint.gguf_header import TensorInfo

_Types = gguf.GGMLQuantizationType
PLAIN = {
    _Types.F32: np.dtype("<f4"),
    _Types.F16: np.dtype("<f2"),
    _Types.BF16: np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Loader of one tensor of a GGUF file.

    Attributes:
      path: The file, for messages.
      data: Memory map of the whole file, uint8.
      info: Where the tensor lies.
      rows: For a permuted tensor, the stored row of each row.
    """

    path: pathlib.Path
    data: np.ndarray
    info: TensorInfo
    rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.info.shape

    @property
    def kind(self) -> gguf.GGMLQuantizationType:
        """Format of the data."""
        return self.info.kind

    def _stored(self) -> np.ndarray:
        """[rows, bytes of a row], a view of the file; a vector's elements are rows.

        A quantised vector is one row.
        """
        raw = self.data[self.info.offset : self.info.offset + self.info.nbytes]
        if len(self.shape) > 1:
            return raw.reshape(math.prod(self.shape[:-1]), -1)
        return raw.reshape(self.shape[0] if self.info.kind in PLAIN else 1, -1)

    def _decode(self, raw: np.ndarray) -> np.ndarray:
        plain = PLAIN.get(self.info.kind)
        if plain is not None:
            return np.ascontiguousarray(raw).view(plain)
        return dequantize(raw, self.info.kind)

    def __call__(self) -> np.ndarray:
        """Returns the array, float32 unless the file holds float16 or bfloat16."""
        stored = self._stored()
        if self.rows is not None:
            stored = stored[self.rows]
        return self._decode(stored).reshape(self.shape)

    def sample(self, indices: np.ndarray) -> np.ndarray:
        """Returns the float32 elements at flat `indices`."""
        stored = self._stored()
        per_row = math.prod(self.shape) // stored.shape[0]
        row, column = np.divmod(indices, per_row)
        if self.rows is not None:
            row = self.rows[row]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[self.info.kind]
        blocks = stored.reshape(-1, block_bytes)
        block, inner = np.divmod(row * per_row + column, per_block)
        decoded = self._decode(blocks[block]).reshape(len(indices), per_block)
        return decoded[np.arange(len(indices)), inner].astype(np.float32)
