"""Checks of what is asked, before any device work: prompts, lengths, limits."""

from collections.abc import Sequence

import jax
import numpy as np

from sparda_jax.checks import ConfigError, instance, integer, require, several, shown
from sparda_jax.checks import text as checked_text
from sparda_jax.engine.model import LanguageModel
from sparda_jax.inference.sampling import MOST_SEED, seed_list

PromptLike = str | Sequence[int] | np.ndarray | jax.Array
LANGUAGE_MODEL = instance(LanguageModel, ", as `load` returns it")

# Of one call.
_MOST_ROWS = 2**16
Prompts = Sequence[PromptLike] | np.ndarray | jax.Array


def model_of_one_group(field: str, value: object) -> LanguageModel:
    """A check of a model whose devices, where there are several, have the same rows.

    Raises:
      ConfigError: If it is none.
    """
    lm = LANGUAGE_MODEL(field, value)
    require(
        lm.mesh is None or lm.mesh.data == 1,
        f"{field}.mesh",
        lm.mesh and lm.mesh.text,
        "data=1: samples are often asked one by one, in which other groups would be "
        "idle; run a process for each group (CUDA_VISIBLE_DEVICES), with a part of the "
        "work each",
    )
    return lm


def prompt_rows(prompts: Prompts) -> Sequence[PromptLike]:
    """The prompts, one an entry; a two-dimensional array has one a row.

    Raises:
      ConfigError: If they are no list of prompts, or none.
    """
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 2:
        prompts = list(_as_array(prompts, "prompts"))
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        got = type(prompts).__name__
        if isinstance(prompts, np.ndarray | jax.Array):
            got += f" of shape {prompts.shape}"
        raise ConfigError(
            "prompts must be a list with one prompt per sequence, each text or token "
            f"ids, or an integer array [B, T]; got {got}"
        )
    if len(prompts) == 0:
        raise ConfigError("prompts is empty: it must hold at least one prompt")
    if len(prompts) > _MOST_ROWS:
        raise ConfigError(
            f"prompts holds {len(prompts)} prompts: at most {_MOST_ROWS} are one batch"
        )
    try:
        return list(prompts)
    except Exception:  # anyone's own sequence
        raise ConfigError(
            f"prompts is a {type(prompts).__name__} that cannot be read"
        ) from None


def repeat_prompts(
    prompts: Prompts, seed: int | Sequence[int], n: int
) -> tuple[Sequence[PromptLike], Sequence[int]]:
    """Every prompt n times in a row, and the seed of each output.

    A prompt's outputs have the seeds s, s + 1, …, from its own s on.

    Raises:
      ConfigError: If the seeds are not one a prompt.
    """
    rows = prompt_rows(prompts)
    seeds = seed_list(seed, len(rows), "a prompt")
    repeated = [row for row in rows for _ in range(n)]
    return repeated, [(first + i) & MOST_SEED for first in seeds for i in range(n)]


def _as_array(value: object, field: str) -> np.ndarray:
    """Any library's array as NumPy's; a mask, which would be lost, is refused."""
    if not isinstance(value, np.ma.MaskedArray):
        try:
            return np.asarray(value)
        except Exception:  # a deleted array; anyone's own __array__
            pass
    raise ConfigError(
        f"{field} is a {type(value).__name__} that cannot be read as token ids: it "
        "must be text, a sequence of integers or a plain integer array"
    )


def _token_ids(prompt: object, field: str) -> list[int]:
    """Token ids of a sequence or of any library's array, as integers."""
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return list(prompt)  # the common case, without a look at every entry's class
    if hasattr(prompt, "__array__"):
        array = _as_array(prompt, field)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ConfigError(
                f"{field} has shape {array.shape} and dtype {array.dtype}: it must be "
                "text or a one-dimensional sequence of integer token ids"
            )
        return array.tolist() if array.size else []
    return list(several(integer(0), "token ids, or text")(field, prompt))


def _encode_text(
    lm: LanguageModel, text: str, field: str, *, begins: bool
) -> list[int]:
    """Ids of a text; one that begins a sequence gets one BOS if the model wants it."""
    text = checked_text(field, text)
    if lm.tokenizer is None:
        raise ConfigError(f"{field} is text, and {lm.no_tokenizer}: give token ids")
    head: list[int] = []
    if begins and lm.config.bos_id is not None:
        head = [lm.config.bos_id]
        # A text that brings the BOS along, by its name, must not get two.
        text = text.removeprefix(lm.tokenizer.token(lm.config.bos_id) or "")
    try:
        return [*head, *lm.tokenizer.encode(text)]
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def encode_prompt(
    lm: LanguageModel, prompt: PromptLike, field: str, *, begins: bool = True
) -> list[int]:
    """Token ids of a prompt.

    Args:
      lm: The model.
      prompt: Text or token ids. Names of special tokens in a text are text, except for
        the BOS's at its beginning; ids are taken as they are.
      field: What to call it in messages.
      begins: Whether it begins a sequence: a text then gets the model's BOS. A further
        turn of a conversation does not.

    Raises:
      ConfigError: If it is empty, text without a tokenizer, or has ids that are not in
        the vocabulary.
    """
    if isinstance(prompt, str):
        ids = _encode_text(lm, prompt, field, begins=begins)
    else:
        ids = _token_ids(prompt, field)
    if not ids:
        raise ConfigError(f"{field} is empty: it must hold at least one token")
    for token in ids:
        if not 0 <= token < lm.config.vocab_size:
            raise ConfigError(
                f"{field} holds token id {shown(token)}: it must be in "
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


def check_max_context(lm: LanguageModel, max_context: int, reached: int) -> int:
    """The length to choose rotary frequencies for.

    Args:
      lm: The model.
      max_context: What the caller asks for.
      reached: Tokens that this call can reach.

    Raises:
      ConfigError: If it is no integer from `reached` up to the model's context.
    """
    hint = f" (this call's own length, and the context of {lm.config.name!r})"
    return integer(reached, lm.config.max_context, hint=hint)(
        "max_context", max_context
    )


def _cuts_change_nothing(lm: LanguageModel) -> bool:
    """Whether a prompt may be cut into calls.

    Not where rows switch to dense attention by their length, or where windows reach
    past their query (parity settings), or where a layer keeps a part of its prompt.
    """
    if lm.cache.kind == "evict":
        return False
    return lm.sparse.dense_len <= 0 and lm.sparse.mask_future_blocks


def prefill_piece(lm: LanguageModel, longest: int, prefill_chunk: int | None) -> int:
    """Tokens of one prefill call, of a prompt of `longest`.

    Raises:
      ConfigError: If `prefill_chunk` is no integer of at least 1.
    """
    if prefill_chunk is None:
        return longest
    piece = integer(1)("prefill_chunk", prefill_chunk)
    return min(longest, piece) if _cuts_change_nothing(lm) else longest


def without_effect(
    lm: LanguageModel, max_context: int | None, prefill_chunk: int | None
) -> list[str]:
    """Which arguments of a request have no effect with this model, in words."""
    notes = []
    if max_context is not None and lm.config.rope.kind != "longrope":
        notes.append("no effect without LongRoPE: max_context")
    if prefill_chunk is not None and not _cuts_change_nothing(lm):
        notes.append(
            "no effect with dense_len, windows that reach past their query, or "
            "kind='evict': "
            "prefill_chunk (the prompt is one call)"
        )
    return notes
