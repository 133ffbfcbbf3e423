"""A host format is one class: two of them here, and no other file knows of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_cases import Float16, Halves

from sparda_jax.cache.codecs import BlockCodec
from sparda_jax.cache.host_store import HostStore, copy_into
from sparda_jax.cache.lint import lint_host_operands
from sparda_jax.cache.memory import host_shape
from sparda_jax.cache.routes import FetchRoute, named_route

LEAD, BLOCK = (2, 3, 2, 70), (4, 2, 8)


CODECS = (BlockCodec(), Float16(), Halves())


@pytest.fixture(scope="module")
def blocks():
    """Numbers that float16 holds too."""
    values = np.arange(np.prod((*LEAD, *BLOCK))) % 2048
    return jnp.asarray(values.reshape(*LEAD, *BLOCK), jnp.float32)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_what_is_written_is_read_and_grows(codec, blocks):
    store = HostStore.empty(LEAD, BLOCK, jnp.float32, codec)
    numbers = np.asarray(blocks)
    store = store.write(blocks[1:], layer=1)
    store = store.write(blocks[:1, 2:, :, 5:8], row=2, block=5)
    expected = np.zeros_like(numbers)
    expected[1] = numbers[1]
    expected[0, 2, :, 5:8] = numbers[0, 2, :, 5:8]
    for layer in range(2):
        got = store.read(layer, 3, 66)
        np.testing.assert_array_equal(got[0], expected[layer, :, :, 3:69])
    grown = store.grow(75)
    assert grown.lead == (2, 3, 2, 75) and grown.codec == codec
    np.testing.assert_array_equal(grown.read(0, 0, 70)[0], expected[0])
    np.testing.assert_array_equal(
        grown.read(1, 5, 70)[0, :, :, :65], expected[1, :, :, 5:]
    )
    assert not np.asarray(grown.read(1, 70, 5)).any()
    assert grown.nbytes == sum(part.nbytes for part in grown.parts)
    with_numpy = store.with_numpy(store.to_numpy())
    np.testing.assert_array_equal(with_numpy.read(1, 0, 70), store.read(1, 0, 70))


def test_bytes_follow_the_codec():
    sizes = [codec.bytes_per_block(BLOCK, jnp.float32) for codec in CODECS]
    assert sizes == [256, 128, 256]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_no_host_computation(codec, blocks):
    store = HostStore.empty(LEAD, BLOCK, jnp.float32, codec)

    def use(store, blocks):
        return store.write(blocks[:1, :, :, :2], layer=1, block=4).read(1, 3, 5)

    assert lint_host_operands(jax.jit(use).trace(store, blocks).jaxpr) == []


def test_growing_makes_no_copy_beside_old_and_new():
    """The new array is written in place, by chunks that pass through the device."""
    old, new = (
        host_shape((8, 3, 2, count, *BLOCK), jnp.float32) for count in (512, 700)
    )
    assert lint_host_operands(copy_into.trace(new, old).jaxpr) == []
    analysis = copy_into.lower(new, old).compile().memory_analysis()
    size = 4 * np.prod(new.shape)
    assert analysis.alias_size_in_bytes == size
    assert analysis.temp_size_in_bytes < size / 32


@dataclasses.dataclass(frozen=True)
class Writing(FetchRoute):
    """A route that writes as its definition says."""

    writes: bool = True

    def write(self, store, blocks, places):
        kept = jnp.where(places < 0, store.shape[0], places)
        return store.at[kept].set(blocks, mode="drop")


ROWS = [(0, [0, 3, 69], [70, 3, 70]), (1, [5, 0], [17, 66]), (2, [2], [40])]


def _written(store, blocks, first, end, row, route, layer):
    rows = slice(row, row + len(first))
    kv = blocks[:1, rows] + 1
    store = store.put_new(
        kv,
        jnp.asarray(first),
        jnp.asarray(end),
        layer=layer,
        row=jnp.int32(row),
        route=route,
    )
    return store, np.asarray(kv[0])


def _check_written(store, kv, before, first, end, row):
    expected = before[0].copy()
    for number, (begin, stop) in enumerate(zip(first, end, strict=True)):
        expected[1, row + number, :, begin:stop] = kv[number, :, begin:stop]
    np.testing.assert_array_equal(store.to_numpy()[0], expected)


@pytest.mark.parametrize("route", [None, Writing("writing")], ids=["slices", "kernel"])
@pytest.mark.parametrize(("row", "first", "end"), ROWS)
def test_new_blocks_of_rows_and_no_others(row, first, end, route, blocks):
    store = HostStore.empty(LEAD, BLOCK, jnp.float32, BlockCodec()).write(blocks)
    before = store.to_numpy()
    layer = jnp.int32(1) if route is None else 1
    store, kv = _written(store, blocks, first, end, row, route, layer)
    _check_written(store, kv, before, first, end, row)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [2, 40])
def test_native_new_blocks_by_a_kernel(layers):
    """In place, in a loop; 40 layers have more than 2**31 numbers."""
    lead, shape = (layers, 1, 2, 1700), (64, 2, 128)
    route = named_route("mosaic")
    assert route.writes
    store = HostStore.empty(lead, shape, jnp.bfloat16, BlockCodec())
    kv = jax.random.normal(jax.random.key(0), (1, *lead[1:], *shape), jnp.bfloat16)

    @functools.partial(jax.jit, donate_argnums=0)
    def put(store, kv):
        for layer in (0, layers - 1):
            first, end = jnp.array([2 + layer]), jnp.array([1600])
            store = store.put_new(
                kv + layer, first, end, layer=layer, row=jnp.int32(0), route=route
            )
        return store

    place = store.parts[0].unsafe_buffer_pointer()
    store = put(store, kv)
    assert store.parts[0].unsafe_buffer_pointer() == place
    for layer in (0, layers - 1):
        got = np.asarray(store.read(layer, 0, 1700)[0].astype(jnp.float32))
        want = np.asarray((kv + layer)[0].astype(jnp.float32))
        np.testing.assert_array_equal(
            got[:, :, 2 + layer : 1600], want[:, :, 2 + layer : 1600]
        )
        assert not got[:, :, : 2 + layer].any() and not got[:, :, 1600:].any()
    if layers > 2:
        assert not np.asarray(store.read(1, 0, 1700).astype(jnp.float32)).any()


def test_a_format_of_several_parts_is_decoded_as_it_is_committed():
    blocks = jax.random.normal(jax.random.key(0), (3, 64, 2, 16))
    staged = Halves().encode(blocks)
    slots = jnp.zeros((4, 64, 2, 16))
    (out,) = Halves().commit((slots,), staged, jnp.array([2, -1, 0]), jnp.array(3))
    expected = np.zeros((4, 64, 2, 16), np.float32)
    expected[2], expected[0] = blocks[0], blocks[2]
    np.testing.assert_array_equal(out, expected)
