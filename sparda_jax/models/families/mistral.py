"""Mistral: Llama's form with a sliding window, which must be off; Mixtral: its experts.

Their GGUF files are of architecture llama.
"""

from typing import Any

from sparda_jax.config import ModelConfig
from sparda_jax.models.families.family import EXPERTS, Family, refuse_window
from sparda_jax.models.families.fields import Fields

_DEFAULT_WINDOW = 4096  # Of a config.json that does not have the key at all.


def read(fields: Fields) -> dict[str, Any]:
    """No biases; every token must see all before it."""
    refuse_window(fields, fields.values.get("sliding_window", _DEFAULT_WINDOW))
    if fields.flag("attention_bias", False):
        raise fields.fail("attention_bias", True, "false")
    return {}


def read_mixtral(fields: Fields) -> dict[str, Any]:
    """No biases, and no window unless it is asked for."""
    refuse_window(fields, fields.get("sliding_window"))
    if fields.flag("attention_bias", False):
        raise fields.fail("attention_bias", True, "false")
    return {}


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """How many experts there are, and of a token."""
    return {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "sliding_window": None,
    }


MISTRAL = Family(name="mistral", model_type="mistral", read=read, kv_heads=8)

_MOE = "block_sparse_moe"
MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    read=read_mixtral,
    variants=(frozenset({EXPERTS}),),
    write=write_mixtral,
    kv_heads=8,
    architecture="llama",
    permuted=True,
    experts=(8, 2),
    stored_names={
        "mlp.gate.weight": f"{_MOE}.gate.weight",
        "mlp.experts.gate_proj.weight": f"{_MOE}.experts.{{expert}}.w1.weight",
        "mlp.experts.up_proj.weight": f"{_MOE}.experts.{{expert}}.w3.weight",
        "mlp.experts.down_proj.weight": f"{_MOE}.experts.{{expert}}.w2.weight",
    },
)
