"""Llama 2 and 3, SmolLM2 and all that share their form."""

from typing import Any

from sparda_jax.models.families.family import (
    BIASES,
    Family,
    read_biases,
    refuse_window,
)
from sparda_jax.models.families.fields import Fields


def read(fields: Fields) -> dict[str, Any]:
    """Optional biases; a window is no part of Llama."""
    if fields.flag("use_sliding_window", False):
        raise fields.fail("use_sliding_window", True, "false")
    refuse_window(fields, fields.get("sliding_window"))
    return read_biases(fields)


LLAMA = Family(
    name="llama",
    model_type="llama",
    read=read,
    variants=(frozenset(), BIASES),
    architecture="llama",
    permuted=True,
    optional=("attention_bias", "output_bias"),
)
