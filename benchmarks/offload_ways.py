"""The ways that `benchmarks.offload` times: what they choose, and states for them."""

import dataclasses

from benchmarks.offload_figures import CHUNK
from benchmarks.traced import (
    TracedLists,
    begin_rows,
    check_room,
    install,
    map_trace,
    traced_selector,
)

# Modes whose fetches run beside compute.
_AHEAD = ("sparda", "sparda-2", "sparda-late", "sparda-verify")


def _drifting(tile, real, rate: float):
    """Block scores whose top list drifts, in the place of real ones.

    Block b of M stands at place (odd · b) mod M of a circle; a step moves the window of
    best places on by `rate`. Rows and heads start at places of their own.
    """
    import jax.numpy as jnp

    batch, heads, _, count = real.shape
    rows = jnp.arange(batch)[:, None, None, None] * 37
    rows = rows + jnp.arange(heads)[None, :, None, None] * 11
    moved = jnp.floor(rate * tile.positions).astype(jnp.int32)[:, None, :, None]
    place = (jnp.arange(count) * 769 - moved - rows) % count
    # `real` decides nothing, but the compiler cannot know that.
    drift = -place.astype(jnp.float32)
    return jnp.where(real > 1e30, real, jnp.where(real == -jnp.inf, real, drift))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is imposed on the choice of blocks.

    Attributes:
      lists: A trace's lists, mapped; None for the synthetic drift.
      context: Tokens that rows hold at the beginning.
      rate: Blocks of a list that the drift makes new at a step.
    """

    lists: TracedLists | None
    context: int
    rate: float


def _selector(mode: str, choice: Choice):
    """A mode's selector, which scores as ever and chooses what is imposed."""
    from sparda_jax.sparse.selectors import get_selector

    own = mode in ("resident", "sparse")
    found = get_selector("infllm_v2" if own else "sparda")
    if choice.lists is not None:
        return traced_selector(found, choice.lists, context=choice.context)

    @dataclasses.dataclass(frozen=True)
    class Drifting(type(found)):
        rate: float = 0.0

        name = mode

        def score(self, tile, config, sparse, implementation):
            real = super().score(tile, config, sparse, implementation)
            return _drifting(tile, real, self.rate)

    return Drifting(choice.rate)


def imposed_choice(arguments, trace, config, sparse, batch: int, new: int) -> Choice:
    """What one batch's steps choose."""
    if trace is None:
        return Choice(None, arguments.context, arguments.miss * sparse.largest_budget)
    lists = map_trace(
        trace,
        layers=config.num_layers,
        rows=batch,
        kv_heads=config.num_kv_heads,
        scored=sparse.largest_budget - sparse.forced_blocks,
        tokens=new,
    )
    check_room(lists, arguments.context, sparse)
    return Choice(lists, arguments.context, 0.0)


def held_state(model, settings, batch: int, context: int, new: int, cache, lists):
    """A state whose rows hold `context` tokens of arbitrary bytes."""
    from sparda_jax.inference.generate import new_state
    from sparda_jax.inference.shapes import Shapes

    block = settings.sparse.block_size
    capacity = context + -(-new // block) * block
    shapes = Shapes(prompt=0, new=new, capacity=capacity, tile=1024)
    state = new_state(model, settings, batch, shapes, cache)
    if lists is not None:
        state = state._replace(cache=install(state.cache, lists))
    return begin_rows(state, context)


def mode_settings(config, sparse, mode: str, choice: Choice, slots: float, arguments):
    """A mode's cache and how its layers run."""
    from sparda_jax.cache.settings import LayerSettings
    from sparda_jax.config import CacheConfig
    from sparda_jax.planning.auto import offload_settings

    selector = _selector(mode, choice)
    every = -(-arguments.context * 2 // sparse.block_size)
    cache = CacheConfig(
        device_blocks=round(min(slots * sparse.largest_budget, every)),
        kind="resident" if mode.startswith("resident") else "offload",
        prefetch="lookahead" if mode in _AHEAD else "none",
        layers_ahead=2 if mode == "sparda-2" else 1,
        exactness="verify" if mode == "sparda-verify" else "forecast",
        route=arguments.route,
        codec=arguments.codec,
        layer0=arguments.layer0,
    )
    offload = offload_settings(cache, selector)
    if mode == "sparda-late":
        config = dataclasses.replace(config, forecast_reads="attended")
    return cache, LayerSettings(config, sparse, selector, offload=offload)


def decode_request(config, batch: int, context: int, new: int):
    """What a batch is asked for: `new` tokens of each row, a chunk of them a call."""
    import jax.numpy as jnp

    from sparda_jax.inference.generate import Request
    from sparda_jax.inference.sampling import SamplingConfig, sampling_state
    from sparda_jax.models.rope import model_rope

    return Request(
        sampling=sampling_state(SamplingConfig(), 0, batch),
        stops=jnp.full((16,), -1, jnp.int32),
        max_new=jnp.full((batch,), new, jnp.int32),
        steps=jnp.int32(CHUNK),
        rope=model_rope(config, context + new),
    )
