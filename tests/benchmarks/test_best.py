"""Best against best: which cells are run, what the figures say, bad input."""

import dataclasses
import json

import pytest

from benchmarks.best import (
    Cell,
    Planner,
    cells_by_worth,
    draw,
    main,
    of_all,
    summary,
)
from sparda_jax.checks import ConfigError
from sparda_jax.models.presets import get_preset
from sparda_jax.planning.misses import published_curve
from sparda_jax.planning.rates import Rates


def _row(name, batch, step_ms, planned_ms):
    return {
        "name": name,
        "batch": batch,
        "c": 0 if name == "resident" else 96,
        "step_ms": step_ms,
        "least_ms": step_ms,
        "most_ms": step_ms * 1.1,
        "tokens_per_second": batch / step_ms * 1e3,
        "planned_ms": planned_ms,
        "fetched_share": 0.08,
        "host_gib": 8.0,
    }


ROWS = [
    _row("sparda int8", 64, 16.0, 12.0),
    _row("resident", 13, 10.0, 7.0),
    _row("sparda int8", 32, 10.0, 9.0),
    _row("resident", 6, 8.0, 6.0),
]


def test_the_best_of_each_are_compared():
    last = summary(ROWS)[-1]
    assert "sparda int8, batch 64, 4000 tokens/s" in last
    assert "resident, batch 13, 1300: 3.08x (the plan: 2.87x)" in last
    assert len(summary(ROWS[:1])) == 2


def test_the_best_of_every_way_is_run_first():
    preset = get_preset("tiny")
    config = dataclasses.replace(preset.model, max_context=16384)
    rates = Rates(memory=1e12, fetch=1e9)
    misses = published_curve("sparda")
    planner = Planner(config, preset.sparse, 8192, rates, misses)
    cells = list(cells_by_worth(planner, 8))
    names = [cell.name for cell in cells]
    ways = {"sparda int8", "sparda int8 keys", "resident", "sparda", "own query"}
    ways |= {"sparda int8 slots", "own query int8 slots"}
    assert set(names[:7]) == ways
    # All others are compared with the resident one; pinned memory that one store took
    # serves the next, smaller one.
    sizes = [cell.host_gib for cell in cells[1:7]]
    assert sizes == sorted(sizes, reverse=True) and names[0] == "resident"
    two = list(cells_by_worth(planner, 8, ["sparda int8", "resident"]))
    assert {cell.name for cell in two} == {"sparda int8", "resident"}
    for name in set(names):
        own = [cell for cell in cells if cell.name == name]
        assert own[0].promise == max(cell.promise for cell in own)
        assert [cell.batch for cell in own] == sorted(
            (cell.batch for cell in own), reverse=True
        )
    assert all((cell.slots == 0) == (cell.mode == "resident") for cell in cells)
    assert isinstance(cells[0], Cell)


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    figures = {"rows": ROWS, "context": 131072, "model": "m", "device": "d"}
    draw(figures, tmp_path / "best.png")
    assert (tmp_path / "best.png").stat().st_size > 10_000


def test_a_later_run_replaces_its_cells():
    first = {"rows": ROWS, "context": 131072, "model": "m", "device": "d"}
    again = _row("resident", 13, 9.0, 7.0)
    both = of_all([first, {**first, "rows": [again, _row("sparda", 8, 1.0, 1.0)]}])
    assert both["rows"][1] == again and len(both["rows"]) == 5
    with pytest.raises(ConfigError, match="device 'e' are not allowed"):
        of_all([first, {**first, "device": "e"}])


def test_bad_input(tmp_path, capsys):
    (tmp_path / "empty.json").write_text(json.dumps({"rows": []}))
    for arguments in (
        ["--plot", str(tmp_path / "x.png")],
        ["--plot", str(tmp_path / "x.png"), str(tmp_path / "empty.json")],
        [str(tmp_path / "empty.json")],
    ):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"), [("--most", "0"), ("--context", "x"), ("--minutes", "-1")]
)
def test_bad_numbers_name_their_option(capsys, option, value):
    assert main([option, value]) == 2
    told = capsys.readouterr().err.replace("'", "")
    assert told.startswith(f"{option}={value} is not allowed: it must be ")
