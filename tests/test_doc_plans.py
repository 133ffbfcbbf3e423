"""Figures that pages give as computed are those of the commands beside them."""

import json
import os
import re
import subprocess
import sys

import pytest
from doc_pages import ROOT, page_text

_ROWS = re.compile(r"^\|(.*)\|$", re.M)


def _section(page, heading):
    return page_text(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def _rows(text):
    """The cells of every line of the tables of a text."""
    return [[cell.strip() for cell in row.split("|")] for row in _ROWS.findall(text)]


# A process of its own: in this one every call has its types checked.
_PRINT = """
import json, sys
from sparda_jax.cli.main import main
for options in json.loads(sys.argv[1]):
    assert main(["plan", *options.split()]) == 0
    print("\\f", end="")
"""


def _printed(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def plans(computed):
    """What plans print, by their options: words by the first words of a line."""
    options = [own for _, own in _steps(computed)] + [*_BATCHES, _beside()]
    texts = _printed("-c", _PRINT, json.dumps(options)).split("\f")[:-1]
    found = {}
    for own, text in zip(options, texts, strict=True):
        lines = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
        found[own] = {first: rest for first, *rest in lines}
    return found


@pytest.fixture(scope="module")
def computed():
    return _section("docs/scale.md", "Computed: many hosts")


def test_many_hosts_are_what_the_command_computes(computed):
    halves = _printed("-m", "benchmarks.scale").split("cards a group:")[1:]
    by_cards: dict[str, list[str]] = {}
    for half in halves:
        for hosts, cards, resident, offloaded in re.findall(
            r"^ +(\d+) +(\d+) +([\d,]+) +([\d,]+)$", half, re.M
        ):
            by_cards.setdefault(cards, [hosts, cards]).extend([resident, offloaded])
    there = [row for row in _rows(computed) if row[0].isdigit()]
    assert there == list(by_cards.values()) and len(there) == 7


def _steps(computed):
    """Rows of the table of steps, each with the options of its plan."""
    shared = re.search(r"`sparda plan ([^`]*)`", computed)
    assert shared is not None
    found, above = [], shared.group(1)
    for row in _rows(computed.partition("| options")[2]):
        if own := re.search(r"`([^`]*)`", row[0]):
            # Each of these stands below a row that it adds to.
            above = above if row[0].startswith("the same") else shared.group(1)
            above = f"{above} {own.group(1)}"
            found.append((row, above))
    assert len(found) == 9
    return found


def test_steps_beside_the_measured_ones_are_the_plan_s(computed, plans):
    for (_, planned, summed, _), own in _steps(computed):
        assert plans[own]["decode step, about"][1] == planned, own
        if summed:
            layers = 48 if "qwen3" in own else 32
            total = float(planned.split()[0]) + 2 * layers * 0.019
            assert f"{total:.1f} ms" == summed, own


_H100 = "--hbm 75 --host {} --device-kind H100"
_H200 = "--hbm 80 --host 512 --device-kind H200"
_INT8, _KEYS = " --host-codec int8", " --compressed-keys int8"
_PLANS = (
    _H100.format(115),
    _H100.format(115) + _INT8,
    _H100.format(115) + _INT8 + _KEYS,
    _H100.format(230) + _INT8,
    _H100.format(230) + _INT8 + _KEYS,
    _H200,
    _H200 + " --device-blocks 96",
    "--hbm 75 --host 210 --device-kind H200 --bandwidth 3750 --layer0 resident"
    " --host-codec int8_slots" + _KEYS,
)


_BATCHES = ["--model minicpm4.1-8b --context 131072 " + own for own in _PLANS]


def _beside():
    """Options of the plan beside the measured batches."""
    found = re.search(r"`sparda plan ([^`]*)`", _best())
    assert found is not None
    return found.group(1)


def _best():
    return " ".join(_section("docs/offload.md", "Best against best").split())


def test_planned_batches_are_the_plan_s(plans):
    """The table of estimates, and the estimate beside the measured batches."""
    rows = [row for row in _rows(_section("docs/offload.md", "Planning")) if row[0]]
    there = [row for row in rows if " rows, " in row[1]]
    for row, own in zip(there, _BATCHES, strict=True):
        said = [cell.removesuffix(" tokens/s") for cell in row[1:3]]
        batches, rates = plans[own]["batch"], plans[own]["tokens/s, about"]
        assert said == [f"{batches[n]} rows, {rates[n]}" for n in (3, 2)], own
    last, text = plans[_beside()], _best()
    batch, rate = last["batch"][3], last["tokens/s, about"][3]
    assert f"expects {batch} rows to make {rate} tokens/s" in text
