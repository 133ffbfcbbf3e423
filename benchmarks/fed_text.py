"""A text that a model is fed as it stands: a prompt at once, its end token by token.

So neither sampling nor a model that repeats itself decides what is measured.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparda_jax.config import CacheConfig

if TYPE_CHECKING:
    import sparda_jax as sj

# What is kept of a carry, inside the compiled program, with the model that made it.
Take = Callable[[Any, Any], Any]


def feed_text(
    lm: "sj.LanguageModel",
    ids: list[int],
    decode: int,
    cache: CacheConfig,
    *,
    of_prompt: Take | None,
    of_step: Take,
    between: Callable[[Any], None] = lambda kept: None,
) -> tuple[Any, Any]:
    """Prefills a text but for its last tokens, and decodes those as they stand.

    Args:
      lm: A loaded model.
      ids: The text.
      decode: Tokens that are decoded.
      cache: Where KV is kept.
      of_prompt: What is kept of the prefill, with its block lists; None: nothing.
      of_step: What is kept of each step, with its block lists.
      between: Is shown the cache behind the prefill, which decode takes over.

    Returns:
      What `of_prompt` and `of_step` gave, the latter stacked by step.
    """
    import jax
    import jax.numpy as jnp

    from sparda_jax.inference.decode import decode_step
    from sparda_jax.inference.generate import new_state, pad_rows
    from sparda_jax.inference.prefill import prefill
    from sparda_jax.inference.shapes import plan_shapes
    from sparda_jax.models.rope import model_rope
    from sparda_jax.planning.auto import offload_settings

    settings = lm.settings
    if cache.kind == "offload":
        offload = offload_settings(cache, lm.selector)
        settings = dataclasses.replace(settings, offload=offload)
    prompt = len(ids) - decode
    shapes = plan_shapes(
        prompt,
        farthest_start=0,
        longest=prompt,
        max_new=decode,
        tile_size=lm.tile_size,
        block_size=lm.sparse.block_size,
    )
    rope = model_rope(lm.config, len(ids))
    state = new_state(lm.model, settings, 1, shapes, cache)

    @functools.partial(jax.jit, donate_argnums=1)
    def run_prompt(model, kept, tokens, count):
        carry = prefill(
            *(model, kept, tokens, jnp.zeros_like(count), count, rope, settings),
            tile_size=shapes.tile,
            capture=of_prompt is not None,
        )
        return carry.cache, None if of_prompt is None else of_prompt(model, carry)

    @functools.partial(jax.jit, donate_argnums=1)
    def run_steps(model, kept, tokens):
        def step(kept, at):
            token, position = at
            carry = decode_step(
                *(model, kept, token[None], position[None], jnp.ones((1,), bool)),
                *(rope, settings),
                capture=True,
            )
            return carry.cache, of_step(model, carry)

        return jax.lax.scan(step, kept, (tokens, prompt + jnp.arange(decode)))

    padded = pad_rows([ids[:prompt]], shapes.prompt)
    kept, before = run_prompt(lm.model, state.cache, padded.tokens, padded.count)
    between(kept)
    last = jnp.asarray(ids[prompt:], jnp.int32)
    return before, run_steps(lm.model, kept, last)[1]
