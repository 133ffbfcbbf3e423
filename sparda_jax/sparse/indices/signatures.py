"""MagicPIG's hash tables: L codes of K random signs for every centred key (SimHash)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.index import IndexPart, IndexShape, NewTokens, PromptEnd


class SignatureState(NamedTuple):
    """What is kept of a layer.

    Attributes:
      centre: The mean key of the prompt [layers, B, K, H], float32.
      codes: [layers, B, K, S, tables], int16.
      prompt: Tokens that each row held when its prompt ended [layers, B].
    """

    centre: Float[Array, "layers B K H"]
    codes: Int[Array, "layers B K S tables"]
    prompt: Int[Array, "layers B"]


def directions(
    head_dim: int, bits: int, tables: int, seed: int
) -> Float[np.ndarray, "H signs"]:
    """Gaussian directions [H, tables · bits], the same in every layer and head."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((head_dim, tables * bits)).astype(np.float32)


def hash_codes(
    x: Float[Array, "*rows H"], planes: Float[np.ndarray, "H signs"], bits: int
) -> Int[Array, "*rows tables"]:
    """The code of each vector in every table: one bit a direction, by the sign."""
    signs = jnp.einsum("...h,hs->...s", x.astype(jnp.float32), planes) > 0
    signs = signs.reshape(*signs.shape[:-1], -1, bits)
    weights = 2 ** jnp.arange(bits, dtype=jnp.int16)
    return jnp.sum(signs * weights, axis=-1, dtype=jnp.int16)


@dataclasses.dataclass(frozen=True)
class Signatures(IndexPart):
    """Codes of keys less the prompt's mean key.

    They are made when the prompt ends, for all keys at once; decode adds those of new
    tokens, less the same mean.

    Attributes:
      bits: Signs of a code.
      tables: Codes of a key.
      seed: Of the directions.
    """

    bits: int
    tables: int
    seed: int

    def init(self, shape: IndexShape, sparse: SparseConfig) -> SignatureState:
        """As `IndexPart.init`."""
        lead = (shape.layers, shape.batch, shape.kv_heads)
        tokens = shape.blocks * sparse.block_size
        return SignatureState(
            centre=jnp.zeros((*lead, shape.head_dim), jnp.float32),
            codes=jnp.zeros((*lead, tokens, self.tables), jnp.int16),
            prompt=jnp.zeros(lead[:2], jnp.int32),
        )

    def _planes(self, head_dim: int) -> Float[np.ndarray, "H signs"]:
        return directions(head_dim, self.bits, self.tables, self.seed)

    def append(
        self, state: SignatureState, new: NewTokens, sparse: SparseConfig
    ) -> SignatureState:
        """As `IndexPart.append`; a prompt's tokens wait for its end."""
        tokens, layer, start, count = new
        batch, steps, kv_heads, dim = tokens.k.shape
        if steps > 1:
            return state
        centred = tokens.k[:, 0].astype(jnp.float32) - state.centre[layer]
        codes = hash_codes(centred, self._planes(dim), self.bits)
        rows, heads = jnp.ogrid[:batch, :kv_heads]
        room = state.codes.shape[3]
        position = jnp.where(count > 0, start, room)[:, None]
        at = (layer, rows, heads, position)
        return state._replace(codes=state.codes.at[at].set(codes, mode="drop"))

    def end_prefill(
        self,
        state: SignatureState,
        layer: int | Int[Array, ""],
        end: PromptEnd,
        *,
        sparse: SparseConfig,
    ) -> SignatureState:
        """As `IndexPart.end_prefill`: centres and hashes all keys."""
        k = end.kv[end.layer, :, :, :, :, 0]  # B K M block H
        blocks, size, dim = k.shape[2:]
        token = jnp.arange(blocks * size).reshape(blocks, size)
        held = (token < end.length[:, None, None])[:, None, :, :, None]
        total = jnp.sum(jnp.where(held, k.astype(jnp.float32), 0.0), axis=(2, 3))
        centre = total / jnp.maximum(end.length, 1)[:, None, None]
        planes = self._planes(dim)

        def of_block(keys: Float[Array, "B K block H"]) -> Array:
            centred = keys.astype(jnp.float32) - centre[:, :, None]
            return hash_codes(centred, planes, self.bits)

        codes = jax.lax.map(of_block, jnp.moveaxis(k, 2, 0))  # M B K block tables
        codes = jnp.moveaxis(codes, 0, 2).reshape(state.codes.shape[1:])
        ends = end.ends[:, None, None]
        old = state.codes[layer]
        return SignatureState(
            centre=state.centre.at[layer].set(
                jnp.where(ends, centre, state.centre[layer])
            ),
            codes=state.codes.at[layer].set(jnp.where(ends[..., None], codes, old)),
            prompt=state.prompt.at[layer].set(
                jnp.where(end.ends, end.length, state.prompt[layer])
            ),
        )
