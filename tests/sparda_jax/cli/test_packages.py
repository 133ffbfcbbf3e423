"""What a command says where a package that it needs is not there."""

import pytest

from sparda_jax.checks import ConfigError
from sparda_jax.cli.packages import needs


def test_a_missing_package_names_what_brings_it():
    with (
        pytest.raises(ConfigError, match=r"\(uvicorn_x\): pip install.*\[serve\]'"),
        needs("serve"),
    ):
        import uvicorn_x  # noqa: F401


def test_a_module_of_ours_that_is_missing_is_a_fault():
    with pytest.raises(ModuleNotFoundError), needs("serve"):
        import sparda_jax.no_such_module  # noqa: F401
