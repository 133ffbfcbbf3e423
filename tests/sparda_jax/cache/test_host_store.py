"""A host format is one class: two of them here, and no other file knows of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_cases import Float16, Halves

from sparda_jax.cache.codecs import BlockCodec
from sparda_jax.cache.host_store import HostStore, copy_into
from sparda_jax.cache.lint import lint_host_operands
from sparda_jax.cache.memory import host_shape

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
