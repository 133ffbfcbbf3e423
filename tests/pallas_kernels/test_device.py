"""What `describe` says about a device."""

import jax
import pytest
from kernel_cases import on_device

from pallas_kernels.device import describe, records_directory
from pallas_kernels.dispatch import tuned_record
from pallas_kernels.probes import PROBES


def described(kind, platform="cuda"):
    with on_device(kind, platform):
        return describe()


def test_every_operation_is_described():
    import pallas_kernels

    assert set(PROBES) == set(pallas_kernels.__all__) - {"select_blocks"}
    report = described("cpu", "cpu")
    assert [x.op for x in report.ops] == list(PROBES)
    assert all(x.implementation == "xla" and not x.refused for x in report.ops)
    assert str(report).startswith("cpu (cpu), jax ")


def test_a_home_that_is_not_known_is_no_error(monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", "~nobody-of-this-name/records")
    assert tuned_record("block_scores", "NVIDIA H200") is not None
    monkeypatch.delenv("PALLAS_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")
    assert records_directory().name == "pallas_kernels"


def test_a_recorded_device_is_served_as_its_records_say():
    report = described("NVIDIA H200")
    served = {(x.op, x.sizes.get("softmax")): x for x in report.ops}
    # This record tells calls apart.
    assert served["block_scores", False].implementation == "triton"
    assert served["block_scores", True].implementation == "mosaic_gpu"
    for (op, softmax), found in served.items():
        record = tuned_record(op, "NVIDIA H200")
        assert found.why.startswith("recorded with jax") == bool(record)
        if softmax is None and record:
            assert found.implementation == record["default"][0]


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_a_refusal_is_told(implementation):
    [probe] = PROBES["paged_decode_attention"]
    if jax.default_backend() != "cpu":
        pytest.skip("there is a device")
    assert "needs a CUDA device" in probe.refusal(implementation)
    assert probe.refusal("xla") is None
