"""Beginnings of prompts that have been run, kept in host memory for others.

A tree of pieces: each node holds the KV blocks of one piece of `prefill_chunk` tokens,
as the cache has them, and the selector's index behind them. Its key is the tokens
themselves, so that no two texts can be taken for each other. A prompt that begins with
pieces of the tree takes their blocks and goes on behind them with the same programs in
the same cuts: its tokens are those that it would have without, bit for bit.

Only prompts are kept: what decode has written differs from what prefill would write in
the last bits. When the store is full, the piece that was used longest ago makes room,
from the ends of the tree on, and the next is written where it was: memory given back
piece by piece comes to lie in holes, and the process grows beyond the store's bound.
Rows hold copies, so that any piece may go at any time.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

# KV blocks and the selector's index, trees of arrays.
Kept = tuple[Any, Any]


@dataclasses.dataclass(eq=False)
class Piece:
    """A node of the tree.

    Attributes:
      key: Its tokens.
      parent: The piece before it, or the root.
      blocks: KV blocks on the host, as `take_prefix` gives them.
      index: The selector's index behind it.
      nbytes: Of both.
      last_used: When it was used last, counted in uses.
      children: Pieces that follow it, by their tokens.
    """

    key: bytes
    parent: "Piece | None"
    blocks: Any = None
    index: Any = None
    nbytes: int = 0
    last_used: int = 0
    children: dict[bytes, "Piece"] = dataclasses.field(default_factory=dict)


class PrefixStore:
    """The tree; see the module's text. Used by one thread.

    Attributes:
      piece: Tokens of a piece.
      most_bytes: Bytes to keep.
      nbytes: Bytes of all pieces.

    Args:
      piece: Tokens of a piece.
      most_bytes: Bytes to keep.
    """

    def __init__(self, piece: int, most_bytes: int):
        self.piece, self.most_bytes = piece, most_bytes
        self.root = Piece(b"", None)
        self.nbytes = 0
        self._clock = itertools.count(1)
        self._pieces: set[Piece] = set()

    def __len__(self) -> int:
        return len(self._pieces)

    def follow(self, behind: Piece, tokens: Sequence[int], most: int) -> list[Piece]:
        """The pieces that tokens go on with.

        One token at least is left over: its logits are still to be computed.

        Args:
          behind: Where the tokens begin.
          tokens: What follows there.
          most: Pieces to give at most.
        """
        found: list[Piece] = []
        whole = (len(tokens) - 1) // self.piece
        for number in range(min(most, whole)):
            first = number * self.piece
            key = self._key(tokens[first : first + self.piece])
            node = behind.children.get(key)
            if node is None:
                break
            node.last_used = next(self._clock)
            found.append(node)
            behind = node
        return found

    def _key(self, tokens: Sequence[int]) -> bytes:
        return np.asarray(tokens, np.int32).tobytes()

    def holds(self, node: Piece) -> bool:
        """Whether a piece, or the root, is still in the tree."""
        return node is self.root or node in self._pieces

    def add(
        self, behind: Piece, tokens: Sequence[int], blocks: Any, index: Any
    ) -> Piece | None:
        """Keeps a piece, if there is room or can be.

        Args:
          behind: The piece before it; still in the tree.
          tokens: Its tokens.
          blocks, index: Arrays of `take_prefix`.

        Returns:
          The piece; None where it is too large.
        """
        key = self._key(tokens)
        if key in behind.children:
            return behind.children[key]
        # Whatever read a dropped piece is done: this was computed behind it.
        given = jax.device_get((blocks, index))
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(given))
        now = next(self._clock)
        behind.last_used = now
        dropped = self._make_room(nbytes, behind)
        if dropped is None:
            return None
        place = next((p for p in map(_kept, dropped) if _alike(p, given)), None)
        blocks, index = _written(given, place)
        node = Piece(key, behind, blocks, index, nbytes, now)
        behind.children[key] = node
        self._pieces.add(node)
        self.nbytes += nbytes
        return node

    def _make_room(self, nbytes: int, keep: Piece) -> list[Piece] | None:
        """Drops ends of the tree, but for one, until there is room.

        Returns:
          What was dropped; None, and nothing is, if all of it would not do.
        """
        if nbytes + sum(one.nbytes for one in _from_root(keep)) > self.most_bytes:
            return None
        dropped = []
        while self.nbytes + nbytes > self.most_bytes:
            ends = [p for p in self._pieces if not p.children and p is not keep]
            dropped.append(min(ends, key=lambda piece: piece.last_used))
            self._drop(dropped[-1])
        return dropped

    def _drop(self, node: Piece) -> None:
        assert node.parent is not None
        del node.parent.children[node.key]
        self._pieces.remove(node)
        self.nbytes -= node.nbytes

    def clear(self) -> None:
        """Keeps nothing."""
        self.root = Piece(b"", None)
        self._pieces.clear()
        self.nbytes = 0


def _from_root(piece: Piece) -> Iterator[Piece]:
    """A piece and those before it, which stay while it does."""
    node: Piece | None = piece
    while node is not None:
        yield node
        node = node.parent


def _kept(piece: Piece) -> Kept:
    return piece.blocks, piece.index


def _alike(place: Kept, given: Kept) -> bool:
    """Whether arrays of `given` fit where those of `place` are."""
    if jax.tree.structure(place) != jax.tree.structure(given):
        return False
    pairs = zip(jax.tree.leaves(place), jax.tree.leaves(given), strict=True)
    return all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def _written(given: Kept, place: Kept | None) -> Kept:
    """Copies of arrays, in `place` if there is one; those of JAX are read-only."""
    if place is None:
        return jax.tree.map(np.array, given)
    for old, new in zip(jax.tree.leaves(place), jax.tree.leaves(given), strict=True):
        np.copyto(old, new)
    return place
