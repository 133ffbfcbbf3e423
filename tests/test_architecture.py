"""The house: imports along the arrows, nothing private across, nothing long."""

import ast
import functools
import graphlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "sparda_jax", "train", "benchmarks")

_IMPORT_ALL = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " must not be imported by {package}")

sys.meta_path.insert(0, Block())
package = importlib.import_module("{package}")
names = [m.name for m in pkgutil.walk_packages(package.__path__, "{package}.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [("pallas_kernels", {"sparda_jax", "train", "flax"}), ("sparda_jax", {"train"})],
)
def test_package_imports_without_those_above_it(package, blocked):
    script = _IMPORT_ALL.format(package=package, blocked=blocked)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) > 5


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _tree(path: pathlib.Path) -> ast.Module:
    """A file's syntax tree: several tests look at all of them."""
    return _parsed(path.read_text(encoding="utf-8"))


def _imports(path: pathlib.Path) -> Iterator[str]:
    """Dotted names of all that a file imports."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _packages_of(path: pathlib.Path) -> tuple[str, ...]:
    """Packages whose private names a file may use: its own, or those it tests."""
    parts = path.relative_to(ROOT).parts
    if parts[:2] == ("tests", "kernel_cases.py"):  # shared by tests/pallas_kernels
        return ("pallas_kernels",)
    return (parts[1] if parts[0] == "tests" else parts[0],)


def private_imports(path: pathlib.Path) -> list[str]:
    """Names of other packages that a file imports and that begin with `_`."""
    return [
        name
        for name in _imports(path)
        if name.split(".")[0] in PACKAGES
        and name.split(".")[0] not in _packages_of(path)
        and any(part.startswith("_") for part in name.split("."))
    ]


def test_no_package_imports_what_is_private_to_another():
    folders = (*PACKAGES, "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(path): names for path in files if (names := private_imports(path))}
    assert not found


def test_a_private_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "train" / "x.py"
    path.parent.mkdir()
    path.write_text("from pallas_kernels._common.triton import dot\nimport train._x\n")
    assert private_imports(path) == ["pallas_kernels._common.triton.dot"]
    path.write_text("from sparda_jax.models.decoder import _hidden\n")
    assert private_imports(path) == ["sparda_jax.models.decoder._hidden"]


LONGEST = 500  # Lines of a file: one that is longer has several reasons to change.


def _files(*folders: str) -> list[pathlib.Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_no_file_is_long():
    lines = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for path in _files(*PACKAGES, "configs", "tests")
    }
    assert len(lines) > 100
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}


LONGEST_FUNCTION = 60  # Lines of code, without the signature and the docstring.
# Functions that are longer, and why they are not cut:
#   kernel    the body of a kernel, or its launch: what its loops share are registers
#             and shared memory, which every part would have to be handed
#   list      one thing after the other, of the same kind: options, cases, figures
#   order     what one call settles, part by part: each needs what was settled before
LONG_FUNCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "kernel": {
        "pallas_kernels/block_scores/mosaic_lse.py": ("_lse_body",),
        "pallas_kernels/block_scores/pallas_mosaic_gpu.py": (
            "_call",
            "_softmax_body",
        ),
        "pallas_kernels/block_scores/xla.py": ("_tile",),
        "pallas_kernels/block_sparse_attention/pallas_mosaic_gpu.py": (
            "_body",
            "_call",
            "_compute",
        ),
        "pallas_kernels/paged_decode_attention/pallas_mosaic_gpu.py": (
            "_body",
            "_compute",
            "paged_decode_attention_mosaic_gpu",
        ),
        "pallas_kernels/paged_decode_attention/xla.py": ("paged_decode_attention_xla",),
        "pallas_kernels/plan_slots/pallas_triton.py": ("_kernel",),
    },
    "list": {
        "pallas_kernels/tuning/cases/block_scores.py": ("cases",),
        "sparda_jax/cli/forecast_report.py": (
            "_report",
            "add_forecast_report_parser",
        ),
        "sparda_jax/cli/soak.py": ("add_soak_parser",),
        "sparda_jax/evaluation/forecast_pages.py": ("draw",),
    },
    "order": {
        "sparda_jax/evaluation/forecast_measure.py": ("measure_layer",),
        "sparda_jax/inference/host_loop.py": ("decode_host_loop",),
        "sparda_jax/inference/prefill.py": ("prefill",),
        "sparda_jax/planning/plan.py": ("plan",),
        "tests/sparda_jax/models/test_model_goldens.py": ("_run",),
        "train/benchmark.py": ("main",),
        "train/loss.py": ("distill_layer",),
    },
}


def _code_lines(node: ast.FunctionDef) -> int:
    first, *rest = node.body
    if ast.get_docstring(node) is not None and rest:
        first = rest[0]
    assert node.end_lineno is not None
    return node.end_lineno - first.lineno + 1


def test_no_function_is_long_without_a_reason():
    """But for benchmarks: what they do is told from first to last, to one reader."""
    lines: dict[tuple[str, str], int] = {}
    for path in _files(*PACKAGES, "tests"):
        file = path.relative_to(ROOT)
        if "benchmarks" in file.parts:
            continue
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef):
                key = (file.as_posix(), node.name)
                lines[key] = max(lines.get(key, 0), _code_lines(node))
    assert len(lines) > 1000
    allowed = {
        (file, name)
        for group in LONG_FUNCTIONS.values()
        for file, names in group.items()
        for name in names
    }
    assert allowed <= lines.keys()
    long = {key: count for key, count in lines.items() if count > LONGEST_FUNCTION}
    assert {key: n for key, n in long.items() if key not in allowed} == {}


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _loads(path: pathlib.Path, modules: Mapping[str, pathlib.Path]) -> set[str]:
    """Modules of ours that importing a file runs, if they have not run yet."""
    found = set()
    for node in _tree(path).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import module` needs nothing of the package itself.
            names = [name if name in modules else node.module for name in inner]
        else:
            continue
        found.update(name for name in names if name in modules)
    return found - {_module(path)}


def test_no_import_goes_round():
    modules = {_module(path): path for path in _files(*PACKAGES)}
    graph = {name: _loads(path, modules) for name, path in modules.items()}
    # Raises CycleError, which names the circle.
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)
