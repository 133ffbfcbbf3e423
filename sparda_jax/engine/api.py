"""`generate`, `stream` and `forward`: the public calls."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.checks import flag, function, integer, optional
from sparda_jax.config import CacheConfig
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.conversation import Conversation
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.requests import (
    LANGUAGE_MODEL,
    PromptLike,
    Prompts,
    check_length,
    encode_prompt,
    repeat_prompts,
)
from sparda_jax.engine.results import GenerateOutput
from sparda_jax.engine.session import Session
from sparda_jax.engine.stream import Stream
from sparda_jax.inference.generate import Prompt, new_state, pad_rows
from sparda_jax.inference.prefill import prefill
from sparda_jax.inference.sampling import SamplingConfig
from sparda_jax.inference.shapes import Shapes, plan_shapes
from sparda_jax.models.decoder import Decoder, logits
from sparda_jax.models.rope import Rope, model_rope


def forward(lm: LanguageModel, ids: PromptLike) -> Float[Array, "T V"]:
    """Logits after every token of one sequence.

    Args:
      lm: A loaded model.
      ids: Token ids, or text.

    Returns:
      float32 [T, vocab]; row t scores the token that follows token t.

    Raises:
      ConfigError: If ids are empty, out of the vocabulary or longer than the context.
    """
    lm = LANGUAGE_MODEL("lm", lm)
    tokens = encode_prompt(lm, ids, "ids")
    check_length(lm, len(tokens), 0, "ids")
    shapes = plan_shapes(
        len(tokens),
        farthest_start=0,
        longest=len(tokens),
        max_new=0,
        tile_size=lm.tile_size,
        block_size=lm.sparse.block_size,
    )
    prompt = pad_rows([tokens], shapes.prompt)
    arguments = (lm.model, prompt, model_rope(lm.config, len(tokens)))
    static = {"settings": lm.settings, "shapes": shapes}
    program, _ = PROGRAMS.get(_forward, arguments, static)
    return program(*arguments)[: len(tokens)]


def _forward(
    model: Decoder,
    prompt: Prompt,
    rope: Rope,
    *,
    settings: LayerSettings,
    shapes: Shapes,
) -> Float[Array, "T V"]:
    """Logits of one padded sequence, on a cache of its own."""
    state = new_state(model, settings, 1, shapes, CacheConfig())
    carry = prefill(
        model,
        state.cache,
        prompt.tokens,
        jnp.zeros_like(prompt.count),
        prompt.count,
        rope,
        settings,
        tile_size=shapes.tile,
    )
    return logits(model, carry.hidden[0])


def generate(
    lm: LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    n: int = 1,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    conversation: Conversation | None = None,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    single_call: bool = False,
) -> GenerateOutput:
    """Generates a continuation of every prompt, until each has ended.

    Prefill and the `lax.while_loop` over tokens are one jittable function. It is
    dispatched in two parts, so that both are timed, or with `single_call` in one.

    Args:
      lm: A loaded model.
      prompts: One text or sequence of token ids each; lengths may differ. Or an
        integer array [B, T]: B prompts of T tokens.
      max_new_tokens: Most output tokens of each sequence.
      temperature: 0 is greedy.
      top_k, top_p, min_p, repetition_penalty: See `SamplingConfig`.
      seed: One seed for all, or one each. A sequence's tokens depend on its own prompt
        and seed alone, so equal prompts with one seed give equal outputs.
      n: Outputs of each prompt, one after the other: output i of a prompt is that of
        `seed` + i. Every one is prefilled; to prefill a long prompt once, see
        `Conversation.fork`.
      stop: Texts that end a sequence, wherever in a token they begin or end. The text
        of an output ends before the first of them; its tokens, and so the conversation,
        end with the one that completed it. The name of a special token ends a sequence
        at that token.
      stop_ids: Token ids that end a sequence, beside the model's EOS.
      ignore_eos: Let EOS pass.
      conversation: From the output before: the prompts are appended to its cache. It is
        used up.
      max_context: Length to choose LongRoPE's factors for, if further turns shall grow
        past this call's.
      prefill_chunk: Cut a long prompt into calls of that many tokens: device memory
        then holds the hidden states of one piece.
      single_call: Do everything in one dispatch; prefill and decode are not timed
        apart.

    Returns:
      Tokens, texts, stats and the conversation to continue.

    Raises:
      ConfigError: If an argument is out of range, a prompt is empty or too long, or an
        id is not in the vocabulary.
    """
    single_call = flag("single_call", single_call)
    prompts, seed = repeat_prompts(prompts, seed, n)
    session = Session(
        lm,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=SamplingConfig(repetition_penalty, temperature, top_k, top_p, min_p),
        seed=seed,
        stop=stop,
        stop_ids=stop_ids,
        ignore_eos=ignore_eos,
        conversation=conversation,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
    )
    if single_call:
        session.whole()
        return session.output(split=False)
    session.prefill()
    session.decode(session.max_new_tokens)
    return session.output(split=True)


def stream(
    lm: LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    n: int = 1,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    conversation: Conversation | None = None,
    max_context: int | None = None,
    tokens_per_call: int = 4,
    prefill_chunk: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Stream:
    """`generate`, yielding `StreamEvent`s as tokens come.

    Same tokens as `generate`. `tokens_per_call` tokens are decoded per dispatch;
    after every call of a prompt cut by `prefill_chunk`, `on_progress(tokens)` is
    called. Other arguments and errors as there.
    """
    tokens_per_call = integer(1)("tokens_per_call", tokens_per_call)
    on_progress = optional(function)("on_progress", on_progress)
    prompts, seed = repeat_prompts(prompts, seed, n)
    session = Session(
        lm,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=SamplingConfig(repetition_penalty, temperature, top_k, top_p, min_p),
        seed=seed,
        stop=stop,
        stop_ids=stop_ids,
        ignore_eos=ignore_eos,
        conversation=conversation,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
    )
    return Stream(session, tokens_per_call, on_progress)
