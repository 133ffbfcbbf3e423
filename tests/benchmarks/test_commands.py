"""What the commands that measure refuse, and how."""

import json

import pytest

from benchmarks import all as every
from benchmarks import (
    bench,
    best,
    calls,
    codec_error,
    cpu,
    host_routes,
    host_writes,
    layers_ahead,
    look_ahead,
    mesh,
    moe_decode,
    offload,
    prefer_held,
    prefill,
    prefill_attention,
    profile_streams,
    timeline,
    trace,
)


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        (trace.main, [], "required: {record,show,curves}"),
        (trace.main, ["draw"], "invalid choice: 'draw'"),
        (trace.main, ["record"], "required: --out"),
        (trace.main, ["record", "--out", "x", "--context", "0"], "--context=0"),
        (trace.main, ["show"], "required: traces"),
        (offload.main, ["--batch", "few"], "--batch='few' is not allowed"),
        (offload.main, ["--context", "0"], "--context=0 is not allowed"),
        (prefill.main, ["--batch", "1", "few"], "--batch='few' is not allowed"),
        (prefill.main, ["--layers", "0"], "--layers=0 is not allowed"),
        (prefill.main, ["--attention", "all"], "attention='all' is not allowed"),
        (prefill_attention.main, ["--layers", "32"], "--layers=32 is not allowed"),
        (prefill_attention.main, ["--context", "63"], "--context=63 is not allowed"),
        (prefill_attention.main, ["--trace", "none"], "none"),
        (prefill_attention.main, ["--agree", "0"], "--agree=0 is not allowed"),
        (calls.main, ["--rows", "0"], "--rows=0 is not allowed"),
        (calls.main, ["--json", "/no/such/f.json"], "/no/such/f.json"),
        (cpu.main, ["--repeats", "0"], "--repeats=0 is not allowed"),
        (cpu.main, ["--parts", "peers"], "invalid choice: 'peers'"),
        (cpu.main, ["--parts", "llama"], "nothing to run without --llama-python"),
        (offload.main, ["--steps", "4"], "--steps=4 is not allowed: it must be"),
        (best.main, ["--steps", "4"], "--steps=4 is not allowed: it must be"),
        (best.main, ["--most", "few"], "--most='few' is not allowed: it must be"),
        (host_routes.main, ["--blocks", "0"], "--blocks=0 is not allowed: it must be"),
        (profile_streams.main, ["none"], "none holds no device events"),
        (timeline.main, ["none"], "required: --out"),
        (every.main, [], "--card, --tables or both"),
        (every.main, ["--minutes", "few"], "--minutes: invalid float value: 'few'"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, main, arguments, told):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "written"),
    [
        *((mesh.main, ["--out"]), (moe_decode.main, ["--out"])),
        *((best.main, ["--json"]), (best.main, ["--plot"])),
        *((bench.main, ["--json"]), (bench.main, ["--plot"])),
        *((calls.main, ["--json"]), (codec_error.main, ["--json"])),
        *((cpu.main, ["--json"]), (host_routes.main, ["--json"])),
        *((host_writes.main, ["--json"]), (bench.main, ["serve", "--json"])),
        *((layers_ahead.main, ["--json"]), (look_ahead.main, ["own", "--json"])),
        *((offload.main, ["--json"]), (prefer_held.main, ["--json"])),
        *((prefill.main, ["--json"]), (prefill_attention.main, ["--json"])),
        *((timeline.main, ["run", "--out"]), (trace.main, ["record", "--out"])),
        (trace.main, ["show", "a.npz", "--json"]),
        (trace.main, ["curves", "a.npz", "--out"]),
    ],
)
def test_figures_for_a_folder_that_is_not_there_are_refused_at_once(
    capsys, main, written
):
    assert main([*written, "/no/such/file.png"]) == 2
    told = "must be a file in a folder that can be written to"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", [mesh, moe_decode, offload, prefill, best])
def test_more_layers_than_the_preset_has_are_refused(command, capsys):
    assert command.main(["--layers", "99"]) == 2
    assert "layers=99 is not allowed: it must be at most" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_call_of_decode_costs_is_told(tmp_path):
    small = ["--random", "tiny", "--layers", "2", "--context", "64", "--rows", "2"]
    written = tmp_path / "calls.json"
    assert calls.main([*small, "--json", str(written)]) == 0
    lines = json.loads(written.read_text())["calls"]
    assert [line.get("steps") for line in lines] == [1, 2, 4, 8, 16, None]
    assert all(line["ms_a_step"] > 0 for line in lines[:-1])
