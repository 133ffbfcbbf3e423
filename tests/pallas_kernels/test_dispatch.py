"""Which implementation serves a call, and what the records say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from kernel_cases import on_device, slow_but

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels._common import devices, validation
from pallas_kernels._common.numerics import NEG_INF
from pallas_kernels._common.splits import merge_splits
from pallas_kernels._common.triton_merge import merge_splits_triton
from pallas_kernels.block_scores.pallas_triton import Config as ScoresConfig
from pallas_kernels.block_sparse_attention import pallas_mosaic_gpu as sparse_mosaic
from pallas_kernels.block_sparse_attention import pallas_triton as sparse_triton
from pallas_kernels.block_sparse_attention import unions
from pallas_kernels.block_sparse_attention.unions import tile_unions
from pallas_kernels.choose_blocks import pallas_triton as choose_triton
from pallas_kernels.commit_blocks import pallas_mosaic_gpu as commit_mosaic
from pallas_kernels.commit_blocks import pallas_triton as commit_triton
from pallas_kernels.compress_keys import pallas_mosaic_gpu as compress_mosaic
from pallas_kernels.device import current_platform, require_cuda
from pallas_kernels.host_gather import pallas_mosaic_gpu as gather_mosaic
from pallas_kernels.host_gather import pallas_triton as gather_triton
from pallas_kernels.lowering import cuda_lowering_text
from pallas_kernels.paged_decode_attention import pallas_mosaic_gpu as decode_mosaic
from pallas_kernels.paged_decode_attention import pallas_triton as decode_triton
from pallas_kernels.paged_decode_attention.arg_specs import ArgSpec
from pallas_kernels.plan_slots import pallas_triton as plan_triton

CONFIGS = {
    ("block_sparse_attention", "mosaic_gpu"): sparse_mosaic.Config,
    ("block_sparse_attention", "triton"): sparse_triton.Config,
    ("paged_decode_attention", "mosaic_gpu"): decode_mosaic.Config,
    ("paged_decode_attention", "triton"): decode_triton.Config,
    ("host_gather", "mosaic_gpu"): gather_mosaic.Config,
    ("host_gather", "triton"): gather_triton.Config,
    ("block_scores", "triton"): ScoresConfig,
    ("choose_blocks", "triton"): choose_triton.Config,
    ("commit_blocks", "mosaic_gpu"): commit_mosaic.Config,
    ("commit_blocks", "triton"): commit_triton.Config,
    ("compress_keys", "mosaic_gpu"): compress_mosaic.Config,
    ("plan_slots", "triton"): plan_triton.Config,
}
WITHOUT_SETTINGS = {("block_scores", "mosaic_gpu"), ("compress_keys", "triton")}


def test_every_record_can_be_used():
    paths = sorted(dispatch.TUNED.glob("*/*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert path.stem in pallas_kernels.__all__
        assert path.parent.name == devices.device_slug(record["device"])
        assert record["default"][-1] == "xla"
        assert set(record["default"]) <= set(dispatch.IMPLEMENTATIONS)
        for entry in record.get("orders", []):
            assert sorted(entry["default"]) == sorted(record["default"])
        for name in record["default"][:-1]:
            figures = json.dumps(record.get("measured", [])) + json.dumps(
                record["configs"].get(name, [])
            )
            assert name in figures or "milliseconds" in figures, (path, name)
        for name, entries in record["configs"].items():
            for entry in entries:
                if (path.stem, name) in WITHOUT_SETTINGS:
                    assert entry["config"] == {}
                else:
                    CONFIGS[path.stem, name](**entry["config"])


def test_unknown_devices_take_xla():
    assert dispatch.tuned_record("block_sparse_attention", "some device") == {}
    if jax.default_backend() == "cpu":
        assert dispatch.candidates("block_sparse_attention", None) == ("xla",)


def test_a_record_may_tell_cases_apart():
    with on_device("NVIDIA H200"):
        first = {
            softmax: dispatch.candidates("block_scores", None, {"softmax": softmax})[0]
            for softmax in (False, True)
        }
    assert first == {False: "triton", True: "mosaic_gpu"}


def test_the_record_decides_where_there_is_one():
    spec = ArgSpec("", 1, 32, 2, 128, 64, 8, listed=4)
    args = spec.make(jnp.bfloat16)

    def decode(a):
        return pallas_kernels.paged_decode_attention(**a)

    assert "triton" in cuda_lowering_text(decode, args)
    unknown = cuda_lowering_text(decode, args, kind="NVIDIA X100")
    assert "triton" not in unknown and "mosaic" not in unknown


def test_a_refusal_falls_through_only_without_a_choice():
    # Neither Pallas form serves a head dim of 48.
    args = ArgSpec("", 1, 4, 2, 48, 64, 8, listed=4).make(jnp.bfloat16)
    for name in ("triton", "mosaic_gpu"):

        def chosen(a, name=name):
            return pallas_kernels.paged_decode_attention(**a, implementation=name)

        with pytest.raises(NotImplementedError, match="head dim"):
            cuda_lowering_text(chosen, args)
    text = cuda_lowering_text(
        lambda a: pallas_kernels.paged_decode_attention(**a), args
    )
    assert "triton" not in text and "mosaic" not in text


def test_no_cuda_device_is_a_refusal():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a device")
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        devices.require_cuda("triton", 8.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse_mosaic.Config(keys=96), "keys is 96"),
        (lambda: sparse_mosaic.Config(stages=1), "stages is 1"),
        (lambda: sparse_triton.Config(rows=24), "rows is 24"),
        (lambda: decode_triton.Config(splits=0), "splits is 0"),
        (lambda: decode_mosaic.Config(splits=1, stages=1), "stages is 1"),
        (lambda: decode_mosaic.Config(8, 3, 8, 2), "stages is 3"),
        (lambda: decode_mosaic.Config(6, 4, 4), "cluster is 4"),
        (lambda: decode_mosaic.Config(8, 4, 1, 3), "warpgroups is 3"),
        (lambda: compress_mosaic.Config(stages=1), "stages is 1"),
        (lambda: gather_mosaic.Config(programs=0), "programs is 0"),
        (lambda: gather_triton.Config(part_bytes=100), "part_bytes is 100"),
        (lambda: ScoresConfig(tokens=8), "tokens is 8"),
        (lambda: dispatch.candidates("x", "cuda"), "implementation is 'cuda'"),
        (lambda: validation.require_positive("n", True), "n is True"),
    ],
)
def test_settings_validate_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparse_triton.Config().rows = 32


@pytest.mark.parametrize("form", ["xla", "triton"])
def test_merge_of_parts_without_keys(form):
    out = jnp.ones((2, 3, 4, 16))
    lse = jnp.full((2, 3, 4), NEG_INF).at[0, 1].set(0.5)
    if form == "xla":
        merged, total = merge_splits(out, lse)
    else:
        merged, total = merge_splits_triton(out, lse, jnp.float32, interpret=True)
    np.testing.assert_array_equal(merged[0], 1.0)
    np.testing.assert_array_equal(merged[1], 0.0)
    np.testing.assert_array_equal(total[0], 0.5)
    assert np.isneginf(total[1]).all()


def test_merge_of_parts_is_the_same_in_both_forms():
    keys = jax.random.split(jax.random.key(0))
    out = jax.random.normal(keys[0], (3, 5, 2, 16))
    lse = 4 * jax.random.normal(keys[1], (3, 5, 2))
    got = merge_splits_triton(out, lse, jnp.float32, interpret=True)
    for x, y in zip(got, merge_splits(out, lse), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", slow_but({4}, (1, 4, 31)))
def test_unions(tokens, monkeypatch):
    rng = np.random.default_rng(tokens)
    lists = np.stack([rng.permutation(12)[:5] for _ in range(2 * 70)])
    lists = lists.reshape(1, 2, 70, 5).astype(np.int32)
    lists[rng.random(lists.shape) < 0.3] = -1
    # Slabs of a few tiles take the loop that long inputs take.
    monkeypatch.setattr(unions, "SLAB_WORDS", 5 * 2 * 12)
    found = tile_unions(
        jnp.asarray(lists), jnp.array([40]), blocks=12, block=8, tokens=tokens
    )
    for k, tile in np.ndindex(found.count.shape[1:]):
        want: dict[int, int] = {}
        for bit, t in enumerate(range(tile * tokens, min((tile + 1) * tokens, 70))):
            for m in lists[0, k, t]:
                if m >= 0 and m * 8 <= 40 + t:
                    want[int(m)] = want.get(int(m), 0) | (1 << bit)
        count = int(found.count[0, k, tile])
        blocks = np.asarray(found.blocks)[0, k, tile, :count].tolist()
        words = np.asarray(found.words)[0, k, tile, :count].tolist()
        assert blocks == sorted(want)
        assert words == [want[m] for m in blocks]


def test_unions_of_too_many_tokens():
    with pytest.raises(ValueError, match="tokens is 32"):
        tile_unions(
            jnp.zeros((1, 1, 64, 2), jnp.int32),
            jnp.zeros((1,), jnp.int32),
            blocks=4,
            block=16,
            tokens=32,
        )


@pytest.mark.parametrize("platform", ["gpu", "cuda"], ids=["mesh", "lowering"])
def test_platform_of_a_mesh(platform):
    """Inside `shard_map` the mesh names its devices "gpu", a lowering names "cuda"."""
    with on_device("NVIDIA H200", platform):
        assert current_platform() == "cuda"
        require_cuda("triton", 8.0)


def test_platform_inside_shard_map():
    mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,))
    seen = []

    def f(x):
        seen.append(current_platform())
        return x

    spec = PartitionSpec("x")
    jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.ones(1))
    assert seen == [current_platform()]
