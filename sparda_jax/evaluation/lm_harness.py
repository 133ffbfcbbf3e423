"""An adapter for EleutherAI's lm-evaluation-harness: its tasks run on ours unchanged.

    import lm_eval, sparda_jax as sj
    from sparda_jax.evaluation.lm_harness import harness_model

    model = harness_model(sj.load("smollm2-135m", attention="infllm_v2"))
    lm_eval.simple_evaluate(model, tasks=["lambada_openai"])

It is an extra (`pip install 'sparda-jax[lm-eval]'`); nothing else here needs it.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from sparda_jax.checks import ConfigError, integer
from sparda_jax.engine.api import generate
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.requests import model_of_one_group
from sparda_jax.evaluation.token_scores import score_tokens

_MAX_NEW = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What the harness passes and what says nothing here.
_IGNORED = ("do_sample", "max_length", "num_beams")


def split_pair(
    lm: LanguageModel, context: str, continuation: str
) -> tuple[list[int], int]:
    """Token ids of both texts together, and how many of them are the continuation's.

    Blanks at the end of the context belong to the continuation, as in the harness: most
    tokenizers write them at the beginning of a word. Without a context the model's BOS,
    or else its end token, stands before it. What is too long loses its beginning.

    Raises:
      ConfigError: If the continuation is empty, or longer than the model's context.
    """
    assert lm.tokenizer is not None
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    bos = [] if lm.config.bos_id is None else [lm.config.bos_id]
    begin = bos if stripped else _begin(lm)
    if not stripped and not begin:
        raise ConfigError("context is empty, and the model has no token to begin with")
    before = begin + lm.tokenizer.encode(stripped, special=True)
    whole = begin + lm.tokenizer.encode(stripped + continuation, special=True)
    count = len(whole) - len(before)
    most = lm.config.max_context
    if not 0 < count < most:
        raise ConfigError(
            f"continuation has {count} tokens: it must have 1 … {most - 1}"
        )
    return whole[-most:], count


def _begin(lm: LanguageModel) -> list[int]:
    """The token that a text begins with, for one that has none before it."""
    if lm.config.bos_id is not None:
        return [lm.config.bos_id]
    return list(lm.config.eos_ids[:1])


def loglikelihood(
    lm: LanguageModel, context: str, continuation: str
) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether greedy decoding would write it.

    Args:
      lm: A loaded model.
      context, continuation: Texts; see `split_pair`.
    """
    ids, count = split_pair(lm, context, continuation)
    scores = score_tokens(lm, ids)
    total = -float(np.sum(scores.surprises[-count:], dtype=np.float64))
    return total, bool(np.all(scores.likeliest[-count:]))


def rolling_loglikelihood(lm: LanguageModel, text: str) -> float:
    """Log-probability of a whole text, of any length.

    What is beyond the context comes in windows that do not overlap: each token is
    counted once, and a window begins with the last token of the one before.
    """
    assert lm.tokenizer is not None
    ids = _begin(lm) + lm.tokenizer.encode(text, special=True)
    total, most = 0.0, lm.config.max_context
    for first in range(0, len(ids) - 1, most - 1):
        window = ids[first : first + most]
        total -= float(np.sum(score_tokens(lm, window).surprises, dtype=np.float64))
    return total


def generate_until(
    lm: LanguageModel, context: str, arguments: Mapping[str, Any]
) -> str:
    """Continues a text up to one of the strings in `until`, as the harness asks.

    Args:
      lm: A loaded model.
      context: What is continued; too long a one loses its beginning.
      arguments: `until`, `max_gen_toks`, `temperature`, `top_p` and the like.

    Raises:
      ConfigError: If there is an argument that is not known.
    """
    assert lm.tokenizer is not None
    options = {k: v for k, v in arguments.items() if k not in _IGNORED}
    until = options.pop("until", None) or []
    stops = [until] if isinstance(until, str) else [text for text in until if text]
    room = options.pop("max_gen_toks", options.pop("max_new_tokens", _MAX_NEW))
    room = integer(1)("max_gen_toks", room)
    unknown = sorted(set(options) - set(_SAMPLING))
    if unknown:
        allowed = ("until", "max_gen_toks", *_SAMPLING)
        raise ConfigError(
            f"{unknown[0]}={options[unknown[0]]!r} is not allowed: generation takes "
            f"{', '.join(allowed)}"
        )
    if arguments.get("do_sample") is False:
        options = {k: v for k, v in options.items() if k == "repetition_penalty"}
    most = lm.config.max_context - room
    if most < 1:
        raise ConfigError(
            f"max_gen_toks={room} is not allowed: it must be below the context of "
            f"{lm.config.max_context} tokens"
        )
    begin = [] if lm.config.bos_id is None else [lm.config.bos_id]
    ids = (begin + lm.tokenizer.encode(context, special=True))[-most:]
    out = generate(lm, [ids], max_new_tokens=room, stop=stops, **options)
    return out.texts[0]


def harness_model(lm: LanguageModel) -> Any:
    """An `lm_eval.api.model.LM` that answers with a loaded model.

    Args:
      lm: A loaded model with a tokenizer.

    Raises:
      ConfigError: If the harness is not installed, or there is no tokenizer.
    """
    lm = model_of_one_group("lm", lm)
    try:
        base: Any = importlib.import_module("lm_eval.api.model").LM
    except ImportError as error:
        raise ConfigError(
            "the harness is not installed: pip install 'sparda-jax[lm-eval]'"
        ) from error
    if lm.tokenizer is None:
        raise ConfigError(f"lm is not allowed: {lm.no_tokenizer}")
    tokenizer = lm.tokenizer

    class SpardaLM(base):
        """Requests of the harness, one by one."""

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            """Of (context, continuation) pairs."""
            return [loglikelihood(lm, *args) for args in _args(requests)]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            """Of whole texts."""
            return [rolling_loglikelihood(lm, *args) for args in _args(requests)]

        def generate_until(self, requests: Any) -> list[str]:
            """Continuations of (context, arguments) pairs."""
            return [generate_until(lm, *args) for args in _args(requests)]

        @property
        def tokenizer_name(self) -> str:
            """For the harness's cache of requests."""
            return f"{lm.config.name}-{tokenizer.vocab_size}"

        def apply_chat_template(
            self,
            chat_history: Sequence[Mapping[str, str]],
            add_generation_prompt: bool = True,
        ) -> str:
            """Messages in the model's own form."""
            return tokenizer.chat(
                chat_history, add_generation_prompt=add_generation_prompt
            )

    return SpardaLM()


def _args(requests: Sequence[Any]) -> Any:
    """The arguments of the harness's requests, with a progress bar."""
    return (request.args for request in tqdm(requests, disable=None, unit="request"))
