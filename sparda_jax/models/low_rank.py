"""Forecast heads as a change of the model's own query weights: small files.

Heads that make a query for each query head are as large as the model's query weights,
and they are much like them: the input of a layer is close to that of the next one. So a
file may hold, for each consuming layer,

    head = gain ⊙ W_q + down · up          [D, K·R·H]

where W_q are the consuming layer's query weights (means of them for R < G), `gain`
scales the D inputs and the product has rank r. A file of rank 64 holds a seventh of
what whole heads do for a model of 896 dimensions, and less still for wide ones.
`factor_heads` finds the best such heads in the sense of what they answer to real
inputs, whose second moments it is given (reduced-rank regression).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from sparda_jax.models.by_layer import by_layer

# Of the mean eigenvalue of the second moments: directions without any input.
_RIDGE = 1e-4
# Of gain and product, after the first; the error falls with each.
_TURNS = 2


@dataclasses.dataclass(frozen=True)
class LowRankHeads:
    """Heads by consuming layer, relative to its query weights.

    Attributes:
      gain: Scales of the inputs [L, D].
      down: [L, D, r].
      up: [L, r, K·R·H].
    """

    gain: Float[np.ndarray, "L D"]
    down: Float[np.ndarray, "L D r"]
    up: Float[np.ndarray, "L r KRH"]

    @property
    def rank(self) -> int:
        """The rank r of what is added."""
        return self.down.shape[-1]

    def whole(self, queries: Sequence[Float[Array, "D KRH"]]) -> list[Array]:
        """The heads [D, K·R·H] in float32.

        Args:
          queries: `weights.from_query_heads` of the model, with R queries a kv head.
        """
        layers = zip(queries, self.gain, self.down, self.up, strict=True)
        return [
            jnp.asarray(gain)[:, None] * jnp.asarray(own, jnp.float32)
            + jnp.matmul(jnp.asarray(down), jnp.asarray(up), precision="highest")
            for own, gain, down, up in layers
        ]


def factor_heads(
    heads: Float[np.ndarray, "L D KRH"],
    queries: Sequence[Float[Array, "D KRH"]],
    square: Float[np.ndarray, "L D D"],
    rank: int,
    *,
    progress: bool = False,
) -> LowRankHeads:
    """The heads of a rank that answer most like `heads`, in the sense of least squares.

    Args:
      heads: Float32.
      queries: As for `LowRankHeads.whole`.
      square: XᵀX of what the heads read, summed over tokens (`train.init`).
      rank: r, at most D and K·R·H.
      progress: Show a bar.
    """

    def factor(head: Any, own: Any, moments: np.ndarray) -> tuple[np.ndarray, ...]:
        whole, plain = np.asarray(head, np.float64), np.asarray(own, np.float64)
        return _factor(whole, plain, moments, rank)

    what = f"heads of rank {rank}"
    found = by_layer(factor, heads, queries, square, what=what, progress=progress)
    gain, down, up = (
        np.stack(parts).astype(np.float32) for parts in zip(*found, strict=True)
    )
    return LowRankHeads(gain, down, up)


def _factor(
    head: np.ndarray, own: np.ndarray, square: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = len(square)
    square = square + (_RIDGE * np.trace(square) / size + 1e-12) * np.eye(size)
    # d/dgain of ‖X·(gain ⊙ own − rest)‖²; alike inputs with alike weights may be many.
    normal = square * (own @ own.T)
    normal += 1e-9 * np.trace(normal) / size * np.eye(size)
    root = np.linalg.cholesky(square)  # ‖X·M‖² = ‖rootᵀ·M‖²

    def product(gain: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The best one for a gain, and what it leaves of the answers."""
        change = root.T @ (head - gain[:, None] * own)
        wide = change.shape[1] > size
        # Singular vectors of the shorter side alone: a whole decomposition takes many
        # times as long. SciPy finds those that are kept in half the time, but does not
        # leave Python's lock.
        gram = change @ change.T if wide else change.T @ change
        squares, sides = (x[..., -rank:] for x in np.linalg.eigh(gram))
        # A half of the scale in each factor, so that rounding hurts neither.
        half = np.maximum(squares, 1e-30 * squares[-1]) ** 0.25
        left = sides * half if wide else change @ (sides / half)
        up = (sides / half).T @ change if wide else (sides * half).T
        down: Any = scipy.linalg.solve_triangular(root, left, trans="T", lower=True)
        return float(np.trace(gram) - squares.sum()), np.asarray(down), up

    def fitted(rest: np.ndarray) -> np.ndarray:
        """The best gain for what a product leaves."""
        return np.linalg.solve(normal, np.einsum("de,de->d", square @ rest, own))

    # In turns, from the better one of two sides: where queries have a bias, it rules
    # the moments, and a gain alone is a poor beginning.
    starts = (np.zeros(size), fitted(head))
    best = min(((product(gain), gain) for gain in starts), key=lambda one: one[0][0])
    for _ in range(_TURNS):
        gain = fitted(head - best[0][1] @ best[0][2])
        best = product(gain), gain
    return best[1], best[0][1], best[0][2]
