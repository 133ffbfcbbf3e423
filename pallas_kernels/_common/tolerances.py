"""How far an implementation may be from the float32 reference, in one table.

The measure is relative to the result: max |x - ref| / (max |ref| + 1e-6) for every
array of the result separately. The reference sees the same (already rounded) inputs,
so that the figures cover the arithmetic and the rounding of the result alone.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

# 16-bit results carry one rounding (2^-9 for bfloat16, 2^-12 for float16) and weights
# that were rounded before their product with the values.
TOLERANCES: dict[str, float] = {
    "float32": 5e-6,
    "bfloat16": 1.6e-2,
    "float16": 2e-3,
    "int32": 0.0,
}
# Gradients add recomputed weights and products of them.
GRADIENT_FACTOR = 4.0


def relative_error(x: Any, reference: Any) -> float:
    """The largest difference over the largest reference value.

    Where the reference is infinite, ``x`` must be equal; a NaN in ``x`` that the
    reference does not have gives inf.

    Args:
      x: what was computed, any float dtype.
      reference: what it should be, of the same shape.

    Returns:
      The relative error, inf when shapes or non-finite values disagree.
    """
    x = np.asarray(jnp.asarray(x, jnp.float32))
    reference = np.asarray(jnp.asarray(reference, jnp.float32))
    if x.shape != reference.shape:
        return float("inf")
    finite = np.isfinite(reference)
    if not np.array_equal(x[~finite], reference[~finite], equal_nan=True):
        return float("inf")
    if not np.isfinite(x[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    difference = np.abs(x[finite] - reference[finite]).max()
    return float(difference / (np.abs(reference[finite]).max() + 1e-6))


def tolerance(dtype: Any) -> float:
    """The allowed relative error for inputs of ``dtype``."""
    return TOLERANCES[jnp.dtype(dtype).name]
