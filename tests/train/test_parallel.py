"""Four devices equal one; a killed run resumes from a whole checkpoint."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from sparda_jax.checkpoint.hf import read_safetensors
from train.config import OptimizerConfig
from train.metrics import read_log
from train.text import Corpus, save_corpus

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from sparda_jax.config import SparseConfig
    from sparda_jax.models.presets import get_preset
    from sparda_jax.models.weights import build_decoder, random_tensors
    from train.config import LossConfig, OptimizerConfig
    from train.tiles import Documents
    from train.metrics import make_evaluate
    from train.backbone import Batch, Settings
    from train.init import initial_heads
    from train.optimizer import initial_state, make_optimizer
    from train.sharding import AXIS, batch_sharding, make_mesh, place, shard_model
    from train.step import make_gradients, make_step

    assert len(jax.devices()) == 4
    config = get_preset("tiny-nosa").model
    tensors = random_tensors(config, seed=0, scale=0.1)
    model = build_decoder(config, tensors, dtype=jnp.float32, storage="stacked")
    settings = Settings(
        config,
        SparseConfig(local_blocks=1, block_budget=4, query_blocks=2),
        LossConfig(tile=320),
    )
    optimizer = make_optimizer(OptimizerConfig())
    tokens = np.random.default_rng(0).integers(0, 128, (1, 4, 320)).astype(np.int32)
    documents = [np.broadcast_to(x, (1, 4, 320)) for x in Documents.whole_rows(4, 320)]
    results = []
    for count, fsdp in ((1, False), (4, False), (4, True)):
        mesh = make_mesh(count)
        placed = shard_model(model, mesh, fsdp=fsdp)
        if fsdp:
            qkv = placed.layers.qkv[...]
            assert qkv.addressable_shards[0].data.size * 4 == qkv.size
        heads = initial_heads(model, "from_query", 0)
        whole = NamedSharding(mesh, PartitionSpec())
        state = jax.device_put(initial_state(heads, optimizer), whole)
        step = make_step(placed, settings, optimizer, mesh, fsdp=fsdp)
        spread = batch_sharding(mesh)
        batch = Batch(
            jax.device_put(tokens, spread),
            Documents(*(jax.device_put(np.array(x), spread) for x in documents)),
        )
        state, metrics = step(placed, state, batch)
        evaluate = make_evaluate(placed, settings, mesh, fsdp=fsdp, mass=True)
        rows = NamedSharding(mesh, PartitionSpec(AXIS))
        flat = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[0], rows), batch)
        found = evaluate(placed, state.heads, [flat])
        # Before Adam, which turns rounding of tiny gradients into whole steps.
        moments = [np.asarray(x) for x in jax.tree.leaves(state.optimizer) if x.ndim]
        results.append((np.asarray(metrics.loss), *moments, found.kl, found.recall))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-7)
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)
    print("equal")
"""


def _environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **changes}


@pytest.mark.slow
def test_four_devices_equal_one():
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEVICES)],
        env=_environment(XLA_FLAGS=flags),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]


CONFIG = """
from sparda_jax.config import SparseConfig
from train.config import *

def get_config():
    return TrainConfig(
        model="tiny",
        sparse=SparseConfig(local_blocks=1, block_budget=4),
        loss=LossConfig(tile=256),
        data=DataConfig(
            sources=[({data!r}, 1.0)], seq_len=512, packing="long", held_out={held_out}
        ),
        optimizer=OptimizerConfig(steps={steps}, global_batch={batch}),
        eval=EvalConfig(every={evaluate}, batches={batches}, mass=False),
        checkpoint=CheckpointConfig(every={keep}),
    )
"""


class Trainers:
    """Training processes of one configuration, in a folder of their own."""

    def __init__(self, folder: pathlib.Path, **values):
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 128, 40_000).astype(np.uint32)
        ends = np.arange(1000, 40_001, 1000)
        save_corpus(Corpus("x", (tokens,), (ends,), 128), folder / "data")
        self.folder = folder
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(data=str(folder / "data"), **values))

    def start(self, out: str, *settings: str, flags=(), **environment: str):
        """A process that trains into `out`."""
        command = [sys.executable, "-m", "train.main", "--quiet", *flags]
        command += ["--config", str(self.config), "--set", f"out={self.folder / out}"]
        return subprocess.Popen(
            [*command, *settings],
            env=_environment(**environment),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, *running: subprocess.Popen) -> None:
        """Waits for processes, all of which must end well."""
        try:
            for process in running:
                text, _ = process.communicate()
                assert process.returncode == 0, text[-3000:]
        finally:
            for process in running:
                process.kill()

    def heads(self, out: str) -> dict[str, np.ndarray]:
        """The exported matrices, by name."""
        tensors = read_safetensors(self.folder / out / "forecast.safetensors")[0]
        return {name: load() for name, load in sorted(tensors.items())}


@pytest.mark.slow
@pytest.mark.usefixtures("heeds_interrupts")
def test_killed_run_resumes_from_a_whole_checkpoint(tmp_path):
    """SIGKILL, and Ctrl-C once; the result is that of a run left alone."""
    trainers = Trainers(
        tmp_path, steps=60, batch=1, held_out=0.2, evaluate=20, batches=1, keep=2
    )
    trainers.finish(trainers.start("whole"))
    folder = tmp_path / "killed" / "checkpoints"
    kills = 0
    for wanted in (4, 17, 40):
        process = trainers.start("killed")
        # Ended as soon as a directory of that step or a later one appears, whole or
        # not: in the middle of writing it.
        while process.poll() is None:
            names = [x.name.split(".")[0] for x in folder.glob("*")]
            if any(name.isdigit() and int(name) >= wanted for name in names):
                process.send_signal(signal.SIGINT if wanted == 17 else signal.SIGKILL)
                kills += 1
                text, _ = process.communicate()
                if wanted == 17:
                    assert process.returncode == 130, text[-3000:]
                    assert text.startswith("sparda: interrupted:")
                    assert text.count("\n") == 1
                break
            time.sleep(0.002)
    assert kills == 3
    trainers.finish(trainers.start("killed"))
    whole, killed = (trainers.heads(out) for out in ("whole", "killed"))
    for name, matrix in whole.items():
        np.testing.assert_array_equal(matrix, killed[name])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """`jax.distributed` by flags; each process reads its part of every batch."""
    trainers = Trainers(
        tmp_path, steps=2, batch=4, held_out=0.3, evaluate=2, batches=2, keep=1
    )

    def start(out: str, *flags: str, limit: str = "None") -> subprocess.Popen:
        return trainers.start(
            out,
            "fsdp=True",
            f"max_minutes={limit}",
            flags=flags,
            JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
        )

    def both(*limits: str) -> list[subprocess.Popen]:
        shared = ("--coordinator", f"127.0.0.1:{_free_port()}", "--num-processes", "2")
        return [
            start("two", *shared, "--process-id", str(i), limit=limit)
            for i, limit in enumerate(limits)
        ]

    # The first process's clock counts: both stop after one step, and go on later.
    trainers.finish(start("one"), *both("0.0", "None"))
    steps = [x.name for x in (tmp_path / "two" / "checkpoints").iterdir()]
    assert steps == ["1"]
    trainers.finish(*both("None", "0.0"))
    one, two = (read_log(tmp_path / out / "log.jsonl") for out in ("one", "two"))
    kinds = [(x["step"], x["kind"]) for x in one]
    assert sorted(kinds) == [(0, "eval"), (1, "train"), (2, "eval"), (2, "train")]
    # The step that was the last one for a while was evaluated.
    two = [x for x in two if (x["step"], x["kind"]) != (1, "eval")]
    assert [(x["step"], x["kind"]) for x in two] == kinds
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "gradient_norm", "kl", "recall"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a, b)
    heads = [np.stack([*trainers.heads(out).values()]) for out in ("one", "two")]
    # Adam moves a weight whose gradient is rounding by a whole step either way: few.
    moved = 2 * OptimizerConfig().lr
    assert np.mean(np.abs(heads[0] - heads[1]) > 0.01 * moved) < 1e-3
    steps = sorted(x.name for x in (tmp_path / "two" / "checkpoints").iterdir())
    assert steps == ["1", "2"]
