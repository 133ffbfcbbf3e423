"""The tuner: what it records, after each step and when it goes on from a record."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from pallas_kernels.benchmarks.decode_account import straight_line
from pallas_kernels.benchmarks.harness import Timing
from pallas_kernels.tuning import main, search
from pallas_kernels.tuning.case import Case
from pallas_kernels.tuning.record import case_orders, default_order, merged


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a made-up kernel: how far off it is, and how long it takes."""

    error: float
    milliseconds: float


def _cases(small):
    del small

    def run(name, config, x):
        return x if name == "xla" else x + config.error

    for batch, best in ((8, 1.0), (64, 3.0)):
        yield Case(
            {"B": batch},
            (jnp.ones((4,)),),
            run,
            {
                # The fastest of all is wrong.
                "triton": [Config(0.0, 2.0), Config(0.0, best), Config(0.5, 0.1)],
                "mosaic_gpu": [Config(0.0, 2.5)],
            },
        )


@pytest.fixture
def cases(monkeypatch):
    """A made-up operation, timed by what its settings say; XLA takes 4 ms."""

    def timed(title, f, *args, links=1):
        del f, args, links
        milliseconds = 4.0
        if "milliseconds=" in title:
            milliseconds = float(title.split("milliseconds=")[1].rstrip(")"))
        return Timing(title, milliseconds / 1e3, 0.0)

    monkeypatch.setattr(search, "measure", timed)
    for module in (main, search):
        monkeypatch.setattr(module, "CASES", {"op": _cases})


def _times(record):
    return {
        name: {e["when"]["B"]: e["milliseconds"] for e in entries}
        for name, entries in record["configs"].items()
    }


def test_the_fastest_right_settings_of_each_case(cases):
    record = search.tune("op")
    assert _times(record) == {
        "triton": {8: 1.0, 64: 2.0},
        "mosaic_gpu": {8: 2.5, 64: 2.5},
    }
    assert record["default"] == ["triton", "mosaic_gpu", "xla"]
    assert record["failed"] == record["unfinished"] == []


def test_what_is_never_right_is_no_default(cases, monkeypatch):
    def wrong(small):
        for case in _cases(small):
            yield dataclasses.replace(
                case, check=lambda name, config, x: x + (name == "mosaic_gpu")
            )

    monkeypatch.setattr(search, "CASES", {"op": wrong})
    record = search.tune("op")
    assert record["default"] == ["triton", "xla"]
    assert [x["implementation"] for x in record["failed"]] == ["mosaic_gpu"] * 2


def test_what_loses_to_xla_is_no_default():
    def entry(batch, milliseconds):
        when = {"B": batch}
        return {"when": when, "milliseconds": milliseconds, "xla_milliseconds": 3.0}

    configs = {
        "triton": [entry(8, 1.0), entry(64, 3.5)],
        "mosaic_gpu": [entry(8, 2.0)],
    }
    assert default_order(configs, []) == ["mosaic_gpu", "xla"]


def test_cases_that_dispatch_tells_apart_have_an_order_of_their_own():
    def entry(softmax, milliseconds):
        return {
            "when": {"G": 16 if softmax else 1},
            "milliseconds": milliseconds,
            "xla_milliseconds": 9.0,
            "order": {"softmax": softmax},
        }

    configs = {
        "triton": [entry(False, 1.0), entry(True, 6.0)],
        "mosaic_gpu": [entry(False, 2.0), entry(True, 3.0)],
    }
    default = default_order(configs, [])
    assert default == ["mosaic_gpu", "triton", "xla"]
    orders = case_orders(configs, default)
    assert orders == [
        {"when": {"softmax": False}, "default": ["triton", "mosaic_gpu", "xla"]}
    ]
    record = {"default": default, "orders": orders, "configs": configs}
    new = {**record, "failed": [], "unfinished": []}
    new["relative_error_against_xla"] = {}
    assert merged({}, new, partial=False)["orders"] == orders


def test_a_run_cut_short_is_on_disk_and_can_be_taken_up(cases, tmp_path, monkeypatch):
    path = tmp_path / "op.json"
    seen = []
    best = search._best

    def cut(case, name, want, limit):
        seen.append(json.loads(path.read_text()) if path.is_file() else None)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return best(case, name, want, limit)

    monkeypatch.setattr(search, "_best", cut)
    with pytest.raises(KeyboardInterrupt):
        main.main(["op", "--out", str(tmp_path)])
    assert seen[0] is None
    assert _times(seen[1]) == {"triton": {8: 1.0}}
    assert len(seen[1]["unfinished"]) == 3
    found = json.loads(path.read_text())
    assert _times(found) == {"triton": {8: 1.0}, "mosaic_gpu": {8: 2.5}}
    assert {x["when"]["B"] for x in found["unfinished"]} == {64}
    found["measured"] = ["by hand"]
    path.write_text(json.dumps(found))

    monkeypatch.setattr(search, "_best", best)
    main.main(["op", "--out", str(tmp_path), "--case", "B=64"])
    whole = json.loads(path.read_text())
    assert _times(whole) == _times(search.tune("op"))
    assert whole["default"] == ["triton", "mosaic_gpu", "xla"]
    assert whole["measured"] == ["by hand"]
    assert "unfinished" not in whole


def test_entries_by_hand_keep_their_order(cases):
    old = {
        "default": ["mosaic_gpu", "xla"],
        "configs": {"mosaic_gpu": [{"when": {"B": 16}, "config": {}}]},
    }
    new = search.tune("op", implementations=["triton"], only=[{"B": 8}])
    both = merged(old, new, partial=True)
    assert both["default"] == ["mosaic_gpu", "xla"]
    assert both["configs"]["mosaic_gpu"] == old["configs"]["mosaic_gpu"]
    assert _times({"configs": {"triton": both["configs"]["triton"]}}) == {
        "triton": {8: 1.0}
    }
    assert merged(old, new, partial=False)["default"] == ["triton", "xla"]


def test_an_operation_that_is_none_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(["nothing"])
    assert capsys.readouterr().err.startswith("op: invalid choice: 'nothing'")


def test_nothing_to_tune(cases):
    with pytest.raises(ValueError, match="no case of op is left"):
        search.tune("op", only=[{"B": 5}])


def test_every_operation_has_cases():
    import pallas_kernels

    assert set(search.CASES) == set(pallas_kernels.__all__) - {"select_blocks"}


def test_the_line_through_durations_is_rate_and_fixed_part():
    start, slope = straight_line([(10.0, 3.5), (20.0, 4.0), (40.0, 5.0)])
    assert (start, slope) == pytest.approx((3.0, 0.05))
