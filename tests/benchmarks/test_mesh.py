"""The benchmark of several devices runs from its command on devices of the host."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import mesh, offload
from benchmarks.mesh import _of_meshes, _parser, compiler_options, hidden_share
from benchmarks.traced import TracedLists, standing
from sparda_jax.checks import ConfigError


def test_hidden_is_the_part_of_the_waiting_that_looking_ahead_saves():
    rows = [
        {"mode": "sparse", "step_ms": 10.0, "standing_ms": 6.0},
        {"mode": "sparda", "step_ms": 6.5, "standing_ms": 5.5},
        {"mode": "resident", "step_ms": 5.0},
    ]
    assert hidden_share(rows) == pytest.approx(0.75)
    assert hidden_share(rows[1:]) is None


def test_every_mesh_may_have_a_batch_of_its_own():
    def meshes(words):
        found = _of_meshes(_parser().parse_args(words.split()))
        return [(devices, own.batch, own.codec) for devices, own in found]

    assert meshes("--batch 3 --devices 1 2") == [(1, 3, "exact"), (2, 3, "exact")]
    both = "--batch 4 8 --codec exact int8 --devices 1 2"
    assert meshes(both) == [(1, 4, "exact"), (2, 8, "int8")]
    with pytest.raises(ConfigError, match=r"--batch=\[1, 2, 3\] .* one for each"):
        meshes("--batch 1 2 3 --devices 1 2")


@pytest.mark.parametrize(
    "words",
    ["--batch 0", "--slots nan", "--limit nan", "--context -1", "--layers 0"],
)
@pytest.mark.parametrize("command", [mesh, offload])
def test_sizes_that_no_run_can_have_are_one_line(command, words, capsys):
    assert command.main(words.split()) == 2
    name, value = words.split()
    said = capsys.readouterr().err
    assert said.startswith(f"{name}={value} is not allowed: ") and said.count("\n") < 3


@pytest.mark.parametrize("words", ["--devices 0", "--option 3", "--option xla_name"])
def test_a_mesh_s_own_options_are_checked_before_anything_runs(words, capsys):
    assert mesh.main(words.split()) == 2
    assert "is not allowed: " in capsys.readouterr().err


def test_options_of_xla_have_the_type_that_it_wants():
    words = ["--option", "xla_a=true", "xla_b=2", "xla_c=ALLREDUCE"]
    given = dict(_parser().parse_args(words).option)
    assert given == {"xla_a": True, "xla_b": 2, "xla_c": "ALLREDUCE"}


def test_a_mode_may_be_compiled_with_the_scheduler_that_the_engine_leaves_out():
    own, given = {"xla_scheduler": False}, {"xla_a": 2}
    assert compiler_options("sparda", own, given) == own | given
    scheduled = compiler_options("sparda-scheduled", own, given)
    assert scheduled == {"xla_scheduler": True, "xla_a": 2}


def test_lists_that_stand_still_are_those_of_the_first_token():
    bits = np.random.default_rng(0).integers(0, 256, (2, 1, 2, 5, 3), np.uint8)
    still = standing(TracedLists(bits, places=24, scored=4, source="random"))
    assert np.array_equal(still.bits, np.repeat(bits[:, :, :, :1], 5, axis=3))


@pytest.mark.slow
@pytest.mark.long  # of one device: `test_measuring_commands_run`
def test_one_device_and_two_stand_beside_each_other(tmp_path):
    out = tmp_path / "mesh.jsonl"
    arguments = (
        "--model tiny --context 8192 --batch 2 --steps 8 --devices 1 2 "
        "--mode sparda sparse --out"
    )
    subprocess.run(
        [sys.executable, "-m", "benchmarks.mesh", *arguments.split(), str(out)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        check=True,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    modes = [(row["devices"], row.get("mode")) for row in rows]
    assert modes == [(n, mode) for n in (1, 2) for mode in ("sparda", "sparse", None)]
    one, two = (row for row in rows if row.get("mode") == "sparda")
    assert one["fetched_share"] == two["fetched_share"] > 0
    assert one["sums_ms"] == 0 < two["sums_ms"]
    assert one["tokens_per_second"] > 0 < two["tokens_per_second"]
