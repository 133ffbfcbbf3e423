"""What the Triton kernels that copy listed blocks share."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels._common.triton import require_launch


@dataclass(frozen=True)
class CopyConfig:
    """Settings of a kernel that copies parts of listed blocks.

    Attributes:
      programs: most persistent programs.
      part_bytes: bytes that a program copies at a time, a power of two.
      num_warps: warps of a program.
    """

    programs: int
    part_bytes: int
    num_warps: int

    def __post_init__(self):
        if self.programs < 1:
            raise ValueError(f"programs is {self.programs}; it must be at least 1")
        if self.part_bytes < 256 or self.part_bytes & (self.part_bytes - 1):
            raise ValueError(
                f"part_bytes is {self.part_bytes}; it must be a power of two >= 256"
            )
        require_launch(self.num_warps, num_stages=1)
