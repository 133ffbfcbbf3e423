"""The boundary of the public functions: every argument has a row of values that are not
allowed, and each of them is a ConfigError of one line, before any device work.

A new argument, or a new public name, fails here until it has a row.
"""

import dataclasses
import decimal
import inspect
import math
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from boundary_values import (
    CONFIG,
    DTYPE,
    FLAG,
    FUNCTION,
    HUGE,
    IDS,
    INTEGER,
    MESSAGES,
    NAMES,
    NOTHING,
    NUMBER,
    NUMBERS,
    PATH,
    PROMPT,
    PROMPTS,
    RAGGED,
    SEEDS,
    STOP,
    TEXT,
    WORD,
    maybe,
)
from evaluation_cases import character_tokenizer

import sparda_jax as sj
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import shown
from sparda_jax.engine import batch
from sparda_jax.engine.generate_config import GenerateOptions
from sparda_jax.inference.sampling import SamplingConfig
from sparda_jax.planning import measure

_SAMPLING = {
    "temperature": (*NUMBER, 1e30),
    "top_k": (*INTEGER, -1),
    "top_p": (*NUMBER, 0.0, 1.5),
    "min_p": (*NUMBER, 1.5),
    "repetition_penalty": (*NUMBER, 0.0, 1e-30, 1e30),
}
_OPTIONS = {
    "max_new_tokens": (*INTEGER, 0),
    "min_new_tokens": INTEGER,
    **_SAMPLING,
    # Some number of seeds: how many there must be, the prompts say.
    "seed": (*(v for v in SEEDS if not isinstance(v, np.ndarray)), 2**32),
    "n": (*INTEGER, 0),
    "stop_ids": IDS,
    "stop": STOP,
    "max_context": (*maybe(INTEGER), 0),
    "prefill_chunk": (*maybe(INTEGER), 0),
}
_REQUEST = {
    "lm": CONFIG,
    "prompts": PROMPTS,
    "config": maybe(CONFIG),
    "conversation": maybe(CONFIG),
    **_OPTIONS,
    # The prompts and the model have their say as well.
    "seed": (*SEEDS, 2**32, [1, 2]),
    "stop_ids": (*IDS, [10**6]),
    "include_stop": FLAG,
    "ignore_eos": FLAG,
}
_CHOSEN = {
    "attention": WORD,
    "sparse": maybe(CONFIG),
    "cache": maybe(CONFIG),
}
_CHAT = {
    "lm": CONFIG,
    "messages": MESSAGES,
    "config": (*maybe(CONFIG), sj.GenerateConfig(n=2)),
    "chat_args": (3, "ab", math.nan, [1], {1: 2}, NOTHING, {"x": HUGE}),
    "answer_prefix": TEXT,
    "conversation": maybe(CONFIG),
    "options": (3, None),
}
ROWS = {
    "load": {
        "model": (*PATH, "no/such/model.gguf", "no-such-preset"),
        **_CHOSEN,
        "forecast": (*maybe(PATH), "no/such/file.safetensors"),
        "forecast_base": WORD,
        "dtype": DTYPE,
        "weights": maybe(WORD),
        "storage": WORD,
        "implementation": maybe(WORD),
        "mesh": maybe(CONFIG),
        "on_layer": FUNCTION,
    },
    "with_attention": {"lm": CONFIG, **_CHOSEN, "forecast": maybe(WORD)},
    "forward": {"lm": CONFIG, "ids": PROMPT},
    "generate": {**_REQUEST, "single_call": FLAG},
    "stream": {**_REQUEST, "tokens_per_call": (*INTEGER, 0), "on_progress": FUNCTION},
    "chat": _CHAT,
    "stream_chat": {
        **_CHAT,
        "tokens_per_call": (*INTEGER, 0),
        "on_progress": FUNCTION,
    },
    "plan": {
        "model": (*PATH, "no/such/model.gguf", {}),
        "context": (*INTEGER, 0, 2**30),
        "hbm_gib": (*NUMBER, 0.0),
        "host_gib": (*NUMBER, 0.0),
        "rates": CONFIG,
        "batch": (*INTEGER, 0),
        **_CHOSEN,
        "miss": (*maybe(NUMBER), 1.5),
        "trace": (*maybe(PATH), "no/such/trace.npz"),
        "dtype": (*DTYPE, None),
        "max_new_tokens": (*INTEGER, 0),
        "prefill_chunk": (*maybe(INTEGER), 0),
        "mesh": maybe(CONFIG),
    },
    "measure_rates": {
        "block_size": (*INTEGER, 0, 2**30),
        "head_dim": (*INTEGER, 0, 2**30),
        "dtype": (*DTYPE, None),
        "route": WORD,
        "store_bytes": (*maybe(INTEGER), 0, 2**60),
    },
    "recorded_rates": {"device_kind": TEXT},
    "configure_cache": {"directory": (*maybe(PATH), "/dev/null/xla")},
    "configure_offload": {},
    "describe_device": {"measure": FLAG},
    "evaluate": {
        "lm": CONFIG,
        "out": PATH,
        "attention": (*NAMES, ["no such selector"]),
        "tasks": (*NAMES, ["no such task"], []),
        "lengths": (
            3.0,
            None,
            "ab",
            b"ab",
            [],
            [0],
            [1.5],
            [True],
            [HUGE],
            RAGGED,
            {1: 2},
        ),
        "budgets": (3, None, "25%", [0], ["0%"], ["200%"], [math.nan], [True], [HUGE]),
        "samples": (*INTEGER, 0),
        "seed": (*INTEGER, -1),
        "batch": (*maybe(INTEGER), 0),
        "floor": (*NUMBER, 101),
        "task_files": (3, None, "ab", b"ab", [3], [""], ["no/such.jsonl"], {1: 2}),
        "time_limit": (*maybe(NUMBER), 0.0),
        "progress": FLAG,
        "commit": (*maybe(TEXT), ""),
    },
    "adapt": {
        "model": (*PATH, "no/such/model.gguf", "no-such-preset"),
        "out": (*PATH, "heads.bin"),
        "progress": FLAG,
        "options": (3, None),
    },
    "read_report": {"folder": (*PATH, "no/such/folder", "no\nsuch\u2028folder")},
    "selector_names": {},
    "Rates": {
        **dict.fromkeys(("memory", "fetch"), (*NUMBER, 0.0)),
        **dict.fromkeys(("link", "peak"), (*maybe(NUMBER), 0.0)),
        **dict.fromkeys(("layer", "row", "decode"), NUMBER),
        "route": WORD,
        "source": TEXT,
    },
    "RopeConfig": {
        "kind": WORD,
        **dict.fromkeys(
            (
                *("theta", "factor", "low_freq_factor", "high_freq_factor"),
                *("beta_fast", "beta_slow"),
            ),
            (*NUMBER, 0.0),
        ),
        **dict.fromkeys(("original_max", "longrope_max"), (*maybe(INTEGER), 0)),
        **dict.fromkeys(("short_factors", "long_factors"), NUMBERS),
        "attention_factor": (*maybe(NUMBER), 0.0),
    },
    "ModelConfig": {
        "name": TEXT,
        **dict.fromkeys(
            (
                *("vocab_size", "hidden_size", "ffn_size", "num_layers", "num_heads"),
                *("num_kv_heads", "head_dim", "max_context", "forecast_queries"),
            ),
            (*INTEGER, 0, -1),
        ),
        "forecast_reads": WORD,
        "rope": CONFIG,
        **dict.fromkeys(
            ("rms_norm_eps", "embed_scale", "residual_scale", "logits_divisor"),
            (*NUMBER, 0.0),
        ),
        **dict.fromkeys(
            (
                *("num_experts", "experts_per_token", "shared_ffn_size"),
                "forecast_queries",
            ),
            (*INTEGER, -1),
        ),
        "bos_id": (*maybe(INTEGER), 10**6),
        "eos_ids": (*IDS, [10**6]),
    },
    "SparseConfig": {
        **dict.fromkeys(
            (
                *("kernel_size", "kernel_stride", "block_size", "local_blocks"),
                "block_budget",
            ),
            (*INTEGER, 0, -1),
        ),
        "init_blocks": (*INTEGER, -1),
        "query_blocks": (*INTEGER, -1),
        "dense_len": (*INTEGER, -2),
        "compressed_keys": (*WORD, "int8_slots"),
    },
    "CacheConfig": {
        **dict.fromkeys(("kind", "layer0", "route", "exactness", "codec"), WORD),
        "prefetch": maybe(WORD),
        "device_blocks": (*maybe(INTEGER), 0),
        "layers_ahead": (*INTEGER, 0, 9, -1),
        "recall_every": (*INTEGER, -1),
        "device_limit": (*maybe(INTEGER), 0),
        "host_limit": (*maybe(INTEGER), 0),
    },
    "MeshConfig": dict.fromkeys(("data", "model"), (*INTEGER, 0, -1)),
    "GenerateConfig": _OPTIONS,
    "SamplingConfig": _SAMPLING,
    "Selector": {},
    "LanguageModel": {
        **dict.fromkeys(("model", "config", "sparse", "selector", "cache"), CONFIG),
        **dict.fromkeys(("tokenizer", "forecast_sparse", "mesh"), maybe(CONFIG)),
        **dict.fromkeys(("fingerprint", "tokenizer_error"), maybe(TEXT)),
        "implementation": maybe(WORD),
    },
}
# What the package makes and hands out, and names that are not called.
RESULTS = {"ChatOutput", "Conversation", "Forecast", "GenerateOutput", "GenerateStats"}
RESULTS |= {"ChatStream", "OffloadStats", "Plan", "Stream", "StreamEvent"}
RESULTS |= {"MachineReport", "Report"}
NOT_CALLED = {"CheckpointError", "ConfigError", "PRESETS", "__version__"}


def _call(name: str):
    return SamplingConfig if name == "SamplingConfig" else getattr(sj, name)


def _parameters(name: str) -> set[str]:
    """Names of a callable's arguments, those of `GenerateConfig` spelt out."""
    names = set(inspect.signature(_call(name)).parameters)
    if name in ("generate", "stream"):
        names -= {"options"}
        names |= {field.name for field in dataclasses.fields(sj.GenerateConfig)}
    return names


def _flags(name: str) -> list[str]:
    """Boolean fields of a configuration."""
    kind = _call(name)
    if not dataclasses.is_dataclass(kind):
        return []
    return [field.name for field in dataclasses.fields(kind) if field.type is bool]


@pytest.fixture(scope="module")
def lm():
    return sj.load("tiny", attention="infllm_v2", storage="stacked")


@pytest.fixture(scope="module")
def allowed(lm, tmp_path_factory):
    """Arguments with which each callable would do its work."""
    small = {"hidden_size": 8, "ffn_size": 8, "num_layers": 2, "num_heads": 2}
    small |= {"num_kv_heads": 1, "head_dim": 4, "max_context": 64, "vocab_size": 9}
    machine = {"context": 2048, "hbm_gib": 1.0, "host_gib": 1.0}
    request = {"lm": lm, "prompts": [[1]], "max_new_tokens": 2}
    talk = {"lm": lm, "messages": [{"role": "user", "content": "x"}]}
    texts = dataclasses.replace(lm, tokenizer=character_tokenizer())
    run = {"lm": texts, "out": tmp_path_factory.mktemp("out"), "lengths": [1024]}
    return {
        "load": {"model": "tiny"},
        "adapt": {"model": "tiny", "out": run["out"] / "heads.safetensors"},
        "evaluate": {**run, "attention": ["window"], "samples": 1},
        "with_attention": {"lm": lm, "attention": "dense"},
        "forward": {"lm": lm, "ids": [1]},
        "generate": request,
        "stream": request,
        "chat": talk,
        "stream_chat": talk,
        "plan": {"model": "tiny", "rates": sj.Rates(1e9, 1e9), **machine},
        "recorded_rates": {"device_kind": "NVIDIA H200"},
        "Rates": {"memory": 1e9, "fetch": 1e9},
        "ModelConfig": {"name": "m", **small},
        "Selector": {},
        "LanguageModel": vars(lm),
    }


@pytest.fixture
def no_work(monkeypatch):
    """Fails where a refused call gets as far as making arrays."""

    def never(*arguments, **named):
        raise AssertionError("a bad value must be refused before this")

    monkeypatch.setattr(sj.loading, "build_decoder", never)
    monkeypatch.setattr(batch, "new_state", never)
    monkeypatch.setattr(measure, "_pinned_store", never)


def test_every_public_name_is_in_the_table():
    assert set(sj.__all__) == set(ROWS) - {"SamplingConfig"} | RESULTS | NOT_CALLED


@pytest.mark.parametrize("name", ROWS)
def test_every_argument_has_a_row(name):
    assert {*ROWS[name], *_flags(name)} == _parameters(name)


CASES = [(name, argument) for name in ROWS for argument in (*ROWS[name], *_flags(name))]


@pytest.mark.usefixtures("without_type_checks", "no_work")
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_bad_values_are_one_line(name, argument, allowed):
    for bad in ROWS[name].get(argument, FLAG):
        arguments = {**allowed.get(name, {}), argument: bad}
        try:
            _call(name)(**arguments)
        except (sj.ConfigError, CheckpointError) as error:
            line = str(error)
            assert "\n" not in line
            assert len(line) < 500
            assert "object at" not in line or bad is NOTHING or "count" in repr(bad)
        except Exception as error:
            kind = type(error).__name__
            pytest.fail(f"{argument}={shown(bad)} raised {kind}: {error}")
        else:
            pytest.fail(f"{argument}={shown(bad)} is taken")


# Other libraries' values are taken where they are what is asked, and kept in one form.
_SAME = {int: (np.int64, np.uint8, np.array, jnp.array), bool: (np.bool_,)}
_SAME[float] = (np.float64, np.array, decimal.Decimal)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "name",
    [
        "RopeConfig",
        "ModelConfig",
        "SparseConfig",
        "CacheConfig",
        "Rates",
        "GenerateConfig",
    ],
)
def test_values_of_other_libraries(name, allowed):
    made = _call(name)(**allowed.get(name, {}))
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        for form in _SAME.get(type(value), ()):
            if value == -1 and form is np.uint8:
                continue
            if type(value) is int and value > 255 and form is np.uint8:
                continue
            other = dataclasses.replace(made, **{field.name: form(value)})
            assert other == made
            assert type(getattr(other, field.name)) is type(value)
            assert hash(other) == hash(made)


@pytest.mark.usefixtures("without_type_checks")
def test_sequences_and_integers_of_other_libraries():
    rope = sj.RopeConfig(
        kind="longrope",
        original_max=np.int32(8),
        short_factors=np.ones(2),
        long_factors=[1, 2],
    )
    assert rope.short_factors == (1.0, 1.0)
    assert rope.long_factors == (1.0, 2.0)
    assert hash(rope)


@pytest.mark.usefixtures("without_type_checks")
def test_a_request_of_other_libraries_values_is_the_plain_one(lm):
    plain = sj.generate(
        lm,
        [[3, 4], [5, 6], [8, 9]],
        max_new_tokens=3,
        seed=[1, 2, 3],
        stop_ids=[7],
        top_k=2,
    )
    other = sj.generate(
        lm,
        jnp.array([[3, 4], [5, 6], [8, 9]]),
        max_new_tokens=np.int64(3),
        temperature=np.float32(0.0),
        top_k=jnp.array(2),
        seed=np.array([1, 2, 3]),
        stop_ids={np.int32(7)},
        ignore_eos=np.bool_(False),
        prefill_chunk=np.uint16(512),
    )
    assert other.tokens == plain.tokens
    assert other.stats.compile_seconds == 0


@pytest.mark.usefixtures("without_type_checks")
def test_a_fork_counts_rows(lm):
    conversation = sj.generate(lm, [[3, 4]], max_new_tokens=3).conversation
    for bad in (*maybe(INTEGER), 0):
        with pytest.raises(sj.ConfigError, match="rows="):
            conversation.fork(bad)
    assert conversation.fork(np.int64(2)).lengths == conversation.lengths * 2


def test_options_are_the_fields_of_the_configuration():
    fields = {field.name: field.type for field in dataclasses.fields(sj.GenerateConfig)}
    assert typing.get_type_hints(GenerateOptions) == fields


@pytest.mark.usefixtures("without_type_checks")
def test_a_configuration_is_kept_in_one_form():
    plain = sj.GenerateConfig(stop=("a",), stop_ids=(7,), seed=(1, 2))
    other = sj.GenerateConfig(stop="a", stop_ids=np.array([7]), seed=jnp.array([1, 2]))
    assert other == plain
    assert hash(other) == hash(plain)


def test_a_request_by_configuration_is_the_one_by_arguments(lm):
    config = sj.GenerateConfig(max_new_tokens=5, stop_ids=[7], top_k=2, ignore_eos=True)
    plain = sj.generate(
        lm, [[3, 4]], max_new_tokens=3, stop_ids=[7], top_k=2, ignore_eos=True
    )
    # An argument goes before the configuration's field, and leaves the others.
    assert sj.generate(lm, [[3, 4]], config, max_new_tokens=3).tokens == plain.tokens
    parts = list(sj.stream(lm, [[3, 4]], config=config, max_new_tokens=3))
    assert [part.token for part in parts] == plain.tokens[0]
    with pytest.raises(TypeError, match="max_tokens"):
        sj.generate(lm, [[3, 4]], config, max_tokens=3)
