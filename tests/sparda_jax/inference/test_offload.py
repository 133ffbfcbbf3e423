"""Offloaded KV gives what resident KV gives, bit for bit.

A whole conversation is one program here: a ragged prompt, decode steps in which rows
end one after the other, a further turn and more steps. Logits of every step and the
block lists of every layer are compared, as bits, with those of a resident cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_cases import Float16, Halves

from sparda_jax.cache.codecs import BlockCodec
from sparda_jax.cache.lint import lint_host_operands
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig, SparseConfig
from sparda_jax.inference.decode import decode_step
from sparda_jax.inference.generate import new_state
from sparda_jax.inference.prefill import prefill
from sparda_jax.inference.shapes import Shapes
from sparda_jax.models.decoder import logits
from sparda_jax.models.forecast import heads_from_query
from sparda_jax.models.rope import model_rope
from sparda_jax.planning.auto import offload_settings
from sparda_jax.sparse.selection import sorted_blocks
from sparda_jax.sparse.selectors import Selector, get_selector

SPARSE = SparseConfig(local_blocks=2, block_budget=6, query_blocks=2)
SMALL = dataclasses.replace(SPARSE, query_blocks=24)
BY_LAYER = dataclasses.replace(SPARSE, block_budget=(6, 4, 7))
INT8_KEYS = dataclasses.replace(SPARSE, compressed_keys="int8")
WIDE = 10_000  # more slots than any cache here has blocks


@dataclasses.dataclass(frozen=True)
class NextQuery(type(get_selector("sparda"))):
    """Looks ahead by the next layer's own W_q, group means of it: no Forecast heads."""

    name = "next_query"
    needs_forecast = False

    def next_query_weights(self, model, layer):
        config, index = model.config, layer % model.config.num_layers
        weights = jax.lax.dynamic_index_in_dim(
            model.layers.qkv[...], index, keepdims=False
        )
        width = config.num_heads * config.head_dim
        return heads_from_query(
            weights[:, :width], config.num_kv_heads, config.head_dim
        )


@dataclasses.dataclass(frozen=True)
class ByNumber(type(get_selector("sparda"))):
    """Forecasts that depend on the head that makes them alone, not on hidden states.

    Whichever layer makes them, the choice for a layer is then the same.
    """

    name = "by_number"

    def next_query(self, weights, x, rope_cos_sin):
        return super().next_query(weights, jnp.ones_like(x), rope_cos_sin)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to attend and to keep the cache."""

    attention: str | Selector = "sparda"
    nosa: bool = False
    storage: str = "stacked"
    slots: int | None = None
    prefetch: str | None = None
    layer0: str = "resident"
    exactness: str = "forecast"
    recall_every: int = 0
    route: str = "auto"
    sparse: SparseConfig = SPARSE
    codec: BlockCodec = dataclasses.field(default_factory=BlockCodec)
    layers_ahead: int = 1

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(
            kind="offload",
            device_blocks=self.slots,
            prefetch=self.prefetch,
            layers_ahead=self.layers_ahead,
            layer0=self.layer0,
            exactness=self.exactness,
            recall_every=self.recall_every,
            route=self.route,
        )

    def __str__(self) -> str:
        default = Case()
        fields = dataclasses.fields(self)
        named = {f.name: getattr(self, f.name) for f in fields if f.name != "sparse"}
        changed = [
            f"{name}={value}"
            for name, value in named.items()
            if value != getattr(default, name)
        ]
        extra = [] if self.sparse == SPARSE else ["sparse changed"]
        return ", ".join([*changed, *extra]) or "defaults"


@dataclasses.dataclass(frozen=True)
class Talk:
    """Lengths of a conversation: prompts, steps per row, a turn, steps per row.

    Prompts are padded to `padded`, if they are shorter: conversations of one such
    length share their programs.
    """

    prompts: tuple[int, ...]
    steps: tuple[int, ...]
    turn: tuple[int, ...]
    more: tuple[int, ...]
    padded: int = 0

    @property
    def width(self) -> int:
        return max(self.padded, *self.prompts, *self.turn)

    @property
    def capacity(self) -> int:
        """Room for it all, and for prefill to write whole tiles of any width."""
        rows = zip(self.prompts, self.steps, self.turn, self.more, strict=True)
        longest = max(
            max(self.padded, p) + s + max(self.width + 128, t + m)
            for p, s, t, m in rows
        )
        return -(-longest // 64) * 64


TALK = Talk((500, 3, 130), (150, 90, 70), (40, 130, 1), (70, 2, 66))


@functools.partial(jax.jit, static_argnames="settings")
def _prompt(model, kept, ids, lengths, count, rope, settings):
    return prefill(
        model, kept, ids, lengths, count, rope, settings, tile_size=128
    ).cache


@functools.partial(jax.jit, static_argnames=("settings", "steps"))
def _steps(model, kept, lengths, ends, rope, settings, steps):
    """Logits and lists of every step while rows are active, and the counters."""
    batch = lengths.shape[0]

    def step(loop, number):
        kept, lengths = loop
        active = number < ends
        token = (number * 7 + jnp.arange(batch) * 3) % 120 + 2
        carry = decode_step(
            model, kept, token, lengths, active, rope, settings, capture=True
        )
        scores = logits(model, carry.hidden[:, 0])
        scores = jnp.where(active[:, None], scores, 0)
        lists = sorted_blocks(carry.blocks[:, :, :, 0])
        lists = jnp.where(active[:, None, None], lists, -1)
        return (carry.cache, lengths + active), (scores, lists, carry.fetches)

    return jax.lax.scan(step, (kept, lengths), jnp.arange(steps))


def _settings(case: Case, model, offload: bool) -> LayerSettings:
    selector = get_selector(case.attention)
    if not offload and case.exactness == "verify":
        # What verifying must give: the own queries' choice.
        selector = LayerSettings(model.config, case.sparse, selector).own_query
    how = offload_settings(case.cache, selector) if offload else None
    if how is not None:
        how = dataclasses.replace(how, codec=case.codec)
    return LayerSettings(model.config, case.sparse, selector, offload=how)


def _run(case: Case, model, talk: Talk, offload: bool):
    """Logits, lists and counters of both turns' steps."""
    settings = _settings(case, model, offload)
    batch = len(talk.prompts)
    shapes = Shapes(prompt=0, new=1, capacity=talk.capacity, tile=128)
    kept = new_state(model, settings, batch, shapes, case.cache).cache
    rope = model_rope(settings.config, talk.capacity)
    lengths, seen = jnp.zeros((batch,), jnp.int32), []
    rng = np.random.default_rng(0)
    for prompts, steps in ((talk.prompts, talk.steps), (talk.turn, talk.more)):
        ids = jnp.asarray(rng.integers(2, 128, (batch, talk.width)), jnp.int32)
        count = jnp.asarray(prompts, jnp.int32)
        kept = _prompt(model, kept, ids, lengths, count, rope, settings)
        ends = jnp.asarray(steps, jnp.int32)
        (kept, lengths), out = _steps(
            model,
            kept,
            lengths + count,
            ends,
            rope,
            settings,
            max(*talk.steps, *talk.more),
        )
        seen.append(out)
    return seen


@pytest.fixture(scope="module")
def resident(deeper):
    """What a resident cache gives; computed once for cases that differ in caching."""

    @functools.cache
    def run(attention, nosa, storage, exactness, sparse, talk):
        case = Case(
            attention=attention,
            nosa=nosa,
            storage=storage,
            exactness=exactness,
            sparse=sparse,
        )
        return _run(case, deeper(nosa, storage), talk, offload=False)

    def of(case: Case, talk: Talk):
        return run(
            case.attention, case.nosa, case.storage, case.exactness, case.sparse, talk
        )

    return of


def _check(case: Case, talk: Talk, deeper, resident):
    expected = resident(case, talk)
    got = _run(case, deeper(case.nosa, case.storage), talk, offload=True)
    for turn, (want, have) in enumerate(zip(expected, got, strict=True)):
        for name, a, b in zip(("logits", "lists"), want[:2], have[:2], strict=True):
            a, b = np.asarray(a), np.asarray(b)
            different = np.argwhere(a != b)
            assert not len(different), f"turn {turn}: {name} differ at {different[0]}"
    return got


CASES = (
    Case(),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case(exactness="verify", layers_ahead=2, sparse=INT8_KEYS),
            # A quota that the budget has no room for; nothing is fetched ahead.
            Case("nosa", nosa=True, sparse=SMALL),
            # Single tokens, read from a slot for every block.
            Case("magicpig_tokens", layer0="offload", slots=WIDE),
        )
    ),
    *(
        pytest.param(case, marks=[pytest.mark.slow, pytest.mark.long])
        for case in (
            # What each has is in CI too: `verify`, two layers ahead, own queries alone
            # and every layer 0 here, codecs in `test_int8_codec`, all blocks in slots
            # in `test_auto`, selectors in `test_every_selector` and `test_rows`.
            Case(attention="infllm_v2", layer0="offload"),
            Case(attention="dense", slots=WIDE),
            Case(codec=Halves(), exactness="verify"),
            Case(exactness="verify"),
            Case(NextQuery(), prefetch="lookahead"),
            Case("reuse", exactness="verify"),
            Case(ByNumber(), layers_ahead=3, layer0="offload"),
            Case("snapkv", layer0="offload"),
            Case(slots=WIDE, recall_every=4),
            Case("quest", layer0="offload", slots=7),
            Case("quest_16"),
            Case("infllm_v2_bounds"),
            Case(ByNumber(), layers_ahead=2, slots=7, storage="per_layer"),
            Case(ByNumber(), layers_ahead=8, storage="per_layer", layer0="offload"),
            Case("infinigen", slots=7, recall_every=4),
            Case("infinigen", storage="per_layer", layer0="offload", prefetch="none"),
            Case("infllm", slots=7, layer0="offload"),
            Case("sparda_bounds", exactness="verify"),
            Case("sparda_bounds", storage="per_layer", layer0="offload", slots=7),
            Case("magicpig"),
            Case("magicpig_tokens", nosa=True, storage="per_layer", slots=WIDE),
            Case("nosa", nosa=True, storage="per_layer", sparse=BY_LAYER),
            Case(nosa=True, storage="per_layer", layer0="offload", slots=7),
            Case(layer0="offload", slots=7),
            Case("reuse"),
            Case("reuse", storage="per_layer", layer0="offload", prefetch="none"),
            Case("oracle", nosa=True),
            Case(sparse=INT8_KEYS),
            Case(sparse=INT8_KEYS, storage="per_layer", exactness="verify", slots=12),
            Case(ByNumber(), layers_ahead=2),
            Case(ByNumber(), layers_ahead=2, prefetch="none"),
            Case("snapkv", layers_ahead=2),
            Case("infinigen", exactness="verify"),
            Case(sparse=BY_LAYER),
        )
    ),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conversation_equals_resident(case, deeper, resident):
    got = _check(case, TALK, deeper, resident)
    fetches = got[0][2]
    everything = case.attention == "dense" or case.slots == WIDE
    assert (int(fetches.fetched.sum()) == 0) == everything
    if case.layer0 == "resident":
        assert int(fetches.fetched[:, 0].sum()) == int(fetches.hits[:, 0].sum()) == 0
    if case.exactness == "verify":
        assert 0 < int(fetches.repaired.sum()) < int(fetches.fetched.sum())
    if case.recall_every or case.exactness == "verify":
        assert 0 < int(fetches.recall_hits.sum()) <= int(fetches.recall_total.sum())


@pytest.mark.slow
@pytest.mark.long  # keys in 8 bits, verified, and NOSA's bias: above
@pytest.mark.parametrize(
    "case", [Case("oracle", nosa=True), Case(sparse=INT8_KEYS)], ids=str
)
def test_a_short_conversation_equals_resident(case, deeper, resident):
    """Two of the long ones above."""
    talk = Talk((450, 3), (70, 66), (20, 60), (20, 10))
    got = _check(case, talk, deeper, resident)
    assert int(got[0][2].fetched.sum()) > 0


@pytest.mark.slow
@pytest.mark.long  # by 8 bits: `test_int8_codec`
def test_a_lossy_host_format_rounds_what_it_keeps(deeper, resident):
    case = Case(codec=Float16())
    expected = resident(case, TALK)
    got = _run(case, deeper(False, "stacked"), TALK, offload=True)
    for want, have in zip(expected, got, strict=True):
        np.testing.assert_allclose(have[0], want[0], atol=0.05)
        assert (np.asarray(have[0]) != want[0]).any()


# Every way to attend with the budget, one more, twice as many and all; storage and
# layer 0 alternate.
SLOTS = (None, 7, 12, WIDE)
KEPT = (("stacked", "resident"), ("per_layer", "offload"))
MATRIX = [
    Case(attention, nosa, storage, slots, prefetch, layer0)
    for row, (attention, nosa, prefetch) in enumerate(
        (
            ("sparda", False, "lookahead"),
            ("sparda", False, "none"),
            ("sparda", True, "lookahead"),
            ("sparda", True, "none"),
            ("infllm_v2", False, None),
            ("nosa", True, None),
        )
    )
    for column, slots in enumerate(SLOTS)
    for storage, layer0 in (KEPT[(row + column) % 2],)
]


@pytest.mark.slow
@pytest.mark.long  # forecasts and NOSA's queries: above; an array a layer: `test_rows`
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix_equals_resident(case, deeper, resident):
    _check(case, TALK, deeper, resident)


LONG = (
    Case(sparse=dataclasses.replace(SPARSE, dense_len=320)),
    Case(sparse=dataclasses.replace(SPARSE, forecast_decode_only=True)),
    Case(),
    Case(storage="per_layer", exactness="verify", layer0="offload"),
    Case(storage="per_layer", slots=7, layer0="offload"),
    Case(attention="infllm_v2"),
    Case(attention="nosa", nosa=True, slots=12),
)


@pytest.mark.slow
@pytest.mark.long  # prompts of any length, and steps across an end: below
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_conversation_equals_resident(case, deeper, resident):
    """1,000 tokens of prompt and 700 steps: blocks and windows begin and end."""
    _check(case, Talk((1000,), (700,), (1,), (10,)), deeper, resident)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 31, 63, 64, 65, 127, 128, 384, 385, 1000])
def test_every_prompt_length_equals_resident(length, deeper, resident):
    talk = Talk((length,), (66,), (3,), (4,), padded=1000)
    _check(Case(layer0="offload"), talk, deeper, resident)


@pytest.mark.slow
@pytest.mark.long  # three ragged rows: every conversation above
def test_large_ragged_batch_equals_resident(deeper, resident):
    prompts = (1, 64, 65, 200, 511, 512, 900, 33)
    steps = (130, 1, 64, 65, 3, 127, 128, 90)
    talk = Talk(prompts, steps, (5, 64, 1, 1, 70, 2, 3, 128), (66,) * 8)
    _check(Case(), talk, deeper, resident)


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", ["lookahead", "none"])
@pytest.mark.parametrize("route", ["mosaic", "triton", "dynamic_slice"])
def test_routes_on_a_gpu(route, prefetch, deeper, resident):
    """Kernels that read pinned memory; a GPU's GEMMs may differ between programs."""
    case = Case(storage="per_layer", route=route, prefetch=prefetch)
    expected = resident(case, TALK)
    got = _run(case, deeper(False, "per_layer"), TALK, offload=True)
    for want, have in zip(expected, got, strict=True):
        np.testing.assert_allclose(have[0], want[0], atol=1e-3)
        assert int(have[2].fetched.sum()) > 0


@pytest.mark.slow
def test_ended_rows_cost_no_transfers(deeper):
    """Rows that have ended list nothing, so nothing is fetched for them."""
    talk = dataclasses.replace(TALK, steps=(100, 20, 20))
    got = _run(Case(layer0="offload"), deeper(False, "stacked"), talk, offload=True)
    fetches = got[0][2]
    asked = np.asarray(fetches.hits + fetches.fetched).sum(1)
    # Two kv heads, three layers, at most six blocks; 500 tokens are eight blocks.
    assert asked[50] <= 2 * 3 * 6
    assert asked[10] > asked[50]


@pytest.mark.parametrize("case", [Case(), Case(storage="per_layer", prefetch="none")])
def test_no_host_computation_in_the_pipeline(case, deeper):
    model = deeper(case.nosa, case.storage)
    settings = _settings(case, model, offload=True)
    shapes = Shapes(prompt=128, new=32, capacity=1024, tile=128)
    state = new_state(model, settings, 2, shapes, case.cache)
    from sparda_jax.inference.generate import Prompt, Request, generate_loop
    from sparda_jax.inference.sampling import SamplingConfig, sampling_state

    request = Request(
        sampling=sampling_state(SamplingConfig(), 0, 2),
        stops=jnp.full((16,), -1, jnp.int32),
        max_new=jnp.full((2,), 8, jnp.int32),
        steps=jnp.int32(8),
        rope=model_rope(model.config, 1024),
    )
    prompt = Prompt(jnp.zeros((2, 128), jnp.int32), jnp.asarray([5, 100], jnp.int32))
    call = functools.partial(generate_loop, settings=settings, tile_size=128)
    traced = jax.jit(call).trace(model, state, prompt, request)
    assert lint_host_operands(traced.jaxpr) == []
    assert "host" in str(traced.jaxpr), "the store must be typed as a host array"


# The public API.
