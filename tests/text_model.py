"""A tiny model that takes text."""

import dataclasses

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import sparda_jax as sj
from sparda_jax.checkpoint.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokens() -> list[str]:
    """124 tokens: ASCII, the bytes of é, and some that hold several characters."""
    single = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "Ã", "©"]
    words = ["ĊĊ", ".Ċ", "ab", "bc", "Ġa", "Ġb", "stop", "op", "er", "in", "on"]
    tokens = [*SPECIAL, *single, *words]
    return tokens + [f"ĠĠ{n}" for n in range(10)] + ["Ġthe", "an"]


@pytest.fixture(scope="session")
def text_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 124 tokens; 0 to 2 are special."""
    vocab = {token: index for index, token in enumerate(_tokens())}
    merges = [("Ċ", "Ċ"), (".", "Ċ"), ("a", "b"), ("b", "c"), ("Ġ", "a")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False) for token in SPECIAL]
    )
    return Tokenizer(
        backend, where="a test", eos_ids=[2], bos_id=0, chat_source=TEMPLATE
    )


@pytest.fixture(scope="module")
def text_lm(text_tokenizer) -> sj.LanguageModel:
    """The tiny random model with that tokenizer; it ends at <|im_end|>."""
    lm = sj.load("tiny", storage="stacked")
    config = dataclasses.replace(lm.config, eos_ids=(2,))
    return dataclasses.replace(lm, config=config, tokenizer=text_tokenizer)
