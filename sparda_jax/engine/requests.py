"""Checks of what is asked, before any device work: prompts, lengths, limits."""

from collections.abc import Sequence

import numpy as np

from sparda_jax.config import ConfigError
from sparda_jax.engine.model import LanguageModel

PromptLike = str | Sequence[int] | np.ndarray


def check_prompts(prompts: Sequence[PromptLike]) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ConfigError(
            "prompts must be a list with one prompt per sequence, each text or token "
            f"ids; got {type(prompts).__name__}"
        )
    if not prompts:
        raise ConfigError("prompts is empty: it must hold at least one prompt")


def encode_prompt(lm: LanguageModel, prompt: PromptLike, field: str) -> list[int]:
    """Token ids of a prompt.

    Raises:
      ConfigError: If it is empty, text without a tokenizer, or has ids that are not in
        the vocabulary.
    """
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise ConfigError(
                f"{field} is text, and model {lm.config.name!r} has no tokenizer: give "
                "token ids"
            )
        ids = list(lm.tokenizer.encode(prompt))
        if lm.config.bos_id is not None:
            ids = [lm.config.bos_id, *ids]
    else:
        array = np.asarray(prompt)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ConfigError(
                f"{field} has shape {array.shape} and dtype {array.dtype}: it must be "
                "text or a one-dimensional sequence of integer token ids"
            )
        ids = [int(token) for token in array]
    if not ids:
        raise ConfigError(f"{field} is empty: it must hold at least one token")
    for token in ids:
        if not 0 <= token < lm.config.vocab_size:
            raise ConfigError(
                f"{field} holds token id {token}: it must be in "
                f"[0, {lm.config.vocab_size}) for model {lm.config.name!r}"
            )
    return ids


def check_length(lm: LanguageModel, tokens: int, max_new: int, field: str) -> None:
    limit = lm.config.max_context
    if tokens + max_new > limit:
        raise ConfigError(
            f"{field} has {tokens} tokens, and max_new_tokens={max_new} more make "
            f"{tokens + max_new}: at most {limit} fit the context of model "
            f"{lm.config.name!r}"
        )
