"""Checkpoints: damaged ones, other runs', a full disk; and who has the directory."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.config import ConfigError
from train.checkpoint import Checkpoints, clean
from train.config import CheckpointConfig, OptimizerConfig
from train.optimizer import initial_state, make_optimizer
from train.run_directory import LOCK, check_writable, hold_directory
from train.seal import SEAL, fault
from train.sharding import make_mesh

IDENTITY = {"config": {"seed": 1}, "data": [{"sha256": "a"}, {"sha256": "b"}]}


def _state(value: float):
    heads = jnp.full((2, 4, 6), float(value))
    return initial_state(heads, make_optimizer(OptimizerConfig()))


def _open(out: pathlib.Path, identity=IDENTITY) -> Checkpoints:
    return Checkpoints(out, CheckpointConfig(), identity, make_mesh(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Steps 2 and 4."""
    out = tmp_path_factory.mktemp("saved")
    checkpoints = _open(out)
    for step in (2, 4):
        checkpoints.save(step, _state(step), {"at": step}, recall=0.5)
    checkpoints.close()
    return out


@pytest.fixture
def out(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved, tmp_path / "run")


def _resumed(out: pathlib.Path) -> int:
    """The step that a run goes on from, if it gets back what was written."""
    checkpoints = _open(out)
    restored = checkpoints.restore(_state(0))
    checkpoints.close()
    step = restored.data["at"]
    np.testing.assert_array_equal(restored.state.heads, _state(step).heads)
    assert checkpoints.latest_step == step == checkpoints.best_step
    return step


def _damage(path: pathlib.Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["removed", "cut", "flipped"])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_taken(
    saved, tmp_path, how, capfd
):
    """Whichever of its files it is: every part with numbers or settings."""
    step = saved / "checkpoints" / "4"
    assert fault(step) is None
    places = json.loads((step / SEAL).read_text())
    assert {place.split("/")[0] for place in places} == {
        "data",
        "identity",
        "metrics",
        "state",
    }
    for place in places:
        copy = shutil.copytree(saved, tmp_path / place.replace("/", "_"))
        _damage(copy / "checkpoints" / "4" / place, how)
        clean(copy / "checkpoints", IDENTITY)
        told = capfd.readouterr().err.splitlines()
        assert len(told) == 2 and "damaged and was moved to" in told[0], told
        assert told[1] == f"the run continues from {copy / 'checkpoints' / '2'}"
        assert [x.name for x in (copy / "checkpoints").iterdir()] == ["2"]
        # Nothing is lost.
        assert (copy / "damaged" / "4").is_dir()


@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_in_the_middle_of_a_save_waits_for_its_end(out, monkeypatch):
    """What it has begun would else wait for it, and the process with it."""
    save = ocp.StandardCheckpointHandler.async_save

    async def interrupted(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return await save(*arguments, **named)

    checkpoints = _open(out)
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(6, _state(6), {"at": 6}, recall=0.5)
    monkeypatch.undo()
    checkpoints.close()
    assert _resumed(out) == 6


def test_a_run_goes_on_behind_a_damaged_checkpoint(out):
    """And writes the step again."""
    (numbers,) = (out / "checkpoints" / "4" / "state" / "d").iterdir()
    for name in ("4", "4-2"):
        _damage(out / "checkpoints" / "4" / "state" / "d" / numbers.name, "flipped")
        assert _resumed(out) == 2
        assert (out / "damaged" / name).is_dir()
        checkpoints = _open(out)
        checkpoints.save(4, _state(4), {"at": 4}, recall=0.5)
        checkpoints.close()
        assert _resumed(out) == 4
        (numbers,) = (out / "checkpoints" / "4" / "state" / "d").iterdir()


def test_junk_among_the_checkpoints(out, capfd):
    folder = out / "checkpoints"
    (folder / "7").mkdir()
    assert _resumed(out) == 4
    assert f"{folder / '7'} is empty: removed\n" == capfd.readouterr().err
    (folder / "8").write_text("a file")
    (folder / "9" / "state").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "4" / SEAL).write_text("[")
    assert _resumed(out) == 2
    told = capfd.readouterr().err
    for words in ("8 is no directory", "9 has no state", "4 cannot be read"):
        assert words in told
    assert (folder / "notes.txt").read_text() == "mine"


def test_checkpoints_without_a_seal_are_taken_as_they_are(out):
    (out / "checkpoints" / "4" / SEAL).unlink()
    assert _resumed(out) == 4
    (out / "checkpoints" / "4" / SEAL).unlink(missing_ok=True)
    _damage(out / "checkpoints" / "4" / "data" / "metadata", "cut")
    checkpoints = _open(out)
    with pytest.raises(CheckpointError, match="4: cannot be read") as error:
        checkpoints.restore(_state(0))
    assert "\n" not in str(error.value)
    checkpoints.close()


def test_if_none_is_whole_nothing_begins_anew(out):
    for step in ("2", "4"):
        _damage(out / "checkpoints" / step / "data" / "metadata", "flipped")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole: 4"):
        _open(out)
    assert sorted(x.name for x in (out / "checkpoints").iterdir()) == ["2", "4"]


def test_another_runs_damage_is_left_alone(out):
    _damage(out / "checkpoints" / "4" / "data" / "metadata", "flipped")
    other = {**IDENTITY, "data": [{"sha256": "a"}, {"sha256": "c"}]}
    with pytest.raises(ConfigError, match=r"data.1.sha256 was 'b', and is 'c' now"):
        _open(out, other)
    assert sorted(x.name for x in (out / "checkpoints").iterdir()) == ["2", "4"]


def test_a_full_disk_is_one_line(out):
    """A limit on the size of files stands for it: the same writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = _open(out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(CheckpointError, match="written: File too large") as error:
            checkpoints.save(6, _state(6), {"at": 6}, recall=None)
            checkpoints.wait()
        assert "\n" not in str(error.value)
        # Whoever still writes in the background ends before there is room again.
        for thread in threading.enumerate():
            if thread.name.startswith("async_save"):
                thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.close()
    assert _resumed(out) == 4


HOLD = """
import pathlib, sys
from train.run_directory import hold_directory
with hold_directory(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_trainer_a_directory(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=pathlib.Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"process {holder.pid} on .* does: wait"),
            hold_directory(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    # What the killed one left is no obstacle, nor what anybody wrote there.
    assert (tmp_path / LOCK).read_text().startswith(str(holder.pid))
    with hold_directory(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} on ")
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()} on"),
            hold_directory(tmp_path),
        ):
            pass
    with hold_directory(tmp_path):
        pass


def test_places_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", "a\0b", "~nobody-at-all/x", "x" * 3000):
        with pytest.raises(ConfigError, match="a directory that can be written") as e:
            check_writable(out)
        assert "\n" not in str(e.value)
