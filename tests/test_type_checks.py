"""What tests check of types, with and without arrays, and that it can be turned off."""

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from sparda_jax.config import SparseConfig
from sparda_jax.evaluation.token_scores import divergence
from sparda_jax.machine import size_text


def _logs(tokens: int, dtype: str = "float32") -> np.ndarray:
    return np.full((2, tokens), -1.0, dtype)


def test_shapes_and_types_of_arrays_are_checked():
    divergence(_logs(3), _logs(3))
    for other in (_logs(4), _logs(3, "int32")):
        with pytest.raises(TypeCheckError, match="divergence"):
            divergence(_logs(3), other)


@pytest.mark.parametrize(
    "call", [lambda: size_text("x"), lambda: SparseConfig(block_size="x")]
)
def test_other_types_are_checked(call):
    with pytest.raises(BeartypeCallHintViolation, match="'x'"):
        call()


def test_checks_can_be_turned_off(without_type_checks):
    with pytest.raises(ValueError, match="shapes"):
        divergence(_logs(3), _logs(4))
