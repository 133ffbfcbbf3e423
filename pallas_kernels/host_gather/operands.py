"""What every back end of the host gather takes, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Shaped

from pallas_kernels._common import validation
from pallas_kernels._common.operands import Listed


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Gather(Listed):
    """Blocks and the rows to fetch of them.

    Attributes:
      blocks: rows of any shape and type, in ``pinned_host`` or device memory.
      zero_skipped: write zeros where an entry is skipped, rather than nothing; a trace
        fixes it.
    """

    blocks: Shaped[Array, " R *E"]
    zero_skipped: bool = field(metadata={"static": True})

    @property
    def elements(self) -> int:
        """Numbers of a block."""
        return self.blocks.size // self.blocks.shape[0]


def checked(blocks, indices, *, count=None, skipped="zero") -> Gather:
    """Checks arguments of ``host_gather`` and brings them to one form.

    Raises:
      ValueError: on shapes, dtypes or settings other than the operation names.
    """
    validation.require_rows("blocks", blocks, "[R, ...]")
    if skipped not in ("zero", "undefined"):
        raise ValueError(f"skipped is {skipped!r}; allowed: 'zero', 'undefined'")
    if count is not None and skipped != "undefined":
        raise ValueError(
            f"skipped is {skipped!r} with a count; entries behind it are not "
            "looked at: allowed: 'undefined'"
        )
    rows = validation.listed(indices, count)
    return Gather(blocks=blocks, zero_skipped=skipped == "zero", **rows)
