"""Several devices give what one gives, and no KV ever leaves its own."""

import dataclasses
import math
import re
import threading
import weakref

import pytest
from mesh_cases import always_run, on_four_devices

import sparda_jax as sj
from sparda_jax.config import ConfigError
from sparda_jax.mesh import MeshConfig
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.sharding import config_of_device, placer
from sparda_jax.models.spec import LAYER, MESH_AXES, MODEL
from sparda_jax.models.weights import build_decoder, random_tensors
from sparda_jax.sparse.selectors import get_selector, selector_names

DEVICES = """
    import json
    import jax, numpy as np
    from jax.sharding import PartitionSpec
    import sparda_jax as sj
    from sparda_jax.cache.lint import lint_host_operands
    from sparda_jax.config import CacheConfig
    from sparda_jax.engine.call import Call
    from sparda_jax.engine.compile_cache import PROGRAMS
    from sparda_jax.inference.generate import new_state, pad_rows
    from sparda_jax.inference.prefill import prefill
    from sparda_jax.inference.shapes import plan_shapes
    from sparda_jax.mesh import MeshConfig
    from sparda_jax.models.rope import model_rope
    from sparda_jax.models.sharding import model_specs, on_device

    assert len(jax.devices()) == 4
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 128, n).tolist() for n in (600, 3, 130)]
    asked = dict(max_new_tokens=70, ignore_eos=True, temperature=1.5)
    sparse = sj.SparseConfig(local_blocks=2, block_budget=6)
    how = dict(attention="sparda", forecast="from_query", storage="stacked")
    there = CacheConfig(kind="offload", device_blocks=None, route="dynamic_slice")
    here = CacheConfig()
    found = {}

    def load(model, mesh, cache=here):
        return sj.load(model, mesh=mesh, cache=cache, sparse=sparse, **how)

    def outcome(lm, conversation=None, texts=prompts):
        out = sj.generate(lm, texts, conversation=conversation, **asked)
        stats, fetches = out.stats, None
        if stats.offload is not None:
            fetches = [stats.offload.hits, stats.offload.misses]
            fetches.append(stats.offload.fetched_bytes)
        blocks = [stats.prefill_blocks, stats.decode_blocks]
        return [out.tokens, blocks, fetches], out

    def lists(lm):
        shapes = plan_shapes(600, farthest_start=0, longest=600, max_new=0,
                             tile_size=lm.tile_size, block_size=64)
        prompt, rope = pad_rows([prompts[0]], shapes.prompt), model_rope(lm.config, 600)
        def run(model):
            model = on_device(model, lm.settings.config)
            state = new_state(model, lm.settings, 1, shapes, here)
            start = np.zeros(1, np.int32)
            return prefill(model, state.cache, prompt.tokens, start, prompt.count, rope,
                           lm.settings, tile_size=shapes.tile, capture=True).blocks
        if lm.mesh is not None:
            heads = PartitionSpec(None, None, "model")
            specs = model_specs(lm.model, lm.config)
            run = jax.shard_map(run, mesh=lm.mesh.devices, in_specs=(specs,),
                                out_specs=heads, check_vma=False)
        return np.sort(np.asarray(jax.jit(run)(lm.model))[:, :, :, :600], axis=-1)

    one, two = load("tiny", None), load("tiny", MeshConfig(model=2))
    logits = [sj.forward(lm, prompts[0]) for lm in (one, two)]
    found["logits"] = float(np.abs(logits[0] - logits[1]).max())
    found["lists"] = bool(np.array_equal(lists(one), lists(two)))
    expected, first = outcome(one)
    again, _ = outcome(one, first.conversation)
    resident, out = outcome(two)
    found["resident"] = resident == expected
    found["turn"] = outcome(two, out.conversation)[0] == again

    compiled, memory, linted = [], {1: [], 2: []}, []
    get = PROGRAMS.get
    def watch(function, arguments, static, *, donate=()):
        program, seconds = get(function, arguments, static, donate=donate)
        arrays = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
        own = [x.addressable_shards[0].data.nbytes for x in arrays]
        devices = max(len(x.sharding.device_set) for x in arrays)
        bytes = program.memory_analysis()
        memory[devices].append([sum(own), len(own), bytes.argument_size_in_bytes,
                                bytes.temp_size_in_bytes])
        if devices == 2:
            compiled.append(program.as_text())
            call = jax.jit(lambda *given: function(*given, **static))
            linted.extend(lint_host_operands(call.trace(*arguments).jaxpr))
        return program, seconds
    PROGRAMS.get = watch
    alone, _ = outcome(sj.with_attention(one, "sparda", cache=there))
    split, out = outcome(sj.with_attention(two, "sparda", cache=there))
    PROGRAMS.get = get
    found["memory"], found["linted"] = [memory[1], memory[2]], linted
    found["offload"] = split == alone and split[2][1] > 0
    found["offload tokens"] = split[0] == expected[0]
    store = out.conversation.state.cache.store.parts[0]
    found["host kinds"] = [store.sharding.memory_kind]
    found["host shards"] = [part.data.nbytes / store.nbytes
                            for part in store.addressable_shards]
    found["programs"] = compiled
    both = load("tiny", MeshConfig(data=2, model=2), there)
    found["rows"] = outcome(both)[0][:2] == split[:2]
    few = dict(texts=prompts[2:])
    moe = [outcome(load("tiny-moe", mesh), **few)[0]
           for mesh in (None, MeshConfig(model=2))]
    found["experts"] = moe[0] == moe[1]
    print(json.dumps(found))
"""


ONLY_ROWS = """
    import json
    import numpy as np
    import sparda_jax as sj
    from sparda_jax.mesh import MeshConfig

    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 128, n).tolist() for n in (600, 3, 130)]

    def outcome(mesh):
        lm = sj.load("tiny-nosa", mesh=mesh, attention="sparda", forecast="from_query",
                     sparse=sj.SparseConfig(local_blocks=2, block_budget=6),
                     storage="stacked")
        out = sj.generate(lm, prompts, max_new_tokens=70, ignore_eos=True,
                          temperature=1.5)
        return [out.tokens, out.stats.prefill_blocks, out.stats.decode_blocks]

    print(json.dumps([outcome(mesh) for mesh in (None, MeshConfig(data=2))]))
"""


SESSION = """
    import json
    import jax, numpy as np
    import sparda_jax as sj
    from sparda_jax.config import CacheConfig
    from sparda_jax.engine.compile_cache import PROGRAMS
    from sparda_jax.engine.session import Session
    from sparda_jax.mesh import MeshConfig

    rng = np.random.default_rng(0)
    shared = rng.integers(2, 128, 300).tolist()
    prompts = [shared + [5, 6, 7], shared + [8], [9, 10]]
    cache = CacheConfig(kind="offload", device_blocks=None, route="dynamic_slice")
    found = {}

    def answers(lm):
        session = Session.open(lm, rows=2, max_context=512, max_new_tokens=24,
                                  prefill_chunk=128, top_logprobs=3,
                                  prefix_bytes=2**24)
        session.warm_up()
        for row in (None, 0):  # of other steps: all arrays but one are the same
            one, other = (session.request(steps, row=row) for steps in (4, 7))
            pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
            assert sum(a is not b for a, b in pairs) == 1
        before, given = PROGRAMS.compiled, []
        for number, prompt in enumerate(prompts):
            row = session.join(prompt, max_new_tokens=20, ignore_eos=True, seed=number,
                               temperature=1.5, logprobs=number == 0,
                               score_prompt=number == 2)
            while not session.prefill(row):
                pass
            cached = session.cached_tokens(row)
            logs = [log.logprob for log in session.prompt_logprobs(row)]
            while row in session.running:
                session.decode(4)
            events = list(session.take_events())
            logs += [e.logs.logprob for e in events if e.logs is not None]
            out = session.leave(row)
            given.append([out.tokens, cached, logs])
        assert PROGRAMS.compiled == before, "compiled after the warm-up"
        return given

    def load(mesh):
        return sj.load("tiny", mesh=mesh, cache=cache, attention="sparda",
                       forecast="from_query", storage="stacked",
                       sparse=sj.SparseConfig(local_blocks=2, block_budget=4))

    one, two = answers(load(None)), answers(load(MeshConfig(model=2)))
    for a, b in zip(one, two):
        found.setdefault("tokens", []).append(a[0] == b[0])
        found.setdefault("cached", []).append([a[1], b[1]])
        found.setdefault("logs", []).append([len(a[2]), len(b[2])])
        gaps = [abs(x - y) for x, y in zip(a[2], b[2])]
        found["gap"] = max([found.get("gap", 0), *gaps])
    print(json.dumps(found))
"""


WAYS = """
    import json, sys
    import numpy as np
    import sparda_jax as sj
    from sparda_jax.config import CacheConfig
    from sparda_jax.mesh import MeshConfig
    from sparda_jax.sparse.selectors import get_selector

    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 128, n).tolist() for n in (400, 3)]
    few = dict(kind="offload", route="dynamic_slice", device_blocks=None)
    found = {}

    def outcome(mesh, attention, cache):
        lm = sj.load("tiny", mesh=mesh, attention=attention, forecast="from_query",
                     storage="stacked", cache=CacheConfig(**cache),
                     sparse=sj.SparseConfig(local_blocks=1, block_budget=4))
        out = sj.generate(lm, prompts, max_new_tokens=12, ignore_eos=True)
        stats, fetches = out.stats, None
        if stats.offload is not None:
            fetches = [stats.offload.hits, stats.offload.misses,
                       stats.offload.fetched_bytes]
        return [out.tokens, stats.prefill_blocks, stats.decode_blocks, fetches]

    for name in sys.argv[1:]:
        attention, _, more = name.partition(" ")
        resident = (attention in ("dense", "snapkv", "window")
                    or get_selector(attention).attends_tokens)
        cache = {} if resident else few | json.loads(more or "{}")
        one, two = (outcome(mesh, attention, cache)
                    for mesh in (None, MeshConfig(model=2)))
        found[name] = [one == two, one[3]]
    print(json.dumps(found))
"""


EVALUATION = """
    import dataclasses, json, pathlib, sys
    import sparda_jax as sj
    from evaluation_cases import character_tokenizer
    from sparda_jax.mesh import MeshConfig

    def records(mesh, out):
        lm = sj.load("tiny", mesh=mesh, forecast="from_query", storage="stacked")
        lm = dataclasses.replace(lm, tokenizer=character_tokenizer())
        tasks = ["passkey", "retr_kv", "perplexity_code", "agreement"]
        sj.evaluate(lm, out=out, attention=["sparda"], tasks=tasks, lengths=[900],
                    samples=2, batch=2, floor=0)
        return {file.name: [json.loads(line) for line in file.open()]
                for file in sorted(pathlib.Path(out, "results").iterdir())}

    one, two = (records(mesh, f"{sys.argv[1]}/{n}")
                for n, mesh in enumerate((None, MeshConfig(model=2))))
    print(json.dumps([one, two]))
"""


@pytest.fixture(scope="module")
def found():
    """What four devices gave, in a process of their own."""
    return on_four_devices(DEVICES)


@pytest.mark.slow
def test_logits_and_block_lists_are_those_of_one_device(found):
    assert found["logits"] < 1e-5
    assert found["lists"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["resident", "turn", "offload", "offload tokens", "rows", "experts"]
)
def test_tokens_blocks_and_fetches_are_those_of_one_device(found, how):
    assert found[how]


@pytest.mark.slow
def test_every_device_has_its_own_part_of_the_host_store(found):
    assert found["host kinds"] == ["pinned_host"]
    assert found["host shards"] == [0.5, 0.5]


@pytest.mark.slow
def test_a_device_holds_its_part_alone(found):
    """What the compiler says of a program is what a device's parts of arrays are."""
    alone, split = found["memory"]
    assert len(alone) == len(split) > 1
    for one, two in zip(alone, split, strict=True):
        for held, arrays, planned, _ in (one, two):
            # Arrays begin at round addresses; what is not used is left out.
            assert abs(planned - held) < 64 * arrays, (held, arrays, planned)
        assert two[2] < 0.75 * one[2], "weights and KV are halved, small arrays are not"
        assert two[3] < one[3], "scratch of half the heads"


@pytest.mark.slow
def test_nothing_is_computed_on_host_operands(found):
    assert found["linted"] == []


@pytest.mark.slow
def test_no_kv_is_exchanged(found):
    """Devices exchange sums of hidden states, logits and counters alone.

    Logits only for rows that filter: where all are greedy or hot, two numbers a row.
    """
    exchanged, drawn = [], []
    for program in found["programs"]:
        for line in program.splitlines():
            match = re.search(r"= (.*?) (all-[a-z-]+|collective[a-z-]*)\(", line)
            if match is None:
                continue
            exchanged.append(match[2].removesuffix("-start"))
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            # Hidden states end in D = 64, logits begin with V = 128; KV has 16 a head.
            for shape in shapes:
                sizes = [int(size) for size in shape.split(",") if size]
                assert sizes == [] or len(sizes) <= 2 or sizes[-1] == 64, line
        for line in always_run(program):
            if match := re.search(r"= (.*?) all-gather", line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
                sizes = [math.prod(map(int, s.split(","))) for s in shapes if s]
                assert max(sizes) < 64, (line, "a row's logits of one device are 64")
                drawn += [shape for shape in shapes if shape in ("2,6", "2,2")]
    assert drawn, "the best of every device"
    assert set(exchanged) == {"all-reduce", "all-gather"}


@pytest.mark.slow
@pytest.mark.long  # rows divided as heads are: above
def test_rows_divided_alone_are_those_of_one_device():
    """A model whose heads cannot be."""
    one, two = on_four_devices(ONLY_ROWS)
    assert one == two


@pytest.mark.slow
@pytest.mark.long
def test_a_session_on_two_devices_is_one_on_one():
    """Rows that join and leave, shared beginnings, log-probabilities."""
    found = on_four_devices(SESSION)
    assert found["tokens"] == [True] * 3
    assert found["cached"] == [[0, 0], [256, 256], [0, 0]]
    assert found["logs"] == [[20, 20], [0, 0], [1, 1]]
    assert found["gap"] < 1e-5


# NOSA's key bias is refused.
DIVIDED = [
    name
    for name in selector_names()
    if get_selector(name).divides_heads and name != "nosa"
]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("names", [DIVIDED[::2], DIVIDED[1::2]])
def test_every_selector_on_two_devices_is_itself_on_one(names):
    found = on_four_devices(WAYS, *names)
    assert {name: same for name, (same, _) in found.items()} == dict.fromkeys(
        names, True
    )


@pytest.mark.slow
@pytest.mark.long
def test_every_cache_on_two_devices_is_itself_on_one():
    ways = [
        'sparda {"codec": "int8"}',
        'sparda {"device_blocks": "auto"}',
        'sparda {"device_blocks": 5, "exactness": "verify"}',
        'sparda {"device_blocks": 5, "layers_ahead": 2}',
        'sparda {"layer0": "resident"}',
        'sparda {"kind": "resident", "route": "auto"}',
    ]
    found = on_four_devices(WAYS, *ways)
    assert all(same for same, _ in found.values()), found


@pytest.mark.slow
@pytest.mark.long
def test_an_evaluation_on_two_devices_is_one_on_one(tmp_path):
    """Answers, several questions on one text, surprises and nearness to dense's own."""
    one, two = on_four_devices(EVALUATION, str(tmp_path))
    assert one.keys() == two.keys()
    assert len(one) == 8, "four tasks by two ways to attend"
    for name, records in one.items():
        for first, second in zip(records, two[name], strict=True):
            assert first.keys() == second.keys()
            for field, value in first.items():
                close = isinstance(value, float | list) and field != "outputs"
                same = pytest.approx(value, abs=1e-4) if close else value
                assert second[field] == same, (name, field)


@pytest.mark.slow
@pytest.mark.long  # of two devices: above
def test_a_mesh_of_one_device_changes_nothing(token_ids):
    """The same programs under `shard_map`: resident, then offloaded."""
    cache = sj.CacheConfig(kind="offload", device_blocks=None, route="dynamic_slice")
    outcomes = []
    for mesh in (None, MeshConfig()):
        lm = sj.load(
            "tiny",
            attention="sparda",
            forecast="from_query",
            sparse=sj.SparseConfig(local_blocks=2, block_budget=6),
            storage="stacked",
            cache=cache,
            mesh=mesh,
        )
        out = sj.generate(lm, [token_ids(600)], max_new_tokens=20, ignore_eos=True)
        offload = out.stats.offload
        outcomes.append((out.tokens, out.stats.decode_blocks, offload.misses))
    assert outcomes[0] == outcomes[1]


def test_the_axis_of_every_dimension_is_in_the_table():
    letters = {letter for row in (*LAYER, *MODEL) for letter in row.shape}
    assert letters == set(MESH_AXES)


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        ("tiny", 3, "num_kv_heads=2 .* use model=2, or data=3"),
        ("llama-3.1-8b", 16, "num_kv_heads=8 .* use model=8, or data=16"),
        ("tiny-nosa", 2, "key bias"),
    ],
)
def test_what_cannot_be_divided_is_refused(model, parts, message):
    with pytest.raises(ConfigError, match=message):
        config_of_device(PRESETS[model].model, parts)


def test_a_mesh_is_loaded_with_a_few_layers_on_the_host():
    """What was read is gone when it lies on its devices; layers come one by one."""
    config = dataclasses.replace(PRESETS["tiny"].model, num_layers=24)
    held, most, sizes, lock = 0, 0, [], threading.RLock()

    def freed(size):
        nonlocal held
        with lock:
            held -= size

    def counted(load):
        def read():
            nonlocal held, most
            array = load()
            with lock:
                held += array.nbytes
                most = max(most, held)
            sizes.append(array.nbytes)
            weakref.finalize(array, freed, array.nbytes)
            return array

        return read

    tensors = random_tensors(config, seed=0, scale=0.2)
    told = []
    build_decoder(
        config,
        {name: counted(load) for name, load in tensors.items()},
        dtype="bfloat16",
        put=placer(config, MeshConfig(), "bfloat16"),
        on_layer=lambda: told.append(held),
    )
    assert len(told) == 24
    assert most < sum(sizes) / 3, (most, sum(sizes))


def test_a_mesh_needs_its_devices():
    with pytest.raises(ConfigError, match=r"mesh='data=64,model=2' .* at most"):
        sj.load("tiny", mesh=MeshConfig(data=64, model=2))


def test_devices_that_do_not_start_are_one_line(monkeypatch):
    """A card that is lost: JAX raises at its first call."""

    def lost():
        raise RuntimeError("Unable to initialize backend 'cuda': INTERNAL:\n no device")

    monkeypatch.setattr("jax.devices", lost)
    for call in (lambda: sj.load("tiny"), sj.describe_device):
        with pytest.raises(ConfigError, match=r"cannot start .* INTERNAL: no device; "):
            call()


@pytest.mark.parametrize("text", ["2", "model", "model=0", "model=2,model=2", "x=2"])
def test_text_that_is_no_mesh_is_refused(text):
    with pytest.raises(ConfigError, match=r"mesh|model"):
        MeshConfig.parse("--mesh", text)


def test_text_of_a_mesh():
    assert MeshConfig.parse("--mesh", "model=2") == MeshConfig(model=2)
    assert MeshConfig.parse("--mesh", "data=3,model=2").text == "data=3,model=2"
