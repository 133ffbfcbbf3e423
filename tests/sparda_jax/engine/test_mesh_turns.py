"""Conversations on several devices grow and are copied as on one."""

import jax
import pytest
from mesh_cases import on_four_devices

import sparda_jax as sj
from sparda_jax.engine.placement import Sizes, place, state_layout
from sparda_jax.mesh import MeshConfig

TURNS = """
    import json, re, sys
    import jax, numpy as np
    import sparda_jax as sj
    from sparda_jax.config import CacheConfig, ConfigError
    from sparda_jax.engine import turns
    from sparda_jax.mesh import MeshConfig

    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(2, 128, n).tolist()
    begun, long, further = draw(150), [draw(200), draw(130)], [draw(3), draw(2)]
    asked = dict(max_new_tokens=12, ignore_eos=True, temperature=1.5)

    def figures(out):
        stats, fetches = out.stats, None
        if stats.offload is not None:
            fetches = [stats.offload.hits, stats.offload.misses,
                       stats.offload.fetched_bytes]
        return [out.tokens, stats.prefill_blocks, stats.decode_blocks, fetches]

    def load(mesh, cache):
        return sj.load("tiny", mesh=mesh, attention="sparda", forecast="from_query",
                       storage="stacked", cache=CacheConfig(**cache),
                       sparse=sj.SparseConfig(local_blocks=1, block_budget=4))

    def story(lm, divided):
        found = {}
        def turn(name, prompts, conversation=None):
            out = sj.generate(lm, prompts, conversation=conversation, **asked)
            found[name] = figures(out)
            return out.conversation
        # Groups of devices have rows of their own, which are copied as they are.
        read = turn("begun", [begun, begun[9:]] if divided else [begun])
        copies = read.fork() if divided else read.fork(rows=2)
        grown = turn("grown copies", long, copies)
        found["grown"] = grown.state.cache.capacity > read.state.cache.capacity
        turn("a copy of the grown goes on", further, grown.fork())
        turn("what was copied goes on", long[:len(read.lengths)], read)
        return found, grown.state.cache

    compiled = []
    for name in ("_grown", "_copied", "_copy_on_mesh"):
        def watched(*given, function=getattr(turns, name), **static):
            compiled.append(function.lower(*given, **static).compile().as_text())
            return function(*given, **static)
        setattr(turns, name, watched)

    result = {}
    for name in sys.argv[1:]:
        mesh, _, cache = name.partition(" ")
        mesh, cache = MeshConfig.parse("mesh", mesh), json.loads(cache)
        divided = mesh.data > 1
        one, _ = story(load(None, cache), divided)
        two, held = story(load(mesh, cache), divided)
        shards = []
        if cache["kind"] == "offload":
            parts = held.store.parts
            shards = [[s.data.nbytes / part.nbytes for s in part.addressable_shards]
                      for part in parts]
            shards.append([part.sharding.memory_kind for part in parts])
        differ = [key for key in one if one[key] != two[key]]
        fetched = one["grown copies"][3]
        result[name] = [differ, one["grown"], shards, fetched]
    lm = load(MeshConfig(data=2), dict(kind="resident"))
    read = sj.generate(lm, [begun], **asked).conversation
    try:
        read.fork(rows=2)
    except ConfigError as error:
        result["refused"] = str(error)
    result["exchanged"] = [line for program in compiled for line in program.splitlines()
                           if re.search(r" (all-|collective|reduce-scatter)", line)]
    result["programs"] = len(compiled)
    print(json.dumps(result))
"""


OFFLOAD = '"kind": "offload", "route": "dynamic_slice", "device_blocks": 5'


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "way",
    [
        'model=2 {"kind": "resident"}',
        f"model=2 {{{OFFLOAD}}}",
        f'model=2 {{{OFFLOAD}, "codec": "int8"}}',
        f"data=2,model=2 {{{OFFLOAD}}}",
    ],
)
def test_turns_and_copies_on_a_mesh_are_those_of_one_device(way):
    found = on_four_devices(TURNS, way)
    differ, grown, shards, fetched = found[way]
    assert differ == []
    assert grown
    if "offload" in way:
        assert fetched[1] > 0
        *parts, kinds = shards
        devices = 4 if "data" in way else 2
        assert all(part == [1 / devices] * devices for part in parts)
        assert set(kinds) == {"pinned_host"}
    assert "rows=2 is not allowed on a mesh of data=2" in found["refused"]
    assert found["programs"] > 2
    assert found["exchanged"] == []


@pytest.mark.parametrize("slots", [None, 5, 64])
def test_every_array_of_a_divided_state_has_a_size(slots):
    """JAX 0.11.2 ends without a word on arrays of no size in a divided program."""
    cache = sj.CacheConfig(kind="offload", device_blocks=slots)
    lm = sj.load(
        "tiny",
        attention="sparda",
        forecast="from_query",
        sparse=sj.SparseConfig(local_blocks=1, block_budget=4),
        cache=cache,
        mesh=MeshConfig(),
    )
    sizes = Sizes(batch=1, chunk=300, farthest_start=0, longest=300, max_new=8)
    layout = state_layout(lm, place(lm, sizes, None), None)
    assert layout is not None
    assert all(leaf.size for leaf in jax.tree.leaves(layout.abstract()))
