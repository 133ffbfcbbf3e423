"""What a command says where a package that it needs is not there."""

import pathlib
import re
import subprocess
import sys

import pytest

from sparda_jax.checks import ConfigError
from sparda_jax.cli.packages import command_needs, needs

ROOT = pathlib.Path(__file__).parents[3]


def test_a_missing_package_names_what_brings_it():
    with (
        pytest.raises(ConfigError, match=r"\(uvicorn_x\): pip install.*\[serve\]'"),
        needs("serve"),
    ):
        import uvicorn_x  # noqa: F401


def test_a_module_of_ours_that_is_missing_is_a_fault():
    with pytest.raises(ModuleNotFoundError), needs("serve"):
        import sparda_jax.no_such_module  # noqa: F401


def test_a_command_without_a_package_ends_in_a_line(capsys):
    with pytest.raises(SystemExit) as ended, command_needs("train", "__main__"):
        import uvicorn_x
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "pip install 'sparda-jax[train]'" in told
    # Imported, it is an import that failed.
    with pytest.raises(ModuleNotFoundError), command_needs("train", "train.main"):
        import uvicorn_x  # noqa: F401


_HELPS = """
import runpy, sys
for name in ("grain", "matplotlib", "nbformat", "nbclient", "PIL"):
    sys.modules[name] = None  # as if it were not installed
for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        print("ENDED", module, ended.code)
"""


@pytest.mark.slow
def test_commands_without_the_extras_end_in_help_or_a_line():
    files = [*(ROOT / "train").glob("*.py"), ROOT / "scripts" / "run_notebooks.py"]
    modules = [
        f"{file.parent.name}.{file.stem}"
        for file in files
        if "__main__" in file.read_text(encoding="utf-8")
    ]
    done = subprocess.run(
        [sys.executable, "-c", _HELPS, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status = dict(re.findall(r"^ENDED (\S+) (\d)$", done.stdout, re.M))
    assert status.keys() == set(modules)
    lines = done.stderr.splitlines()
    assert len(lines) == list(status.values()).count("2") >= 5
    assert all("pip install 'sparda-jax[" in line for line in lines)
