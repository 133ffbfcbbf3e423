"""Blocks in 8 bits: against NumPy, rounded once, the same by every route and C."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.cache.codecs import BlockCodec, Int8Codec, named_codec
from sparda_jax.cache.host_store import HostStore
from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.routes import resolve_route

SPARSE = sj.SparseConfig(local_blocks=2, block_budget=6)
INT8 = sj.CacheConfig(
    kind="offload", route="dynamic_slice", codec="int8", device_blocks=7
)


def _oracle(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K by channel, V by token, number by number."""
    whole = np.zeros(blocks.shape, np.int8)
    block, _, dim = blocks.shape[-3:]
    scales = np.zeros((*blocks.shape[:-3], 256 * -(-(block + dim) // 256)), np.float32)
    for lead in np.ndindex(blocks.shape[:-3]):
        for kind, axis in ((0, 0), (1, 1)):
            for i in range(dim if kind == 0 else block):
                numbers = (
                    blocks[lead][:, kind].astype(np.float32).take(i, axis=1 - axis)
                )
                scale = np.abs(numbers).max() * np.float32(1 / 127)
                bits = scale.view(np.uint32) + np.uint32(0x80)
                scale = (bits & np.uint32(0xFFFFFF00)).view(np.float32)
                scales[(*lead, i if kind == 0 else dim + i)] = scale
                if scale > 0:
                    rounded = np.clip(np.rint(numbers / scale), -127, 127)
                    if kind == 0:
                        whole[lead][:, 0, i] = rounded
                    else:
                        whole[lead][i, 1] = rounded
    return whole, scales


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_integers_and_scales_are_numpys(dtype):
    random = np.random.default_rng(0)
    blocks = random.standard_normal((3, 64, 2, 16)).astype(np.float32)
    blocks[..., 0, 5] *= 100  # one channel of K far above the others
    blocks[0, :, 0, 2] = 0
    blocks[0, 7, 1] = 0
    given = jnp.asarray(blocks, dtype)
    codec = Int8Codec()
    whole, scales = jax.jit(codec.encode)(given)
    for got, expected in zip((whole, scales), _oracle(np.asarray(given)), strict=True):
        np.testing.assert_array_equal(got, expected)
    shapes = codec.part_shapes((64, 2, 16), dtype)
    for part, shape in zip((whole, scales), shapes, strict=True):
        assert part.shape[1:] == shape.shape and part.dtype == shape.dtype
    back = np.asarray(codec.decode((whole, scales), jnp.float32))
    values = np.asarray(given, np.float32)
    off = np.abs(back - values)
    k_scale, v_scale = np.asarray(scales)[:, :16], np.asarray(scales)[:, 16:80]
    assert (off[:, :, 0] <= 0.5001 * k_scale[:, None]).all()
    assert (off[:, :, 1] <= 0.5001 * v_scale[..., None]).all()
    assert np.all(back[0, :, 0, 2] == 0) and np.all(back[0, 7, 1] == 0)
    # A large channel of K costs the others nothing.
    assert off[..., 0, 0].max() < 0.02 < off[..., 0, 5].max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_decoded_block_is_encoded_to_the_same(dtype):
    """So what was fetched may be encoded again for a slot, and is what was stored."""
    random = np.random.default_rng(1)
    blocks = random.standard_normal((40, 64, 2, 16)).astype(np.float32)
    blocks *= np.exp(random.standard_normal((40, 1, 2, 16))).astype(np.float32)
    blocks[0, :, 0, 2] = 0
    codec = named_codec("int8_slots")

    @jax.jit
    def twice(given):
        stored = codec.encode(given)
        return stored, codec.for_slots(codec.decode(stored, dtype))

    for once, again in zip(*twice(jnp.asarray(blocks, dtype)), strict=True):
        np.testing.assert_array_equal(once, again)


def test_bytes():
    """A block of the 8B shape in bfloat16: 32 KiB become 17."""
    shape, codec = (64, 2, 128), named_codec("int8")
    assert BlockCodec().bytes_per_block(shape, jnp.bfloat16) == 32 * 1024
    assert codec.bytes_per_block(shape, jnp.bfloat16) == 17 * 1024
    assert not codec.exact and named_codec("exact").exact
    slot = named_codec("int8_slots").slot_shapes(shape, jnp.bfloat16)
    assert sum(part.size * part.dtype.itemsize for part in slot) == 17 * 1024


@pytest.mark.parametrize(
    "route",
    [
        "dynamic_slice",
        pytest.param("mosaic", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ],
)
def test_a_fetch_and_its_commit_are_the_oracles(route):
    """Blocks of the 8B shape in pinned memory, listed with gaps, put into slots."""
    random = np.random.default_rng(3)
    blocks = random.standard_normal((12, 64, 2, 128)).astype(np.float32)
    blocks = np.asarray(jnp.asarray(blocks, jnp.bfloat16))
    lead, slots = (1, 1, 1, 12), jnp.zeros((9, 64, 2, 128), jnp.bfloat16)
    codec = Int8Codec()
    whole, scales = _oracle(blocks)
    store = HostStore.empty(lead, blocks.shape[1:], jnp.bfloat16, codec)
    store = store.with_numpy((whole[None, None, None], scales[None, None, None]))
    sources = jnp.asarray([7, -1, 0, 11, -1, 3, -1, -1], jnp.int32)
    targets = jnp.asarray([2, -1, 8, 0, -1, 5, -1, -1], jnp.int32)
    count, way = jnp.int32(6), resolve_route(route)

    @jax.jit
    def step(parts, slots):
        staged = tuple(
            way.fetch(
                part.reshape(-1, *part.shape[4:]),
                sources,
                count,
                jnp.zeros((8, *part.shape[4:]), part.dtype),
                on_side_stream=False,
            )
            for part in parts
        )
        return codec.commit((slots,), staged, targets, count)[0]

    got = np.asarray(step(store.parts, slots), np.float32)
    scale = np.stack(
        np.broadcast_arrays(scales[:, None, :128], scales[:, 128:192, None]), axis=2
    )
    decoded = jnp.asarray(whole.astype(np.float32) * scale, jnp.bfloat16)
    want = np.zeros(got.shape, np.float32)
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        if source >= 0:
            want[target] = np.asarray(decoded[source], np.float32)
    np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def lm(lm, deeper):
    return dataclasses.replace(lm, model=deeper(False, "stacked"))


@pytest.fixture(scope="module")
def talk(lm, token_ids):
    """Two turns of ragged rows; tokens, cache and lengths after each."""

    @functools.cache
    def run(cache):
        placed = dataclasses.replace(lm, cache=cache)
        how = {"temperature": 1.2, "ignore_eos": True, "max_new_tokens": 70}
        prompts = [token_ids(length, seed=length) for length in (600, 3, 130)]
        first = sj.generate(placed, prompts, **how)
        state = first.conversation.state
        stored = state.cache.store.to_numpy()
        lengths = np.asarray(state.lengths)
        more = [token_ids(length, seed=length) for length in (2, 150, 64)]
        second = sj.generate(placed, more, conversation=first.conversation, **how)
        return first, second, (stored, lengths)

    return run


@pytest.mark.slow
def test_a_stored_block_never_changes(talk):
    """Neither by decode nor by a further turn."""
    _, second, (stored, lengths) = talk(INT8)
    after = second.conversation.state.cache
    for old, new in zip(stored, after.store.to_numpy(), strict=True):
        for row, length in enumerate(lengths):
            full = length // SPARSE.block_size
            np.testing.assert_array_equal(new[:, row, :, :full], old[:, row, :, :full])
    exact = talk(dataclasses.replace(INT8, codec="exact"))
    # Prompts of one prefill are rounded, and no more than that: 9 blocks of row 0.
    whole, scales = (part[:, 0, :, :9] for part in stored)
    parts = (jnp.asarray(whole), jnp.asarray(scales))
    back = np.asarray(Int8Codec().decode(parts, jnp.float32))
    off = np.abs(back - exact[2][0][0][:, 0, :, :9])
    assert 0 < off.max() <= 0.5001 * scales.max()
    nbytes = exact[1].conversation.state.cache.store.nbytes
    assert after.store.nbytes < 0.4 * nbytes


@pytest.mark.slow
@pytest.mark.long  # what is stored: above; slots and ways to fetch: `test_offload`
@pytest.mark.parametrize(
    "change",
    [
        {"device_blocks": 9},
        {"device_blocks": 1000},
        {"route": "host_loop"},
        {"prefetch": "none"},
    ],
    ids=str,
)
def test_every_number_of_slots_and_way_to_fetch_agrees(talk, change):
    first, second, _ = talk(INT8)
    other = talk(dataclasses.replace(INT8, **change))
    assert other[0].tokens == first.tokens
    assert other[1].tokens == second.tokens
    after = second.conversation.state
    kept = other[1].conversation.state.cache.store.to_numpy()
    for mine, theirs in zip(after.cache.store.to_numpy(), kept, strict=True):
        for row, length in enumerate(np.asarray(after.lengths)):
            full = length // SPARSE.block_size
            _assert_stored_alike(mine[:, row, :, :full], theirs[:, row, :, :full])


def _assert_stored_alike(mine: np.ndarray, theirs: np.ndarray) -> None:
    """Blocks that two programs stored: bit for bit on a CPU.

    A GPU's programs may add up K and V in another order (docs/exactness.md). A number
    at the edge of two integers is then one or the other, and a scale at the edge of its
    16 bits likewise.
    """
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(mine, theirs)
    elif mine.dtype == np.int8:
        off = np.abs(mine.astype(np.int16) - theirs)
        assert off.max() <= 1 and off.mean() < 1e-3
    else:
        np.testing.assert_allclose(mine, theirs, rtol=2**-14)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    [
        {"device_blocks": 9},
        {"device_blocks": 1000},
        {"route": "host_loop"},
        {"prefetch": "none", "layer0": "offload", "device_blocks": 9},
    ],
    ids=str,
)
def test_slots_in_8_bits_agree_too(talk, change):
    """Whatever left a slot and came back, and whatever was encoded again for one."""
    # Layer 0 is exact where it is resident, so what it gives then is something else.
    layer0 = change.get("layer0", INT8.layer0)
    start = dataclasses.replace(INT8, codec="int8_slots", layer0=layer0)
    first, second, _ = talk(start)
    other = talk(dataclasses.replace(start, **change))
    assert other[0].tokens == first.tokens
    assert other[1].tokens == second.tokens
    kept = second.conversation.state.cache
    assert isinstance(kept, OffloadCache) and kept.store.codec.in_slots
    # Slots hold what the host holds, and the same blocks as slots of numbers would.
    for number, layer in enumerate(kept.layers):
        held = np.asarray(layer.table.blocks)
        lengths = np.asarray(second.conversation.state.lengths)
        full = (held >= 0) & (held < (lengths // SPARSE.block_size)[:, None, None])
        for at in np.argwhere(full)[::7]:
            depth, row, head, _ = at
            where = (number + depth, row, head, held[tuple(at)])
            for mine, stored in zip(layer.held, kept.store.to_numpy(), strict=True):
                np.testing.assert_array_equal(mine[tuple(at)], stored[where])


@pytest.mark.slow
def test_another_codec_does_not_continue(lm, token_ids):
    talk = sj.generate(
        dataclasses.replace(lm, cache=INT8), [token_ids(5)], max_new_tokens=2
    ).conversation
    exact = dataclasses.replace(lm, cache=dataclasses.replace(INT8, codec="exact"))
    with pytest.raises(sj.ConfigError, match=r"CacheConfig.codec='int8'"):
        sj.generate(exact, [[5]], conversation=talk)
