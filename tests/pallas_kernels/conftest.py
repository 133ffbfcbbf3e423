"""Fixtures of the kernel tests."""

import jaxtyping
import pytest


@pytest.fixture
def without_type_checks():
    """Lets wrong arguments reach the checks that users without beartype meet."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
