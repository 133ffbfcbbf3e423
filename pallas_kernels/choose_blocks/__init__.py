"""The best blocks of each row of scores."""

from pallas_kernels.choose_blocks.api import choose_blocks
from pallas_kernels.choose_blocks.forced import Forced

__all__ = ["Forced", "choose_blocks"]
