"""What an offloaded 8B model needs on the device, by XLA's own buffer assignment.

Everything is abstract: programs are compiled from shapes, and nothing of that size is
ever allocated. On a CPU the compiler counts the host store among the arguments; it is
taken off here by its exact size.
"""

import jax
import jax.numpy as jnp
import pytest

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig
from sparda_jax.inference.generate import (
    Prompt,
    Request,
    decode_loop_call,
    prefill_and_sample_call,
)
from sparda_jax.inference.sampling import SamplingConfig, sampling_state
from sparda_jax.inference.shapes import Shapes
from sparda_jax.models.presets import get_preset
from sparda_jax.models.rope import model_rope
from sparda_jax.models.weights import abstract_decoder
from sparda_jax.planning.auto import offload_settings
from sparda_jax.planning.memory import abstract_state
from sparda_jax.sparse.selectors import get_selector

SHORT, LONG = 32_768, 131_072
PRESET = get_preset("minicpm4.1-8b")
CACHE = CacheConfig(kind="offload", device_blocks=None, layer0="offload")


def _compiled(call, context, **static):
    """Memory analysis of a call at that capacity, and the size of the host store."""
    selector = get_selector("sparda")
    how = offload_settings(CACHE, selector)
    settings = LayerSettings(PRESET.model, PRESET.sparse, selector, offload=how)
    model = abstract_decoder(
        PRESET.model, jnp.float32, storage="stacked", forecast=True
    )
    tile = static.get("tile_size", 1024)
    shapes = Shapes(prompt=context, new=32, capacity=context, tile=tile)
    state, store = abstract_state(model, settings, CACHE, 1, shapes)
    assert store is not None
    store = store.host_shapes()
    state = state._replace(cache=state.cache._replace(store=store))
    request = Request(
        sampling=sampling_state(SamplingConfig(), 0, 1),
        stops=jnp.full((16,), -1, jnp.int32),
        max_new=jnp.full((1,), 32, jnp.int32),
        steps=jnp.int32(32),
        rope=model_rope(PRESET.model, 1024),
    )
    arguments = [request]
    if call is prefill_and_sample_call:
        ids = jax.ShapeDtypeStruct((1, context), jnp.int32)
        count = jax.ShapeDtypeStruct((1,), jnp.int32)
        arguments = [Prompt(ids, count), request]
    lowered = call.lower(model, state, *arguments, settings=settings, **static)
    analysis = lowered.compile().memory_analysis()
    return analysis, store.nbytes


def _device_bytes(analysis, store: int) -> int:
    kept = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    extra = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return kept + extra - store


def _keys(context: int) -> int:
    """Bytes of all compressed keys."""
    model, sparse = PRESET.model, PRESET.sparse
    windows = context // sparse.kernel_stride
    return model.num_layers * model.num_kv_heads * windows * model.head_dim * 4


@pytest.mark.slow
def test_decode_grows_by_compressed_keys_alone():
    sizes, scratch, stores = {}, {}, {}
    for context in (SHORT, LONG):
        analysis, store = _compiled(decode_loop_call, context)
        assert analysis.alias_size_in_bytes > store, "the store is updated in place"
        sizes[context] = _device_bytes(analysis, store)
        scratch[context], stores[context] = analysis.temp_size_in_bytes, store
    copied = (scratch[LONG] - scratch[SHORT]) / (stores[LONG] - stores[SHORT])
    assert copied < 0.02, "no copy of the store"
    growth = sizes[LONG] - sizes[SHORT]
    keys = _keys(LONG) - _keys(SHORT)
    assert keys <= growth <= 1.1 * keys


@pytest.mark.slow
def test_prefill_holds_one_layer_and_the_prompt():
    """Prompt states, one layer's KV and compressed keys; nothing else grows."""
    model = PRESET.model
    sizes = {}
    for context in (SHORT, LONG):
        analysis, store = _compiled(prefill_and_sample_call, context, tile_size=1024)
        assert analysis.alias_size_in_bytes > store
        sizes[context] = _device_bytes(analysis, store)
    tokens = LONG - SHORT
    head = model.num_kv_heads * model.head_dim
    one_layer = tokens * head * 2 * 4
    hidden = tokens * model.hidden_size * 4
    # The forecasts of a layer and the rotations, beside ids.
    small = tokens * (head + model.head_dim + 1) * 4
    growth = sizes[LONG] - sizes[SHORT] - (_keys(LONG) - _keys(SHORT))
    assert hidden + one_layer <= growth <= 2.2 * (hidden + one_layer + small)
