"""Notebooks: nothing of a run in git; executed whole, they show what they promise."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import sparda_jax as sj
from pallas_kernels.lowering import cuda_lowering_text

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
    assert _source(code[0]) == _source(_cells(BOOKS[0], "code")[0])
    for number, cell in enumerate(code):
        compile(_source(cell), f"{path.name}[{number}]", "exec")
    words = " ".join(map(_source, _cells(path, "markdown") + code))
    assert re.search(r"[Ss]kipped|decides nothing", words)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_kept_outputs_say_when_and_of_which_cells(path):
    run = json.loads((path.parent / "outputs" / f"{path.stem}.json").read_text("utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"])
    assert re.fullmatch(r"[0-9a-f]{7,40}", run["commit"])
    # A cell that has changed shows nothing: the first one, with the device, must.
    assert run["cells"][0]["source"] == _source(_cells(path, "code")[0])
    assert "JAX" in run["cells"][0]["outputs"][0]["text"]


def test_the_kernel_of_a_contributor_lowers_for_a_gpu():
    """On a GPU it is compiled, which no CPU shows."""
    (cell,) = [
        c
        for c in map(_source, _cells(ROOT / "notebooks/extend.ipynb", "code"))
        if "def compress_keys_own" in c
    ]
    definition = cell.partition("keys = jax.random")[0]
    card = types.SimpleNamespace(compute_capability="9.0")
    space = {"jax": jax, "jnp": jnp, "GPU": True, "device": card}
    exec(compile(definition, "extend", "exec"), space)
    keys = jax.ShapeDtypeStruct((2, 2, 200, 64), jnp.float32)
    call = functools.partial(
        space["compress_keys_own"], kernel_size=32, kernel_stride=16
    )
    assert "triton" in cuda_lowering_text(call, keys)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """`told(name)` is what a notebook printed, and how many pictures it drew."""
    pytest.importorskip("nbclient")
    folder = tmp_path_factory.mktemp("notebooks")

    def run(name: str) -> tuple[str, int]:
        command = [sys.executable, "scripts/run_notebooks.py", "--seconds", "3600"]
        done = subprocess.run(
            [*command, "--out", str(folder), f"notebooks/{name}.ipynb"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outputs = [
            output
            for cell in _cells(folder / f"{name}.ipynb", "code")
            for output in cell["outputs"]
        ]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        return "".join("".join(o.get("text", [])) for o in outputs), pictures

    return run


@pytest.mark.slow
@pytest.mark.network
def test_long_document(told):
    text, _ = told("long_document")
    rows = re.findall(
        r"^(dense|infllm_v2|sparda) +(resident|offload) +(\d+) / (\d+) .*%", text, re.M
    )
    assert len(rows) == 5
    assert "offloaded tokens are the resident ones: True" in text
    found = {(name, kind): int(n) / int(of) for name, kind, n, of in rows}
    assert found["dense", "resident"] == 1
    assert found["sparda", "offload"] == found["sparda", "resident"]
    megabytes = [float(x) for x in re.findall(r"% +([\d.]+)$", text, re.M)]
    assert megabytes[2] == megabytes[4] < megabytes[0]
    hits, fetched = re.search(r"hits (\d+)%, ([\d.]+) MB", text).groups()
    assert int(hits) > 50 and float(fetched) > 0


@pytest.mark.slow
@pytest.mark.network
def test_selectors(told):
    text, pictures = told("selectors")
    found = dict(re.findall(r"^(\w+) +(\d+\.\d{3})", text, re.M))
    values = {name: float(value) for name, value in found.items()}
    skipped = set(re.findall(r"^(\w+): skipped: .+", text, re.M))
    assert values.keys() | skipped == set(sj.selector_names())
    assert {"nosa", "snapkv"} <= skipped
    # What looks at the keys beats what does not, and the oracle is not far from dense.
    assert values["dense"] < values["infllm_v2"] < values["window"]
    assert values["sparda"] < values["random"]
    assert abs(values["oracle"] / values["dense"] - 1) < 0.05
    assert pictures == 1


@pytest.mark.slow
def test_extend(told):
    text, _ = told("extend")
    assert "'every_third'" in text
    assert "offloaded tokens are the resident ones: True" in text
    assert "looked ahead: True" in text
    assert "ran by: Pallas's interpreter" in text and "agrees: True" in text
    assert 0 < float(re.search(r"from the reference: (\S+)", text)[1]) < 1e-5


@pytest.mark.slow
@pytest.mark.network
def test_distil(told):
    text, pictures = told("distil")
    recall = [float(x) for x in re.findall(r"held-out recall ([\d.]+)", text)]
    assert len(recall) == 4 and 0.6 < recall[0] < recall[-1] < 1
    assert "it rose: True" in text and pictures == 1
    assert re.search(r"the forecast found \d+% of the own queries' blocks", text)


@pytest.mark.slow
@pytest.mark.network
def test_inside(told):
    text, pictures = told("inside")
    recall = float(re.search(r"recall over all layers: ([\d.]+)", text)[1])
    assert 0.6 < recall < 1
    forecast, own, oracle = (
        float(x) for x in re.findall(r"mass in the lists of the .*?: +([\d.]+)", text)
    )
    assert 0.6 < forecast <= oracle and own <= oracle < 1
    block, budget = re.search(
        r"missed block [^§]*by the forecast: (\d+) \(the list ends at (\d+)\)",
        text,
    ).groups()
    assert int(block) >= int(budget)
    assert "listed instead, block " in text
    assert text.count("new at a step") == 2
    assert pictures == 4


@pytest.mark.slow
def test_link(told):
    text, pictures = told("link")
    assert float(re.search(r"link ([\d.]+) GB/s", text)[1]) > 0
    routes = dict(re.findall(r"^(\w+) +(?:refused|([\d.]+) GB/s).*$", text, re.M))
    assert float(routes["dynamic_slice"]) > 0 and float(routes["host_loop"]) > 0
    assert routes["mosaic"] == routes["triton"] == "" and "WRONG" not in text
    assert len(re.findall(r"^sparda (?:resident|offload) .* … ", text, re.M)) == 6
    assert "best against best" in text
    operations = int(re.search(r"^(\d+) operations on \d+ threads", text, re.M)[1])
    assert operations > 100
    assert pictures == 2
