"""Linear algebra of many layers on the host: layers side by side, a thread each.

BLAS divides each call among as many threads as there are cores, which wait for each
other without sleeping. The matrices of a layer are too small for that, and where other
processes have the cores too, each wait is for one that the system let run last: on two
busy cores the eigenvectors of 896 × 896 numbers took 19 s, with one thread 0.6 s.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterable
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm import tqdm

# Each holds some matrices of a layer.
_MOST_WORKERS = 4


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

    Raises:
      Exception: What a layer raises; those that have not begun then do not.
    """
    layers = list(zip(*parts, strict=True))
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    silent = None if progress else True
    with (
        threadpool_limits(1, user_api="blas"),
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(layers), desc=what, unit="layer", disable=silent) as bar,
    ):
        running = [pool.submit(make, *layer) for layer in layers]
        made = []
        try:
            for one in running:
                made.append(one.result())
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made
