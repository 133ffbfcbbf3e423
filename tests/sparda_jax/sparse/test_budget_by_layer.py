"""Budgets by layer: each layer lists what a flat budget of its own would."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selector_cases as cases
from planning_cases import Case
from selector_cases import CONFIG, SPARSE

import sparda_jax as sj
from sparda_jax.models.presets import get_preset
from sparda_jax.planning.memory import memory_plan
from sparda_jax.sparse.selection import constrain_by_importance, top_blocks
from sparda_jax.sparse.selectors import get_selector

BUDGETS = (6, 4, 9, 7)
BY_LAYER = dataclasses.replace(SPARSE, block_budget=BUDGETS)


def _flat(budget):
    return dataclasses.replace(SPARSE, block_budget=budget)


def test_each_layer_lists_what_its_own_budget_says():
    layer, quest = cases.draw_layer("adversarial"), get_selector("quest")
    index = cases.make_index(quest, layer, [layer.length], 16)
    where = slice(0, None, 37)
    positions = np.arange(layer.length)[where]
    tile = cases.tile_of(layer, index, where, 16)
    score = jax.jit(lambda tile: quest.score(tile, CONFIG, BY_LAYER, None))
    scores = np.asarray(score(tile))
    select = jax.jit(
        lambda number: quest.select(
            dataclasses.replace(tile, layer=number), CONFIG, BY_LAYER
        )
    )
    for number, budget in enumerate(BUDGETS):
        lists = select(jnp.int32(number))
        assert lists.shape[-1] == max(BUDGETS)
        got = cases.listed_sets(lists)
        assert got == cases.best_sets(scores, positions, _flat(budget)), number


def test_the_second_stage_keeps_to_the_layer_s_budget():
    """With a quota above it the picks would push forced blocks out."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.standard_normal((1, 2, 1, 12)), jnp.float32)
    scores = scores.at[..., [0, 9, 10, 11]].set(jnp.inf)
    importance = jnp.asarray(rng.standard_normal((1, 2, 48)), jnp.float32)
    own, length = jnp.full((1, 1, 1), 11), jnp.full((1,), 12 * 64)

    def lists(sparse, number):
        constrained = constrain_by_importance(
            scores, importance, own, sparse, layer=number
        )
        return cases.listed_sets(
            top_blocks(constrained, own, length, sparse, layer=number)
        )

    for number, budget in enumerate(BUDGETS):
        assert lists(BY_LAYER, number) == lists(_flat(budget), 0)


def test_the_planner_takes_the_largest_and_a_wrong_number_of_budgets_is_refused():
    case = Case(kind="offload")
    sizes = [
        memory_plan(
            dataclasses.replace(case.settings, sparse=sparse),
            case.cache,
            batch=2,
            shapes=case.shapes,
            dtype="float32",
        )
        for sparse in (
            _flat(9),
            dataclasses.replace(SPARSE, block_budget=(9, 4, 6)),
        )
    ]
    assert sizes[0] == sizes[1]
    count = get_preset("tiny").model.num_layers
    wrong = dataclasses.replace(SPARSE, block_budget=(6,) * (count + 1))
    with pytest.raises(sj.ConfigError, match=f"block_budget=.*each of the {count} lay"):
        sj.load("tiny", attention="window", sparse=wrong)
    with pytest.raises(sj.ConfigError, match="at least the 4 forced blocks"):
        dataclasses.replace(SPARSE, block_budget=(6, 3))
    with pytest.raises(sj.ConfigError, match="block_budget="):
        dataclasses.replace(SPARSE, block_budget=())
