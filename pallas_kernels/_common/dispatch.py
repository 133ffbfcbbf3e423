"""Old address of public names; use `pallas_kernels.device` and `.dispatch`."""

from pallas_kernels._common.devices import (
    current_device_kind,
    current_platform,
    require_cuda,
)
from pallas_kernels.dispatch import Implementation, candidates, tuned_record

__all__ = [
    "Implementation",
    "candidates",
    "current_device_kind",
    "current_platform",
    "require_cuda",
    "tuned_record",
]
