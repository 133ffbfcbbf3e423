"""Mixture of experts: a router, and the MLPs of the experts that tokens are given to.

Three forms of the same sum. Which one runs is a matter of shapes and of the platform:

  chosen   the weights of each token's experts are gathered: a decode step of few
           tokens reads no others
  grouped  tokens sorted by expert, `jax.lax.ragged_dot`. Where that is no grouped
           product it multiplies every token with every expert, from copies of the
           tokens of which each has one expert's: pieces of the prompt bound them. On a
           GPU that is still several times faster than tiles
  tiled    tokens sorted by expert and cut into tiles of one expert each, for a CPU

A step of picks (tokens times k) takes chosen below as many picks as there are experts;
on a GPU up to half as many. An H200 takes (`benchmarks/moe.py`, 128 experts, JAX
0.11.2): 8 picks 89 us chosen and 332 grouped, 32 picks 232 and 367, 128 picks 428
grouped and 14,715 tiled, 8,192 picks 14,180 grouped and 50,407 tiled.
"""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.models.layers import matmul

# XLA's option by which `ragged_dot` is one grouped product on a GPU.
GROUPED = "--xla_gpu_experimental_use_ragged_dot_grouped_gemm"
_TILE = 64  # Most rows of a tile.
# Bytes of the copies that `ragged_dot` may make of a piece.
_COPIES = 2**29


class Routes(NamedTuple):
    """Where tokens go.

    Attributes:
      experts: Of each token, the best first.
      weights: What the experts' outputs are multiplied by.
    """

    experts: Int[Array, "T k"]
    weights: Float[Array, "T k"]


def route(
    x: Float[Array, "T D"], router: Float[Array, "D E"], used: int, *, normalize: bool
) -> Routes:
    """The `used` most probable experts of each token; ties go to the lowest one.

    Args:
      x: Normalised inputs.
      router: Weights of the router, whose softmax is float32.
      used: k.
      normalize: Whether the chosen probabilities are divided by their sum.
    """
    scores = matmul(x, router).astype(jnp.float32)
    weights, experts = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), used)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routes(experts, weights.astype(x.dtype))


def routed_mlp(
    x: Float[Array, "T D"],
    routes: Routes,
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts.

    Args:
      x: Normalised inputs.
      routes: Their experts.
      gate_up: gate and up side by side.
      down: Output projections.
    """
    picks = routes.experts.size
    gate_up, down = gate_up.astype(x.dtype), down.astype(x.dtype)
    on_gpu = jax.default_backend() == "gpu"
    few = gate_up.shape[0] // 2 if on_gpu else gate_up.shape[0] - 1
    if picks <= few:
        return chosen_mlp(x, routes, gate_up, down)
    if _has_grouped_product():
        return grouped_mlp(x, routes, gate_up, down)
    if on_gpu:
        copies = gate_up.shape[0] * routes.experts.shape[1]
        copies *= x.shape[1] * x.dtype.itemsize
        return in_pieces(x, routes, gate_up, down, tokens=max(1, _COPIES // copies))
    return tiled_mlp(x, routes, gate_up, down)


def _has_grouped_product() -> bool:
    """Whether `ragged_dot` multiplies each token with its own expert alone."""
    backend = jax.default_backend()
    if backend == "gpu":
        return f"{GROUPED}=true" in os.environ.get("XLA_FLAGS", "")
    return backend == "tpu"


def _gated(fused: Float[Array, "*rows F2"]) -> Float[Array, "*rows F"]:
    gate, up = jnp.split(fused, 2, axis=-1)
    return jax.nn.silu(gate) * up


def copied_bytes(experts: int, picks: int, token: int) -> int:
    """What `ragged_dot` may copy of picks of `token` bytes each; 0 but on a GPU."""
    if jax.default_backend() != "gpu" or _has_grouped_product():
        return 0
    return min(_COPIES, experts * picks * token)


def chosen_mlp(
    x: Float[Array, "T D"],
    routes: Routes,
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
    """`routed_mlp` that gathers the weights of each token's experts."""
    inner = _gated(jnp.einsum("td,tkdf->tkf", x, gate_up[routes.experts]))
    out = jnp.einsum("tkf,tkfd->tkd", inner, down[routes.experts])
    return jnp.einsum("tkd,tk->td", out, routes.weights)


def grouped_mlp(
    x: Float[Array, "T D"],
    routes: Routes,
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
    """`routed_mlp` by `jax.lax.ragged_dot` on tokens sorted by expert."""
    used = routes.experts.shape[1]
    picked = routes.experts.reshape(-1)
    order = jnp.argsort(picked)
    sizes = jnp.bincount(picked, length=gate_up.shape[0]).astype(jnp.int32)
    inner = _gated(jax.lax.ragged_dot(x[order // used], gate_up, sizes))
    out = jax.lax.ragged_dot(inner, down, sizes)
    out = out[jnp.argsort(order)].reshape(*routes.experts.shape, -1)
    return jnp.einsum("tkd,tk->td", out, routes.weights)


def in_pieces(
    x: Float[Array, "T D"],
    routes: Routes,
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    *,
    tokens: int,
) -> Float[Array, "T D"]:
    """`grouped_mlp` of at most so many tokens at a time, one piece after the other."""
    pieces = -(-x.shape[0] // tokens)
    if pieces == 1:
        return grouped_mlp(x, routes, gate_up, down)

    def cut(a: Array) -> Array:
        # What is added at the end goes to expert 0, with weight 0.
        padded = jnp.pad(a, ((0, pieces * tokens - a.shape[0]), (0, 0)))
        return padded.reshape(pieces, tokens, -1)

    def one(piece: tuple[Array, Routes]) -> Array:
        return grouped_mlp(*piece, gate_up, down)

    out = jax.lax.map(one, (cut(x), jax.tree.map(cut, routes)))
    return out.reshape(pieces * tokens, -1)[: x.shape[0]]


def tiled_mlp(
    x: Float[Array, "T D"],
    routes: Routes,
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    *,
    together: int = 1,
) -> Float[Array, "T D"]:
    """`routed_mlp` by a loop over tiles of rows of one expert each.

    An expert's last tile may be part empty. The loop ends with the last tile in use, so
    that experts without tokens are not read.

    Args:
      x, routes, gate_up, down: As of `routed_mlp`.
      together: Tiles of one turn of the loop, whose experts' weights are gathered.
    """
    tokens, used = routes.experts.shape
    experts, picks = gate_up.shape[0], tokens * used
    rows = min(_TILE, max(8, picks // experts))
    picked = routes.experts.reshape(-1)
    order = jnp.argsort(picked)
    sizes = jnp.bincount(picked, length=experts)
    # Tiles and sorted rows before each expert.
    tiles = -(-sizes // rows)
    first_tile = jnp.cumsum(tiles) - tiles
    first_row = jnp.cumsum(sizes) - sizes
    most = -(-(picks // rows + experts) // together) * together

    def some(turn: Int[Array, ""], out: Float[Array, "rows D"]) -> Array:
        numbers = turn * together + jnp.arange(together)
        expert = jnp.searchsorted(first_tile + tiles, numbers, side="right")
        # Tiles of the last turn that nobody needs take the last expert.
        expert = jnp.minimum(expert, experts - 1)
        begin = first_row[expert] + (numbers - first_tile[expert]) * rows
        at = jnp.minimum(begin[:, None] + jnp.arange(rows), picks - 1)
        inner = _gated(
            jnp.einsum("nrd,ndf->nrf", x[order[at] // used], gate_up[expert])
        )
        done = jnp.einsum("nrf,nfd->nrd", inner, down[expert])
        done = done.reshape(together * rows, -1)
        return jax.lax.dynamic_update_slice(out, done, (turn * together * rows, 0))

    out = jnp.zeros((most * rows, x.shape[1]), x.dtype)
    out = jax.lax.fori_loop(0, -(-jnp.sum(tiles) // together), some, out)
    # Where each pick's row lies among the tiles.
    place = jnp.zeros_like(order).at[order].set(jnp.arange(picks, dtype=order.dtype))
    place = first_tile[picked] * rows + place - first_row[picked]
    out = out[place].reshape(tokens, used, -1)
    return jnp.einsum("tkd,tk->td", out, routes.weights)
