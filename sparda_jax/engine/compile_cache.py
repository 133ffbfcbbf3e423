"""Compiled programs, shared by every request of the process.

A program belongs to nobody: its key is all that it was compiled for, which is the
function, its static arguments, the types of its array arguments (tree, shapes, dtypes,
where they live) and the settings of JAX that change what is traced. Weights, prompts
and whatever else is dynamic are arguments. So a model that is replaced, or loaded
again, can never meet a program of another one, and models of one shape share theirs.

The number of programs is bounded: the one that was not used for longest makes room.

Threads: every method may be called from any thread. Of several that want one program,
the first compiles it and the others wait for that one.
"""

import collections
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from pallas_kernels.lowering import silence_triton_deprecation

# Requests of all small sizes need 10 (`inference.shapes`), further turns a few more.
_MOST_PROGRAMS = 64

# Settings of JAX that change a program and may change between two calls: each is a
# context manager of that name, and then the thread's own.
_TRACED = (
    "enable_x64",
    "default_matmul_precision",
    "numpy_dtype_promotion",
    "default_prng_impl",
    "threefry_partitionable",
)


class BoundedCache[Value]:
    """The `size` values that were used last, by key; safe under threads."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._held: collections.OrderedDict[Hashable, Future[Value]] = (
            collections.OrderedDict()
        )

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> Value | None:
        """What is held by the key; None if nothing is, or if it is still being made."""
        with self._lock:
            found = self._held.get(key)
            if found is None or not found.done():
                return None
            self._held.move_to_end(key)
        return found.result()

    def put(self, key: Hashable, value: Value) -> None:
        """Holds a value."""
        done: Future[Value] = Future()
        done.set_result(value)
        with self._lock:
            self._insert(key, done)

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What is held by the key; if nothing is, what `make` gives.

        An exception of `make` goes to all who wait for it, and leaves nothing behind.
        """
        ours: Future[Value] = Future()
        with self._lock:
            found = self._held.get(key)
            if found is None:
                self._insert(key, ours)
            else:
                self._held.move_to_end(key)
        if found is not None:
            return found.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                if self._held.get(key) is ours:
                    del self._held[key]
            ours.set_exception(error)
            raise
        ours.set_result(value)
        return value

    def clear(self) -> None:
        """Holds nothing any more."""
        with self._lock:
            self._held.clear()

    def _insert(self, key: Hashable, value: Future[Value]) -> None:
        self._held[key] = value
        self._held.move_to_end(key)
        while len(self._held) > self._size:
            self._held.popitem(last=False)


def signature(arguments: Any) -> Hashable:
    """The types of a tree of arrays: what a program compiled for them depends on."""
    leaves, tree = jax.tree.flatten(arguments)
    types = tuple(
        (
            leaf.shape,
            leaf.dtype,
            getattr(leaf, "weak_type", False),
            getattr(leaf, "sharding", None),
        )
        for leaf in leaves
    )
    return tree, types


def _trace_settings(*more: str) -> dict[str, Any]:
    """This thread's settings of JAX that change a program, and others, by name."""
    return {name: getattr(jax.config, f"jax_{name}") for name in (*_TRACED, *more)}


@contextlib.contextmanager
def side_by_side(most: int | None = None) -> Iterator[Callable[..., Future[Any]]]:
    """Threads that work under the settings of JAX, and on the device, of this one.

    Args:
      most: Threads; as many as the machine's processors if none.

    Yields:
      What takes a function and its arguments, for a thread to call, and gives what will
      have the result. The block ends when all calls have. Where one fails, or the block
      does (Ctrl-C), that is raised, and calls that have not begun never do.
    """
    here = _trace_settings("default_device")

    def call(function: Callable, given: tuple, named: dict) -> Any:
        with contextlib.ExitStack() as settings:
            for name, value in here.items():
                if getattr(jax.config, f"jax_{name}") != value:
                    settings.enter_context(getattr(jax, name)(value))
            return function(*given, **named)

    started: list[Future[Any]] = []

    def start(function: Callable, *given: Any, **named: Any) -> Future[Any]:
        started.append(pool.submit(call, function, given, named))
        return started[-1]

    with ThreadPoolExecutor(most or os.cpu_count()) as pool:
        try:
            yield start
            for one in started:
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Programs:
    """Compiled programs; see the module's text.

    Attributes:
      compiled: How many were compiled since the process began.
      seconds: What that took, of every thread that compiled.
    """

    def __init__(self, size: int = _MOST_PROGRAMS):
        self._held: BoundedCache[jax.stages.Compiled] = BoundedCache(size)
        self._lock = threading.Lock()
        self.compiled = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def get(
        self,
        function: Callable,
        arguments: tuple,
        static: Mapping[str, Hashable],
        *,
        donate: tuple[int, ...] = (),
    ) -> tuple[Callable, float]:
        """The program of a function for these arguments.

        Args:
          function: A pure function at module level; it may have `compiler_options`.
          arguments: Its array arguments, trees of arrays each.
          static: What is fixed in the program, by name.
          donate: Places of the arguments whose buffers the program may use up.

        Returns:
          The program, to be called with such arguments, and the seconds that this call
          spent compiling.
        """
        key = (
            function,
            tuple(sorted(static.items())),
            donate,
            signature(arguments),
            tuple(_trace_settings().values()),
        )
        seconds = 0.0

        def compile_program() -> jax.stages.Compiled:
            nonlocal seconds
            begun = time.perf_counter()
            # A function of its own: what JAX keeps for it goes when the program does.
            own = jax.jit(functools.partial(function, **static), donate_argnums=donate)
            options = getattr(function, "compiler_options", None)
            # Kernels of a layer that JAX has traced before do not say it again.
            silence_triton_deprecation()
            program = own.lower(*arguments).compile(options)
            seconds = time.perf_counter() - begun
            with self._lock:
                self.compiled += 1
                self.seconds += seconds
            return program

        return self._held.get_or_make(key, compile_program), seconds

    def clear(self) -> None:
        """Drops all programs."""
        self._held.clear()


PROGRAMS = Programs()
