"""Fetching listed blocks out of host memory."""

from pallas_kernels.host_gather.api import host_gather

__all__ = ["host_gather"]
