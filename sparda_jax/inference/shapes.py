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
_MIN_NEW = 32

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


def bucket(length: int, smallest: int) -> int:
    """The next of smallest · {1, 1.5} · 2^n: lengths that share a compilation."""
    size = smallest
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def tile_tokens(platform: str) -> int:
    """Query tokens per prefill tile: on a CPU what a GEMM needs; a GPU wants more."""
    return 256 if platform == "cpu" else 1024


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Bucketed sizes of one compilation.

    Attributes:
      prompt: T.
      new: Room for output tokens.
      capacity: Cache tokens per row.
      tile: Query tokens per prefill tile.
    """

    prompt: int
    new: int
    capacity: int
    tile: int


def plan_shapes(
    prompt: int,
    *,
    farthest_start: int,
    longest: int,
    max_new: int,
    tile_size: int,
    block_size: int,
) -> Shapes:
    """Buckets of a request.

    Args:
      prompt: Tokens of the longest row in one prefill call.
      farthest_start: Largest position at which a row's prefill call starts. Prefill
        writes whole tiles from there in every row, whatever the row's own count.
      longest: Tokens of the longest row, prompt and cache together.
      max_new: Output tokens.
      tile_size: Query tokens per tile, if the prompt is that long.
      block_size: Tokens per KV block.
    """
    width = bucket(prompt, _MIN_PROMPT)
    tile = min(tile_size, width)
    room = max(farthest_start + padded_length(width, tile), longest + max_new)
    return Shapes(
        prompt=width,
        new=bucket(max_new, _MIN_NEW),
        capacity=bucket(-(-room // block_size), 4) * block_size,
        tile=tile,
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
