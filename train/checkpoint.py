"""Checkpoints of a run: written beside training, whole or not at all, resumed exactly.

A checkpoint holds the heads, the optimizer's state, the counters, the state of the data
iterator and the identity of the run: everything that a step depends on and that is not
frozen. All randomness comes from seeds in the configuration and from the iterator's
position. Orbax writes into a directory of another name and renames it when all is
written, so a run that is killed at any moment leaves whole checkpoints only.

    OUT/checkpoints/STEP/    the latest ones, and the best by held-out recall
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
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
from train.config import CheckpointConfig
from train.step import TrainState

METRIC = "recall"


def check_writable(out: str | os.PathLike) -> pathlib.Path:
    """Makes the run's directory, before anything costs time.

    Raises:
      ConfigError: If it cannot be written to.
    """
    path = pathlib.Path(out).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"out={str(path)!r} is not allowed: it must be a directory that can be "
            f"written to ({error.strerror})"
        ) from error
    return path


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
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

        Args:
          out: The run's directory.
          config: What is kept.
          identity: JSON that must be equal when a run is continued.
          mesh: State is restored to all its devices.

        Raises:
          ConfigError: If the directory holds checkpoints of another run.
        """
        self._where = out / "checkpoints"
        self._identity, self._mesh = dict(identity), mesh
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
        self._manager = ocp.CheckpointManager(
            epath.Path(self._where), options=options, handler_registry=registry
        )
        latest = self.latest_step
        if latest is not None:
            items = ocp.args.Composite(identity=ocp.args.JsonRestore())
            try:
                held = self._manager.restore(latest, args=items)["identity"]
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{self._where}/{latest} cannot be read: {error}"
                ) from error
            check_identity(held, self._identity, str(self._where))

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
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                # A copy: the next step writes into the state's own buffers, which on a
                # CPU are the ones that are being written out.
                state=ocp.args.StandardSave(jax.tree.map(jnp.copy, state._asdict())),
                data=ocp.args.JsonSave(data),
                identity=ocp.args.JsonSave(self._identity),
            ),
            metrics=None if recall is None else {METRIC: recall},
        )

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """The latest checkpoint, or that of a step; None if there is none.

        Args:
          like: A state of the same shapes.
          step: Which one.
        """
        step = self.latest_step if step is None else step
        if step is None:
            return None
        whole = NamedSharding(self._mesh, PartitionSpec())
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            like._asdict(),
        )
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
            ),
        )
        return Restored(TrainState(**items["state"]), items["data"])

    def wait(self) -> None:
        """Until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and closes."""
        self._manager.wait_until_finished()
        self._manager.close()


def export_forecast(
    path: str | os.PathLike,
    heads: Float[Array, "L D KH"],
    *,
    config: ModelConfig,
    sparse: SparseConfig,
    fingerprint: str | None,
    extra: Mapping[str, Any],
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes heads as a Forecast weights file that `sparda_jax.load` takes."""
    matrices = np.swapaxes(np.asarray(heads, np.float32), 1, 2)
    weights = ForecastWeights(
        future=matrices[1:],
        current=matrices[0],
        base_fingerprint=fingerprint,
        sparse=sparse,
    )
    save_forecast(path, weights, base_name=config.name, extra=extra, dtype=dtype)
