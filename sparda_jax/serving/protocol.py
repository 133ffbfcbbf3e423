"""Bodies of requests, as OpenAI's and vLLM's clients write them.

A field is known, or has no effect at the values in `_NEUTRAL`, or is refused: what a
client asks for is never left out silently.
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sparda_jax.checks import (
    Check,
    ConfigError,
    flag,
    integer,
    require,
    several,
    shown,
    text,
)
from sparda_jax.engine.generate_config import GenerateConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.requests import encode_prompt
from sparda_jax.engine.session import Session
from sparda_jax.inference.sampling import MOST_SEED, SAMPLING_CHECKS

# What vLLM and OpenAI take where nothing is said.
_DEFAULT_TOKENS = 16
_MOST_OUTPUTS = 128
_MOST_PROMPTS = 4096
# Arguments of a rendering that a request has fields of its own for, or cannot give.
_NO_VARIABLES = {"self", "messages", "answer_prefix"}

_SAMPLING: Mapping[str, Check[Any]] = {
    "temperature": SAMPLING_CHECKS["temperature"],
    "top_p": SAMPLING_CHECKS["top_p"],
    "min_p": SAMPLING_CHECKS["min_p"],
    "repetition_penalty": SAMPLING_CHECKS["repetition_penalty"],
}


def _texts_or_text(field: str, value: object) -> tuple[str, ...]:
    texts: object = [value] if isinstance(value, str) else value
    return several(text, "texts")(field, texts)


def _any_seed(field: str, value: object) -> int:
    """Any integer as a seed: clients send 64 bits, and negative ones."""
    return integer(-(2**63), 2**64 - 1)(field, value) & MOST_SEED


def _mapping(field: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(n, str) for n in value):
        raise ConfigError(
            f"{field}={shown(value)} is not allowed: it must be an object"
        )
    return dict(value)


_COMMON: Mapping[str, Check[Any]] = {
    "model": text,
    "max_tokens": integer(0),
    "min_tokens": integer(0),
    **_SAMPLING,
    "top_k": integer(-1, hint=" (0 or -1 is off)"),
    "seed": _any_seed,
    "n": integer(1, _MOST_OUTPUTS),
    "stop": _texts_or_text,
    "stop_token_ids": several(integer(0), "token ids"),
    "ignore_eos": flag,
    "include_stop_str_in_output": flag,
    "stream": flag,
    "stream_options": _mapping,
}
_COMPLETION: Mapping[str, Check[Any]] = {
    **_COMMON,
    "prompt": lambda field, value: value,
    "echo": flag,
    "logprobs": integer(0),
}
_CHAT: Mapping[str, Check[Any]] = {
    **_COMMON,
    "messages": lambda field, value: value,
    "max_completion_tokens": integer(0),
    "logprobs": flag,
    "top_logprobs": integer(0),
    "chat_template_kwargs": _mapping,
}
# Fields that say nothing to the model, and the values of others at which they ask for
# nothing. null is always one of them.
_SILENT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "priority",
    "verbosity",
}
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True,),
    "detokenize": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "echo": (False,),
    "logprobs": (),
}


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """A request of the API, checked.

    Attributes:
      prompts: Token ids of each prompt.
      configs: What is asked for, of each output of one prompt: n of them.
      stream: Whether it wants events.
      usage: Whether a stream ends with a usage chunk.
      running_usage: Whether every chunk has one.
      echo: Whether the prompt is part of the answer.
      logprobs: Likeliest tokens to report with each; None for no log-probabilities.
      no_output: Only the prompt is asked for: the one token that runs is left out.
      chat: Whether it is a chat.
    """

    prompts: tuple[list[int], ...]
    configs: tuple[GenerateConfig, ...]
    stream: bool
    usage: bool
    running_usage: bool
    echo: bool
    logprobs: int | None
    no_output: bool
    chat: bool


class UnknownModel(ConfigError):
    """The server has no such model."""


def known_fields(body: object, fields: Mapping[str, Check[Any]]) -> dict[str, Any]:
    """The values of a body's fields, those that ask for nothing left out."""
    if not isinstance(body, dict):
        raise ConfigError(
            f"the body is {shown(body)}: it must be a JSON object with fields"
        )
    values = {}
    for name, value in body.items():
        if value is None or name in _SILENT:
            continue
        if name in fields:
            values[name] = fields[name](name, value)
        elif name in _NEUTRAL:
            allowed = _NEUTRAL[name]
            words = " or ".join(map(repr, allowed)) or "null"
            require(value in allowed, name, value, f"{words}: no more is served")
        else:
            raise ConfigError(
                f"{shown(name)} is no field that this server knows: it must be one of "
                f"{', '.join(sorted(fields))}"
            )
    return values


def _check_model(values: dict[str, Any], served: str) -> None:
    asked = values.pop("model", None)
    if asked is not None and asked != served:
        raise UnknownModel(
            f"the model {shown(asked)} does not exist: this server has {served!r}"
        )


def parse_completion(
    body: object, session: Session, *, served: str, most_logprobs: int
) -> ApiRequest:
    """A body of /v1/completions.

    Args:
      body: What the JSON was.
      session: Whose limits hold.
      served: The model's name.
      most_logprobs: Likeliest tokens that can be asked for.

    Raises:
      ConfigError: If a field is not known or not allowed, or a prompt is too long.
    """
    values = known_fields(body, _COMPLETION)
    _check_model(values, served)
    prompts = _prompts(session.lm, values.pop("prompt", None))
    logprobs = values.pop("logprobs", None)
    echo = values.pop("echo", False)
    return _request(
        session,
        values,
        prompts,
        echo=echo,
        logprobs=logprobs,
        most_logprobs=most_logprobs,
        default_tokens=_DEFAULT_TOKENS,
        chat=False,
    )


def _prompts(lm: LanguageModel, prompt: object) -> list[list[int]]:
    """Token ids of a text, of ids, or of a list of either."""
    if prompt is None:
        raise ConfigError("prompt is missing: text, token ids, or a list of either")
    if isinstance(prompt, str):
        return [encode_prompt(lm, prompt, "prompt")]
    if not isinstance(prompt, list):
        raise ConfigError(
            f"prompt={shown(prompt)} is not allowed: it must be text, token ids, or a "
            "list of either"
        )
    if prompt and not isinstance(prompt[0], str | list):
        return [encode_prompt(lm, prompt, "prompt")]
    count = len(prompt)
    if not 1 <= count <= _MOST_PROMPTS:
        raise ConfigError(
            f"prompt holds {count} prompts: it must hold 1 … {_MOST_PROMPTS}"
        )
    found = []
    for index, one in enumerate(prompt):
        field = f"prompt[{index}]"
        require(isinstance(one, str | list), field, one, "text or token ids")
        found.append(encode_prompt(lm, one, field))
    return found


def parse_chat(
    body: object, session: Session, *, served: str, most_logprobs: int
) -> ApiRequest:
    """A body of /v1/chat/completions; arguments and errors as `parse_completion`."""
    values = known_fields(body, _CHAT)
    _check_model(values, served)
    tokenizer = session.lm.tokenizer
    if tokenizer is None or not tokenizer.has_chat_template:
        raise ConfigError(f"model {served!r} has no chat template: use /v1/completions")
    messages = parse_messages("messages", values.pop("messages", None))
    variables = values.pop("chat_template_kwargs", {})
    for name in _NO_VARIABLES & variables.keys():
        raise ConfigError(f"chat_template_kwargs has {name!r}, which is no variable")
    flag("add_generation_prompt", variables.get("add_generation_prompt", True))
    prompt = tokenizer.encode_chat(messages, **variables)
    top = values.pop("top_logprobs", 0)
    wanted = values.pop("logprobs", False)
    require(wanted or not top, "top_logprobs", top, "with logprobs=true only")
    most = values.pop("max_completion_tokens", None)
    if most is not None:
        values["max_tokens"] = most
    return _request(
        session,
        values,
        [prompt],
        echo=False,
        logprobs=top if wanted else None,
        most_logprobs=most_logprobs,
        default_tokens=None,
        chat=True,
    )


def parse_messages(field: str, value: object) -> list[dict[str, Any]]:
    """Messages with texts as contents; parts that are texts are joined."""
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"{field}={shown(value)} is not allowed: it must be a list of messages "
            "with role and content"
        )
    return [_message(f"{field}[{i}]", message) for i, message in enumerate(value)]


def _message(field: str, message: object) -> dict[str, Any]:
    found = _mapping(field, message)
    content = found.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = []
        for i, part in enumerate(content):
            is_text = isinstance(part, dict) and part.get("type") == "text"
            require(is_text, f"{field}.content[{i}]", part, "a part of type text")
            parts.append(text(f"{field}.content[{i}].text", part.get("text")))
        found["content"] = "".join(parts)
    return found


def _request(
    session: Session,
    values: dict[str, Any],
    prompts: list[list[int]],
    *,
    echo: bool,
    logprobs: int | None,
    most_logprobs: int,
    default_tokens: int | None,
    chat: bool,
) -> ApiRequest:
    """What both kinds of requests have in common; checks that every prompt fits."""
    if logprobs is not None:
        field = "top_logprobs" if chat else "logprobs"
        integer(0, most_logprobs)(field, logprobs)
    usage = known_fields(
        values.pop("stream_options", {}),
        {
            "include_usage": flag,
            "continuous_usage_stats": flag,
            "include_obfuscation": flag,
        },
    )
    stream, count = values.pop("stream", False), values.pop("n", 1)
    scored = echo and logprobs is not None
    allowed = "false with echo and logprobs, which come with a whole answer alone"
    require(not (stream and scored), "stream", stream, allowed)
    seed = values.pop("seed", None)
    seed = secrets.randbits(32) if seed is None else seed
    new = values.pop("max_tokens", None)
    if new is None:
        longest = max(map(len, prompts))
        room = max(session.max_context - longest, 1)
        new = min(session.max_new_tokens, room, default_tokens or room)
    require(new > 0 or echo, "max_tokens", new, "at least 1 (0 with echo)")
    config = GenerateConfig(
        max_new_tokens=max(new, 1),
        min_new_tokens=values.pop("min_tokens", 0),
        temperature=values.pop("temperature", 1.0),
        top_k=max(values.pop("top_k", 0), 0),
        stop=tuple(stop for stop in values.pop("stop", ()) if stop),
        stop_ids=values.pop("stop_token_ids", ()),
        include_stop=values.pop("include_stop_str_in_output", False),
        **values,
    )
    for prompt in prompts:
        session.check(prompt, config)
    configs = (
        dataclasses.replace(config, seed=(seed + i) & MOST_SEED) for i in range(count)
    )
    return ApiRequest(
        prompts=tuple(prompts),
        configs=tuple(configs),
        stream=stream,
        usage=usage.get("include_usage", False),
        running_usage=usage.get("continuous_usage_stats", False),
        echo=echo,
        logprobs=logprobs,
        no_output=new == 0,
        chat=chat,
    )
