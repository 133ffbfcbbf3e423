"""Putting fetched blocks into their slots, in place."""

from pallas_kernels.commit_blocks.api import commit_blocks

__all__ = ["commit_blocks"]
