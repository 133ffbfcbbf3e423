"""From prompts to token ids: BOS, arrays, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.config import ConfigError
from sparda_jax.engine.requests import encode_prompt, prompt_rows

BOS = 0


@pytest.fixture(scope="module")
def bos_lm(text_lm):
    """A model whose texts begin with a BOS."""
    config = dataclasses.replace(text_lm.config, bos_id=BOS)
    return dataclasses.replace(text_lm, config=config)


def test_one_bos_at_the_beginning(bos_lm, text_lm):
    plain = text_lm.tokenizer.encode("hello")
    assert encode_prompt(bos_lm, "hello", "p") == [BOS, *plain]
    assert encode_prompt(bos_lm, "hello", "p", begins=False) == plain
    assert encode_prompt(text_lm, "hello", "p") == plain
    # Ids are taken as they are.
    assert encode_prompt(bos_lm, plain, "p") == plain


def test_a_text_that_names_the_bos_gets_one(bos_lm, text_lm):
    """As a rendered chat does; other names of special tokens stay text."""
    text = "<|endoftext|>hello<|endoftext|><|im_end|>"
    ids = encode_prompt(bos_lm, text, "p")
    assert ids.count(BOS) == 1 and ids[0] == BOS
    assert text_lm.tokenizer.decode(ids[1:]) == "hello<|endoftext|><|im_end|>"
    # A model without BOS, and a further turn: all of it is text.
    for other in (
        encode_prompt(text_lm, text, "p"),
        encode_prompt(bos_lm, text, "p", begins=False),
    ):
        assert BOS not in other and text_lm.tokenizer.decode(other) == text


def test_no_bos_in_the_middle_of_a_conversation(bos_lm):
    """Public report llama.cpp#9606, with texts of our own."""
    how = {"max_new_tokens": 4, "ignore_eos": True}
    first = sj.generate(bos_lm, ["Sea and"], **how)
    encode = bos_lm.tokenizer.encode
    ids = [BOS, *encode("Sea and"), *first.tokens[0], *encode(" sky.")]
    turn = sj.generate(bos_lm, [" sky."], conversation=first.conversation, **how)
    assert turn.conversation.lengths == (len(ids) + 3,)
    assert turn.tokens == sj.generate(bos_lm, [ids], **how).tokens


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_two_dimensional_arrays_are_prompts(text_lm, array):
    ids = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    how = {"max_new_tokens": 4, "ignore_eos": True}
    want = sj.generate(text_lm, ids, **how).tokens
    assert sj.generate(text_lm, array(ids), **how).tokens == want
    stream = sj.stream(text_lm, array(ids), **how)
    got = [[], [], []]
    for event in stream:
        if event.token >= 0:
            got[event.index].append(event.token)
    assert got == want


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (np.zeros((2, 2, 2), int), r"an integer array \[B, T\]; got ndarray of shape"),
        (np.zeros(3, int), r"got ndarray of shape \(3,\)"),
        (np.zeros((0, 3), int), "prompts is empty"),
        ({1: 2}, "got dict"),
        ("text", "got str"),
    ],
)
def test_prompts_that_are_none(prompts, named, without_type_checks):
    with pytest.raises(ConfigError, match=named):
        prompt_rows(prompts)


def test_rows_that_are_no_ids(text_lm):
    for row, named in (
        (np.zeros((2, 0), int), "is empty"),
        (np.ones((2, 3)), "dtype float64"),
        (np.full((2, 3), 500), "token id 500"),
    ):
        with pytest.raises(ConfigError, match=named):
            sj.generate(text_lm, row)
    with pytest.raises(ConfigError, match="valid Unicode"):
        encode_prompt(text_lm, "\ud800", "p")
