"""`sparda doctor` and `sparda tune`: what they tell, and what they refuse."""

import json

import jax
import pytest

import sparda_jax as sj
from pallas_kernels.tuning.cases import CASES
from sparda_jax.cli import doctor
from sparda_jax.cli.main import main


def _run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setenv("SPARDA_CACHE", str(tmp_path / "sparda"))
    return tmp_path


def test_the_report_tells_what_serves_and_with_what(folders, capsys):
    status, out, err = _run(capsys, "doctor")
    assert (status, err) == (0, "")
    for word in (
        f"jax {jax.__version__}",
        f"sparda-jax {sj.__version__}",
        "choose_blocks: xla: no record of this device",
        "('no record of this device': kernels were not timed on it",
        "pinned_host",
        "host memory: this ",
        "XLA_FLAGS=",
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=",
        "--measure measures it",
        f"{folders / 'kernels'}: writable",
        "no problems found",
    ):
        assert word in out
    assert not list(folders.iterdir())  # Looking makes nothing.


def test_json_holds_the_same(folders, capsys):
    status, out, _ = _run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["device"]["platform"] == "cpu"
    assert {op["op"] for op in found["device"]["ops"]} == set(CASES)
    assert all(op["why"] for op in found["device"]["ops"])
    assert found["memory_kinds"] == list(sj.describe_device().memory_kinds)
    assert found["rates"] is None and found["problems"] == []
    assert found["host"]["size"] > 2**28


def test_what_stands_in_the_way_is_named(folders, monkeypatch):
    (folders / "file").write_text("")
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(folders / "file" / "deeper"))
    report = sj.describe_device()
    assert not report.directories[str(folders / "file" / "deeper")]
    assert any("deeper cannot be written to" in x for x in report.problems)
    assert "CANNOT be written to" in str(report)


def test_a_gpu_without_flags_or_pinned_memory_is_told():
    device = sj.describe_device().device
    found = doctor_problems(device, ("device",), "")
    assert any("XLA_FLAGS lacks" in x for x in found)
    assert any("KV cannot be offloaded" in x for x in found)
    good = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT"
    assert doctor_problems(device, ("device", "pinned_host"), good) == []


def doctor_problems(device, kinds, flags):
    from sparda_jax.doctor import _problems

    return _problems(device, True, kinds, {"XLA_FLAGS": flags}, {})


def test_tune_knows_every_operation():
    assert set(doctor._OPS) == set(CASES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tune",), "kernels are tuned on a CUDA GPU"),
        (("tune", "sorting"), "OP='sorting'"),
        (("doctor", "--jason"), "--jason"),
    ],
)
def test_bad_requests_are_one_line(arguments, says, capsys):
    status, out, err = _run(capsys, *arguments)
    assert status == 2 and out == ""
    assert says in err and err.count("\n") == 1


def test_tune_refuses_a_directory_that_it_cannot_write(folders, monkeypatch, capsys):
    (folders / "file").write_text("")
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(folders / "file" / "deeper"))
    status, _, err = _run(capsys, "tune", "choose_blocks", "--small")
    assert status == 2
    assert "deeper: cannot be written" in err and err.count("\n") == 1
