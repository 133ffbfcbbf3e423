"""Devices that each have a part of the vocabulary's logits draw one device's tokens."""

import pytest
from mesh_cases import on_four_devices

PARTS = """
    import json
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    from sparda_jax.inference.logprobs import empty_logs, record_logs
    from sparda_jax.inference.sampling import (
        SamplingConfig, cannot_choose, sample, sampling_of_rows, without_stops)
    from sparda_jax.mesh import DATA, MODEL, MeshConfig

    rows, vocab = 8, 1024
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((rows, vocab)) * 3
    coarse = np.round(normal)  # Many equal values, over all devices.
    seen = rng.random((rows, vocab)) < 0.3
    place = jnp.arange(rows, dtype=jnp.int32) * 5
    stops = np.full((rows, 4), -1, np.int32)
    stops[:, 0], stops[::2, 1] = normal.argmax(1), vocab - 1
    early = np.arange(rows) % 4 != 1

    def drawn(scores, seen, place, state, stops, early):
        scores = without_stops(scores, stops, early, vocab)
        return sample(scores, seen, place, state), cannot_choose(scores, vocab)

    def logged(scores, tokens):
        room = empty_logs(tokens.shape[0], 1, 5)
        slot = jnp.zeros_like(tokens)
        return record_logs(room, scores, tokens, slot, jnp.bool_(True), vocab)

    of = P(DATA)
    def split(function, mesh, specs, out):
        return jax.jit(jax.shard_map(function, mesh=mesh.devices, in_specs=specs,
                                     out_specs=out, check_vma=False))

    one, logs_of_one = jax.jit(drawn), jax.jit(logged)
    meshes = MeshConfig(model=2), MeshConfig(model=4), MeshConfig(data=2, model=2)
    parts = {m.text: split(drawn, m, (P(DATA, MODEL), *[of] * 5), (of, of))
             for m in meshes}

    hot = dict(temperature=1.3)
    ways = {
        "greedy": [{}],
        "temperature": [hot],
        "penalty": [dict(repetition_penalty=2.0)],
        "hot penalty": [hot | dict(repetition_penalty=1.5)],
        "one": [hot | dict(top_k=1)],
        "few": [hot | dict(top_k=40)],
        "most candidates": [hot | dict(top_k=128)],
        "too many candidates": [hot | dict(top_k=129)],
        "all": [hot | dict(top_k=2000)],
        "top-p": [hot | dict(top_p=0.8)],
        "min-p": [hot | dict(min_p=0.05)],
        "few, top-p": [hot | dict(top_k=50, top_p=0.7)],
        "few, all": [hot | dict(top_k=50, top_p=0.9, min_p=0.02)],
        "off and few": [{}, hot, hot | dict(top_k=7), dict(top_k=900)],
        "each other": [{}, hot, hot | dict(top_k=7), hot | dict(top_p=0.5)],
    }
    # The first half of the rows, a group's with data=2, takes another branch.
    ways["groups"] = [{}] * 4 + [hot | dict(min_p=0.1)] * 4
    broken = normal.copy()
    broken[0, 700], broken[1, 3], broken[2] = np.nan, np.inf, -np.inf
    broken[3, 5] = -np.inf
    found = {}
    for name, configs in ways.items():
        many = [SamplingConfig(**c) for c in configs] * (rows // len(configs))
        state = sampling_of_rows(many, list(range(rows)))
        for kind, logits in dict(normal=normal, coarse=coarse, broken=broken).items():
            scores = jnp.asarray(logits, jnp.float32)
            given = (scores, seen, place, state, stops, early)
            tokens, bad = one(*given)
            clear = ~np.asarray(bad)
            for mesh, program in parts.items():
                others, ill = program(*given)
                found[f"{name}, {kind}, {mesh}"] = np.array_equal(
                    ill, bad) and np.array_equal(
                    np.asarray(others)[clear], np.asarray(tokens)[clear])
    found["some are broken"] = np.asarray(bad).tolist() == [True] * 3 + [False] * 5
    scores = jnp.asarray(normal, jnp.float32)
    logs = logs_of_one(scores, tokens)
    again = split(logged, meshes[2], (P(DATA, MODEL), of), of)(scores, tokens)
    found["logs"] = all(map(np.array_equal, again, logs))
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_devices_with_parts_of_the_vocabulary_draw_what_one_draws():
    """Every option, ties, values that are not finite, and groups that differ."""
    found = on_four_devices(PARTS)
    assert len(found) == 16 * 3 * 3 + 2
    assert [name for name, same in found.items() if not same] == []


ENGINE = """
    import json
    import numpy as np
    import sparda_jax as sj
    from sparda_jax.inference import sampling
    from sparda_jax.mesh import MeshConfig

    sampling._CANDIDATES = 8  # Of 64 tokens of a device.
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 128, n).tolist() for n in (70, 3, 9)]
    hot = dict(temperature=1.5)
    ways = [dict(), dict(repetition_penalty=1.5), hot | dict(top_k=5),
            hot | dict(top_k=8, top_p=0.8), hot | dict(top_p=0.9, min_p=0.02)]

    def outcome(mesh):
        lm = sj.load("tiny", mesh=mesh, attention="sparda", forecast="from_query",
                     storage="stacked")
        first = sj.generate(lm, prompts, max_new_tokens=4, ignore_eos=True).tokens
        stop = [row[1] for row in first]  # Greedy rows would end here.
        asked = dict(max_new_tokens=10, min_new_tokens=4, stop_ids=stop, seed=[7, 8, 9])
        return [sj.generate(lm, prompts, **asked, **way).tokens for way in ways]

    meshes = None, MeshConfig(model=2), MeshConfig(data=2, model=2)
    print(json.dumps([outcome(mesh) for mesh in meshes]))
"""


@pytest.mark.slow
def test_generation_on_two_and_four_devices_is_that_of_one():
    """Ragged rows, seeds, and stop tokens that no row may draw yet."""
    one, *others = on_four_devices(ENGINE)
    assert others == [one, one]
    assert all(4 <= len(row) <= 10 for rows in one for row in rows)
