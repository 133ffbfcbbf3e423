"""The XLA form of block scores where a tile walks over several chunks of windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_scores, select_blocks
from pallas_kernels._common.tolerances import relative_error
from pallas_kernels.block_scores.operands import Scoring
from pallas_kernels.block_scores.reference import block_scores_reference
from pallas_kernels.block_scores.rule import Rule
from pallas_kernels.block_scores.xla import CPU_TOKENS, CPU_WINDOWS
from pallas_kernels.choose_blocks.reference import choose_blocks_reference

TOKENS, WINDOWS, BLOCKS, DIM = CPU_TOKENS + 12, CPU_WINDOWS + 21, 38, 16


@pytest.mark.parametrize(
    ("softmax", "kernel_size"),
    [
        pytest.param(False, 4, marks=pytest.mark.slow),
        pytest.param(False, 8, marks=pytest.mark.slow),
        pytest.param(True, 8, marks=pytest.mark.slow),
        (True, 32),
    ],
)
def test_several_tiles_and_chunks(softmax, kernel_size):
    """Windows that reach into no, one and two further blocks; ragged rows."""
    rng = np.random.default_rng(0)
    query, keys = (
        jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
        for shape in ((2, TOKENS, 4 if softmax else 2, DIM), (2, 2, WINDOWS, DIM))
    )
    start, complete = np.int32([0, 460]), jnp.int32([WINDOWS, WINDOWS - 18])
    sizes = {"block_size": 16, "kernel_size": kernel_size, "kernel_stride": 4}
    rule = {"blocks": BLOCKS, "softmax": softmax, "mask_future_blocks": False, **sizes}
    rule |= {"init_blocks": 1, "local_blocks": 2, "scale": 0.25 if softmax else 1.0}
    operands = Scoring(
        query=query,
        compressed_keys=keys[None],
        q_start=jnp.asarray(start),
        num_windows=complete,
        layer=jnp.int32(0),
        rule=Rule(**rule),
    )
    want = jax.jit(block_scores_reference)(operands)

    def call(f, **more):
        more |= {"implementation": "xla", **rule}
        jitted = jax.jit(
            lambda query, keys, start, complete: f(
                query, keys, q_start=start, num_windows=complete, **more
            )
        )
        return jitted(query, keys, jnp.asarray(start), complete)

    got = call(block_scores, return_lse=True)
    for x, ref in zip(got, want, strict=True):
        assert relative_error(x, ref) <= 3e-6
    lists = call(select_blocks, budget=6)
    own = (start[:, None] + np.arange(TOKENS)) // 16
    chosen = choose_blocks_reference(np.asarray(got[0]), own[:, None], 6)
    np.testing.assert_array_equal(np.sort(lists), np.sort(chosen))
