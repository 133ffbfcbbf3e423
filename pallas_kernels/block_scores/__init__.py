"""Scoring blocks of keys against queries, and choosing the best of them."""

from pallas_kernels.block_scores.api import block_scores, select_blocks

__all__ = ["block_scores", "select_blocks"]
