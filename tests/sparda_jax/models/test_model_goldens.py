"""Whole tiny models against the reference: logits, hidden states, block lists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.cache.resident import init_cache
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.inference.decode import decode_step
from sparda_jax.inference.prefill import prefill
from sparda_jax.inference.stack import layer_on_tile, start_stack
from sparda_jax.models.decoder import logits
from sparda_jax.models.layers import rms_norm
from sparda_jax.models.rope import model_rope, rope_cos_sin_at
from sparda_jax.sparse.selection import sorted_blocks
from sparda_jax.sparse.selectors import get_selector

CAPACITY = 1152
LOGITS_ATOL = {"minicpm_tiny": 1e-4, "nosa_tiny": 3e-4}
MODES = [
    ("L1000", "dense"),
    ("L1000", "sparse"),
    ("L1000", "sparda"),
    ("L1000", "sparda_fm"),
    ("L700", "decodeonly"),
    ("L700", "switch"),
    ("L700", "sparse"),
    ("L700", "sparda"),
    ("L700", "sparda_fm"),
]
# Own queries, and Forecasts with both ways of masking; the rest are slow tests (dense
# ones by default: `test_every_option_equals_a_textbook_decoder`).
FAST = {
    "minicpm_tiny": [("L1000", "sparda_fm")],
    "nosa_tiny": [("L1000", "sparse"), ("L1000", "sparda")],
}
# What those leave out, for one of the models; all else is long.
IN_CI = {"minicpm_tiny": [("L700", "decodeonly"), ("L700", "switch")], "nosa_tiny": []}
LONG = [pytest.mark.slow, pytest.mark.long]
CASES = [
    pytest.param(
        *(name, *mode),
        marks=() if mode in fast else pytest.mark.slow if mode in IN_CI[name] else LONG,
    )
    for name, fast in FAST.items()
    for mode in MODES
]


@pytest.fixture(scope="module")
def tiny(request, golden_model):
    """(name, arrays, config, sparse, decoder) of a golden model."""
    arrays, config, sparse, model = golden_model(request.param.removesuffix("_tiny"))
    # The reference drops NOSA's bias where attention is dense; so do its goldens.
    sparse = dataclasses.replace(sparse, dense_key_bias=False)
    return request.param, arrays, config, sparse, model


def _settings(config, sparse, mode):
    nosa = config.key_bias
    name = {"dense": "dense", "sparse": "nosa" if nosa else "infllm_v2"}
    changes = {
        "sparda": {"mask_future_blocks": False},
        "decodeonly": {"forecast_decode_only": True},
        "switch": {"dense_len": 720},
    }
    sparse = dataclasses.replace(sparse, **changes.get(mode, {}))
    selector = get_selector(name.get(mode, "sparda"))
    return LayerSettings(config, sparse, selector)


def _run(model, ids, length, settings, tile_size):
    """Prefill of `length` tokens, then one decode step for each further one."""
    config = settings.config
    cache = init_cache(
        config,
        settings.sparse,
        settings.indices,
        batch=1,
        capacity=CAPACITY,
        dtype=jnp.float32,
        storage=model.storage,
    )
    rope = model_rope(config, 1040)

    @jax.jit
    def first(model, cache, tokens):
        zero = jnp.zeros((1,), jnp.int32)
        count = jnp.full((1,), length, jnp.int32)
        carry = prefill(
            model,
            cache,
            tokens,
            zero,
            count,
            rope,
            settings,
            tile_size=tile_size,
            capture=True,
        )
        return logits(model, carry.hidden[0]), carry.hidden, carry.cache, carry.blocks

    @jax.jit
    def rest(model, cache, tokens):
        def step(cache, inputs):
            token, position = inputs
            carry = decode_step(
                model,
                cache,
                token[None],
                position[None],
                jnp.ones((1,), bool),
                rope,
                settings,
                capture=True,
            )
            return carry.cache, (logits(model, carry.hidden[0])[0], carry.blocks)

        positions = length + jnp.arange(tokens.shape[0], dtype=jnp.int32)
        return jax.lax.scan(step, cache, (tokens, positions))[1]

    tokens = jnp.asarray(ids, jnp.int32)
    prompt_logits, hidden, cache, prompt_lists = first(
        model, cache, tokens[None, :length]
    )
    decode_logits, decode_lists = rest(model, cache, tokens[length:])
    decode_lists = jnp.swapaxes(decode_lists[:, :, 0, :, 0], 0, 1)  # L steps K P
    return (
        np.asarray(prompt_logits),
        np.asarray(hidden[0]),
        np.asarray(sorted_blocks(prompt_lists[:, 0])),
        np.asarray(decode_logits),
        np.asarray(sorted_blocks(jnp.swapaxes(decode_lists, 1, 2))),
    )


def _assert_lists(got, expected, margin):
    """Exact lists; at most two rows with a margin below 1e-5 may differ."""
    wrong = np.any(got[..., : expected.shape[-1]] != expected, axis=-1)
    wrong |= np.any(got[..., expected.shape[-1] :] != -1, axis=-1)
    near = (margin > 0) & (margin < 1e-5)
    assert not np.any(wrong & ~near), np.argwhere(wrong & ~near)[:5]
    assert np.sum(wrong) <= 2


@pytest.mark.parametrize(("tiny", "tag", "mode"), CASES, indirect=["tiny"])
def test_model_equals_reference(tiny, tag, mode):
    name, arrays, config, sparse, model = tiny
    prefix = f"{tag}/{mode}"
    length = int(tag[1:])
    ids = arrays[f"{tag}/input_ids"]
    settings = _settings(config, sparse, mode)
    # 192 does not divide either length, so the last tile is ragged.
    got_logits, hidden, lists, step_logits, step_lists = _run(
        model, ids, length, settings, tile_size=192
    )
    atol = LOGITS_ATOL[name]
    positions = arrays[f"{tag}/logit_pos"]
    np.testing.assert_allclose(
        got_logits[positions], arrays[f"{prefix}/prefill_logits"], atol=atol
    )
    np.testing.assert_allclose(
        step_logits, arrays[f"{prefix}/decode_logits"], atol=atol
    )
    final = rms_norm(jnp.asarray(hidden), model.final_norm[...], config.rms_norm_eps)
    rows = arrays[f"{tag}/hidden_pos"]
    np.testing.assert_allclose(final[rows], arrays[f"{prefix}/hidden"][-1], atol=1e-4)
    if mode == "dense":
        return
    margin = arrays[f"{prefix}/margin"]
    if f"{prefix}/prefill_sel" in arrays:
        expected = arrays[f"{prefix}/prefill_sel"]
        _assert_lists(lists, expected, margin[:, :, :length])
    expected = arrays[f"{prefix}/decode_sel"]
    if mode == "switch":
        # −2 marks steps that ran dense: there every causal block must be listed.
        sparse_steps = np.all(expected[0, 0] != -2, axis=-1)
        assert sparse_steps.any() and not sparse_steps.all()
        for step in np.flatnonzero(~sparse_steps):
            own = (length + step) // 64
            listed = step_lists[:, :, step]
            assert np.all(listed[..., : own + 1] == np.arange(own + 1))
        step_lists = step_lists[:, :, sparse_steps]
        expected = expected[:, :, sparse_steps]
        margin = margin[:, :, length:][:, :, sparse_steps]
    else:
        margin = margin[:, :, length:]
    _assert_lists(step_lists, expected, margin)


@pytest.mark.parametrize(
    ("tiny", "mode"),
    [
        ("minicpm_tiny", "sparda_fm"),
        pytest.param("nosa_tiny", "sparse", marks=LONG),
        pytest.param("minicpm_tiny", "sparse", marks=LONG),
        pytest.param("nosa_tiny", "sparda_fm", marks=LONG),
    ],
    indirect=["tiny"],
)
def test_hidden_states_between_layers(tiny, mode):
    """The input of every layer, which outputs alone would not pin down."""
    _, arrays, config, sparse, model = tiny
    settings = _settings(config, sparse, mode)
    ids = jnp.asarray(arrays["L700/input_ids"][:700], jnp.int32)[None]
    rope = model_rope(config, 1040)
    tile = TileState(
        start=jnp.zeros((1,), jnp.int32),
        count=jnp.full((1,), 700, jnp.int32),
        length=jnp.full((1,), 700, jnp.int32),
        rope_cos_sin=rope_cos_sin_at(rope, jnp.arange(700)[None]),
        num_blocks=12,
        decoding=False,
    )
    cache = init_cache(
        config,
        sparse,
        settings.indices,
        batch=1,
        capacity=768,
        dtype=jnp.float32,
        storage="stacked",
    )
    carry = start_stack(model, cache, ids, tile, settings, capture=False)
    rows = arrays["L700/hidden_pos"]
    expected = arrays[f"L700/{mode}/hidden"]
    for index in range(config.num_layers):
        np.testing.assert_allclose(carry.hidden[0, rows], expected[index], atol=1e-4)
        layer = jax.tree.map(lambda a, index=index: a[index], model.layers)
        carry = layer_on_tile(model, carry, layer, index, 0, 700, tile, settings)
