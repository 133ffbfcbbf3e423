"""Held-out metrics by layer, and where figures of a run are written.

  KL       the training loss, on held-out rows
  recall   of the blocks that the layer's own query chooses (the deployed selector), the
           share that the forecast chooses as well; forced blocks are not counted
  recall_at_budget  the same with them: of all blocks that the own query reads
  mass     attention probability of all causal tokens that falls into the chosen blocks:
           of the forecast, of the own query, and of the oracle, which knows that mass

Recall and mass count rows whose context does not fit the budget: elsewhere nothing is
chosen. Hidden states come from own-query selection, so that a layer is judged on what
the selectors that it is compared with would see.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from sparda_jax.checkpoint.atomic import (
    cannot_write,
    new_file,
    write_json,
    write_text,
)
from sparda_jax.config import ConfigError, SparseConfig
from sparda_jax.models.decoder import Decoder
from sparda_jax.sparse.selection import force_blocks, top_blocks
from train.backbone import (
    Batch,
    LayerView,
    Settings,
    attend,
    run_backbone,
    teach_layer,
)
from train.config import LossConfig
from train.objectives import forecast_routing, supervised_blocks
from train.sharding import AXIS, make_gather, model_specs
from train.teacher import (
    LayerKeys,
    confine,
    group_softmax,
    layer_keys,
    own_block,
    teach,
)
from train.tiles import (
    Documents,
    Queries,
    head_scores,
    join_tiles,
    padded_heads,
    tile_queries,
    tile_size,
)


class LayerSums(NamedTuple):
    """Sums over the rows of a batch; a ratio of two of them is a metric.

    Attributes:
      kl, kl_weight: Loss, and its weights.
      recall_hits, recall_total: Blocks that both choose, blocks that the own query
        chooses.
      forecast_mass, own_mass, oracle_mass: Attention mass in the chosen blocks.
      rows: Rows times kv heads that count for mass.
    """

    kl: Float[Array, "*L"]
    kl_weight: Float[Array, "*L"]
    recall_hits: Float[Array, "*L"]
    recall_total: Float[Array, "*L"]
    forecast_mass: Float[Array, "*L"]
    own_mass: Float[Array, "*L"]
    oracle_mass: Float[Array, "*L"]
    rows: Float[Array, "*L"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics by layer; masses are NaN where they were not measured."""

    kl: np.ndarray
    recall: np.ndarray
    recall_at_budget: np.ndarray
    forecast_mass: np.ndarray
    own_mass: np.ndarray
    oracle_mass: np.ndarray

    @staticmethod
    def of(sums: LayerSums, sparse: SparseConfig) -> "Evaluation":
        """Ratios of the sums."""
        s: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        # Both lists of a row that counts hold all forced blocks.
        forced = sparse.forced_blocks * s.rows
        with np.errstate(invalid="ignore", divide="ignore"):
            return Evaluation(
                kl=s.kl / s.kl_weight,
                recall=s.recall_hits / s.recall_total,
                recall_at_budget=(s.recall_hits + forced) / (s.recall_total + forced),
                forecast_mass=s.forecast_mass / s.rows,
                own_mass=s.own_mass / s.rows,
                oracle_mass=s.oracle_mass / s.rows,
            )

    def means(self) -> dict[str, float | None]:
        """Each metric averaged over the layers; None where it was not measured."""
        fields = (field.name for field in dataclasses.fields(self))
        values = {name: float(np.mean(getattr(self, name))) for name in fields}
        return {k: v if np.isfinite(v) else None for k, v in values.items()}

    def by_layer(self) -> dict[str, list[float | None]]:
        """Each metric by layer, as JSON."""
        return {
            field.name: [
                round(float(x), 6) if np.isfinite(x) else None
                for x in getattr(self, field.name)
            ]
            for field in dataclasses.fields(self)
        }


def _mass_in(
    mass: Float[Array, "B K T M"], lists: Int[Array, "B K T P"]
) -> Float[Array, "B K T"]:
    picked = jnp.take_along_axis(mass, jnp.maximum(lists, 0), axis=-1)
    return jnp.sum(jnp.where(lists >= 0, picked, 0.0), axis=-1)


def _tile_sums(
    queries: Queries,
    keys: LayerKeys,
    raw: Float[Array, "B K S H"] | None,
    key_bias: Float[Array, "B K S"] | None,
    settings: Settings,
) -> tuple[tuple[Array, ...], Int[Array, "B K T P"]]:
    """Sums of one tile as in `LayerSums` from recall on, and the own query's lists."""
    sparse = settings.sparse
    deployed = LossConfig(teacher="deployed")
    own = teach(queries, keys, sparse=sparse, loss=deployed).routing
    guess = forecast_routing(queries, keys, sparse=sparse)
    blocks = keys.windows.shape[2] // sparse.windows_per_block
    held = queries.token // sparse.block_size - queries.start // sparse.block_size + 1
    counts = (held > sparse.largest_budget) & (queries.token < queries.end)
    counts = counts[:, None]
    total = supervised_blocks(own, queries, blocks, sparse) & counts[..., None]
    hits = supervised_blocks(guess, queries, blocks, sparse) & total
    masses = (jnp.float32(jnp.nan),) * 3
    if raw is not None:
        index = jnp.arange(raw.shape[2])
        seen = index <= queries.token[:, None]
        seen &= index >= queries.start[..., None]
        scores = head_scores(queries.q, raw)
        if key_bias is not None:
            scores = scores + key_bias[:, :, None, None]
        weights = group_softmax(scores, seen)
        weights = weights / (queries.q.shape[2] // raw.shape[1])
        mass = weights.reshape(*weights.shape[:3], blocks, -1).sum(-1)
        row_block = own_block(queries, sparse)
        scores = confine(force_blocks(mass, row_block, sparse), queries, sparse)
        length = jnp.zeros(row_block.shape[0], jnp.int32)
        best = top_blocks(scores, row_block, length, sparse)
        masses = tuple(
            jnp.sum(jnp.where(counts, _mass_in(mass, lists), 0.0))
            for lists in (guess, own, best)
        )
    rows = jnp.sum(counts) * keys.windows.shape[1]
    sums = (jnp.sum(hits), jnp.sum(total), *masses, rows)
    return tuple(x.astype(jnp.float32) for x in sums), own


def layer_metrics(
    view: LayerView,
    documents: Documents,
    settings: Settings,
    *,
    mass: bool,
) -> tuple[Int[Array, "B K T P"], LayerSums]:
    """Own-query block lists and the metrics' sums of one layer."""
    sparse = dataclasses.replace(settings.sparse, dense_len=-1)
    settings = dataclasses.replace(settings, sparse=sparse)
    loss = teach_layer(view, documents, settings, kernels=settings.teacher_kernels)
    deployed = LossConfig(teacher="deployed")
    batch, tokens, heads, _ = view.q.shape
    keys = layer_keys(view.k, documents, view.key_bias, sparse=sparse, loss=deployed)
    raw = key_bias = None
    if mass:
        raw = padded_heads(view.k, sparse)
        if view.key_bias is not None:
            key_bias = padded_heads(view.key_bias, sparse)
    size = settings.loss.tile
    size = size or tile_size(batch, tokens, heads, jax.default_backend())
    tiles, cut = tile_queries(view.q, view.forecast, documents, size)

    def one(index: Int[Array, ""]):
        return _tile_sums(cut(index), keys, raw, key_bias, settings)

    sums, lists = jax.lax.map(one, jnp.arange(tiles))
    sums = tuple(jnp.sum(x) for x in sums)
    return join_tiles(lists, 2, tokens), LayerSums(loss.total, loss.weight, *sums)


Evaluate = Callable[[Decoder, Float[Array, "L D KRH"], Sequence[Batch]], Evaluation]


def make_evaluate(
    model: Decoder, settings: Settings, mesh: Mesh, *, fsdp: bool, mass: bool
) -> Evaluate:
    """A function of (model, heads, batches [B, T], B a multiple of the devices)."""
    gather = make_gather(model, mesh, fsdp=fsdp)

    def sums(model: Decoder, heads: Array, batch: Batch) -> LayerSums:
        def on_layer(view: LayerView):
            lists, found = layer_metrics(view, batch.documents, settings, mass=mass)
            return attend(view, lists, settings), found

        out = run_backbone(model, heads, batch, settings, on_layer, gather)[1]
        return jax.lax.psum(out, AXIS) if mesh.size > 1 else out

    run = jax.jit(
        jax.shard_map(
            sums,
            mesh=mesh,
            in_specs=(
                model_specs(model, mesh, fsdp=fsdp),
                PartitionSpec(),
                PartitionSpec(AXIS),
            ),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )

    def evaluate(model: Decoder, heads: Array, batches: Sequence[Batch]) -> Evaluation:
        parts = [jax.device_get(run(model, heads, batch)) for batch in batches]
        total = jax.tree.map(lambda *xs: np.sum(xs, axis=0), *parts)
        return Evaluation.of(total, settings.sparse)

    return evaluate


def _tensorboard(folder: pathlib.Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ConfigError(
            "tensorboard=True is not allowed: it needs the package tensorboardX "
            "(pip install 'sparda-jax[tensorboard]')"
        ) from error
    # What a killed run wrote after the step that is resumed is hidden.
    return SummaryWriter(str(folder), purge_step=start + 1 if start > 0 else None)


class NoLog:
    """Stands for `RunLog` in all processes but the first."""

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Nothing."""

    def advance(self, **shown: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class RunLog:
    """JSON lines, a progress bar and, if wanted, TensorBoard files.

    A resumed run goes on in the same file: lines from the checkpoint's step on, which
    the killed run had written, are taken away first.
    """

    def __init__(
        self,
        out: pathlib.Path,
        *,
        start: int,
        steps: int,
        tensorboard: bool = False,
        progress: bool = True,
    ):
        """Opens the log of a run that begins at step `start` of `steps`."""
        self._writer = None
        if tensorboard:
            self._writer = _tensorboard(out / "tensorboard", start)
        self._path = out / "log.jsonl"
        kept = [line for line in read_log(self._path) if line["step"] <= start]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        self._bar = tqdm(
            total=steps, initial=start, unit="step", disable=None if progress else True
        )
        self._begin = time.monotonic()

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """One line; plain numbers go to TensorBoard as well."""
        seconds = round(time.monotonic() - self._begin, 3)
        line = {"step": step, "kind": kind, "seconds": seconds, **values}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def advance(self, **shown: str) -> None:
        """One step done; `shown` stands behind the progress bar."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Closes files and bar."""
        self._bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Lines of a log; a last line that a kill cut short is left out."""
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def keep_json(path: pathlib.Path | None, values: Any) -> None:
    """Writes figures that are known so far, whole or not at all; None writes nothing.

    For commands that measure for long: a run that is cut off still tells something.

    Raises:
      CheckpointError: The place cannot be written to, or is full.
    """
    if path is not None:
        write_json(path, values)


def plot_curves(log: str | pathlib.Path, out: str | pathlib.Path) -> None:
    """A PNG of loss and held-out metrics over steps, and recall and mass by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    steps = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (curve, recall), (by_layer, mass) = figure.subplots(2, 2)
    curve.plot([x["step"] for x in steps], [x["loss"] for x in steps], label="training")
    if evaluations:
        at = [x["step"] for x in evaluations]
        curve.plot(at, [x["kl"] for x in evaluations], "o-", label="held out")
        for name, label in (
            ("recall", "block recall"),
            ("forecast_mass", "mass, Forecast"),
            ("own_mass", "mass, own query"),
            ("oracle_mass", "mass, oracle"),
        ):
            values = [np.nan if x[name] is None else x[name] for x in evaluations]
            recall.plot(at, values, "o-", label=label)
        first, last = evaluations[0]["layers"], evaluations[-1]["layers"]
        for layers, label in ((first, "before"), (last, "after")):
            values = [np.nan if x is None else x for x in layers["recall"]]
            by_layer.plot(values, "o-", label=f"recall {label}")
        for name in ("forecast_mass", "own_mass", "oracle_mass"):
            values = [np.nan if x is None else x for x in last[name]]
            mass.plot(values, "o-", label=name.replace("_", " "))
    curve.set(xlabel="step", ylabel="KL", title="Loss, mean over layers")
    recall.set(xlabel="step", title="Held-out recall and attention mass")
    by_layer.set(xlabel="layer", title="Held-out block recall by layer")
    mass.set(xlabel="layer", title="Captured attention mass by layer")
    for axes in (curve, recall, by_layer, mass):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    with new_file(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
