"""The slots that listed blocks take, and what must be fetched for it."""

from pallas_kernels.plan_slots.api import plan_slots
from pallas_kernels.plan_slots.plan import SlotPlan

__all__ = ["SlotPlan", "plan_slots"]
