"""Attention of one query token a row over listed key-value blocks."""

from pallas_kernels.paged_decode_attention.api import paged_decode_attention

__all__ = ["paged_decode_attention"]
