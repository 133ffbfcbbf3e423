"""A request to plan, with its abstract arguments and what XLA says of them."""

import dataclasses

import jax
import jax.numpy as jnp

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig, ForecastReads, HostCodec, KeyCodec
from sparda_jax.inference.generate import (
    Prompt,
    Request,
    decode_loop_call,
    prefill_and_sample_call,
)
from sparda_jax.inference.rows import prefill_row_and_sample_call
from sparda_jax.inference.sampling import SamplingConfig, sampling_state
from sparda_jax.inference.shapes import Shapes, plan_shapes
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.rope import model_rope
from sparda_jax.models.weights import abstract_decoder
from sparda_jax.planning.auto import offload_settings
from sparda_jax.planning.memory import (
    abstract_state,
    memory_plan,
)
from sparda_jax.sparse.selectors import get_selector


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, planned and compiled."""

    attention: str = "sparda"
    kind: str = "resident"
    preset: str = "tiny"
    storage: str = "stacked"
    batch: int = 2
    prompt: int = 1000
    chunk: int | None = None
    slots: int | str | None = None
    layer0: str = "resident"
    prefetch: str | None = None
    codec: HostCodec = "exact"
    layers_ahead: int = 1
    keys: KeyCodec = "exact"
    reads: ForecastReads = "input"
    tile: int = 256
    max_new: int = 100
    vocab: int | None = None
    dtype: str = "float32"

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(
            kind=self.kind,
            device_blocks=self.slots,
            layer0=self.layer0,
            prefetch=self.prefetch,
            codec=self.codec,
            layers_ahead=self.layers_ahead,
        )

    @property
    def settings(self) -> LayerSettings:
        preset = PRESETS[self.preset]
        selector = get_selector(self.attention)
        offload = offload_settings(self.cache, selector)
        evict = self.kind == "evict"
        sparse = dataclasses.replace(preset.sparse, compressed_keys=self.keys)
        vocab = self.vocab or preset.model.vocab_size
        model = dataclasses.replace(
            preset.model, forecast_reads=self.reads, vocab_size=vocab
        )
        return LayerSettings(model, sparse, selector, offload=offload, evict=evict)

    @property
    def shapes(self) -> Shapes:
        piece = self.chunk or self.prompt
        return plan_shapes(
            piece,
            farthest_start=(self.prompt - 1) // piece * piece,
            longest=self.prompt,
            max_new=self.max_new,
            tile_size=self.tile,
            block_size=self.settings.sparse.block_size,
        )

    def plan(self):
        return memory_plan(
            self.settings,
            self.cache,
            batch=self.batch,
            shapes=self.shapes,
            dtype=self.dtype,
            storage=self.storage,
        )

    def arguments(self):
        """Model, state, prompt and request of shapes."""
        settings = self.settings
        config = settings.config
        model = abstract_decoder(
            config,
            self.dtype,
            storage=self.storage,
            forecast=settings.selector.needs_forecast,
        )
        state, store = abstract_state(
            model, settings, self.cache, self.batch, self.shapes
        )
        if store is not None:
            store = store.host_shapes()
            state = state._replace(cache=state.cache._replace(store=store))
        request = Request(
            sampling=sampling_state(SamplingConfig(), 0, self.batch),
            stops=jnp.full((16,), -1, jnp.int32),
            max_new=jnp.full((self.batch,), self.max_new, jnp.int32),
            steps=jnp.int32(1),
            rope=model_rope(config, self.prompt),
        )
        prompt = Prompt(
            jnp.zeros((self.batch, self.shapes.prompt), jnp.int32),
            jnp.ones((self.batch,), jnp.int32),
        )
        return model, state, prompt, request

    def prefill_arguments(self):
        """Prompt and request of one prefill call, with the row where it runs one."""
        _, _, prompt, request = self.arguments()
        if self.shapes.prefill_rows(self.batch) == self.batch:
            return prompt, request
        prompt, sampling, max_new = jax.tree.map(
            lambda x: x[:1], (prompt, request.sampling, request.max_new)
        )
        request = request._replace(sampling=sampling, max_new=max_new)
        return prompt, request, jnp.int32(0)

    def compiled(self):
        """What XLA says of prefill and of decode."""
        model, state, _, request = self.arguments()
        settings, tile = self.settings, self.shapes.tile
        arguments = self.prefill_arguments()
        one_row = len(arguments) == 3
        call = prefill_row_and_sample_call if one_row else prefill_and_sample_call
        prefill = call.lower(
            model, state, *arguments, settings=settings, tile_size=tile
        )
        decode = decode_loop_call.lower(model, state, request, settings=settings)
        return prefill.compile().memory_analysis(), decode.compile().memory_analysis()
