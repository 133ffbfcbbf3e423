"""MagicPIG as it is published: single tokens, sampled, with corrected logits.

A token is attended to if it is one of the first, one of the last of the prompt, newer
than the prompt, or sampled: if its code equals the query's in at least two of L tables.
The chance of that is w = 1 − (1 − pᴷ)ᴸ − L·pᴷ·(1 − pᴷ)ᴸ⁻¹ with p = 1 − θ/π and θ the
angle between the query and the key less the mean key; a sampled token's logit is
lessened by log(w + 10⁻⁴), so that the sum of sampled weights estimates that of all.
Every sixteenth layer attends to everything. Source: models/attnserver.py of MagicPIG.

Sampled tokens lie anywhere, so this form cannot use kernels that read blocks: it reads
the whole cache in plain jax.numpy, to be evaluated, not to be fast. So an offloaded one
must have a device slot for every block, as for `dense`. Its mean key is that of the
prompt (published: of the prompt's offloaded part).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparda_jax.checks import integer, settle
from sparda_jax.config import ModelConfig
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors.magicpig import MagicPIG


@dataclasses.dataclass(frozen=True)
class MagicPIGTokens(MagicPIG):
    """The estimator, over all tokens of a cache.

    Attributes:
      first: Leading tokens that are always attended to.
      last: Tokens at the prompt's end that are.
      dense_every: Layers 0, n, 2n, … attend to everything.
    """

    first: int = 4
    last: int = 64
    dense_every: int = 16

    name = "magicpig_tokens"
    title = "MagicPIG"
    summary = (
        "MagicPIG's sampled tokens with corrected logits (for evaluation: all blocks "
        "on the device, plain jax.numpy)"
    )
    dense = True
    attends_tokens = True

    def __post_init__(self) -> None:
        settle(
            self,
            bits=integer(1, 15),
            tables=integer(2, 1024),
            seed=integer(0, 2**32 - 1),
            first=integer(0, 2**20),
            last=integer(0, 2**20),
            dense_every=integer(1, 2**20),
        )

    def token_correction(
        self, tile: SelectionTile, keys: Float[Array, "B K S H"], config: ModelConfig
    ) -> Float[Array, "B K G T S"]:
        """As `Selector.token_correction`."""
        assert tile.q is not None
        part = tile.index["signatures"]
        chance = sampling_chance(
            tile.q, keys - part.centre[:, :, None], self.bits, self.tables
        )
        token, prompt = jnp.arange(keys.shape[2]), part.prompt[:, None]
        exact = (token < self.first) | (token >= prompt - self.last)
        everything = tile.layer % self.dense_every == 0
        exact = (exact | everything)[:, None, None, None]  # B 1 1 1 S
        sampled = jnp.where(self.sampled(tile), -jnp.log(chance + 1e-4), -jnp.inf)
        return jnp.where(exact, 0.0, sampled)


def sampling_chance(
    q: Float[Array, "B T N H"], centred: Float[Array, "B K S H"], bits: int, tables: int
) -> Float[Array, "B K G T S"]:
    """w of the module's text: how likely each query head is to sample each key."""
    batch, steps, heads, dim = q.shape
    kv_heads = centred.shape[1]
    q = q.astype(jnp.float32).reshape(batch, steps, kv_heads, heads // kv_heads, dim)

    def unit(x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
        size = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x / jnp.maximum(size, 1e-20)

    cosine = jnp.einsum("btkgh,bksh->bkgts", unit(q), unit(centred))
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    equal = (1 - angle / jnp.pi) ** bits
    missed = (1 - equal) ** (tables - 1)
    return 1 - missed * (1 - equal) - tables * equal * missed


SELECTOR = MagicPIGTokens()
