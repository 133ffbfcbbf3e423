"""Forecast weights that the package publishes, by the hash of their base model.

Each fits one base model and one geometry of the selection. README.md beside the files
is their model card. Trained by `python -m train.main`.
"""

import dataclasses
import pathlib
import types

from sparda_jax.config import SparseConfig


@dataclasses.dataclass(frozen=True)
class Published:
    """A file of Forecast weights.

    Attributes:
      file: Its name in this folder.
      preset: Whose shape its base model has.
      kernel_size, kernel_stride, block_size: The geometry that it is for.
    """

    file: str
    preset: str
    kernel_size: int
    kernel_stride: int
    block_size: int

    @property
    def path(self) -> pathlib.Path:
        """Where it is."""
        return pathlib.Path(__file__).parent / self.file

    def fits(self, sparse: SparseConfig) -> bool:
        """Whether a selection scores the averages that it is for."""
        asked = (sparse.kernel_size, sparse.kernel_stride, sparse.block_size)
        return asked == (self.kernel_size, self.kernel_stride, self.block_size)

    def fitted(self, sparse: SparseConfig) -> SparseConfig:
        """A selection that scores the averages that it is for."""
        return dataclasses.replace(
            sparse,
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            block_size=self.block_size,
        )


PUBLISHED = types.MappingProxyType(
    {
        # SmolLM2-135M-Instruct, Q4_1.
        "68c407998cb0b48743775dcb452bf59362f8a5dfb86b98db3ebc02cec204bd61": Published(
            "smollm2-135m.safetensors",
            preset="smollm2-135m",
            kernel_size=8,
            kernel_stride=4,
            block_size=64,
        ),
        # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M: a query for each query head, made behind
        # a layer's attention. Trained with windows of 32 keys; a guess of the layer's
        # own queries, it is as good for others, and 8 keys keep needles that 32 hide.
        "2c721389e34ff94e8a179499d61e5817da48520b7654ea651532a5a0483391be": Published(
            "qwen2.5-coder-0.5b.safetensors",
            preset="qwen2.5-coder-0.5b",
            kernel_size=8,
            kernel_stride=4,
            block_size=64,
        ),
    }
)


def published_forecast(fingerprint: str | None) -> Published | None:
    """The published weights for a base model; None if there are none."""
    return None if fingerprint is None else PUBLISHED.get(fingerprint)
