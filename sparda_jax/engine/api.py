"""`generate`, `stream` and `forward`: the public calls."""

from collections.abc import Callable
from typing import Unpack

from jaxtyping import Array, Float

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.checks import flag, function, integer, optional
from sparda_jax.engine.call import Call
from sparda_jax.engine.conversation import Conversation
from sparda_jax.engine.generate_config import (
    GenerateConfig,
    GenerateOptions,
    merge_options,
)
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.requests import (
    LANGUAGE_MODEL,
    PromptLike,
    Prompts,
    encode_prompt,
)
from sparda_jax.engine.results import GenerateOutput
from sparda_jax.engine.stream import Stream
from sparda_jax.engine.whole_sequence import run_whole
from sparda_jax.inference.generate import Prompt, hidden_states
from sparda_jax.inference.shapes import Shapes
from sparda_jax.models.decoder import Decoder, logits
from sparda_jax.models.rope import Rope


def forward(lm: LanguageModel, ids: PromptLike) -> Float[Array, "T V"]:
    """Logits after every token of one sequence.

    Args:
      lm: A loaded model.
      ids: Token ids, or text.

    Returns:
      float32 [T, vocab]; row t scores the token that follows token t.

    Raises:
      ConfigError: If ids are empty, out of the vocabulary or longer than the context.

    Example:
      >>> sj.forward(lm, [5, 6, 7]).shape == (3, lm.config.vocab_size)
      True
    """
    lm = LANGUAGE_MODEL("lm", lm)
    tokens = encode_prompt(lm, ids, "ids")
    return run_whole(_forward, lm, tokens)[: len(tokens)]


def _forward(
    model: Decoder,
    prompt: Prompt,
    rope: Rope,
    *,
    settings: LayerSettings,
    shapes: Shapes,
) -> Float[Array, "T V"]:
    """Logits of one padded sequence, on a cache of its own."""
    hidden = hidden_states(model, prompt, rope, settings=settings, shapes=shapes)
    return logits(model, hidden)


def generate(
    lm: LanguageModel,
    prompts: Prompts,
    config: GenerateConfig | None = None,
    *,
    conversation: Conversation | None = None,
    single_call: bool = False,
    **options: Unpack[GenerateOptions],
) -> GenerateOutput:
    """Generates a continuation of every prompt, until each has ended.

    Two compiled programs: one reads the prompts, the other is a loop over tokens. The
    first call of a size compiles them (`stats.compile_seconds`).

        out = sj.generate(lm, ["Once upon a time"], max_new_tokens=32, temperature=0.7)
        config = sj.GenerateConfig(max_new_tokens=32, temperature=0.7)
        same = sj.generate(lm, ["Once upon a time"], config)

    Args:
      lm: A loaded model.
      prompts: One text or sequence of token ids each; lengths may differ. Or an
        integer array [B, T]: B prompts of T tokens.
      config: What to ask for.
      conversation: From the output before: the prompts are appended to its cache. It is
        used up.
      single_call: Run prefill and decode as one program; they are not timed apart.
      **options: Any field of `GenerateConfig`, such as max_new_tokens, temperature,
        seed or stop. One that is given goes before that of `config`.

    Returns:
      Tokens, texts, stats and the conversation to continue.

    Raises:
      ConfigError: If an argument is out of range, a prompt is empty or too long, or an
        id is not in the vocabulary.

    Example:
      >>> out = sj.generate(lm, ["a stop", "ab"], max_new_tokens=4, ignore_eos=True)
      >>> [len(tokens) for tokens in out.tokens], out.finish_reasons
      ([4, 4], ['length', 'length'])
    """
    single_call = flag("single_call", single_call)
    config = merge_options(config, options)
    call = Call(lm, prompts, config, conversation, single_call=single_call)
    if single_call:
        call.whole()
        return call.output(split=False)
    call.prefill()
    call.decode(call.max_new_tokens)
    return call.output(split=True)


def stream(
    lm: LanguageModel,
    prompts: Prompts,
    config: GenerateConfig | None = None,
    *,
    conversation: Conversation | None = None,
    tokens_per_call: int = 4,
    on_progress: Callable[[int], None] | None = None,
    **options: Unpack[GenerateOptions],
) -> Stream:
    """`generate`, yielding `StreamEvent`s as tokens come.

    Args:
      lm: A loaded model.
      prompts: As for `generate`.
      config: What to ask for.
      conversation: As for `generate`.
      tokens_per_call: Tokens of each sequence that are decoded before events come:
        more are faster, fewer come sooner.
      on_progress: Called after every piece of a prompt that `prefill_chunk` cuts, with
        the tokens of that piece.
      **options: As for `generate`.

    Returns:
      An iterator of events, the tokens of which are those of `generate`.

    Raises:
      ConfigError: As `generate`.

    Example:
      >>> events = sj.stream(lm, ["a stop"], max_new_tokens=4, ignore_eos=True)
      >>> tokens = [event.token for event in events]
      >>> tokens == events.output.tokens[0]
      True
    """
    tokens_per_call = integer(1)("tokens_per_call", tokens_per_call)
    on_progress = optional(function)("on_progress", on_progress)
    call = Call(lm, prompts, merge_options(config, options), conversation)
    return Stream(call, tokens_per_call, on_progress)
