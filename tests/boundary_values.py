"""Values that no argument of a kind may take, by kind: `INTEGER`, `TEXT`, …"""

import array
import collections
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import sparda_jax as sj

HUGE = 10**5000  # its repr alone is a ValueError
RAGGED = [[1], [2, 3]]
NOTHING = object()
LONE = "\ud800"
DELETED = jnp.arange(2)
DELETED.delete()
MASKED = np.ma.array([1, 2], mask=[False, True])
# Integers that stand in no order, are bytes, or cannot be read.
UNREADABLE = ({1, 2}, frozenset([1]), memoryview(b"ab"), DELETED)


class Unreadable(collections.abc.Sequence):
    """A sequence of anyone's, which fails in everything but its length."""

    shape = property(lambda self: 1 // 0)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise RuntimeError("a sequence that cannot be read")

    def __repr__(self):
        raise RuntimeError("nor shown")


# Values that no argument of the kind may take.
NO_NUMBER = (math.nan, math.inf, -math.inf, HUGE, -HUGE, "3", True, 1j, b"3", RAGGED)
NO_NUMBER += (memoryview(b"3"), array.array("b", b"3"), Unreadable())
NO_NUMBER += (np.bool_(True), np.array([1, 2]), jnp.array([1]), None, NOTHING, {})
INTEGER = (*NO_NUMBER, 1.5, 2.0, np.float32(2), -(2**70), 2**70)
NUMBER = (*NO_NUMBER, -1.0)
FLAG = (0, 1, "yes", None, math.nan, np.int64(1), [True], NOTHING)
TEXT = (3, None, LONE, b"text", math.nan, ["text"], NOTHING)
WORD = ("no such word", "", LONE, 3, None, True, math.nan, ["dense"], {}, HUGE, b"xla")
PATH = (3, None, "", LONE, "a\0b", b"path", math.nan, True, [pathlib.Path("a")], HUGE)
DTYPE = ("int4", "float64", np.int32, 3, NOTHING, math.nan, "f4,f4", ["float32"], LONE)
DTYPE += (np.float32(1), np.ones(2, np.float32), jnp.ones(2))
CONFIG = ("offload", 3, True, {}, [], math.nan, NOTHING, sj.ConfigError("x"))
FUNCTION = (3, "print", math.nan, [], {})
IDS = (3, None, math.nan, "ab", b"ab", RAGGED, [1.5], [True], [None], [math.nan])
IDS += (["1"], [HUGE], [-1], {1: 2}, itertools.count(), range(10**12), np.ones((2, 2)))
STOP = (3, None, math.nan, [""], "", [3], [None], LONE, [LONE], b"ab", [b"ab"], {1: 2})
STOP += ([["a"]], itertools.count(), NOTHING)
NUMBERS = (3.0, None, "ab", [math.nan], [0.0], [True], [HUGE], RAGGED, {1: 2})
SEEDS = (
    *(x for x in INTEGER if not isinstance(x, jax.Array | array.array)),
    "ab",
    [1.5],
    [[1], [2]],
    [True],
    [HUGE],
    [-1],
    itertools.count(),
    *UNREADABLE,
)
PROMPT = (3, None, math.nan, LONE, b"ab", RAGGED, [True], [None], [1.5], [HUGE], [-1])
PROMPT += (*UNREADABLE, MASKED, jax.random.key(0))
PROMPT += ([10**6], [], [1, True], np.ones((1, 2, 2)), {1: 2}, itertools.count())
PROMPTS = (3, None, math.nan, "text", [], {1: [1]}, itertools.count(), np.ones((2, 2)))
PROMPTS += (np.ma.array([[1, 2]], mask=[[False, True]]), range(10**12), Unreadable())
PROMPTS += tuple([prompt] for prompt in PROMPT)
NAMES = (3, None, math.nan, "dense", b"dense", [3], [None], [[]], {1: 2}, NOTHING)
MESSAGES = (3, None, math.nan, "ab", b"ab", [], [3], {"role": "user"}, [{}], [LONE])
MESSAGES += ([{"role": 3}], itertools.count(), [[]], NOTHING)


def maybe(values: tuple) -> tuple:
    """The same kind where None is allowed."""
    return tuple(value for value in values if value is not None)
