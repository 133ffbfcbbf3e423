"""Stop strings: matched across tokens, left out of the text, ending their row alone."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparda_jax as sj
from sparda_jax.checks import ConfigError
from sparda_jax.engine.stop_strings import StopMatcher, pause_tokens

HOW = {"max_new_tokens": 30, "temperature": 2.0, "ignore_eos": True}
PROMPTS = ["a stop.", "in bc", "or"]


def _expected(text: str, stops) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


_TEXT = st.text("ab\n", max_size=20)
_STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(st.lists(_TEXT, max_size=6), _STOPS)
@settings(max_examples=500, deadline=None)
def test_the_cut_of_a_text_into_pieces_does_not_matter(pieces, stops):
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        # What is out is never taken back.
        assert _expected("".join(pieces), stops)[0].startswith("".join(shown))
    text = "".join(shown) + matcher.flush()
    assert (text, matcher.matched) == _expected("".join(pieces), stops)


def test_what_may_begin_a_stop_string_is_held_back():
    matcher = StopMatcher(["\n\nQ:"])
    assert [matcher.push(x) for x in ("yes", "\n", "\n", "Q", " no")] == [
        "yes",
        "",
        "",
        "",
        "\n\nQ no",
    ]
    assert matcher.push("\n") == "" and matcher.flush() == "\n"


@pytest.fixture(scope="module")
def whole(text_lm):
    """Outputs that nothing ends."""
    return sj.generate(text_lm, PROMPTS, seed=7, **HOW)


def test_a_cancelled_output_has_the_text_of_its_tokens(text_lm, whole):
    """What is held back, as it may begin a stop string, is a part of it."""
    decode = text_lm.tokenizer.decode
    first = decode(whole.tokens[0][:1])
    stream = sj.stream(text_lm, PROMPTS[:1], seed=7, stop=f"{first}never", **HOW)
    assert next(stream).text == ""
    out = stream.cancel()
    assert out.tokens == [whole.tokens[0][:1]] and out.texts == [first] != [""]


def _stops(whole) -> list[str]:
    """Stop strings that stand in one of the outputs, across its tokens."""
    first, last = whole.texts[0], whole.texts[2]
    return [first[9:13], last[20:22]]


def _streamed(stream):
    texts, tokens = {}, {}
    for event in stream:
        texts[event.index] = texts.get(event.index, "") + event.text
        if event.token >= 0:
            tokens.setdefault(event.index, []).append(event.token)
    return list(texts.values()), list(tokens.values())


def test_stop_strings_end_their_rows(text_lm, whole):
    """Each its own row, not the batch (public report transformers#26959)."""
    stops = _stops(whole)
    out = sj.generate(text_lm, PROMPTS, seed=7, stop=stops, **HOW)
    decode = text_lm.tokenizer.decode
    for text, tokens, reason, all_tokens, all_text in zip(
        out.texts,
        out.tokens,
        out.finish_reasons,
        whole.tokens,
        whole.texts,
        strict=True,
    ):
        expected, matched = _expected(all_text, stops)
        assert text == expected
        assert reason == ("stop" if matched else "length")
        # The tokens end with the one that completed the stop string.
        assert tokens == all_tokens[: len(tokens)]
        assert _expected(decode(tokens), stops) == (expected, matched)
        if matched:
            assert not _expected(decode(tokens[:-1]), stops)[1]
    assert out.finish_reasons.count("stop") >= 2
    assert out.stats.new_tokens == sum(map(len, out.tokens)) < 90
    for tokens_per_call in (1, 5):
        stream = sj.stream(
            text_lm,
            PROMPTS,
            seed=7,
            stop=stops,
            tokens_per_call=tokens_per_call,
            **HOW,
        )
        assert _streamed(stream) == (out.texts, out.tokens)
        assert stream.output.texts == out.texts
        assert stream.output.finish_reasons == out.finish_reasons


def test_a_further_turn_follows_the_stop_string(text_lm, whole):
    """The conversation holds the output's tokens, no more and no less."""
    stops = _stops(whole)
    out = sj.generate(text_lm, PROMPTS, seed=7, stop=stops, **HOW)
    how = {"max_new_tokens": 6, "ignore_eos": True}
    turn = sj.generate(text_lm, [" go"] * 3, conversation=out.conversation, **how)
    encode = text_lm.tokenizer.encode
    prompts = [
        [*encode(prompt), *tokens, *encode(" go")]
        for prompt, tokens in zip(PROMPTS, out.tokens, strict=True)
    ]
    assert turn.conversation.lengths == tuple(len(ids) + 5 for ids in prompts)
    assert turn.tokens == sj.generate(text_lm, prompts, **how).tokens


# Offloaded, in a server: `test_where_an_output_ends`.
@pytest.mark.slow
@pytest.mark.parametrize(
    "route", [pytest.param("dynamic_slice", marks=pytest.mark.long), "host_loop"]
)
def test_stop_strings_of_an_offloaded_cache(text_lm, whole, route):
    cache = sj.CacheConfig(
        kind="offload", device_blocks=None, route=route, prefetch="none"
    )
    lm = dataclasses.replace(text_lm, cache=cache)
    stops = _stops(whole)
    out = sj.generate(lm, PROMPTS, seed=7, stop=stops, **HOW)
    assert out.texts == [_expected(text, stops)[0] for text in whole.texts]


def test_a_single_token_and_a_single_string(text_lm, whole):
    """The first token may complete a stop string; a special token's name is one."""
    first = text_lm.tokenizer.decode(whole.tokens[0][:1])
    out = sj.generate(text_lm, PROMPTS[:1], seed=7, stop=first, **HOW)
    assert (out.tokens[0], out.texts[0]) == (whole.tokens[0][:1], "")
    forced = {**HOW, "stop": "<|im_end|>", "max_new_tokens": 400}
    out = sj.generate(text_lm, PROMPTS[:1], **forced)
    assert 2 in out.tokens[0] and out.tokens[0].index(2) == len(out.tokens[0]) - 1
    assert out.finish_reasons == ["stop"]


def test_pause_tokens(text_lm):
    """Decoding pauses where a stop string may be complete, and nowhere else."""
    tokenizer = text_lm.tokenizer
    pause = pause_tokens(text_lm, ["x\n", "é"])
    names = [tokenizer.token(int(token)) for token in pause.nonzero()[0]]
    assert names == ["Ċ", "©", "ĊĊ", ".Ċ"]
    assert pause_tokens(text_lm, []).sum() == 0
    assert pause_tokens(text_lm, ["a", "\ufffd"]).all()


@pytest.mark.slow
def test_n_outputs_are_those_of_n_seeds(text_lm):
    how = {**HOW, "max_new_tokens": 8}
    out = sj.generate(text_lm, PROMPTS[:2], n=3, seed=[11, 2**32 - 1], **how)
    seeds = [11, 12, 13, 2**32 - 1, 0, 1]
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert out.tokens == sj.generate(text_lm, prompts, seed=seeds, **how).tokens
    assert len({tuple(tokens) for tokens in out.tokens}) == 6
    same = sj.generate(text_lm, PROMPTS[:1], n=3, seed=11, **how)
    assert same.tokens == out.tokens[:3]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"stop": [""]}, "texts of at least one character"),
        ({"stop": ""}, "texts of at least one character"),
        ({"stop": [3]}, r"stop\[0\]=3"),
        ({"stop": 3}, "stop=3 is not allowed"),
        ({"stop": ["\ud800"]}, "valid Unicode"),
        ({"stop": "a", "single_call": True}, "single_call=True is not allowed with"),
        ({"n": 0}, "n=0 is not allowed"),
        ({"n": True}, "n=True is not allowed"),
        ({"n": 2, "seed": [1, 2]}, "seed has 2 values"),
        ({"n": 2, "seed": -1}, "seed=-1"),
        ({"n": 2, "seed": 0.5}, "seed=0.5"),
    ],
)
def test_bad_values(text_lm, arguments, named, without_type_checks):
    with pytest.raises(ConfigError, match=named):
        sj.generate(text_lm, ["a"], **arguments)


def test_a_model_without_tokenizer_has_no_texts(text_lm):
    lm = dataclasses.replace(text_lm, tokenizer=None)
    with pytest.raises(ConfigError, match="no tokenizer to find texts with"):
        sj.generate(lm, [[5]], stop=["a"])
