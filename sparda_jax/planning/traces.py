"""Block traces: which blocks a real model chose over a real document.

A trace holds the block lists of consecutive tokens, of every layer and kv head: the
last tokens of a prompt as prefill chose for them, then the tokens that were decoded
one by one. Benchmarks replay them, and the planner takes from them how many listed
blocks a cache of C slots misses. `python -m benchmarks.trace` makes them.

The file is an npz archive of two arrays:

  header   JSON text as uint8: format, version, model, text, attention, forecast, tokens
           (the position of the first list), prefill and decode (lists of each; T in
           all), block_size, init_blocks, local_blocks, block_budget, and notes (any
           names and values)
  listed   uint8 [L, K, M, ceil(T / 8)], most significant bit first: whether a token's
           list holds a block. Tokens come last: they agree in long runs, so that the
           archive (LZMA) takes a fifth less than the other way round
"""

import dataclasses
import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sparda_jax.checkpoint.atomic import new_file
from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.files import read_bytes
from sparda_jax.checks import instance, integer, non_empty_text, require, settle, text

_FORMAT, _VERSION = "sparda-block-trace", 1
_MAX_FILE, _MAX_ARRAY = 1 << 26, 1 << 28
# Slots are filled by these first decode steps before misses are counted.
WARM_STEPS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class BlockTrace:
    """Block lists of consecutive tokens.

    Attributes:
      model, text, attention: What chose, and over what.
      forecast: Where the Forecast heads come from; "" for none.
      tokens: Position of the first list's token.
      prefill: How many lists prefill made; decode steps follow.
      block_size, init_blocks, local_blocks, block_budget: As in `SparseConfig`.
      listed: Whether a token's list holds a block, [L, K, T, M].
      notes: What else is known of it: device, JAX version, ...

    Raises:
      ConfigError: If a value is not allowed, or lists are not what the geometry says:
        forced blocks are in, none comes after the token's own, the budget is full.
    """

    model: str
    text: str
    attention: str
    forecast: str
    tokens: int
    prefill: int
    block_size: int
    init_blocks: int
    local_blocks: int
    block_budget: int
    listed: Bool[np.ndarray, "L K T M"]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        count, some = integer(0, 2**24), integer(1, 2**24)
        settle(
            self,
            model=non_empty_text,
            text=non_empty_text,
            attention=non_empty_text,
            forecast=text,
            tokens=count,
            prefill=count,
            block_size=some,
            init_blocks=count,
            local_blocks=count,
            block_budget=some,
            listed=instance(np.ndarray),
            notes=instance(Mapping),
        )
        shape = self.listed.shape
        require(
            self.listed.dtype == bool and len(shape) == 4 and 0 not in shape,
            "BlockTrace.listed",
            f"{self.listed.dtype} {shape}",
            "booleans of layers, kv heads, tokens and blocks, none of them 0",
        )
        require(
            self.prefill < shape[2],
            "BlockTrace.prefill",
            self.prefill,
            f"less than the {shape[2]} lists, so that decode steps are left",
        )
        blocks = int(self.own_blocks[-1]) + 1
        require(
            shape[3] == blocks,
            "BlockTrace.listed",
            f"of {shape[3]} blocks",
            f"of the {blocks} blocks that the last token's position makes",
        )
        forced, past = self._forced_and_past()
        require(
            self.block_budget > int(forced.sum(-1).max()),
            "BlockTrace.block_budget",
            self.block_budget,
            "more than the forced blocks, init and local",
        )
        possible = bool(((self.listed <= past) & (self.listed >= forced)).all())
        require(
            possible and bool((self.listed.sum(-1) == self.block_budget).all()),
            "BlockTrace.listed",
            "lists",
            f"lists of {self.block_budget} blocks that hold all forced ones, and none "
            "behind the token's own",
        )

    def _forced_and_past(
        self,
    ) -> tuple[Bool[np.ndarray, "T M"], Bool[np.ndarray, "T M"]]:
        """Whether a block is forced for a token, and whether it has begun."""
        block = np.arange(self.listed.shape[3])
        own = self.own_blocks[:, None]
        local = (block >= own - self.local_blocks) & (block <= own)
        return (block < self.init_blocks) | local, block <= own

    @property
    def own_blocks(self) -> Int[np.ndarray, " T"]:
        """The block that each token is in."""
        return (self.tokens + np.arange(self.listed.shape[2])) // self.block_size

    @property
    def decode(self) -> int:
        """How many lists decode steps made."""
        return self.listed.shape[2] - self.prefill

    @property
    def length(self) -> int:
        """Tokens of prompt and decode together."""
        return self.tokens + self.listed.shape[2]

    @property
    def scored(self) -> int:
        """Blocks of a list that scores choose: the budget less the forced ones."""
        return self.block_budget - self.init_blocks - self.local_blocks - 1

    @property
    def chosen(self) -> Bool[np.ndarray, "L K T M"]:
        """The lists without their forced blocks."""
        return self.listed & ~self._forced_and_past()[0]

    @property
    def new_share(self) -> float:
        """Share of a decode step's scored blocks that the step before did not list."""
        steps = self.listed[:, :, self.prefill :]
        new = self.chosen[:, :, self.prefill + 1 :] & ~steps[:, :, :-1]
        return float(new.sum(-1).mean()) / self.scored

    def miss_curve(self, sizes: Sequence[float]) -> Float[np.ndarray, " sizes"]:
        """Share of the scored blocks that a cache of slots misses, by its size.

        Slots are reused as the offloaded cache reuses them: least recently listed
        first, none of the step's own list. They begin with the list of the prompt's
        last token (or the first step's), and the first `WARM_STEPS` decode steps, at
        most a quarter of them, do not count.

        Args:
          sizes: Slots per scored block, those that the forced blocks take not counted:
            (C − forced) / scored, at least 1.
        """
        forced = self.block_budget - self.scored
        slots = [forced + round(size * self.scored) for size in sizes]
        first = max(self.prefill - 1, 0)
        lists = self.listed[:, :, first:]
        lists = lists.reshape(-1, *lists.shape[2:])
        misses = slot_misses(lists, self.own_blocks[first:], slots)
        counted = misses[:, 1 + min(WARM_STEPS, misses.shape[1] // 4) :]
        return counted.mean((0, 1)) / self.scored


def slot_misses(
    lists: Bool[np.ndarray, "streams T M"],
    own: Int[np.ndarray, " T"],
    slots: Sequence[int],
) -> Int[np.ndarray, "streams T sizes"]:
    """Blocks that must be fetched at each step, for caches of several sizes.

    Args:
      lists: Whether a step lists a block.
      own: The block that each step's token is in, which is never fetched.
      slots: Sizes of the caches, each at least as large as a list.

    Returns:
      Fetched blocks; the slots are empty before the first step.
    """
    streams, steps, blocks = lists.shape
    last_used = np.full((streams, blocks), -1)
    found = np.zeros((streams, steps, len(slots)), np.int64)
    for step in range(steps):
        # Recency is a stack: a cache of C slots holds the C blocks used last.
        order = np.argsort(-last_used, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(blocks)[None], axis=1)
        rank[last_used < 0] = blocks
        asked = lists[:, step].copy()
        last_used[asked] = step
        asked[:, own[step]] = False
        for size, count in enumerate(slots):
            found[:, step, size] = (asked & (rank >= count)).sum(1)
    return found


def write_trace(path: str | os.PathLike, trace: BlockTrace) -> None:
    """Writes a trace; equal traces give equal bytes.

    Raises:
      CheckpointError: The place cannot be written to.
    """
    names = [f.name for f in dataclasses.fields(trace) if f.name not in ("listed",)]
    header = {"format": _FORMAT, "version": _VERSION}
    header |= {name: getattr(trace, name) for name in names}
    header["decode"] = trace.decode
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "listed": np.packbits(trace.listed.swapaxes(2, 3), axis=-1),
    }
    with (
        new_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive,
    ):
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            # A fixed date, the archive's first possible.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_LZMA
            archive.writestr(entry, content.getvalue())


def read_trace(path: str | os.PathLike) -> BlockTrace:
    """Reads a trace.

    Raises:
      CheckpointError: There is no such file, or it is damaged or no trace.
    """
    content = read_bytes(path, _MAX_FILE)
    if content is None:
        raise CheckpointError(f"{path}: no such file, allowed: a block trace (npz)")
    try:
        return _parsed(content)
    except (
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
        *(ValueError, LookupError, TypeError, ArithmeticError, MemoryError),
        *(RuntimeError, NotImplementedError),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path}: is no block trace, or a damaged one: {reason[:300]}"
        ) from error


def _parsed(content: bytes) -> BlockTrace:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            if entry.file_size > _MAX_ARRAY:
                raise ValueError(
                    f"{entry.filename} has {entry.file_size} bytes, allowed: at most "
                    f"{_MAX_ARRAY}"
                )
        header = json.loads(bytes(_array(archive, "header", 1)).decode())
        bits = _array(archive, "listed", 4)
    if not isinstance(header, dict):
        raise ValueError("header is no JSON object")
    version = header.pop("format", None), header.pop("version", None)
    if version != (_FORMAT, _VERSION):
        raise ValueError(
            f"format and version are {show(version)}, allowed: {(_FORMAT, _VERSION)}"
        )
    names = {f.name for f in dataclasses.fields(BlockTrace)} - {"listed"}
    if unknown := sorted({*names, "decode"} ^ set(header)):
        raise ValueError(f"header lacks or has in excess {show(unknown)}")
    count = header["prefill"] + header.pop("decode")
    if not 0 <= 8 * bits.shape[3] - count < 8 or 8 * bits.size > _MAX_ARRAY:
        raise ValueError(
            f"listed has the shape {bits.shape}, and prefill and decode make {count}"
        )
    listed = np.unpackbits(bits, axis=-1, count=count).astype(bool)
    return BlockTrace(**header, listed=np.ascontiguousarray(listed.swapaxes(2, 3)))


def _array(archive: zipfile.ZipFile, name: str, rank: int) -> np.ndarray:
    array = np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim != rank:
        raise ValueError(
            f"{name} is {array.dtype} of rank {array.ndim}, allowed: uint8 of {rank}"
        )
    return array
