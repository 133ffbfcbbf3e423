"""Public entry of block-sparse attention: checks, dispatch, differentiation."""

from __future__ import annotations

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.operands import Prefill, checked
from pallas_kernels.block_sparse_attention.xla import (
    block_sparse_attention_xla,
    block_sparse_attention_xla_backward,
    scratch_bytes,
)
from pallas_kernels.dispatch import Implementation, dispatch

__all__ = ["OP", "block_sparse_attention", "scratch_bytes"]

OP = "block_sparse_attention"


@overload
def block_sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "*L B K M block 2 H"],
    *,
    q_start: Int[Array, " B"],
    block_indices: Int[Array, "B K T P"] | None = ...,
    layer: Int[Array, ""] | int | None = ...,
    key_bias: Float[Array, "*L B K M block"] | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Float[Array, "B T N H"]: ...


@overload
def block_sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "*L B K M block 2 H"],
    *,
    q_start: Int[Array, " B"],
    block_indices: Int[Array, "B K T P"] | None = ...,
    layer: Int[Array, ""] | int | None = ...,
    key_bias: Float[Array, "*L B K M block"] | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]: ...


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "*L B K M block 2 H"],
    *,
    q_start: Int[Array, " B"],
    block_indices: Int[Array, "B K T P"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    key_bias: Float[Array, "*L B K M block"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attends causally from T consecutive tokens a row to the blocks each one lists.

    Token t of row b has position ``q_start[b] + t`` and reads the keys of its listed
    blocks whose position is not greater. Without lists this is causal attention.
    Differentiable in ``q``, ``kv`` and ``key_bias`` whatever the implementation; the
    backward pass is the XLA form.

    Follows the second stage of InfLLM-V2 at prefill (reference implementation
    NVlabs/SparDA, ``infllmv2_sparse_attention.py``); ``key_bias`` is NOSA's additive
    term, which the reference computes as two attention calls.

    Args:
      q: queries in float32, bfloat16 or float16. Head n reads kv head n // (N // K).
      kv: blocks in the dtype of ``q``; block m holds positions m * block ...; index 0
        of the axis of 2 is the key, 1 the value. With ``layer``, a stack of them, of
        which no slice is copied. Blocks after the last position are not read.
      q_start: int32, position of token 0 of each row. A token of negative position
        reads nothing.
      block_indices: int32 lists; -1 is padding, allowed anywhere; any order; no
        block twice in one list. None for causal attention to everything.
      layer: which layer of a stacked ``kv`` (int or int32 scalar, traced or not).
      key_bias: float32, added to the scaled logits of each key.
      scale: factor of the logits; ``H ** -0.5`` by default.
      return_lse: also return the log-sum-exp of the logits.
      implementation: "mosaic_gpu", "triton" or "xla"; None for the recorded choice
        of this device kind. A named implementation never falls back.

    Returns:
      The output in the dtype of ``q``, 0 for a token that reads no key; with
      ``return_lse`` also the float32 log-sum-exp, -inf for such a token.

    Raises:
      ValueError: on shapes or dtypes other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    operands = checked(
        q,
        kv,
        q_start=q_start,
        block_indices=block_indices,
        layer=layer,
        key_bias=key_bias,
        scale=scale,
    )
    arrays = dict(vars(operands))
    out, lse = _attend(arrays.pop("scale"), implementation, arrays)
    return (out, lse) if return_lse else out


def _implementation(name: str):
    """The function behind a name. The Pallas modules are imported on first use."""
    if name == "mosaic_gpu":
        from pallas_kernels.block_sparse_attention import pallas_mosaic_gpu

        return pallas_mosaic_gpu.block_sparse_attention_mosaic_gpu
    if name == "triton":
        from pallas_kernels.block_sparse_attention import pallas_triton

        return pallas_triton.block_sparse_attention_triton
    return block_sparse_attention_xla


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, implementation: Implementation | None, arrays):
    """Serves the call; ``arrays`` are the operands but for ``scale``, by name."""
    operands = Prefill(**arrays, scale=scale)
    return dispatch(OP, implementation, lambda name: _implementation(name)(operands))


def _attend_forward(scale: float, implementation: Implementation | None, arrays):
    out, lse = _attend(scale, implementation, arrays)
    return (out, lse), (arrays, out, lse)


def _attend_backward(scale: float, _, residuals, cotangents):
    # A constant among the residuals comes back as a NumPy array.
    arrays, out, lse = jax.tree.map(jnp.asarray, residuals)
    operands = Prefill(**arrays, scale=scale)
    gradients = block_sparse_attention_xla_backward(operands, out, lse, *cotangents)
    return (dict.fromkeys(arrays) | gradients,)


_attend.defvjp(_attend_forward, _attend_backward)
