"""Fixtures of the tests that run models."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def token_ids():
    """`token_ids(length, seed)` draws ids of the tiny vocabulary."""

    def draw(length: int, seed: int = 0) -> list[int]:
        rng = np.random.default_rng(seed)
        return rng.integers(2, 128, size=length).tolist()

    return draw
