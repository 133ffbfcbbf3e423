"""The sizes of a request's programs: rounded up, so that requests share them.

A large request takes the next of a series of close sizes (`plan_shapes`). Small ones
share a few sizes, so that few programs serve them all (`shared_shapes`): memory is no
matter there, and compiling is. Rows of padding are done from the beginning, prefill
runs as many tiles as the longest prompt needs, and attention reads as many blocks as
the longest row holds, so what is rounded up costs memory and little time.

First calls, 1 to 8 rows, up to 4,096 tokens and 512 new ones, take 10 programs in all:
a prefill and a decode for each of four numbers of rows, and two more for a single short
row. Sizes that few requests have are left out: a program that is needed once in a
hundred calls is compiled when nobody expects it any more.
"""

import dataclasses

from sparda_jax.inference.prefill import padded_length

_MIN_PROMPT = 128
# So much room for output costs a row 512 bytes, and a block more where a cache evicts:
# short answers and long share programs.
_MIN_NEW = 128

_ROWS = (1, 2, 4, 8)
_NEW = 512
# (tokens of a prefill call, tokens of the cache): for a first call, and for one behind
# tokens that are in the cache already.
_FIRST_ALONE = ((1024, 1024), (4096, 4608))
_FIRST = ((4096, 4608),)
_LATER = ((128, 1024), (128, 4608), (1024, 4608))
# A tile runs whole for its last token: it is small where prompts are short, and where
# other rows bring the tokens that a product wants.
_SHORT, _LEAST_TILE, _TILE_TOKENS = 1024, 128, 1024
# Prompts of more than so many tiles take larger ones, where the device has room for
# them: (bytes of memory, tokens of a tile).
_MOST_TILES = 32
_TILES = ((48 * 10**9, 4096), (24 * 10**9, 2048))
_FINE_BLOCKS = 256


def bucket(length: int, smallest: int) -> int:
    """The next of smallest · {1, 1.5} · 2^n: lengths that share a compilation."""
    size = smallest
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def capacity_blocks(blocks: int) -> int:
    """Blocks of a cache that holds at least `blocks`.

    Where blocks are many, they cost more memory than a further program is worth: there
    the steps are an eighth, not a half.
    """
    if blocks <= _FINE_BLOCKS:
        return bucket(blocks, 4)
    step = (1 << (blocks - 1).bit_length() - 1) // 8
    return -(-blocks // step) * step


def tile_tokens(platform: str, memory: int | None = None) -> int:
    """Most query tokens of a prefill tile, over all rows of a batch.

    On a CPU it is what a product needs. On a GPU every tile has its launches, waits
    once for the host and reads the layer's weights anew, so that larger ones are
    faster, as far as there is room for what a tile computes.

    Args:
      platform: Of the device.
      memory: Bytes that it has for us; None where that is not known.
    """
    if platform == "cpu":
        return 256
    return next((tokens for least, tokens in _TILES if (memory or 0) >= least), 1024)


def _tile(width: int, most: int, batch: int) -> int:
    """Query tokens of a tile: small beside the prompt, as the last one runs whole."""
    tokens = max(min(most, _TILE_TOKENS), min(most // batch, width // _MOST_TILES))
    return min(1 << (tokens.bit_length() - 1), width)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Bucketed sizes of one compilation.

    Attributes:
      prompt: T.
      new: Room for output tokens.
      capacity: Cache tokens per row.
      tile: Query tokens per prefill tile.
      by_row: Prefill runs the rows of a batch one after another, each in its place, and
        so with the scratch of one. Where a prompt fills whole tiles a row alone gives
        the device's products all the tokens that they want, and ragged rows cost no
        padding. Shorter prompts run together: a product of few tokens takes nearly as
        long as one of many, and their scratch is small.
    """

    prompt: int
    new: int
    capacity: int
    tile: int
    by_row: bool = False

    def prefill_rows(self, batch: int) -> int:
        """Rows of one prefill call."""
        return 1 if self.by_row else batch


def plan_shapes(
    prompt: int,
    *,
    farthest_start: int,
    longest: int,
    max_new: int,
    tile_size: int,
    block_size: int,
    batch: int = 1,
    by_row: bool | None = None,
) -> Shapes:
    """Buckets of a request.

    Args:
      prompt: Tokens of the longest row in one prefill call.
      farthest_start: Largest position at which a row's prefill call starts. Prefill
        writes whole tiles from there in every row, whatever the row's own count.
      longest: Tokens of the longest row, prompt and cache together.
      max_new: Output tokens.
      tile_size: Most query tokens of a tile, of `tile_tokens`.
      block_size: Tokens per KV block.
      batch: Sequences.
      by_row: Whether prefill runs them one after another; None: where a prompt fills
        more than one of the smallest tiles.
    """
    width = bucket(prompt, _MIN_PROMPT)
    if by_row is None:
        by_row = prompt > min(tile_size, _TILE_TOKENS)
    tile = _tile(width, tile_size, 1 if by_row else batch)
    room = max(farthest_start + padded_length(width, tile), longest + max_new)
    return Shapes(
        prompt=width,
        new=bucket(max_new, _MIN_NEW),
        capacity=capacity_blocks(-(-room // block_size)) * block_size,
        tile=tile,
        by_row=by_row,
    )


def shared_rows(batch: int) -> int | None:
    """The number of rows that a small batch runs as; None for a larger one."""
    return next((rows for rows in _ROWS if batch <= rows), None)


def shared_shapes(
    rows: int,
    prompt: int,
    *,
    farthest_start: int,
    longest: int,
    max_new: int,
    tile_size: int,
    block_size: int,
) -> Shapes | None:
    """Sizes that a small request shares with others; None for a large one.

    Args:
      rows: As `shared_rows` gives them.
      prompt, farthest_start, longest, max_new, tile_size, block_size: As those of
        `plan_shapes`.
    """
    if max_new > _NEW:
        return None
    first = _FIRST_ALONE if rows == 1 else _FIRST
    for width, tokens in _LATER if farthest_start else first:
        capacity = -(-tokens // block_size) * block_size
        room = max(farthest_start + width, longest + max_new)
        if prompt <= width and room <= capacity:
            tile = _LEAST_TILE
            if width > _SHORT:
                tile = max(tile, min(tile_size, _TILE_TOKENS // rows))
            return Shapes(prompt=width, new=_NEW, capacity=capacity, tile=tile)
    return None
