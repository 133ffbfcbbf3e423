"""What the Triton kernels share.

Triton tiles have power-of-two sizes and dot operands of at least 16 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.numerics import NEG_INF, dot_precision, finite_or_zero
from pallas_kernels.lowering import silence_triton_deprecation

MIN_ROWS = 16


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is not less than ``value`` (at least 1)."""
    return 1 << max(0, value - 1).bit_length()


# Largest key tile in bytes. On an H200 tiles of 32 KiB ran with three stages of keys
# and values; 64 KiB (float32 with H = 256, or blocks of 128 with H = 128) did not.
MAX_TILE_BYTES = 32 * 1024


def require_triton_sizes(
    dtype: Any, head_dim: int, block: int, interpret: bool
) -> None:
    """Refuses what the Triton kernels cannot tile.

    Raises:
      NotImplementedError: naming the size, or the missing device.
    """
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        raise NotImplementedError(
            f"triton needs a head dim that is a power of two from 16 to 256, not "
            f"{head_dim}"
        )
    if block & (block - 1) or not 16 <= block <= 128:
        raise NotImplementedError(
            f"triton needs a block size that is a power of two from 16 to 128, not "
            f"{block}"
        )
    tile = block * head_dim * jnp.dtype(dtype).itemsize
    if tile > MAX_TILE_BYTES:
        raise NotImplementedError(
            f"triton has no room for tiles of {block} keys with head dim {head_dim} in "
            f"{jnp.dtype(dtype)}: {tile} bytes, at most {MAX_TILE_BYTES}"
        )
    if not interpret:
        require_cuda("triton", 8.0)


def dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Tile product with float32 accumulation; float32 operands are not rounded."""
    return lax.dot_general(
        a,
        b,
        (((1,), (0,)), ((), ())),
        precision=dot_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def require_launch(num_warps: int, num_stages: int) -> None:
    """Checks what every kernel's settings have.

    Raises:
      ValueError: for a number of warps or stages that Triton does not take.
    """
    if num_warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"num_warps is {num_warps}; allowed: 1 2 4 8 16")
    if num_stages < 1:
        raise ValueError(f"num_stages is {num_stages}; it must be >= 1")


@dataclass(frozen=True)
class WarpsConfig:
    """Settings of a kernel of which a program serves a row.

    Attributes:
      num_warps: warps of a program.
    """

    num_warps: int = 4

    def __post_init__(self):
        require_launch(self.num_warps, self.num_stages)

    @property
    def num_stages(self) -> int:
        """Depth of the load pipeline: there is no loop of loads."""
        return 1


@runtime_checkable
class _Launch(Protocol):
    """Settings of every kernel."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...


def launch(
    kernel: Callable[..., None],
    *operands: Array | None,
    grid: tuple[int, ...],
    out_shape: Any,
    config: _Launch,
    interpret: bool,
    name: str,
    aliases: Mapping[int, int] | None = None,
) -> Any:
    """Launches a kernel that takes None where a call lacks an operand.

    Args:
      kernel: takes a reference, or None, for each operand, then those of the results.
      *operands: arrays; None for what this call does without.
      grid: programs.
      out_shape: shapes and dtypes of the results.
      config: the kernel's settings.
      interpret: run in Pallas's interpreter, on any device.
      name: of the kernel, in profiles and messages.
      aliases: results, by number, that take the place of operands, likewise.

    Returns:
      The results.
    """
    present = [x is not None for x in operands]

    def without_gaps(*refs: Any) -> None:
        given = iter(refs)
        inputs = [next(given) if there else None for there in present]
        kernel(*inputs, *given)

    silence_triton_deprecation()
    return pl.pallas_call(
        without_gaps,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=plt.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
        name=name,
    )(*(x for x in operands if x is not None))


type Softmax = tuple[jax.Array, jax.Array, jax.Array]


def softmax_start(rows: int, head_dim: int) -> Softmax:
    """Running maximum, sum and accumulator of a tile of rows, float32."""
    return (
        jnp.full((rows,), NEG_INF, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, head_dim), jnp.float32),
    )


def softmax_step(
    running: Softmax,
    logits: Float[Array, "rows keys"],
    load_values: Callable[[], Float[Array, "keys H"]],
    value_scales: Float[Array, "1 keys"] | None = None,
) -> Softmax:
    """Takes in a tile of masked logits; values are loaded after the weights.

    Values may have a scale a key, by which their weights are multiplied.
    """
    top, total, acc = running
    new_top = jnp.maximum(top, logits.max(1))
    shift = finite_or_zero(new_top)
    weights = jnp.exp(logits - shift[:, None])
    fade = jnp.exp(top - shift)
    values = load_values()
    factors = weights if value_scales is None else weights * value_scales
    acc = acc * fade[:, None] + dot(factors.astype(values.dtype), values)
    return new_top, total * fade + weights.sum(1), acc


def softmax_end(
    running: Softmax,
) -> tuple[Float[Array, "rows H"], Float[Array, " rows"]]:
    """Output and log-sum-exp; 0 and -inf for a row without keys."""
    top, total, acc = running
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    return acc / total[:, None], jnp.where(empty, NEG_INF, top + jnp.log(total))
