"""A training run from its configuration: load, resume, train, evaluate, export."""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sparda_jax
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import require
from sparda_jax.engine.model import LanguageModel
from sparda_jax.loading import default_dtype
from sparda_jax.models.low_rank import LowRankHeads, factor_heads
from sparda_jax.models.weights import from_query_heads
from train.backbone import Batch, Settings
from train.checkpoint import Checkpoints, export_forecast
from train.command import TrainingError
from train.config import TrainConfig
from train.data import (
    Row,
    batches,
    data_identity,
    held_out_rows,
    open_sources,
    training_data,
)
from train.init import Regression, initial_heads, regression_heads, sum_moments
from train.metrics import Evaluation, NoLog, RunLog, make_evaluate, plot_curves
from train.optimizer import (
    TrainState,
    initial_state,
    learning_rate,
    make_optimizer,
    with_inputs,
)
from train.processes import from_first, on_first
from train.run_directory import check_writable, hold_directory
from train.sharding import AXIS, batch_sharding, make_mesh, place, shard_model
from train.step import StepMetrics, make_step
from train.tiles import Documents


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      state: After the last step.
      evaluation: Held-out metrics after it, or None if none were made.
      forecast: The exported weights.
      resumed_from: Step of the checkpoint that it continued, or None.
    """

    state: TrainState
    evaluation: Evaluation | None
    forecast: pathlib.Path
    resumed_from: int | None


def _on_devices(rows: Row, mesh: Mesh, micro_batches: int) -> Batch:
    """[B, T] arrays of this process → a Batch [A, B/A, T] over the mesh."""

    def put(array: np.ndarray) -> jax.Array:
        shape = (micro_batches, -1, array.shape[-1])
        array = np.ascontiguousarray(array, np.int32).reshape(shape)
        return jax.make_array_from_process_local_data(batch_sharding(mesh), array)

    documents = Documents(put(rows["start"]), put(rows["end"]))
    return Batch(put(rows["tokens"]), documents)


def _held_out_batches(rows: list[Row], mesh: Mesh, per_device: int) -> list[Batch]:
    """Whole batches of the rows; the last rows may be left out."""
    size = per_device * mesh.size
    if len(rows) < size:
        # Fewer rows than devices: rows are repeated, which changes no ratio much.
        rows = [rows[i % len(rows)] for i in range(size)]
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    out = []
    for first in range(0, len(rows) - size + 1, size):
        part = rows[first : first + size]

        def put(
            name: Literal["tokens", "start", "end"], part: list[Row] = part
        ) -> jax.Array:
            whole = np.stack([np.asarray(row[name], np.int32) for row in part])
            return jax.make_array_from_callback(
                whole.shape, sharding, lambda index: whole[index]
            )

        documents = Documents(put("start"), put("end"))
        out.append(Batch(put("tokens"), documents))
    return out


class Run:
    """The pieces of a run that its loop uses."""

    def __init__(self, config: TrainConfig, *, progress: bool = False):
        self.out = check_writable(config.out)
        self.config = config
        self.progress = progress and jax.process_index() == 0
        _check_devices(config.parallel.devices)
        self.mesh = make_mesh(config.parallel.devices)
        self.accumulation = config.optimizer.accumulation(self.mesh.size)
        self.lm = _load(config)
        self.sparse = config.sparse or self.lm.sparse
        group = self.lm.config.group_size
        field, asked = "TrainConfig.queries", config.queries
        self.queries = asked or group
        require(self.queries <= group, field, asked, f"at most the group's {group}")
        _check_shapes(config, self.lm, self.sparse.block_size)
        shape = dataclasses.replace(self.lm.config, forecast_reads=config.reads)
        self.settings = Settings(
            shape,
            self.sparse,
            config.loss,
            config.implementation,
            masked_attention=config.attention == "masked",
            whole_rows=config.data.packing != "documents",
        )
        vocabulary = self.lm.config.vocab_size
        self.corpora = open_sources(config.data, self.lm.tokenizer, vocabulary)
        block = self.sparse.block_size
        self.data = self._batches()
        self.held_out: list[Batch] = []
        if config.data.held_out:
            rows = held_out_rows(
                self.corpora, config.data, block=block, count=config.eval.batches
            )
            micro = min(config.optimizer.micro_batch, len(rows))
            self.held_out = _held_out_batches(rows, self.mesh, micro)
        self.identity = {
            "config": config.identity(),
            "model": {"name": self.lm.config.name, "hash": self.lm.fingerprint},
            "data": data_identity(self.corpora),
        }
        self.identity = json.loads(json.dumps(self.identity))
        fsdp = config.parallel.fsdp
        heads = initial_heads(self.lm.model, config.init, config.seed, self.queries)
        self._inputs: np.ndarray | None = None
        self.optimizer = make_optimizer(config.optimizer)
        self.state = self.placed(initial_state(heads, self.optimizer))
        self.model = shard_model(self.lm.model, self.mesh, fsdp=fsdp)
        self.step = make_step(
            self.model, self.settings, self.optimizer, self.mesh, fsdp=fsdp
        )
        self.evaluate = make_evaluate(
            self.model, self.settings, self.mesh, fsdp=fsdp, mass=config.eval.mass
        )

    def _batches(self) -> grain.DatasetIterator:
        config = self.config
        return batches(
            training_data(
                self.corpora,
                config.data,
                block=self.sparse.block_size,
                batch=config.optimizer.global_batch,
                part=(jax.process_index(), jax.process_count()),
            )
        )

    def batches(self) -> Iterator[Batch]:
        """All batches from the first one on, on the devices."""
        for rows in self._batches():
            yield _on_devices(rows, self.mesh, self.accumulation)

    def placed(self, state: TrainState) -> TrainState:
        """The state on all devices."""
        return jax.tree.map(lambda x: place(x, self.mesh, PartitionSpec()), state)

    def _regression(self) -> Regression:
        # Batches of its own: training begins with the first one all the same.
        return Regression(
            self.model,
            self.state.heads,
            self.batches(),
            self.settings,
            self.mesh,
            batches=self.config.init_batches,
            fsdp=self.config.parallel.fsdp,
            progress=self.progress,
        )

    def fit_heads(self) -> None:
        """Replaces the first heads by those of `regression_heads`."""
        over = self._regression()
        # It is as large as two copies of the heads, and begins anew with the new ones.
        self.state = self.state._replace(optimizer=None)
        moments = sum_moments(over)
        heads, self._inputs = regression_heads(over, moments), moments[0]
        del moments
        state = initial_state(heads, self.optimizer)
        if self.config.optimizer.whiten:
            square, show = self.input_moments(), self.progress
            white = with_inputs(state.optimizer, square, progress=show)
            state = state._replace(optimizer=white)
        self.state = self.placed(state)

    def low_rank(self, heads: Array) -> LowRankHeads | None:
        """The heads as files of `export_rank` hold them, rounded; None: as they are."""
        rank = self.config.export_rank
        if rank is None:
            return None
        given = np.asarray(heads), self.own_queries(), self.input_moments()
        low = factor_heads(*given, rank, progress=self.progress)
        kind = jnp.dtype(self.config.export_dtype)
        parts = (np.asarray(x, kind) for x in (low.gain, low.down, low.up))
        return LowRankHeads(*(x.astype(np.float32) for x in parts))

    def written(self, state: TrainState) -> tuple[LowRankHeads | None, TrainState]:
        """What a file holds of the heads, and a state with the heads that it gives."""
        low = self.low_rank(state.heads)
        if low is None:
            return None, state
        heads = jnp.stack(low.whole(self.own_queries()))
        return low, self.placed(state._replace(heads=heads))

    def input_moments(self) -> np.ndarray:
        """XᵀX of what the heads read, by layer; summed now if nobody did."""
        if self._inputs is None:
            self._inputs = sum_moments(self._regression())[0]
        return self._inputs

    def own_queries(self) -> list[Array]:
        """The model's query weights, as `models.low_rank` takes them."""
        return from_query_heads(self.lm.model, self.queries)

    def measure(self, log: RunLog | NoLog, step: int) -> Evaluation | None:
        """Held-out metrics, written to the log."""
        found = self.measure_heads(self.state.heads)
        if found is not None:
            log.write(step, "eval", {**found.means(), "layers": found.by_layer()})
        return found

    def measure_heads(self, heads: Array) -> Evaluation | None:
        """Held-out metrics of any heads; None without held-out rows."""
        if not self.held_out:
            return None
        return self.evaluate(self.model, heads, self.held_out)

    def export(
        self,
        state: TrainState,
        evaluation: Evaluation | None,
        name: str,
        low: LowRankHeads | None = None,
    ) -> pathlib.Path:
        """Writes the heads with everything that a model card needs.

        Args:
          state: Where training stands; `heads` are those that are written.
          evaluation: Theirs, or None.
          name: Of the file.
          low: What a file of low rank holds of them.
        """
        path = self.out / name
        if jax.process_index() != 0:
            return path
        extra = {
            "identity": self.identity,
            "step": int(state.step),
            "skipped_steps": int(state.skipped),
            "device": jax.devices()[0].device_kind,
            "devices": self.mesh.size,
            "jax": jax.__version__,
            "held_out": None if evaluation is None else evaluation.by_layer(),
        }
        export_forecast(
            path,
            state.heads,
            config=self.settings.config,
            sparse=self.sparse,
            fingerprint=self.lm.fingerprint,
            extra=extra,
            dtype=jnp.dtype(self.config.export_dtype),
            low_rank=low,
        )
        return path


def _host() -> jax.Device | None:
    """The host as a device; None where JAX was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _load(config: TrainConfig) -> LanguageModel:
    """The frozen model without its output head, which training never reads, in the
    host's memory.

    `shard_model` brings it to the devices, each part straight to where it belongs: no
    device ever holds more than its share.
    """
    dtype = default_dtype() if config.dtype is None else jnp.dtype(config.dtype)
    with jax.default_device(_host()):
        lm = sparda_jax.load(
            config.model,
            attention="dense",
            dtype=dtype,
            storage="stacked",
            implementation=config.implementation,
        )
    lm.model.head = nnx.data(None)
    return lm


def _check_devices(wanted: int | None) -> None:
    if wanted is None:
        return
    held, field = jax.device_count(), "ParallelConfig.devices"
    require(wanted <= held, field, wanted, f"at most the {held} that there are")
    alone = jax.process_count() == 1
    require(alone or wanted == held, field, wanted, "all devices of all processes")


def _check_shapes(config: TrainConfig, lm: LanguageModel, block: int) -> None:
    length, field = config.data.seq_len, "DataConfig.seq_len"
    require(length % block == 0, field, length, f"a multiple of block_size={block}")
    longest = lm.config.max_context
    require(length <= longest, field, length, f"at most max_context={longest}")


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Runs, or continues, a training run.

    Everything goes to `config.out`: checkpoints, log.jsonl, curves.png, config.json,
    forecast.safetensors (the last step) and forecast-best.safetensors (the kept
    checkpoint with the best held-out recall); with `export_best` that one is the first
    file. Where least squares began it, forecast-regression.safetensors comes first of
    all.

    Raises:
      ConfigError: Something in the configuration or the data cannot be used, or the
        directory holds another run, or another trainer runs in it.
      CheckpointError: The model or the checkpoints cannot be read, or the disk is full.
      TrainingError: Too many consecutive steps were not finite.
    """
    out = check_writable(config.out)
    with contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(hold_directory(out)))
        return _train(config, progress=progress)


def _train(config: TrainConfig, *, progress: bool) -> TrainResult:
    run = Run(config, progress=progress)
    # Opening them checks that this run is the one that they are of.
    checkpoints = Checkpoints(run.out, config.checkpoint, run.identity, run.mesh)
    try:
        restored = checkpoints.restore(run.state)
        if restored is not None:
            run.state = restored.state
            run.data.set_state(restored.data)
        elif config.init == "regression":
            run.fit_heads()
            # They may be all that a run leaves that is cut off.
            low, state = run.written(run.state)
            run.export(state, None, "forecast-regression.safetensors", low)
        start = int(run.state.step)
        steps = config.optimizer.steps
        log: RunLog | NoLog = NoLog()
        if jax.process_index() == 0:
            write_json(run.out / "config.json", run.identity)
            log = RunLog(
                run.out,
                start=start if restored is not None else -1,
                steps=steps,
                tensorboard=config.tensorboard,
                progress=progress,
            )
        try:
            evaluation = _loop(run, checkpoints, log, start)
        finally:
            log.close()
        state, evaluation, path = _export(run, checkpoints, evaluation)
    finally:
        checkpoints.close()
    if jax.process_index() == 0:
        plot_curves(run.out / "log.jsonl", run.out / "curves.png")
    resumed = None if restored is None else start
    return TrainResult(state, evaluation, path, resumed)


def _export(
    run: Run, checkpoints: Checkpoints, evaluation: Evaluation | None
) -> tuple[TrainState, Evaluation | None, pathlib.Path]:
    """Writes the files of a run that is done; the state and figures of the main one."""
    checkpoints.wait()
    best, state = checkpoints.best_step, run.state
    if run.config.export_best and best not in (None, int(state.step)):
        held = checkpoints.restore(run.state, best)
        assert held is not None
        state, best = held.state, None
        evaluation = run.measure_heads(state.heads)
    low, state = run.written(state)
    if low is not None:
        # What is written is measured.
        evaluation = run.measure_heads(state.heads)
        if evaluation is not None:
            print(json.dumps({"low rank": evaluation.means()}), file=sys.stderr)
    path = run.export(state, evaluation, "forecast.safetensors", low)
    if best is not None:
        held = checkpoints.restore(run.state, best)
        assert held is not None
        low, kept = run.written(held.state)
        run.export(kept, None, "forecast-best.safetensors", low)
    return state, evaluation, path


def _loop(
    run: Run, checkpoints: Checkpoints, log: RunLog | NoLog, start: int
) -> Evaluation | None:
    """Steps `start` … to the end; returns the last evaluation."""
    config = run.config
    steps, rate = config.optimizer.steps, learning_rate(config.optimizer)
    evaluation = run.measure(log, start) if start in (0, steps) else None
    if start == 0 and config.init == "regression":
        # It took a while, and training may make its heads no better.
        recall = None if evaluation is None else evaluation.means()["recall"]
        checkpoints.save(0, run.state, run.data.get_state(), recall)
    limit = math.inf if config.max_minutes is None else config.max_minutes * 60
    # Clocks differ, and so may the limits: the first process decides for all, so that
    # they take the same steps.
    limited = bool(from_first(limit < math.inf))
    begin = time.monotonic()
    pending: tuple[int, StepMetrics] | None = None
    for step in range(start + 1, steps + 1):
        batch = _on_devices(next(run.data), run.mesh, run.accumulation)
        run.state, metrics = run.step(run.model, run.state, batch)
        # The figures of the step before: reading this one's would wait for it.
        if pending is not None:
            _report(config, log, *pending, rate)
        pending = (step, metrics)
        last = step == steps
        if limited:
            last |= bool(from_first(time.monotonic() - begin > limit))
        recall = None
        if last or step % config.eval.every == 0:
            evaluation = run.measure(log, step)
            recall = None if evaluation is None else evaluation.means()["recall"]
        if last or step % config.checkpoint.every == 0:
            _report(config, log, *pending, rate)
            pending = None
            checkpoints.save(step, run.state, run.data.get_state(), recall)
        if last:
            break
    if pending is not None:
        _report(config, log, *pending, rate)
    return evaluation


def _report(
    config: TrainConfig,
    log: RunLog | NoLog,
    step: int,
    metrics: StepMetrics,
    rate: Any,
) -> None:
    """Logs one step, and stops the run if nothing is finite any more."""
    loss = np.asarray(metrics.loss)
    log.advance(loss=f"{loss.mean():.4f}", skipped=str(int(metrics.skipped)))
    if step % config.log_every == 0:
        finite = bool(np.all(np.isfinite(loss)))
        log.write(
            step,
            "train",
            {
                "loss": float(loss.mean()) if finite else None,
                "layers": loss.round(6).tolist() if finite else None,
                "gradient_norm": float(metrics.gradient_norm) if finite else None,
                "lr": float(rate(step - 1)),
                "skipped": int(metrics.skipped),
            },
        )
    bad, most = int(metrics.bad_in_a_row), config.optimizer.max_bad_steps
    if bad >= most:
        raise TrainingError(
            f"step {step}: the loss or its gradient was not finite in {bad} steps in a "
            "row, which were skipped; the last checkpoint is whole. Look at the data "
            "and the model's weights, or lower optimizer.lr"
        )
