"""Programs over one whole sequence at once: logits of its tokens, or their scores."""

from collections.abc import Callable
from typing import Any

from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.on_mesh import on_devices
from sparda_jax.engine.requests import check_length
from sparda_jax.inference.generate import pad_rows
from sparda_jax.inference.shapes import plan_shapes
from sparda_jax.models.rope import model_rope


def run_whole(function: Callable[..., Any], lm: LanguageModel, ids: list[int]) -> Any:
    """Runs a function of (model, prompt, rope) over a sequence, compiled by size.

    Args:
      function: Takes a decoder, a padded `Prompt` of one row and its rotation, and the
        keywords `settings` and `shapes`; it makes a cache of its own.
      lm: A loaded model.
      ids: Token ids that are in the vocabulary, at least one.

    Returns:
      What the function gives.

    Raises:
      ConfigError: If there are more tokens than the context holds.
    """
    check_length(lm, len(ids), 0, "ids")
    shapes = plan_shapes(
        len(ids),
        farthest_start=0,
        longest=len(ids),
        max_new=0,
        tile_size=lm.tile_size,
        block_size=lm.sparse.block_size,
    )
    prompt = pad_rows([ids], shapes.prompt)
    arguments = (lm.model, prompt, model_rope(lm.config, len(ids)))
    static = {"settings": lm.settings, "shapes": shapes}
    program, _ = PROGRAMS.get(on_devices(lm, function, None), arguments, static)
    return program(*arguments)
