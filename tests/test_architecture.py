"""Imports go along the arrows only: pallas_kernels ← sparda_jax ← train."""

import subprocess
import sys

import pytest

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
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) > 5
