"""What int8 costs: the figures of runs that differ by what is known."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from benchmarks.codec_error import (
    Run,
    compare,
    error_by_layer,
    main,
    report,
    stored_blocks,
)
from sparda_jax.cache.codecs import BlockCodec, Int8Codec
from sparda_jax.cache.host_store import HostStore
from sparda_jax.models.presets import get_preset


def _blocks():
    """A layer of blocks as they are, and rounded."""
    random = np.random.default_rng(0)
    blocks = random.standard_normal((1, 1, 2, 5, 64, 2, 16)).astype(np.float32)
    stores = []
    for codec in (BlockCodec(), Int8Codec()):
        empty = HostStore.empty((1, 1, 2, 5), (64, 2, 16), jnp.float32, codec)
        parts = codec.encode(jnp.asarray(blocks))
        store = empty.with_numpy(tuple(map(np.asarray, parts)))
        stores.append(stored_blocks(store, 4))
    np.testing.assert_array_equal(stores[0], blocks[:, 0, :, :4])
    return stores


def test_normal_numbers_are_off_by_half_a_percent():
    exact, rounded = _blocks()
    assert (error_by_layer(exact, exact) == 0).all()
    found = error_by_layer(exact, rounded)
    assert found.shape == (1, 2)
    assert ((found > 0.003) & (found < 0.008)).all()


def test_runs_are_compared(tmp_path):
    @dataclasses.dataclass
    class Model:
        sparse = get_preset("tiny").sparse

    exact, rounded = _blocks()
    random = np.random.default_rng(1)
    scores = random.standard_normal((4, 8))
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    lists = np.tile(np.arange(4), (4, 1, 2, 1))
    ids = random.integers(0, 8, 64 * 40).tolist()
    same = compare(Run(exact, logs, lists), Run(exact, logs, lists), ids[:324], Model())
    assert same["same_likeliest"] == same["same_blocks"] == 1
    assert same["divergence"]["most"] == 0 and max(same["k_error"]) == 0
    assert same["perplexity"]["exact"] == same["perplexity"]["int8"]
    asked = np.asarray(ids[321:324])
    want = np.exp(-logs[np.arange(3), asked].mean())
    assert abs(same["perplexity"]["exact"] - want) < 1e-9
    other = compare(
        Run(exact, logs, lists),
        Run(rounded, logs[:, ::-1], lists + 1),
        ids[:324],
        Model(),
    )
    assert other["divergence"]["mean"] > 0 and other["v_error"][0] > 0
    keys = {"exact": 2, "int8": 2, "same_tokens": 1, "asked": 2}
    facts = {"model": "m", "text": "t", "context": 324, "attention": "a"}
    facts |= {"dtype": "d", "device": "x", "jax": "0", "passkeys": keys}
    assert "| 0 | " in report(other | facts)


def test_bad_input(capsys, monkeypatch):
    monkeypatch.setattr("sparda_jax.runtime.configure_offload", lambda: None)
    assert main(["--context", "-1"]) == 2
    assert main(["--model", "tiny", "--context", "100"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
