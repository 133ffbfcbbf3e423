"""GPUs without a record: who serves there, what is told, and what is tried first."""

import json

import jax
import pytest
from kernel_cases import on_device, slow_but

from pallas_kernels import choose_blocks, dispatch, proof
from pallas_kernels._common import devices
from pallas_kernels.device import describe
from pallas_kernels.lowering import cuda_lowering_text
from pallas_kernels.probes import PROBES, Probe

HOPPER = {
    "block_scores": {"mosaic_gpu", "triton"},
    "block_sparse_attention": {"mosaic_gpu"},
    "choose_blocks": {"triton"},
    "commit_blocks": {"triton"},
    "compress_keys": {"xla"},  # nowhere faster than XLA
    "host_gather": {"mosaic_gpu"},
    "paged_decode_attention": {"triton"},
    "plan_slots": {"triton"},
}
# wgmma is Hopper's alone; plain copies are not.
NO_WGMMA = {op: who - {"mosaic_gpu"} or {"triton"} for op, who in HOPPER.items()}
TRITON = NO_WGMMA
BLACKWELL = NO_WGMMA | {"host_gather": {"mosaic_gpu"}}
XLA = {op: {"xla"} for op in HOPPER}
KINDS = {
    "NVIDIA A100-SXM4-80GB": (8.0, TRITON),
    "NVIDIA L4": (8.9, TRITON),
    "NVIDIA GeForce RTX 4090": (8.9, TRITON),
    "NVIDIA GH200 480GB": (9.0, HOPPER),
    "NVIDIA B200": (10.0, BLACKWELL),
    "Tesla T4": (7.5, XLA),
}


@pytest.mark.parametrize(
    "kind", slow_but({"NVIDIA L4", "NVIDIA B200", "Tesla T4"}, KINDS)
)
def test_no_operation_falls_to_xla_without_a_word(kind):
    capability, want = KINDS[kind]
    with on_device(kind):
        report = describe()
    assert report.compute_capability == capability
    served = {op: set() for op in want}
    for x in report.ops:
        served[x.op].add(x.implementation)
        assert "the nearest is that of NVIDIA H100" in x.why
        if x.implementation == "xla" and capability < 8:
            assert "kernels need 8.0" in x.why
    assert served == want


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", 9.0),
        ("NVIDIA H200", 9.0),
        ("NVIDIA L40S", 8.9),
        ("NVIDIA A10G", 8.6),
        ("NVIDIA RTX A6000", 8.6),
        ("NVIDIA GeForce RTX 5090", 12.0),
        ("Tesla V100-SXM2-16GB", 7.0),
        ("NVIDIA X100", None),
        ("cpu", None),
    ],
)
def test_capability_by_name(kind, capability):
    assert devices.capability_of(kind) == capability


def test_calls_lower_to_what_is_described(caplog):
    [probe] = PROBES["choose_blocks"]
    call, arrays = probe.bound(None)
    assert "triton" in cuda_lowering_text(call, arrays, kind="NVIDIA L4")
    assert not caplog.records
    dispatch._tell.cache_clear()
    for _ in range(2):
        assert "triton" not in cuda_lowering_text(call, arrays, kind="Tesla T4")
    [record] = caplog.records
    assert "choose_blocks on Tesla T4 runs as XLA" in record.getMessage()


class Simulated:
    """A device as this package looks at it."""

    device_kind = "NVIDIA L4"
    compute_capability = "8.9"


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A CPU that takes itself for a GPU without a record, with a cache of its own."""
    simulated = Simulated()
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "device_at_hand", lambda: simulated)
    monkeypatch.setattr(dispatch, "current_device_kind", lambda: "NVIDIA L4")
    monkeypatch.setattr(dispatch, "current_compute_capability", lambda: 8.9)
    # The device is the one that tests run on, whatever it is called.
    find = proof.find_fault
    monkeypatch.setattr(proof, "_find_on", lambda device, op, name: find(op, name))
    caches = (proof.fault_of, dispatch.tuned_record, dispatch.nearest_record)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def plant(monkeypatch, kernel):
    """Puts a kernel in the place of every Triton form of `choose_blocks`' probe."""

    def call(scores, own, *, budget, implementation):
        right = choose_blocks(scores, own, budget=budget, implementation="xla")
        return kernel(right) if implementation == "triton" else right

    [probe] = PROBES["choose_blocks"]
    planted = {"choose_blocks": (Probe(call, probe.make, lists=0.0),)}
    monkeypatch.setattr("pallas_kernels.probes.PROBES", planted)


def test_a_right_kernel_is_chosen_and_the_verdict_is_kept(on_a_gpu, monkeypatch):
    calls = []

    def kernel(lists):
        calls.append(lists)
        return lists[..., ::-1]

    plant(monkeypatch, kernel)
    for _ in range(2):
        assert dispatch.candidates("choose_blocks", None) == ("triton", "xla")
        proof.fault_of.cache_clear()
    assert len(calls) == 1
    [path] = on_a_gpu.rglob("*.json")
    assert path.parent.name == "nvidia_l4" and path.stem == jax.__version__
    assert json.loads(path.read_text()) == {"choose_blocks": {"triton": "right"}}


def _raises(lists):
    raise RuntimeError("out of shared memory\nand more")


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (lambda x: x.at[..., 0].set(-1), "of its rows are wrong"),
        (lambda x: x[..., 1:], "shape"),
        (_raises, "RuntimeError: out of shared memory"),
    ],
    ids=["wrong", "short", "raises"],
)
def test_a_wrong_kernel_is_left_out(on_a_gpu, monkeypatch, kernel, fault):
    plant(monkeypatch, kernel)
    message = f"triton is left out for choose_blocks on NVIDIA L4: .*{fault}"
    with pytest.warns(RuntimeWarning, match=message):
        assert dispatch.candidates("choose_blocks", None) == ("xla",)
    # From memory, without another warning, and within a trace.
    found = []
    jax.jit(lambda: found.append(dispatch.choice("choose_blocks")))()
    assert found[0].order == ("xla",) and fault in found[0].why
    # From the file.
    proof.fault_of.cache_clear()
    plant(monkeypatch, lambda x: x)
    with pytest.warns(RuntimeWarning, match=message):
        assert dispatch.candidates("choose_blocks", None) == ("xla",)


def test_the_first_use_may_be_within_a_trace(on_a_gpu, monkeypatch):
    plant(monkeypatch, lambda x: x)
    found = []
    jax.jit(lambda x: found.append(dispatch.candidates("choose_blocks", None)) or x)(1)
    assert found == [("triton", "xla")]


def test_a_cache_that_cannot_be_written_or_read(on_a_gpu, monkeypatch):
    plant(monkeypatch, lambda x: x)
    (on_a_gpu / "proofs").write_text("no folder")
    assert dispatch.candidates("choose_blocks", None) == ("triton", "xla")
    (on_a_gpu / "proofs").unlink()
    path = proof.verdict_file("NVIDIA L4")
    path.parent.mkdir(parents=True)
    for damaged in ("{", "[]", '{"choose_blocks": 3}'):
        path.write_text(damaged)
        proof.fault_of.cache_clear()
        assert dispatch.candidates("choose_blocks", None) == ("triton", "xla")


def test_a_users_own_record(on_a_gpu, monkeypatch):
    plant(monkeypatch, lambda x: x)
    path = on_a_gpu / "tuned" / "nvidia_l4" / "choose_blocks.json"
    path.parent.mkdir(parents=True)
    record = {"device": "NVIDIA L4", "jax": jax.__version__, "default": ["xla"]}
    path.write_text(json.dumps(record))
    assert dispatch.choice("choose_blocks") == (
        ("xla",),
        f"recorded with jax {jax.__version__}",
        True,
    )
    path.write_text(json.dumps(record | {"default": ["warp", "xla"]}))
    dispatch.tuned_record.cache_clear()
    dispatch.nearest_record.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"names \['warp'\]"):
        assert dispatch.candidates("choose_blocks", None) == ("triton", "xla")
