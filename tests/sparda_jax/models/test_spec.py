"""The table of parameters: everything that is derived from it agrees."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from sparda_jax.config import ModelConfig
from sparda_jax.models import spec, weights
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.families import FAMILIES
from sparda_jax.models.families.family import FLAGS
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.weights import abstract_decoder, build_decoder, random_tensors

TINY = dataclasses.replace(PRESETS["tiny"].model, num_layers=2)
ALL = dict.fromkeys(FLAGS, True) | {"tie_embeddings": False}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "shared_ffn_size": 24}
EVERYTHING = dataclasses.replace(TINY, **ALL, **EXPERTS)


@pytest.mark.parametrize("name", [*PRESETS, "all"])
def test_abstract_weights_have_as_many_parameters(name):
    config = (
        PRESETS[name].model if name in PRESETS else dataclasses.replace(TINY, **ALL)
    )
    shapes = dict(spec.base_shapes(config))
    model = abstract_decoder(config, "bfloat16", storage="stacked", forecast=True)
    heads = spec.num_forecast_parameters(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == (
        spec.num_parameters(config)
    )
    assert sum(x.size for x in jax.tree.leaves(model)) == (
        spec.num_parameters(config) + heads
    )


def test_active_parameters_are_those_of_the_experts_in_use():
    config = PRESETS["qwen3-30b-a3b"].model
    assert round(spec.num_parameters(config) / 1e9, 1) == 30.5
    assert round(spec.num_active_parameters(config) / 1e9, 2) == 3.35
    assert spec.num_active_parameters(config, 128.0) == spec.num_parameters(config)
    mixtral = PRESETS["mixtral-8x7b"].model
    assert round(spec.num_parameters(mixtral) / 1e9, 1) == 46.7
    assert round(spec.num_active_parameters(mixtral) / 1e9, 1) == 12.9
    dense = PRESETS["tiny"].model
    assert spec.num_active_parameters(dense) == spec.num_parameters(dense)


def _shapes(model: Decoder) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(model)]


@pytest.mark.parametrize("flags", [{}, ALL, ALL | EXPERTS])
def test_built_and_abstract_decoders_have_the_same_shapes(flags):
    config = dataclasses.replace(TINY, **flags)
    tensors = random_tensors(config, seed=0)
    built = build_decoder(config, tensors, dtype="float32", storage="stacked")
    abstract = abstract_decoder(config, "float32", storage="stacked", forecast=False)
    assert _shapes(built) == _shapes(abstract)
    assert jax.tree.structure(built) == jax.tree.structure(abstract)


def test_names_stand_once():
    rows = (*spec.MODEL, *spec.LAYER)
    assert len({row.hf for row in rows}) == len(rows)
    named = [row.gguf for row in rows if row.gguf is not None]
    assert len(set(named)) == len(named)
    # Tensors of one array stand together, and only there.
    arrays = [array for array, _ in spec.joined(spec.LAYER)]
    assert len(set(arrays)) == len(arrays)


def test_flags_of_the_table_are_those_of_the_configuration_and_the_families():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    used = {row.flag for row in spec.LAYER if row.flag is not None}
    experts = {"dense_mlp", "num_experts", "shared_ffn_size"}
    assert used == set(FLAGS) | experts
    assert used - {"dense_mlp"} <= fields
    for family in FAMILIES:
        assert {*family.fixed, *family.optional} <= used
        assert {*family.stored_names} <= {row.hf for row in spec.LAYER}


@pytest.mark.parametrize("array", spec.layer_shapes(EVERYTHING))
def test_devices_divide_linears_alone(array):
    shape = spec.layer_shapes(EVERYTHING)[array]
    assert sorted(spec.shard_axes(array)) == list(
        range(len(shape)) if shape[1:] else []
    )


def test_a_stack_is_filled_in_its_own_memory(monkeypatch):
    """Layers are not held beside the stack that they are copied into."""
    made, write = [], weights._write_layer

    def written(stack, layer, index):
        places = {k: x.unsafe_buffer_pointer() for k, x in stack.items()}
        made.append((places, write(stack, layer, index)))
        assert all(x.is_deleted() for x in stack.values())
        return made[-1][1]

    monkeypatch.setattr(weights, "_write_layer", written)
    tensors = random_tensors(TINY, seed=0)
    stacked = build_decoder(TINY, tensors, dtype="float32", storage="stacked")
    apart = build_decoder(TINY, tensors, dtype="float32")
    places, stack = made[-1]
    assert len(made) == TINY.num_layers
    assert places == {k: x.unsafe_buffer_pointer() for k, x in stack.items()}
    for index, layer in enumerate(apart.layers):
        one = jax.tree.map(lambda x, index=index: x[index], stacked.layers)
        jax.tree.map(np.testing.assert_array_equal, one, layer)
