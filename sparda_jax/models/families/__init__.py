"""The kinds of models whose files can be read, one file a kind.

A new one is a file with a `Family`, an entry in `FAMILIES`, and a preset if it has a
model that is known by name.
"""

from collections.abc import Collection

from sparda_jax.config import ModelConfig
from sparda_jax.models.families.family import Family, variant_of
from sparda_jax.models.families.llama import LLAMA
from sparda_jax.models.families.minicpm import MINICPM
from sparda_jax.models.families.mistral import MISTRAL, MIXTRAL
from sparda_jax.models.families.nosa import NOSA
from sparda_jax.models.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

FAMILIES = (
    LLAMA,
    QWEN2,
    QWEN3,
    MINICPM,
    MISTRAL,
    NOSA,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
)

MODEL_TYPES = tuple(dict.fromkeys(family.model_type for family in FAMILIES))
ARCHITECTURES = tuple(
    dict.fromkeys(
        family.architecture for family in FAMILIES if family.architecture is not None
    )
)


def family_of_config_json(
    model_type: object, tensors: Collection[str]
) -> Family | None:
    """The family of a config.json, None if there is none.

    Args:
      model_type: Its `model_type`.
      tensors: Names of the tensors beside it.
    """
    found = [
        family
        for family in FAMILIES
        if family.model_type == model_type
        and (
            family.marker is None
            or any(name.endswith(family.marker) for name in tensors)
        )
    ]
    # One that is known by a marker goes before the plain one of its model_type.
    return max(found, key=lambda family: family.marker is not None, default=None)


def marked_family(tensors: Collection[str]) -> Family | None:
    """The family that the tensors alone give away, None if they do not."""
    for family in FAMILIES:
        marker = family.marker
        if marker is not None and any(name.endswith(marker) for name in tensors):
            return family
    return None


def family_of_gguf(architecture: object, *, experts: bool) -> Family | None:
    """The family of a GGUF file, None if there is none.

    Args:
      architecture: Its `general.architecture`.
      experts: Whether it has experts: families with and without share a name.
    """
    found = [
        family
        for family in FAMILIES
        if family.architecture is not None and family.architecture == architecture
    ]
    return max(
        found,
        key=lambda family: (family.experts is not None) == experts,
        default=None,
    )


def family_of_model(config: ModelConfig) -> Family | None:
    """The family whose config.json can say what the model is, None if none can."""
    variant = variant_of(config)
    for family in FAMILIES:
        if variant in family.variants:
            return family
    return None
