"""How `adapt` chooses windows, local blocks and a budget from what was measured."""

import dataclasses

import pytest

from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.passkey import PasskeyTask
from train import adapt_passkeys
from train import geometry as geometry_module
from train.adapt_passkeys import keep_passkeys
from train.geometry import _Curve, candidates, choose_geometry

NO_MODEL = object.__new__(LanguageModel)
BLOCKS = [16, 32, 64]
TRIED = candidates(8192)  # windows of 8, 16 and 32 keys, 32 blocks, 8 of them local


def chosen(monkeypatch, own, **options):
    """Chooses from own-query masses at `BLOCKS` by (kernel size, local blocks)."""
    asked = []

    def curve(lm, texts, sparse, on_layer):
        asked.append((sparse.kernel_size, sparse.local_blocks))
        found = own[asked[-1]]
        return _Curve(sparse.largest_budget, BLOCKS, found, [x + 0.01 for x in found])

    monkeypatch.setattr(geometry_module, "_curve", curve)
    options = {"least_mass": 0.9, "tried": TRIED} | options
    return choose_geometry(NO_MODEL, {}, **options), asked


NEAR = {
    (8, 8): [0.85, 0.920, 0.97],
    (16, 8): [0.84, 0.918, 0.97],
    (32, 8): [0.70, 0.800, 0.90],
    (16, 2): [0.84, 0.919, 0.97],
}


def test_the_coarsest_windows_that_come_near(monkeypatch):
    found, asked = chosen(monkeypatch, NEAR)
    assert asked == [(8, 8), (16, 8), (32, 8), (16, 2)]
    sparse = found.sparse
    assert (sparse.kernel_size, sparse.block_budget, sparse.local_blocks) == (16, 32, 8)
    assert found.reached and found.own_mass == pytest.approx(0.918)
    assert found.oracle_mass == pytest.approx(0.928)
    assert len(found.measured) == len(asked) * len(BLOCKS)
    # No more than half of the blocks, whatever is asked for.
    found, _ = chosen(monkeypatch, NEAR, least_mass=0.99)
    assert found.sparse.block_budget == 64 and not found.reached


def test_fewer_local_blocks_where_they_capture_more(monkeypatch):
    more = NEAR | {(16, 2): [0.91, 0.93, 0.98]}
    found, _ = chosen(monkeypatch, more)
    assert found.sparse.local_blocks == 2 and found.sparse.block_budget == 16
    assert found.own_mass == pytest.approx(0.91)
    # One selection that was named is measured as it is.
    one = [dataclasses.replace(TRIED[1])]
    found, asked = chosen(monkeypatch, NEAR, tried=one)
    assert asked == [(16, 8)] and found.sparse.local_blocks == 8


def test_windows_that_lose_passkeys_are_left(monkeypatch):
    """Own queries find 1 by windows of 16 and 3 by 8; dense attention finds 3."""
    finds = {None: 3, 16: 1, 8: 3}
    monkeypatch.setattr(
        adapt_passkeys.sj,
        "with_attention",
        lambda lm, name, sparse=None: sparse and sparse.kernel_size,
    )
    monkeypatch.setattr(
        adapt_passkeys, "passkeys_found", lambda lm, tasks, on_task: finds[lm]
    )
    tasks = [PasskeyTask((0,) * 100, "7", 0.5)] * 3
    kept = []

    def keep(near):
        kept.append(keep_passkeys(NO_MODEL, near, tasks))
        return kept[-1].sparse

    found, _ = chosen(monkeypatch, NEAR, keep=keep)
    assert found.sparse.kernel_size == 8 and found.own_mass == pytest.approx(0.920)
    assert kept[0].figures == {
        "asked": 3,
        "tokens": 100,
        "dense": 3,
        "infllm_v2": 3,
        "windows": {"16": 1, "8": 3},
    }
    # Where none keeps them all: those that keep most, the coarsest of equals.
    finds[8] = 1
    found, _ = chosen(monkeypatch, NEAR, keep=keep)
    assert found.sparse.kernel_size == 16 and kept[1].figures["infllm_v2"] == 1
    # The coarsest keep them: finer ones are not asked.
    finds[16] = 3
    chosen(monkeypatch, NEAR, keep=keep)
    assert kept[2].figures["windows"] == {"16": 3}
