"""`sparda plan`: a table to read, help that teaches, one line for bad input."""

import json
import re

import pytest

from sparda_jax.cli.main import main
from sparda_jax.planning.rates import recorded_rates

MODEL = ("--model", "minicpm4.1-8b", "--context", "131072")
MACHINE = ("--hbm", "80", "--host", "512")
H200 = ("--device-kind", "NVIDIA H200")


def _run(capsys, *arguments):
    status = main(["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "how to read it:", "GiB are 2^30 bytes", "--measure"):
        assert word in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "whether to offload" in capsys.readouterr().out


def test_table(capsys):
    status, out, err = _run(capsys, *MODEL, *MACHINE, *H200)
    assert (status, err) == (0, "")
    rows = {}
    for line in out.splitlines():
        name, *cells = re.split(r"\s{2,}", line.strip())
        rows[name] = cells
    assert rows["weights"][0] == "15.2 GiB"
    assert rows["KV"] == ["4.0 GiB", "–", rows["KV"][2], "–"]
    assert rows["KV slots"][0] == "–"
    assert rows["host store"][:2] == ["–", "3.9 GiB"]
    assert rows["batch"][:2] == ["1", "1"]
    assert int(rows["batch"][3]) > int(rows["batch"][2]) > 1
    assert rows["fits"] == ["yes"] * 4
    for word in (
        "verdict: ",
        "both are estimates: the bandwidths' bounds and 59 us a layer",
        "decode step, about",
        "offload starts to pay at ",
        "offloaded batch (qwen2.5-coder-0.5b-instruct, prose, sparda, 30720 tokens)",
        "recorded for NVIDIA H200",
        "memory 4,308 GB/s, fetch 45.0 GB/s (link 53.7)",
        "LongRoPE",
        "without look-ahead",
    ):
        assert word in out


def test_rates_that_are_given(capsys):
    given = ("--link", "25", "--bandwidth", "1500", "--miss", "0.02")
    status, out, _ = _run(capsys, *MODEL, *MACHINE, *given)
    assert status == 0
    assert "memory 1,500 GB/s, fetch 25.0 GB/s; given" in out
    assert "both rates are bounds" in out and "decode step, at best" in out
    status, out, _ = _run(capsys, *MODEL, *MACHINE, *H200, "--link", "25")
    assert "fetch 25.0 GB/s" in out
    assert "with what was given" in out


def test_options_reach_the_plan(capsys):
    options = (
        *("--attention", "infllm_v2", "--block-budget", "64", "--batch", "9999"),
        *("--device-blocks", "128", "--layer0", "offload", "--prefill-chunk", "0"),
    )
    status, out, _ = _run(capsys, *MODEL, *MACHINE, *H200, *options)
    assert status == 0
    assert "64 of 2,048 blocks a token" in out
    assert "130,816 a prefill call" in out
    assert "9,999" in out
    assert "KV of layer 0" not in out
    assert "without look-ahead" not in out
    assert re.search(r"fits +no +no +yes +yes", out)


@pytest.mark.slow
def test_measure(capsys):
    arguments = ("--model", "tiny", "--context", "2048", "--hbm", "1", "--host", "1")
    status, out, _ = _run(capsys, *arguments, "--measure", "--dtype", "float32")
    assert status == 0
    assert "measured on cpu, JAX" in out
    assert "fetch, dynamic_slice, 8 KiB" in out
    assert "medians of 7 calls" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((*MODEL, *MACHINE), "no rates are recorded for device kind 'cpu'"),
        ((*MODEL, *MACHINE, "--link", "20"), "give --link and --bandwidth"),
        ((*MODEL, *MACHINE, "--device-kind", "Abacus"), "kind 'Abacus'"),
        ((*MODEL, *MACHINE, *H200, "--measure"), "leave out --device-kind"),
        ((*MODEL, *MACHINE, *H200, "--link", "-1"), "--link=-1"),
        ((*MODEL, *MACHINE, *H200, "--miss", "2"), "--miss=2"),
        ((*MODEL, *MACHINE, *H200, "--trace", "none.npz"), "none.npz: no such file"),
        (
            (*MODEL, *MACHINE, *H200, "--trace", "x", "--miss", "0"),
            "None beside miss=0.0",
        ),
        ((*MODEL, *MACHINE, *H200, "--dtype", "int4"), "--dtype='int4'"),
        ((*MODEL, *MACHINE, *H200, "--attention", "magic"), "--attention='magic'"),
        ((*MODEL, *MACHINE, *H200, "--block-budget", "3"), "forced blocks"),
        ((*MODEL, *MACHINE, *H200, "--device-blocks", "3"), "--device-blocks=3"),
        ((*MODEL, "--hbm", "0", "--host", "1", *H200), "--hbm=0"),
        (("--model", "gpt", "--context", "9", *MACHINE, *H200), "model='gpt'"),
        ((*MODEL, *MACHINE, "--measure", "--route", "mosaic"), "route='mosaic'"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, named):
    status, out, err = _run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("sparda: ")
    assert named in err


def test_a_device_goes_by_its_short_name(capsys):
    whole = recorded_rates("NVIDIA H200")
    assert recorded_rates("H200") == recorded_rates("h200") == whole
    status, out, _ = _run(capsys, *MODEL, *MACHINE, "--device-kind", "h200")
    assert status == 0
    assert "recorded for NVIDIA H200" in out


def test_an_unknown_device_is_told_which_are_known(capsys):
    status, _, err = _run(capsys, *MODEL, *MACHINE, "--device-kind", "T4")
    assert status == 2
    assert "one of 'NVIDIA H200', 'NVIDIA H100 80GB HBM3'" in err


def test_a_model_by_its_config_json(capsys, tmp_path):
    """The shape of Llama 3.1 8B, of which nothing else is here."""
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    same = ("--context", "32768", *MACHINE, *H200)
    _, by_file, _ = _run(capsys, "--model", str(tmp_path), *same)
    _, by_name, _ = _run(capsys, "--model", "llama-3.1-8b", *same)
    assert by_file.splitlines()[1:] == by_name.splitlines()[1:]
    assert by_file.startswith(tmp_path.name)
