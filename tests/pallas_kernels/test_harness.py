"""What a benchmark of a kernel leaves out where its time is up."""

import json

import pytest

from pallas_kernels.benchmarks import harness
from pallas_kernels.benchmarks.harness import Report, Timing, arguments


@pytest.fixture
def clock(monkeypatch):
    """The time, to be moved on by hand."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
    return now


def _measured(tmp_path, clock, taken, *options):
    args = arguments("").parse_args(["--out", str(tmp_path), *options])
    report, done = Report("x", args), []
    clock[0] += 5  # what comes before the first case
    for number, seconds in enumerate(taken):
        if report.has_time(f"case {number}"):
            clock[0] += seconds
            report.add(Timing(f"case {number}", 1e-3))
            done.append(number)
    report.finish()
    record = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in record["timings"]] == [f"case {n}" for n in done]
    return done, record.get("left_out")


def test_all_cases_are_measured_without_a_limit(tmp_path, clock):
    assert _measured(tmp_path, clock, (1, 100, 1)) == ([0, 1, 2], None)


def test_what_would_not_fit_is_left_out_and_named(tmp_path, clock, capsys):
    """A case is taken to need what the longest before it needed."""
    found = _measured(tmp_path, clock, (10, 20, 1, 1), "--seconds", "50")
    assert found == ([0, 1], ["case 2", "case 3"])
    assert "case 2: left out, the time is up" in capsys.readouterr().out


def test_the_first_case_is_always_measured(tmp_path, clock):
    assert _measured(tmp_path, clock, (9, 9), "--seconds", "1") == ([0], ["case 1"])
