"""What every selector must do, in one run of each way to decode; and layers without a
model, with the choice by NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from planning_cases import Case

import sparda_jax as sj
from sparda_jax.models.presets import get_preset
from sparda_jax.sparse.index import (
    IndexShape,
    NewTokens,
    PromptEnd,
    TokenKV,
    append_to_index,
    end_prefill_of_index,
    init_index,
)
from sparda_jax.sparse.selection import SelectionTile

SPARSE = sj.SparseConfig(local_blocks=2, block_budget=6)


def check_everywhere(name: str) -> None:
    """Prefill, decode, offload, look-ahead, `verify` and the planner."""
    lm = sj.load("tiny", attention=name, sparse=SPARSE, storage="stacked")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 128, size).tolist() for size in (600, 70)]
    expected = sj.generate(lm, prompts, max_new_tokens=70, ignore_eos=True)
    # A decode step chooses what a prompt's row chooses.
    whole = sj.forward(lm, [*prompts[0], *expected.tokens[0][:-1]])
    greedy = np.argmax(np.asarray(whole)[len(prompts[0]) - 1 :], axis=1)
    assert greedy.tolist() == expected.tokens[0]
    cache = sj.CacheConfig(kind="offload", device_blocks=None, exactness="verify")
    offloaded = sj.with_attention(lm, name, cache=cache)
    out = sj.generate(offloaded, prompts, max_new_tokens=70, ignore_eos=True)
    assert out.tokens == expected.tokens
    stats = out.stats.offload
    assert stats is not None and stats.lookahead
    assert stats.hits > 0 and stats.repaired == 0
    plan = Case(kind="offload", attention=name).plan()
    assert plan.slots > 0 and plan.compressed_keys == 0
    assert name in sj.selector_names()


CONFIG = dataclasses.replace(
    get_preset("tiny").model, num_heads=4, num_kv_heads=2, head_dim=8
)
KINDS = ("random", "adversarial")


@dataclasses.dataclass(frozen=True)
class Layer:
    """Queries and keys of one layer, of rows without a model."""

    q: np.ndarray  # B T N H
    k: np.ndarray  # B T K H
    bias: np.ndarray  # B T K

    @property
    def length(self) -> int:
        return self.k.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.length // SPARSE.block_size)

    def grouped(self) -> np.ndarray:
        """Queries [B, T, K, G, H]."""
        batch, steps, heads, dim = self.q.shape
        kv_heads = self.k.shape[2]
        return self.q.reshape(batch, steps, kv_heads, heads // kv_heads, dim)

    def kv(self, num_blocks: int) -> jnp.ndarray:
        """The cache's blocks [1, B, K, M, block, 2, H]; values are the keys."""
        size = SPARSE.block_size
        k = np.pad(
            self.k, ((0, 0), (0, num_blocks * size - self.length), (0, 0), (0, 0))
        )
        k = np.swapaxes(k, 1, 2)
        k = k.reshape(*k.shape[:2], num_blocks, size, k.shape[-1])
        return jnp.asarray(np.stack((k, k), axis=-2))[None]

    def masses(self) -> np.ndarray:
        """Attention mass by block [B, K, T, M], float64, summed over a group."""
        logits = np.einsum("btkgh,bskh->bkgts", self.grouped(), self.k, dtype=float)
        logits *= self.k.shape[-1] ** -0.5
        past = np.tri(self.length, dtype=bool)
        logits = np.where(past, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        pad = self.blocks * SPARSE.block_size - self.length
        weights = np.pad(weights.sum(2), [(0, 0)] * 3 + [(0, pad)])
        return weights.reshape(*weights.shape[:3], self.blocks, -1).sum(-1)


def draw_layer(kind: str, *, length: int = 700, batch: int = 2, seed: int = 0) -> Layer:
    """Random rows, or ones made to be hard: ties, one block of huge keys, opposite
    signs, a block of zeros."""
    rng = np.random.default_rng(seed)
    heads, kv_heads, dim = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim
    q = rng.standard_normal((batch, length, heads, dim)).astype(np.float32)
    k = rng.standard_normal((batch, length, kv_heads, dim)).astype(np.float32)
    bias = np.zeros((batch, length, kv_heads), np.float32)
    if kind == "adversarial":
        k[:, 64:128] = k[:, 128:192]  # two blocks are equal: ties
        k[:, 192:256] = 0
        k[:, 256:320] *= 50
        k[:, length * 3 // 4] *= -100
        q[:, ::7] *= -20
        q[:, 5::11] = 0
    return Layer(q, k, bias)


def make_index(selector, layer: Layer, pieces, num_blocks: int, *, ends: bool = True):
    """A selector's index of one layer, its tokens appended in pieces.

    `pieces` are sizes; a piece of one token is what a decode step appends. With `ends`
    the prompt ends with the last piece of more than one token.
    """
    indices = selector.indices(CONFIG)
    batch, _, kv_heads, dim = layer.k.shape
    shape = IndexShape(1, batch, kv_heads, num_blocks, dim, jnp.float32)
    index = init_index(indices, shape, SPARSE)
    start = 0
    prompt = max(i for i, size in enumerate(pieces) if size > 1)

    @jax.jit
    def append(index, new, held, count):
        return append_to_index(indices, index, NewTokens(new, 0, held, count), SPARSE)

    @jax.jit
    def end_prefill(index, end):
        return end_prefill_of_index(indices, index, 0, end, SPARSE)

    for number, size in enumerate(pieces):
        piece = slice(start, start + size)
        held, count = jnp.full((batch,), start), jnp.full((batch,), size)
        new = TokenKV(*(jnp.asarray(x[:, piece]) for x in _tokens(layer)))
        index = append(index, new, held, count)
        start += size
        if ends and number == prompt:
            end = PromptEnd(
                layer.kv(num_blocks), None, 0, held, held + count, count > 0
            )
            index = end_prefill(index, end)
    return index


def _tokens(layer: Layer):
    return layer.k, layer.k, layer.bias, layer.q


def tile_of(rows: Layer, index, where: slice, num_blocks: int, **fields):
    """The tile of some of a layer's tokens."""
    positions = np.arange(rows.length)[where]
    batch = rows.k.shape[0]
    return SelectionTile(
        q=jnp.asarray(rows.q[:, where]),
        positions=jnp.broadcast_to(jnp.asarray(positions), (batch, len(positions))),
        length=jnp.full((batch,), rows.length),
        index=jax.tree.map(lambda x: x[0], index),
        num_blocks=num_blocks,
        **{"forecast": None, "decoding": False, **fields},
    )


def scored(selector, tile: SelectionTile) -> np.ndarray:
    """A selector's scores of blocks, by one program as in a layer."""
    run = jax.jit(lambda tile: selector.score(tile, CONFIG, SPARSE, None))
    return np.asarray(run(tile))


def listed(selector, tile: SelectionTile) -> np.ndarray:
    """A selector's block lists, likewise."""
    run = jax.jit(lambda tile: selector.select(tile, CONFIG, SPARSE))
    return np.asarray(run(tile))


def best_sets(scores: np.ndarray, positions, sparse) -> list[set[int]]:
    """The definition of the choice, by NumPy: a set for each row of scores [*, T, M].

    Init and local blocks, then the best of the past ones; ties to the lowest number.
    """
    sets = []
    flat = scores.reshape(-1, *scores.shape[-2:])
    for rows in flat:
        for row, position in zip(rows, positions, strict=True):
            own = position // sparse.block_size
            forced = {*range(min(sparse.init_blocks, own + 1))}
            forced |= {*range(max(0, own - sparse.local_blocks), own + 1)}
            rest = [b for b in range(own) if b not in forced and row[b] > -np.inf]
            rest.sort(key=lambda block: (-row[block], block))
            sets.append(forced | {*rest[: sparse.block_budget - len(forced)]})
    return sets


def listed_sets(lists) -> list[set[int]]:
    """Block lists [*, T, P] as sets, in the order of `best_sets`."""
    lists = np.asarray(lists)
    return [{*row[row >= 0].tolist()} for row in lists.reshape(-1, lists.shape[-1])]
