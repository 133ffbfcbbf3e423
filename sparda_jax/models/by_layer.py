"""Linear algebra of many layers on the host: layers side by side, a thread each.

BLAS divides each call among as many threads as there are cores, which wait for each
other without sleeping. The matrices of a layer are too small for that, and where other
processes have the cores too, each wait is for one that the system let run last: on two
busy cores the eigenvectors of 896 × 896 numbers took 19 s, with one thread 0.6 s.
"""

import concurrent.futures
import contextlib
import ctypes
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

# Each holds some matrices of a layer.
_MOST_WORKERS = 4
# Of the wheels of NumPy and SciPy, each of which brings its own, and of systems.
_NAMES = tuple(
    f"{before}openblas_%s_num_threads{after}"
    for before in ("scipy_", "")
    for after in ("64_", "")
)
_MAPS = pathlib.Path("/proc/self/maps")


def blas_threads() -> list[tuple[Callable[[], int], Callable[[int], None]]]:
    """How many threads each loaded OpenBLAS may use: its getter and its setter.

    Empty where none is found: other systems than Linux, or another BLAS.
    """
    try:
        lines = _MAPS.read_text(errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "openblas" in line}
    found: list[tuple[Any, Any]] = []
    for path in sorted(paths):
        try:
            library = ctypes.CDLL(path)
        except OSError:  # a file that was replaced since
            continue
        for name in _NAMES:
            getter = getattr(library, name % "get", None)
            setter = getattr(library, name % "set", None)
            if getter is not None and setter is not None:
                getter.restype, setter.argtypes = ctypes.c_int, [ctypes.c_int]
                found.append((getter, setter))
                break
    return found


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Every call of BLAS inside takes one thread, in all of the process."""
    found = blas_threads()
    before = [getter() for getter, _ in found]
    try:
        for _, setter in found:
            setter(1)
        yield
    finally:
        for (_, setter), count in zip(found, before, strict=True):
            setter(count)


def by_layer[Made](
    make: Callable[..., Made],
    *parts: Iterable[Any],
    what: str = "",
    progress: bool = False,
) -> list[Made]:
    """`make` of each layer's parts, in their order.

    Args:
      make: NumPy's linear algebra, which leaves Python's lock.
      *parts: As many of each as there are layers.
      what: Name of the bar.
      progress: Show a bar: many wide layers take minutes.
    """
    layers = list(zip(*parts, strict=True))
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    silent = None if progress else True
    with (
        one_blas_thread(),
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(layers), desc=what, unit="layer", disable=silent) as bar,
    ):
        running = [pool.submit(make, *layer) for layer in layers]
        try:
            for _ in concurrent.futures.as_completed(running):
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [one.result() for one in running]
