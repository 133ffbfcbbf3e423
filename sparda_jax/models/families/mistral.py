"""Mistral: Llama's form with a sliding window, which must be off.

Its GGUF files are of architecture llama.
"""

from typing import Any

from sparda_jax.models.families.family import Family, refuse_window
from sparda_jax.models.families.fields import Fields

_DEFAULT_WINDOW = 4096  # Of a config.json that does not have the key at all.


def read(fields: Fields) -> dict[str, Any]:
    """No biases; every token must see all before it."""
    refuse_window(fields, fields.values.get("sliding_window", _DEFAULT_WINDOW))
    if fields.flag("attention_bias", False):
        raise fields.fail("attention_bias", True, "false")
    return {}


MISTRAL = Family(name="mistral", model_type="mistral", read=read, kv_heads=8)
