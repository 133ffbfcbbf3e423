"""Layers side by side on the host, each by one thread of BLAS."""

import concurrent.futures
import threading

import numpy as np
import pytest
import scipy.linalg
import threadpoolctl
from patience import PATIENCE

from sparda_jax.models.by_layer import by_layer


def _counts() -> list[int]:
    """Threads that each BLAS may take."""
    found = threadpoolctl.threadpool_info()
    return [one["num_threads"] for one in found if one["user_api"] == "blas"]


def test_one_blas_thread_inside_and_as_many_as_before_behind(monkeypatch):
    """Of NumPy's and of SciPy's BLAS, also where a layer fails."""
    scipy.linalg.solve_triangular(np.eye(2), np.ones(2))
    before = _counts()
    assert by_layer(lambda _: _counts(), range(3)) == [[1] * len(before)] * 3
    assert _counts() == before

    begun, stopped = [], threading.Event()

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait)

    def fails(layer: int) -> None:
        begun.append(layer)
        if layer == 0:
            raise ValueError("layer 0")
        stopped.wait(PATIENCE)

    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", Pool)
    with pytest.raises(ValueError, match="layer 0"):
        by_layer(fails, range(99))
    assert _counts() == before
    assert len(begun) < 99


def test_layers_stay_in_their_order():
    rng = np.random.default_rng(0)
    square, right = rng.standard_normal((7, 9, 9)), rng.standard_normal((7, 9, 2))
    found = by_layer(np.linalg.solve, square, right, what="solved", progress=True)
    np.testing.assert_array_equal(
        found, [np.linalg.solve(a, b) for a, b in zip(square, right, strict=True)]
    )
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        by_layer(np.linalg.solve, square, right[:3])
