"""Means of overlapping windows of keys."""

from pallas_kernels.compress_keys.api import compress_keys

__all__ = ["compress_keys"]
