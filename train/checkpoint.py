"""Checkpoints of a run: written beside training, whole or not at all, resumed exactly.

A checkpoint holds the heads, the optimizer's state, the counters, the state of the data
iterator and the identity of the run: everything that a step depends on and that is not
frozen. All randomness comes from seeds in the configuration and from the iterator's
position. Orbax writes into a directory of another name and renames it when all is
written, so a run that is killed at any moment leaves whole checkpoints only.

    OUT/checkpoints/STEP/    the latest ones, and the best by held-out recall
    OUT/damaged/STEP/        those that turned out not to be what was written

A step's `sealed.json` has the hash of each of its files. A checkpoint that does not fit
its seal is set aside, and the run goes on from the newest one that does.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from orbax.checkpoint import checkpoint_managers as policies

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.forecast import ForecastWeights, save_forecast
from sparda_jax.config import ConfigError, ModelConfig, SparseConfig
from sparda_jax.models.low_rank import LowRankHeads
from train.config import CheckpointConfig
from train.optimizer import TrainState
from train.processes import on_first
from train.seal import fault, seal

METRIC = "recall"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        tree = {str(index): item for index, item in enumerate(tree)}
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else key))
    return flat


def check_identity(held: Mapping[str, Any], asked: Mapping[str, Any], where: str):
    """Refuses to continue a run with another model, data or configuration.

    Raises:
      ConfigError: Naming the first fields that differ, with both values.
    """
    old, new = _flat(held), _flat(asked)
    names = sorted(set(old) | set(new))
    changed = [name for name in names if old.get(name) != new.get(name)]
    if not changed:
        return
    shown = "; ".join(
        f"{name} was {old.get(name)!r}, and is {new.get(name)!r} now"
        for name in changed[:3]
    )
    more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
    raise ConfigError(
        f"{where} holds checkpoints of another run: {shown}{more}. Continue with the "
        "same configuration, or choose another out="
    )


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back."""

    state: TrainState
    data: Any


class _Silence(logging.Filter):
    """Drops Orbax's reports of what it raises as well: pages, where one line is enough.

    Its threads log it, and what they had begun finds their event loop closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hook = sys.unraisablehook
        self._own = self._unraisable
        logging.getLogger("absl").addFilter(self)
        sys.unraisablehook = self._own

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def _unraisable(self, what: "sys.UnraisableHookArgs", /) -> None:
        if str(what.exc_value) != "Event loop is closed":
            self._hook(what)

    def end(self) -> None:
        """All is as it was."""
        logging.getLogger("absl").removeFilter(self)
        if sys.unraisablehook is self._own:
            sys.unraisablehook = self._hook


# What the system says when a place cannot be written to or read.
_SYSTEM = tuple(
    os.strerror(code)
    for code in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EIO,
    )
)


def _reason(error: Exception) -> str:
    """What went wrong, without the library's account of how it got there."""
    text = " ".join(str(error).split())
    said = getattr(error, "strerror", None)
    return said or next((known for known in _SYSTEM if known in text), text[:300])


@contextlib.contextmanager
def _one_line(what: str) -> Generator[None]:
    """Turns whatever the library raises into one line."""
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    # Errors of the file system come as OSError, ValueError, RuntimeError, KeyError or
    # Exception itself, depending on which of its threads met them.
    except Exception as error:
        raise CheckpointError(f"{what}: {_reason(error)}") from error


@contextlib.contextmanager
def _interrupts_wait() -> Generator[None]:
    """Ctrl-C that comes inside takes effect behind it.

    In the middle of a save it would leave Orbax's threads waiting for one another, for
    minutes, and reporting it after the program's last line.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _set_aside(step: pathlib.Path, reason: str) -> None:
    """Moves a damaged checkpoint out of the way; an empty one is removed."""
    if reason == "is empty":
        step.rmdir()
        print(f"{step} is empty: removed", file=sys.stderr, flush=True)
        return
    folder = step.parent.parent / "damaged"
    folder.mkdir(exist_ok=True)
    target, number = folder / step.name, 1
    while target.exists():
        number += 1
        target = folder / f"{step.name}-{number}"
    os.replace(step, target)
    print(
        f"{step} {reason}: it is damaged and was moved to {target}",
        file=sys.stderr,
        flush=True,
    )


def clean(where: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Sets damaged checkpoints aside, so that the newest one left is whole.

    Nothing is touched unless what is whole belongs to this run.

    Args:
      where: The directory of all steps; it may not exist yet.
      identity: JSON that must be that of the run.

    Raises:
      ConfigError: The checkpoints are of another run.
      CheckpointError: There are checkpoints, and none of them is whole; or one cannot
        be moved.
    """
    with _one_line(f"{where}: cannot be read"):
        found = sorted(where.iterdir()) if where.is_dir() else []
    steps = [path for path in found if path.name.isdecimal()]
    steps.sort(key=lambda path: int(path.name), reverse=True)
    faults = {path: fault(path) for path in steps}
    whole = [path for path in steps if faults[path] is None]
    broken = {
        path: reason
        for path, reason in faults.items()
        if reason is not None and reason != "is empty"
    }
    if whole:
        with _one_line(f"{whole[0]}: cannot be read"):
            held = ocp.JsonCheckpointHandler().restore(
                epath.Path(whole[0] / "identity")
            )
        check_identity(held, identity, str(where))
    elif broken:
        step, reason = next(iter(broken.items()))
        raise CheckpointError(
            f"{where}: none of its {len(broken)} checkpoints is whole: {step.name} "
            f"{reason}; remove them to begin anew, or choose another out="
        )
    for path, reason in faults.items():
        if reason is not None:
            with _one_line(f"{path}: cannot be moved"):
                _set_aside(path, reason)
    if broken:
        print(f"the run continues from {whole[0]}", file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        out: pathlib.Path,
        config: CheckpointConfig,
        identity: Mapping[str, Any],
        mesh: Mesh,
    ):
        """Opens, or begins, the run's checkpoints.

        Damaged ones are set aside; see `clean`.

        Args:
          out: The run's directory.
          config: What is kept.
          identity: JSON that must be equal when a run is continued.
          mesh: State is restored to all its devices.

        Raises:
          ConfigError: If the directory holds checkpoints of another run.
          CheckpointError: None of the checkpoints can be read.
        """
        self._where = out / "checkpoints"
        self._identity, self._mesh = dict(identity), mesh
        on_first(lambda: clean(self._where, self._identity))
        rules: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_last)]
        if config.keep_best:
            rules.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(rules),
            # Without it no metrics are written, and no checkpoint would be the best.
            best_fn=lambda metrics: metrics[METRIC],
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "identity": ocp.JsonCheckpointHandler(),
        }
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name, handler in handlers.items():
            save = ocp.args.StandardSave if name == "state" else ocp.args.JsonSave
            load = ocp.args.StandardRestore if name == "state" else ocp.args.JsonRestore
            registry.add(name, save, handler)
            registry.add(name, load, handler)
        self._failed = False
        self._silence = _Silence()
        with _one_line(f"{self._where}: cannot be opened"):
            self._manager = ocp.CheckpointManager(
                epath.Path(self._where), options=options, handler_registry=registry
            )

    def _seal(self) -> None:
        """Called when all files are written, before the directory gets its name."""
        if jax.process_index() == 0:
            for path in self._where.glob("*.orbax-checkpoint-tmp*"):
                seal(path)

    @property
    def latest_step(self) -> int | None:
        """Step of the latest whole checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the best held-out recall that is kept."""
        found = []
        for step in self._manager.all_steps():
            metrics = self._manager.metrics(step)
            if metrics is not None and metrics.get(METRIC) is not None:
                found.append((metrics[METRIC], step))
        return max(found)[1] if found else None

    def save(
        self, step: int, state: TrainState, data: Any, recall: float | None
    ) -> None:
        """Begins to write a checkpoint; training goes on meanwhile.

        Args:
          step: Steps taken.
          state: Copied before this returns.
          data: State of the data iterator, JSON.
          recall: Held-out recall at this step, or None if it was not measured.

        Raises:
          CheckpointError: The place is full, or the like; also if it was for the
            checkpoint before.
        """
        if step in self._manager.all_steps():
            return
        with _interrupts_wait(), self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    # A copy: the next step writes into the state's own buffers, which
                    # on a CPU are the ones that are being written out.
                    state=ocp.args.StandardSave(
                        jax.tree.map(jnp.copy, state._asdict())
                    ),
                    data=ocp.args.JsonSave(data),
                    identity=ocp.args.JsonSave(self._identity),
                ),
                metrics=None if recall is None else {METRIC: recall},
            )

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            with _one_line(f"{self._where}: cannot be written"):
                yield
        except CheckpointError:
            self._failed = True
            raise

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """The latest checkpoint, or that of a step; None if there is none.

        Args:
          like: A state of the same shapes.
          step: Which one.

        Raises:
          CheckpointError: It cannot be read.
        """
        step = self.latest_step if step is None else step
        if step is None:
            return None
        whole = NamedSharding(self._mesh, PartitionSpec())
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            like._asdict(),
        )
        with _one_line(f"{self._where / str(step)}: cannot be read"):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target),
                    data=ocp.args.JsonRestore(),
                ),
            )
            return Restored(TrainState(**items["state"]), items["data"])

    def wait(self) -> None:
        """Until everything is written.

        Raises:
          CheckpointError: It could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and closes.

        Raises:
          CheckpointError: What was being written could not be, and nobody was told.
        """
        reported = self._failed
        try:
            with self._writing():
                try:
                    self._manager.wait_until_finished()
                finally:
                    self._manager.close()
        except CheckpointError:
            if not reported:
                raise
        finally:
            self._silence.end()


def export_forecast(
    path: str | os.PathLike,
    heads: Float[Array, "L D KRH"],
    *,
    config: ModelConfig,
    sparse: SparseConfig,
    fingerprint: str | None,
    extra: Mapping[str, Any],
    dtype: DTypeLike = np.float32,
    low_rank: LowRankHeads | None = None,
) -> None:
    """Writes heads as a Forecast weights file that `sparda_jax.load` takes."""
    matrices = np.swapaxes(np.asarray(heads, np.float32), 1, 2)
    weights = ForecastWeights(
        future=matrices[1:],
        current=matrices[0],
        base_fingerprint=fingerprint,
        sparse=sparse,
        low_rank=low_rank,
        reads=config.forecast_reads,
        queries=matrices.shape[1] // (config.num_kv_heads * config.head_dim),
    )
    save_forecast(path, weights, base_name=config.name, extra=extra, dtype=dtype)
