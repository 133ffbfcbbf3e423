"""Causal attention in which every token lists the key-value blocks it reads."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention

__all__ = ["block_sparse_attention"]
