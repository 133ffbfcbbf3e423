"""NOSA: Llama's form with a key bias made of the values."""

from typing import Any

from sparda_jax.models.families import llama
from sparda_jax.models.families.family import BIASES, Family
from sparda_jax.models.families.fields import Fields


def read(fields: Fields) -> dict[str, Any]:
    """As Llama; its config.json says nothing of the key bias, its tensors do."""
    return {"key_bias": True} | llama.read(fields)


NOSA = Family(
    name="nosa",
    model_type="llama",
    read=read,
    variants=(frozenset({"key_bias"}), BIASES | {"key_bias"}),
    marker=".self_attn.A",
)
