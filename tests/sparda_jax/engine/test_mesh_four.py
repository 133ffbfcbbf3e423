"""Four devices share every layer; groups with rows of their own sum nothing."""

import pytest
from mesh_cases import on_four_devices

FOUR = """
    import dataclasses, json, tempfile
    import jax, numpy as np
    import sparda_jax as sj
    from sparda_jax.checkpoint.hf import save_hf
    from sparda_jax.mesh import MeshConfig
    from sparda_jax.models.presets import get_preset
    from sparda_jax.models.weights import random_tensors

    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 128, n).tolist() for n in (400, 130)]
    cache = sj.CacheConfig(kind="offload", device_blocks=5, route="dynamic_slice")

    def outcome(folder, mesh):
        lm = sj.load(folder, mesh=mesh, attention="sparda", forecast="from_query",
                     storage="stacked", cache=cache, dtype="float32",
                     sparse=sj.SparseConfig(local_blocks=1, block_budget=4))
        out = sj.generate(lm, prompts, max_new_tokens=12, ignore_eos=True)
        stats = out.stats
        fetches = [stats.offload.hits, stats.offload.misses,
                   stats.offload.fetched_bytes]
        figures = [out.tokens, stats.prefill_blocks, stats.decode_blocks, fetches]
        return figures, out.conversation.state.cache

    config = dataclasses.replace(
        get_preset("tiny").model, num_layers=2, num_kv_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        drawn = random_tensors(config, seed=0, scale=0.2)
        save_hf(folder, config, {name: load() for name, load in drawn.items()})
        one, held = outcome(folder, None)
        four, divided = outcome(folder, MeshConfig(model=4))
        rows, apart = outcome(folder, MeshConfig(data=2))
    def same(ours, theirs):
        return [bool(np.array_equal(np.asarray(a), np.asarray(b)))
                for a, b in zip(ours, theirs, strict=True)]

    # Which blocks have slots, and when each was last asked for.
    tables = [jax.tree.leaves([layer.table for layer in x.layers])
              for x in (held, divided, apart)]
    kv = [x.store.parts for x in (held, apart)]
    print(json.dumps({
        "four": four == one,
        "rows": rows == one,
        "misses": one[3][1],
        "shares": [part.data.nbytes / x.nbytes for x in divided.store.parts
                   for part in x.addressable_shards],
        "tables": same(tables[0], tables[1]) + same(tables[0], tables[2]),
        "bitwise": same(*kv),
        "written": bool(np.any(np.asarray(kv[0][0]))),
    }))
"""


@pytest.mark.slow
@pytest.mark.long
def test_four_devices_of_a_layer_and_two_of_rows_are_one():
    found = on_four_devices(FOUR)
    assert found["four"] and found["rows"]
    assert found["misses"] > 0
    assert found["shares"] == [0.25] * 4
    assert all(found["tables"]) and len(found["tables"]) == 6
    # Where rows are divided no sum is: keys and values are the same bits.
    assert found["bitwise"] == [True] and found["written"]
