"""`sparda chat` over a pipe: turns on one cache, its commands, and what it refuses."""

import io
import json
import signal

import pytest

import sparda_jax as sj
from sparda_jax.cli import chat as cli_chat
from sparda_jax.cli.main import main

HOW = {"max_new_tokens": 6, "ignore_eos": True}
OPTIONS = ["--max-new-tokens", "6", "--ignore-eos"]


@pytest.fixture
def talk(monkeypatch, capsys, text_lm):
    """`talk(lines, *options)` is (status, records, what was said on stderr)."""
    monkeypatch.setattr(cli_chat, "load_model", lambda *_: text_lm)

    def run(lines, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
        status = main(["chat", "--json", *OPTIONS, *options])
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return run


def _user(content):
    return {"role": "user", "content": content}


def test_turns_go_on_one_cache(talk, text_lm):
    status, records, err = talk(["a bird", "", "and on"], "--system", "be brief")
    assert status == 0
    first = sj.chat(
        text_lm, [{"role": "system", "content": "be brief"}, _user("a bird")], **HOW
    )
    messages = [*first.messages, _user("and on")]
    second = sj.chat(text_lm, messages, conversation=first.conversation, **HOW)
    assert [r["tokens"] for r in records] == [
        first.output.tokens[0],
        second.output.tokens[0],
    ]
    assert records[1]["text"] == second.text
    # The second turn read its own message alone.
    assert records[1]["prompt_tokens"] == second.stats.prompt_tokens
    assert records[1]["prompt_tokens"] < records[0]["prompt_tokens"]
    turns = [line for line in err.splitlines() if line.startswith("[")]
    assert turns[0].startswith("[0 tokens held, ")
    assert turns[1].startswith(f"[{first.conversation.lengths[0]} tokens held, ")


def test_fork_back_and_reset(talk):
    lines = ["one", "/fork", "two", "/back", "two", "/reset", "one", "/stats"]
    status, records, err = talk(lines)
    assert status == 0
    one, two, again, fresh = (r["tokens"] for r in records)
    assert again == two
    assert fresh == one
    assert "kept as 1: 2 messages" in err
    assert "back at 1: 2 messages" in err
    assert "attention dense" in err


def test_lines_that_are_no_text_end_in_one_line(monkeypatch, capsys, text_lm):
    monkeypatch.setattr(cli_chat, "load_model", lambda *_: text_lm)
    given = io.TextIOWrapper(io.BytesIO(b"/help\na\xe9b\n"), "utf-8")
    monkeypatch.setattr("sys.stdin", given)
    assert main(["chat"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "sparda: standard input is not utf-8: it has a byte 0xe9"


@pytest.mark.slow
def test_attention_and_cache_read_all_again(talk, text_lm):
    lines = ["one", "/attention window", "two", "/cache auto", "/fork", "three"]
    status, records, err = talk(lines)
    assert status == 0
    assert [r["attention"] for r in records] == ["dense", "window", "window"]
    assert "resident" in records[2]["policy"]
    assert "[cache auto; the next turn reads" in err
    # Without a cache of its setting the second turn reads what the first one wrote.
    window = sj.with_attention(text_lm, "window")
    said = [_user("one"), {"role": "assistant", "content": records[0]["text"]}]
    second = sj.chat(window, [*said, _user("two")], **HOW)
    assert records[1]["tokens"] == second.output.tokens[0]
    said = [*second.messages, _user("three")]
    assert records[2]["tokens"] == sj.chat(window, said, **HOW).output.tokens[0]


@pytest.mark.slow
def test_a_cache_in_host_memory_says_the_same(talk, text_lm):
    lines = ["/attention window", "one", "/cache offload", "two"]
    status, records, err = talk(lines)
    assert status == 0
    assert [r["offload"] is None for r in records] == [True, False]
    assert "MB fetched" in err
    said = [_user("one"), {"role": "assistant", "content": records[0]["text"]}]
    window = sj.with_attention(text_lm, "window")
    resident = sj.chat(window, [*said, _user("two")], **HOW)
    assert records[1]["tokens"] == resident.output.tokens[0]


def test_a_document_comes_with_the_first_message(talk, text_lm, tmp_path):
    (tmp_path / "d.txt").write_text("some words")
    status, records, _ = talk(
        ["what", "/quit", "no"], "--document", f"{tmp_path}/d.txt"
    )
    assert status == 0
    want = sj.chat(text_lm, [_user("some words\n\nwhat")], **HOW)
    assert [r["tokens"] for r in records] == [want.output.tokens[0]]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["/magic"], "/magic is no command: it must be one of /attention"),
        (["/attention magic"], "/attention='magic' is not allowed"),
        (["/attention"], "/attention='' is not allowed"),
        (["/cache moon"], "/cache='moon' is not allowed"),
        (["/cache evict"], "/cache='evict' is not allowed"),
        (["/back"], "/back has no point to go back to"),
        (["/fork a", "/back b"], "/back='b' is not allowed"),
        (["/stats"], "nothing to show before the first turn"),
        (["word " * 3000], "context"),
    ],
)
def test_a_script_with_a_slip_ends(talk, lines, told):
    status, records, err = talk(lines)
    assert (status, records) == (2, [])
    refused = [line for line in err.splitlines() if line.startswith("sparda: ")]
    assert len(refused) == 1
    assert told in refused[0]


def test_a_cache_that_evicts_is_refused_before_a_model_is_loaded(capsys):
    words = ["chat", "--cache", "evict", "--no-compilation-cache"]
    assert main(words) == 2
    assert "--cache='evict' is not allowed" in capsys.readouterr().err


def test_models_without_text_are_refused(capsys):
    assert main(["chat", "--model", "tiny", "--no-compilation-cache"]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_one_interrupt_is_noted_and_a_second_one_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with cli_chat._interrupt_noted() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_answer_stays_in_the_conversation(talk, monkeypatch, text_lm):
    real, streams = sj.stream_chat, []

    class Interrupted:
        def __init__(self, stream):
            self._stream = stream

        def __getattr__(self, name):
            return getattr(self._stream, name)

        def __iter__(self):
            for number, event in enumerate(self._stream):
                if len(streams) == 1 and number == 1:
                    signal.raise_signal(signal.SIGINT)
                yield event

    def stream_chat(*arguments, **named):
        streams.append(Interrupted(real(*arguments, **named)))
        return streams[-1]

    monkeypatch.setattr(cli_chat.sj, "stream_chat", stream_chat)
    status, records, err = talk(["one", "two"])
    assert status == 0
    assert [r["finish_reason"] for r in records] == ["cancelled", "length"]
    assert 0 < len(records[0]["tokens"]) < 6
    assert "cancelled]" in err
    # The next turn goes on behind what had come.
    first = sj.chat(text_lm, [_user("one")], max_new_tokens=len(records[0]["tokens"]))
    assert first.output.tokens[0] == records[0]["tokens"]
    more = [*first.messages, _user("two")]
    second = sj.chat(text_lm, more, conversation=first.conversation, **HOW)
    assert records[1]["tokens"] == second.output.tokens[0]
