"""The run of a whole card: limits, what is kept, and tables that say what is old."""

import json

import pytest

from benchmarks import all as whole
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


def test_a_part_that_takes_too_long_is_ended():
    result = whole.run_part(whole.Part("p", ("http.server", "0"), 600), 0.5)
    assert result["status"] is None and result["figures"] == {}
    assert result["seconds"] < 60


def test_a_run_keeps_what_it_has_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_device", lambda: ("Card 1", "gpu", "0.0"))
    good = whole.Part("good", ("json.tool", str(tmp_path / "in.json"), "{json}"), 60)
    bad = whole.Part("bad", ("no_such_module",), 60)
    (tmp_path / "in.json").write_text('{"rows": [1]}')
    out = tmp_path / "out"
    missing = whole.run_card((good, bad), out, 5.0, "abc")
    assert missing == ["bad has no figures: status 1"]
    kept = json.loads((out / "card_1" / "good.json").read_text())
    assert kept["figures"] == {"rows": [1]} and kept["commit"] == "abc"
    assert kept["device"] == "Card 1" and kept["status"] == 0
    assert [result["part"] for result in whole.results(out)] == ["good"]
    assert whole.run_card((good,), out, 0.01, "abc") == [
        "good is left out: the time is up"
    ]


def test_what_was_never_measured_comes_first_and_then_the_oldest(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_device", lambda: ("Card 1", "gpu", "0.0"))
    ran = []

    def run(part, seconds):
        ran.append(part.name)
        return {"part": part.name, "status": 0, "figures": {"rows": [1]}}

    monkeypatch.setattr(whole, "run_part", run)
    dates = {"new": "2026-02-02", "old": "2026-01-01", "cut": "2026-01-15"}
    for name, date in dates.items():
        status = None if name == "cut" else 0
        path = tmp_path / "card_1" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"date": date, "status": status}))
    parts = tuple(whole.Part(name, (), 60) for name in ("new", "old", "never", "cut"))
    assert whole.run_card(parts, tmp_path, 5.0, "abc") == []
    assert ran == ["never", "cut", "old", "new"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "nothing is asked for"), (("--card", "--minutes", "0"), "--minutes=0")],
)
def test_bad_requests_are_one_line(arguments, says, capsys):
    assert whole.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1
