"""The benchmark of several devices runs from its command on devices of the host."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_one_device_and_two_stand_beside_each_other(tmp_path):
    out = tmp_path / "mesh.jsonl"
    arguments = "--model tiny --context 512 --batch 2 --tokens 8 --devices 2 --out"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.mesh", *arguments.split(), str(out)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        check=True,
        timeout=300,
    )
    one, two = (json.loads(line) for line in out.read_text().splitlines())
    assert one["mesh"] == "one device" and two["mesh"] == "data=1,model=2"
    assert one["decode_blocks"] == two["decode_blocks"]
    assert one["decode_tokens_per_s"] > 0 < two["decode_tokens_per_s"]
