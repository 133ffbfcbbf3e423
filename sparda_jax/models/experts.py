"""Mixture of experts: a router, and the MLPs of the experts that tokens are given to.

Three forms of the same sum. Which one runs is a matter of shapes and of the platform:

  chosen   the weights of each token's experts are gathered: a decode step of few
           tokens reads no others
  grouped  tokens sorted by expert, `jax.lax.ragged_dot`, where that is one grouped
           product
  tiled    tokens sorted by expert and cut into tiles of one expert each, for platforms
           on which `ragged_dot` multiplies every token with every expert
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
    if picks < gate_up.shape[0]:
        return chosen_mlp(x, routes, gate_up, down)
    if _has_grouped_product():
        return grouped_mlp(x, routes, gate_up, down)
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
