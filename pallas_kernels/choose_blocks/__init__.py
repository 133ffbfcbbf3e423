"""The best blocks of each row of scores."""

from pallas_kernels.choose_blocks.api import choose_blocks

__all__ = ["choose_blocks"]
