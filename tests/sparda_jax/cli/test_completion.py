"""`sparda completion` prints scripts that shells accept."""

import shutil
import subprocess
import sys

import pytest

from sparda_jax.cli.main import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_scripts_know_commands_and_options(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("generate", "chat", "--block-budget" if shell != "tcsh" else "plan"):
        assert word in script
    if shell == "bash" and (bash := shutil.which("bash")):
        subprocess.run([bash, "-n"], input=script, text=True, check=True)


def test_without_its_package_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "sparda: completion needs the package shtab: pip install 'sparda-jax[shell]'\n"
    )
