"""`sparda bench`: what it refuses, its files, its tables; and one small run."""

import dataclasses
import json

import pytest

import sparda_jax as sj
from benchmarks import bench
from benchmarks.cells import Limits, Way, share_of_limit, ways, with_hidden_shares
from benchmarks.figures import Cell, Figures, compare, read_figures, table


def _cell(cache, prefetch="", *, token_ms=10.0, batch=1, **values):
    cell = Cell("sparda", cache, prefetch, 1024, batch, "measured")
    return dataclasses.replace(
        cell,
        token_ms=token_ms,
        token_ms_least=token_ms,
        token_ms_most=token_ms,
        tokens_per_second=batch / token_ms * 1e3,
        first_token_ms=50.0,
        **values,
    )


CELLS = (
    _cell("resident"),
    _cell("offload", "lookahead", token_ms=12.0),
    _cell("offload", "none", token_ms=20.0, link_bytes_per_step=2e6, miss_share=0.1),
    _cell("offload", "none", token_ms=30.0, batch=8),
    dataclasses.replace(
        Cell("dense", "resident", "", 1024, 64, "does not fit"), reason="it needs 9 GiB"
    ),
)
FIGURES = Figures({"device": "cpu", "model": "m", "date": "2026-11-26"}, CELLS)


def _written(tmp_path, record, name="a.json"):
    (tmp_path / name).write_text(json.dumps(record))
    return str(tmp_path / name)


def test_a_file_comes_back_as_it_was(tmp_path):
    assert read_figures(_written(tmp_path, FIGURES.record())) == FIGURES


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": "other/2"}, "is not of schema 'sparda-bench/1'"),
        ({"run": 3}, "no run or no cells"),
        ({"cells": [{"attention": "x"}]}, "is no cell of"),
        ({"cells": [dataclasses.asdict(CELLS[0]) | {"token_ms": "5"}]}, "token_ms='5'"),
        ({"cells": [dataclasses.asdict(CELLS[0]) | {"batch": None}]}, "batch=None"),
        ({"cells": [dataclasses.asdict(CELLS[0]) | {"status": 1}]}, "status=1"),
        *(
            ({"cells": [dataclasses.asdict(CELLS[0]) | {"token_ms": bad}]}, "token_ms=")
            for bad in (float("nan"), float("inf"), 10**400)
        ),
    ],
)
def test_other_files_are_one_line(tmp_path, capsys, change, told):
    good = _written(tmp_path, FIGURES.record())
    bad = _written(tmp_path, FIGURES.record() | change, "b.json")
    assert bench.main(["--compare", good, bad]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err


def test_the_table_says_best_against_best_and_what_does_not_fit():
    text = table(FIGURES)
    assert "does not fit: it needs 9 GiB" in text
    assert "10.0 … 10.0" in text
    # 8 rows in 30 ms against 1 in 10.
    assert "best against best: offload 2.67x (sparda offload none, batch 8" in text


def test_hidden_is_the_share_of_waiting_that_look_ahead_saves():
    shares = [cell.hidden_share for cell in with_hidden_shares(list(CELLS))]
    assert shares == [None, pytest.approx(0.8), None, None, None]
    # Steps that scatter by more than they differ say nothing.
    cells = [dataclasses.replace(CELLS[0], token_ms_most=21.0), *CELLS[1:]]
    assert with_hidden_shares(cells)[1].hidden_share is None


def test_a_limit_that_was_passed_is_none():
    assert share_of_limit(2.0, 4.0) == 0.5
    assert share_of_limit(4.0, 2.0) is None


def test_runs_are_compared_cell_by_cell():
    cells = (_cell("resident", token_ms=5.0), _cell("offload", "none", batch=2))
    other = Figures({**FIGURES.run, "device": "H100", "date": "2027"}, cells)
    text = compare(FIGURES, other)
    assert "10.0 → 5.0 (0.50x)" in text
    assert text.count("→") == 2
    assert "note: device differs: 'cpu', 'H100'" in text
    assert "date" not in text


def test_ways_that_forecast_are_offloaded_twice():
    assert ways(["dense", "sparda"], ["resident", "offload"]) == [
        Way("dense", "resident"),
        Way("dense", "offload", "none"),
        Way("sparda", "resident"),
        Way("sparda", "offload", "lookahead"),
        Way("sparda", "offload", "none"),
    ]
    (way,) = ways(["dense"], ["offload"], "auto")
    limits = Limits(2.0, 3.0, sj.Rates(memory=1e11, fetch=1e10))
    assert way.config(limits).device_blocks == "auto"
    assert way.config(limits).device_limit == 2 * 2**30
    assert way.config(limits).codec == "exact"
    (way,) = ways(["dense"], ["offload"], None, "int8")
    assert way.config(limits).codec == "int8"
    assert str(Way("sparda", "offload", "none")) == "sparda offload none"
    assert str(Way("dense", "resident")) == "dense resident"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--attention", "magic"], "--attention='magic'"),
        (["--cache", "auto"], "--cache='auto'"),
        (["--context", "0"], "--context=0"),
        (["--context", "9" * 5000], "--context='999"),
        (["--batch", "worst"], "--batch='worst'"),
        (["--new", "1"], "--new=1"),
        (["--calls", "0"], "--calls=0"),
        (["--device-blocks", "some"], "--device-blocks='some'"),
        (["--hbm", "0"], "--hbm=0"),
        (["--host", "nan"], "--host="),
        (["--seed", "-1"], "--seed=-1"),
        (["--dtype", "int8"], "--dtype='int8'"),
        (["--model", "x", "--random", "tiny"], "not allowed with"),
        (["--layers", "4"], "--layers needs --random"),
        (["--layers", "1"], "--layers=1"),
        (["--random", "magic"], "magic"),
        (["--plot", "x.pdf"], "must end in .png"),
        (["--plot", "no/x.png"], "--plot='no/x.png' is not allowed"),
        (["--json", "no/a.json"], "a file in a folder that can be written to"),
        (["--json", "/"], "--json='/' is not allowed"),
        (["serve", "--json", "no/a.json"], "--json='no/a.json' is not allowed"),
        (["--compare", "a.json"], "needs two files"),
        (["b.json"], "needs two files"),
        (["--compare", "no.json", "no.json"], "no such file"),
        (["--compare", "no.json", "a\0b"], "B.json='a"),
        (["--magic"], "unrecognized"),
        (
            ["--mesh", "data=2"],
            "'data=2,model=1' is not allowed: it must be data=1",
        ),
        (["--random", "tiny", "--forecast", "x"], "--forecast is not allowed with"),
        (["--random", "tiny", "--json", "/no/such/a.json"], "--json="),
        (["--random", "tiny", "--plot", "/no/such/a.png"], "--plot="),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, told):
    assert bench.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("sparda: ") and told in err


def test_nothing_in_common_is_said():
    other = Figures(FIGURES.run, (_cell("resident", batch=3),))
    with pytest.raises(ValueError, match="no measured cell in common"):
        compare(FIGURES, other)


@pytest.mark.slow
def test_a_small_run(capsys, tmp_path):
    """Every way of a tiny model: real figures, a file of the schema, a plot."""
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    command = ["--random", "tiny", "--context", "600", "--batch", "1"]
    command += ["--attention", "sparda", "--new", "6", "--calls", "2"]
    command += [
        "--hbm",
        "1",
        "--host",
        "1",
        "--json",
        str(file),
        "--plot",
        str(picture),
    ]
    assert bench.main(command) == 0
    out, err = capsys.readouterr()
    assert "bench: cell 3 of 3: sparda offload none, 600 tokens, batch 1" in err
    figures = read_figures(str(file))
    assert len(figures.cells) == 3
    assert {cell.status for cell in figures.cells} == {"measured"}
    for cell in figures.cells:
        assert cell.steps == 5 and cell.calls == 2
        assert 0 < cell.token_ms_least <= cell.token_ms <= cell.token_ms_most
        assert cell.tokens_per_second == pytest.approx(cell.batch / cell.token_ms * 1e3)
        assert 0 < cell.block_share < 1
        assert (cell.link_bytes_per_step is None) == (cell.cache == "resident")
        assert cell.planned_device_bytes > 0
    assert figures.run["weights"] == "random"
    assert "best against best" in out
    assert picture.stat().st_size > 1000
    assert bench.main([*command[:-8], "--hbm", "0.0001"]) == 0
    assert "does not fit: it needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        pytest.param("resident", False, marks=[pytest.mark.slow, pytest.mark.long]),
        ("offload", True),
    ],
)
def test_a_codec_is_said_where_blocks_are_offloaded(capsys, cache, said):
    size = "--random tiny --context 512 --batch 1 --new 2 --attention sparda".split()
    options = ["--cache", cache, "--host-codec", "int8", "--hbm", "0.0001"]
    assert bench.main([*size, *options]) == 0
    assert (", blocks in int8" in capsys.readouterr().out) == said
