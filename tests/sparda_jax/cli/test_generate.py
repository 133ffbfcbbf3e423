"""`sparda generate` over a pipe: a prompt from standard input, JSON at the end."""

import json

import pytest

import sparda_jax as sj
from sparda_jax.cli import generate as cli_generate
from sparda_jax.cli.main import main


@pytest.fixture
def piped(monkeypatch, capsys, tmp_path, text_lm):
    """`piped(bytes, *options)` is (status, out, err)."""
    monkeypatch.setattr(cli_generate, "load_model", lambda *_: text_lm)

    def run(content, *options):
        (tmp_path / "in").write_bytes(content)
        with open(tmp_path / "in", encoding="utf-8") as stream:
            monkeypatch.setattr("sys.stdin", stream)
            status = main(["generate", "--prompt-file", "-", *options])
        return status, *capsys.readouterr()

    return run


def test_a_prompt_from_a_pipe_gives_json(piped, text_lm):
    options = ("--max-new-tokens", "6", "--ignore-eos")
    status, out, err = piped(b"a bird\nsings", *options, "--json")
    assert (status, out.count("\n"), err) == (0, 1, "")
    want = sj.generate(text_lm, ["a bird\nsings"], max_new_tokens=6, ignore_eos=True)
    record = json.loads(out)
    assert record["tokens"] == want.tokens[0]
    assert record["text"] == want.texts[0]
    assert record["finish_reason"] == "length"
    assert record["prompt_tokens"] == want.stats.prompt_tokens
    assert record["decode_blocks"] == list(want.stats.decode_blocks)
    assert record["offload"] is None
    assert piped(b"a bird\nsings", *options)[1] == want.texts[0] + "\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "the prompt is empty"), (b"ab\xff", "standard input is not UTF-8: byte 2")],
)
def test_bad_input_is_one_line(piped, content, told):
    status, out, err = piped(content)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert told in err
