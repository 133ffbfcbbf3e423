"""The run of a whole card: limits, what is kept, and tables that say what is old."""

import json
import os
import pathlib
import sys

import pytest

from benchmarks import all as whole
from benchmarks.one_process import Ended, Run, run_in_one_process, share
from benchmarks.tables import stale, tables

DECODE = {
    "context": 1024,
    "lists": "lists of a trace",
    "rows": [
        {
            "mode": mode,
            "batch": 2,
            "slots": slots,
            "step_ms": step,
            "least_ms": step - 0.5,
            "most_ms": step + 0.5,
            "tokens_per_second": 2e3 / step,
            "fetched_share": 0.125,
            "bound_share": 0.75,
        }
        for mode, slots, step in (
            ("resident", None, 5.0),
            ("sparse", 1.0, 12.0),
            ("sparda", 1.0, 8.0),
            ("sparda", 3.0, 6.0),
        )
    ],
}


KERNEL = {"op": "x", "timings": []}


def _result(device, part, commit, date, figures):
    return {
        "device": device,
        "part": part,
        "commit": commit,
        "date": date,
        "jax": "0.0",
        "command": f"python -m benchmarks.{part}",
        "status": 0,
        "figures": figures,
    }


def test_tables_say_what_is_old_or_missing():
    found = [
        _result("A", "decode_32k", "new", "2026-02-02T00:00:00", DECODE),
        _result("B", "decode_32k", "old", "2026-01-01T00:00:00", DECODE),
        _result(
            "A", "kernel_x", "new", "2026-02-02T00:00:00", {"op": "x", "timings": []}
        ),
    ]
    text = tables(found)
    assert (
        "| A | 1,024 | 2 | 1 | 5.00 (4.50 … 5.50) | 12.00 (11.50 … 12.50) |  |" in text
    )
    assert "| 1.50× | 12.5% | 75% |" in text
    assert "| A | 1,024 | 2 | 3 | 5.00" in text
    assert "lists of a trace" in text
    want = ["B, decode_32k: not measured since old", "B, kernel_x: not measured"]
    assert stale(found) == want
    assert all(line in text for line in want)
    assert tables([]) == "nothing has been measured"


def _run(name, *words, file="x", seconds=6000):
    return Run(name, words, pathlib.Path(file), seconds)


def test_runs_share_a_process_until_one_fails_or_takes_too_long(tmp_path, capfd):
    note = tmp_path / "note.py"
    note.write_text("import os, sys; print(os.getpid()); sys.exit(int(sys.argv[1]))")
    names = [note.stem, "0"], [note.stem, "3"], [note.stem, "0"], ["http.server", "0"]
    limits = *[6000] * 3, 3
    runs = [
        _run(f"{i}", *words, seconds=limit)
        for i, (words, limit) in enumerate(zip(names, limits, strict=True))
    ]
    runs.append(_run("last", "no_such_module"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        ended = list(run_in_one_process(runs, 30_000))
    assert [e.name for e in ended] == ["0", "1", "2", "3", "last"]
    assert [e.status for e in ended] == [0, 3, 0, None, 1]
    first, second, third = (e.printed.strip() for e in ended[:3])
    assert first == second != third
    assert "no_such_module" in ended[-1].printed
    assert all(e.seconds < 6000 for e in ended) and ended[3].seconds > 2.5
    assert first in capfd.readouterr().out


def test_figures_are_told_while_a_run_goes_on(tmp_path):
    file, seen, told = tmp_path / "x.json", tmp_path / "seen", []
    (tmp_path / "note.py").write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(file)!r}).write_text('1')\n"
        f"while not pathlib.Path({str(seen)!r}).exists(): time.sleep(0.1)\n"
    )

    def on_change(ended):
        told.append((ended.name, ended.status))
        seen.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        [ended] = run_in_one_process([_run("x", "note", file=file)], 6000, on_change)
    assert ended.status == 0 and told == [("x", None)]


def test_a_run_keeps_what_it_has_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_device", lambda: ("Card 1", "gpu", "0.0"))
    good = whole.Part("good", ("json.tool", str(tmp_path / "in.json"), "{json}"), 6000)
    bad = whole.Part("bad", ("no_such_module",), 6000)
    (tmp_path / "in.json").write_text('{"rows": [1]}')
    out = tmp_path / "out"
    missing = whole.run_card((good, bad), out, 500.0, "abc")
    assert missing == ["bad has no figures: status 1"]
    kept = json.loads((out / "card_1" / "good.json").read_text())
    assert kept["figures"] == {"rows": [1]} and kept["commit"] == "abc"
    assert kept["device"] == "Card 1" and kept["status"] == 0
    assert [result["part"] for result in whole.results(out)] == ["good"]
    assert whole.run_card((good,), out, 0.01, "abc") == [
        "good is left out: the time is up"
    ]


def test_parts_of_one_process_stand_together(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_device", lambda: ("Card 1", "gpu", "0.0"))
    ran = []

    def run(runs, seconds, on_change):
        ran.append([run.name for run in runs])
        for each in runs:
            each.file.write_text('{"rows": [1]}')
            on_change(Ended(each.name, None, 1.0, ""))
            kept = json.loads((tmp_path / "card_1" / f"{each.name}.json").read_text())
            assert kept["status"] is None and kept["figures"] == {"rows": [1]}
            yield Ended(each.name, 0, 2.0, "")

    monkeypatch.setattr(whole, "run_in_one_process", run)
    names = (("a", ""), ("b", "two"), ("c", "two"), ("d", ""))
    parts = tuple(whole.Part(name, ("x",), 60, 0, process) for name, process in names)
    assert whole.run_card(parts, tmp_path, 5.0, "abc") == []
    assert ran == [["a"], ["b", "c"], ["d"]]
    found = {result["part"]: result["status"] for result in whole.results(tmp_path)}
    assert found == dict.fromkeys("abcd", 0)


def test_what_was_never_measured_comes_first_and_then_the_oldest(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_device", lambda: ("Card 1", "gpu", "0.0"))
    ran = []

    def run(runs, seconds, on_change):
        for each in runs:
            ran.append(each.name)
            each.file.write_text('{"rows": [1]}')
            yield Ended(each.name, 0, 1.0, "")

    monkeypatch.setattr(whole, "run_in_one_process", run)
    dates = {"new": "2026-02-02", "old": "2026-01-01", "cut": "2026-01-15"}
    for name, date in dates.items():
        status = None if name == "cut" else 0
        path = tmp_path / "card_1" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"date": date, "status": status}))
    parts = tuple(whole.Part(name, (), 60) for name in ("new", "old", "never", "cut"))
    assert whole.run_card(parts, tmp_path, 5.0, "abc") == []
    assert ran == ["never", "cut", "old", "new"]


def test_a_part_leaves_to_those_behind_it_what_they_need(tmp_path, monkeypatch):
    """However long the first ones take, the last one begins with its least."""
    monkeypatch.setattr(whole, "_device", lambda: ("Card 1", "gpu", "0.0"))
    clock, ran = [0.0], {}
    monkeypatch.setattr(whole.time, "monotonic", lambda: clock[0])

    def run(runs, seconds, on_change):
        end = clock[0] + seconds
        for place, each in enumerate(runs):
            behind = sum(other.least for other in runs[place + 1 :])
            ran[each.name] = share(end - clock[0], each.seconds, each.least, behind)
            clock[0] += ran[each.name]
            each.file.write_text('{"timings": [], "left_out": ["B=64"]}')
            yield Ended(each.name, 0, ran[each.name], "")

    monkeypatch.setattr(whole, "run_in_one_process", run)
    missing = whole.run_card(whole.CARD, tmp_path, 8.8, "abc")
    assert missing == [f"{part.name} lacks B=64" for part in whole.CARD]
    needed = {part.name: part.least for part in whole.CARD}
    assert sum(needed.values()) < 8.8 * 60
    assert all(needed[name] <= seconds for name, seconds in ran.items())
    assert list(ran) == list(needed) and clock[0] <= 8.8 * 60
    # What lacks cases is measured first again.
    path = tmp_path / "card_1" / f"{whole.CARD[0].name}.json"
    path.write_text(json.dumps({"date": "2026-01-01", "status": 0, "figures": {}}))
    ran.clear()
    clock[0] = 0.0
    whole.run_card(whole.CARD[:2], tmp_path, 8.8, "abc")
    assert list(ran) == [part.name for part in (whole.CARD[1], whole.CARD[0])]


@pytest.mark.parametrize(
    ("left", "most", "least", "behind", "want"),
    [
        (500, 120, 50, 100, 120),  # all that it can use
        (200, 120, 50, 130, 70),  # what those behind it do not need
        (150, 120, 50, 130, 50),  # its least
        (30, 120, 50, 130, 30),  # all that is left
    ],
)
def test_share_of_the_time(left, most, least, behind, want):
    assert share(left, most, least, behind) == want


def test_a_benchmark_is_told_what_it_may_take(tmp_path):
    (tmp_path / "note.py").write_text("import sys; print(sys.argv[1:])")
    words = ("note", "{seconds}")
    runs = [
        Run("a", words, pathlib.Path("x"), 6000, 500),
        Run("b", words, pathlib.Path("x"), 100_000, 4000),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        first, second = run_in_one_process(runs, 9000)
    assert int(first.printed.strip()[2:-2]) in range(4000, 4501)  # 0.9 of 9000 - 4000
    assert int(second.printed.strip()[2:-2]) in range(6000, 8101)  # 0.9 of what is left


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "nothing is asked for"), (("--card", "--minutes", "0"), "--minutes=0")],
)
def test_bad_requests_are_one_line(arguments, says, capsys):
    assert whole.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1
