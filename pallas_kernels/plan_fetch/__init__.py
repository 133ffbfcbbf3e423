"""Which listed blocks must be fetched, and which slots they take."""

from pallas_kernels.plan_fetch.api import plan_fetch
from pallas_kernels.plan_fetch.reference import FetchPlan

__all__ = ["FetchPlan", "plan_fetch"]
