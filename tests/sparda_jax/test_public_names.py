"""`import sparda_jax` names what there is, and imports it when it is asked for."""

import ast
import pathlib
import subprocess
import sys

import pytest

import sparda_jax as sj


def test_every_public_name_is_there():
    names = set(sj.__all__) - {"__version__"}
    assert names == set(sj._HOMES)
    for name in names:
        # What is made elsewhere would be imported through a third module.
        made_in = getattr(getattr(sj, name), "__module__", sj._HOMES[name])
        assert made_in == sj._HOMES[name], name
    assert set(sj.__all__) <= set(dir(sj))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sj.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse(pathlib.Path(sj.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == sj._HOMES


def test_the_package_alone_starts_no_jax():
    script = "import sparda_jax, sys; print({'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.stdout.strip() == b"set()", done.stderr
