"""Notebooks: nothing of a run in git; executed whole, they show what they promise."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def _cells(path: pathlib.Path, kind: str) -> list[dict]:
    book = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in book["cells"] if cell["cell_type"] == kind]


def _source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_installs_says_the_machine_and_keeps_no_outputs(path):
    code = _cells(path, "code")
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)
    assert "pip" in _source(code[0]) and "device_kind" in _source(code[0])
    for number, cell in enumerate(code):
        compile(_source(cell), f"{path.name}[{number}]", "exec")
    words = " ".join(map(_source, _cells(path, "markdown") + code))
    assert re.search(r"[Ss]kipped|decides nothing", words)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """`told(name)` is what a notebook printed; it is executed once."""
    pytest.importorskip("nbclient")
    folder = tmp_path_factory.mktemp("notebooks")

    def run(name: str) -> str:
        command = [sys.executable, "scripts/run_notebooks.py", "--out", str(folder)]
        done = subprocess.run(
            [*command, f"notebooks/{name}.ipynb"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outputs = (
            output
            for cell in _cells(folder / f"{name}.ipynb", "code")
            for output in cell["outputs"]
        )
        return "".join("".join(output.get("text", [])) for output in outputs)

    return run


@pytest.mark.slow
@pytest.mark.network
def test_long_document(told):
    text = told("long_document")
    rows = re.findall(r"^(dense|infllm_v2|sparda) +(resident|offload) .*%", text, re.M)
    assert len(rows) == 5
    assert "offloaded tokens are the resident ones: True" in text
    assert re.search(r"^dense .* yes ", text, re.M)
    hits, megabytes = re.search(r"hits (\d+)%, ([\d.]+) MB", text).groups()
    assert int(hits) > 50 and float(megabytes) > 0


@pytest.mark.slow
@pytest.mark.network
def test_selectors(told):
    found = dict(re.findall(r"^(\w+) +(\d+\.\d{3})", told("selectors"), re.M))
    values = {name: float(value) for name, value in found.items()}
    assert {"dense", "infllm_v2", "sparda", "window", "random"} <= values.keys()
    # Reading everything is best, and what looks at the keys beats what does not.
    assert values["dense"] <= values["infllm_v2"] < values["window"]
    assert values["sparda"] < values["random"]


@pytest.mark.slow
def test_extend(told):
    text = told("extend")
    assert "'every_third'" in text
    assert "offloaded tokens are the resident ones: True" in text
    assert "looked ahead: True" in text
    assert "agrees: True" in text


@pytest.mark.slow
@pytest.mark.network
def test_distil(told):
    text = told("distil")
    assert "it rose: True" in text
    assert re.search(r"the forecast found \d+% of the own queries' blocks", text)


@pytest.mark.slow
@pytest.mark.network
def test_inside(told):
    text = told("inside")
    recall = float(re.search(r"recall over all layers: ([\d.]+)", text)[1])
    assert 0.6 < recall < 1
    assert re.search(r"missed block \d+: ['\"].+", text)
    assert text.count("new at a step:") == 2


@pytest.mark.slow
def test_link(told):
    text = told("link")
    assert float(re.search(r"link ([\d.]+) GB/s", text)[1]) > 0
    assert len(re.findall(r"^sparda (?:resident|offload) .* … ", text, re.M)) == 6
    assert "best against best" in text
