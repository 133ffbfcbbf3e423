"""Configuration of a training run: frozen dataclasses that check themselves.

A run is described by one small Python file whose `get_config()` returns a
`TrainConfig`; `with_overrides` applies `--set key=value` to it.
"""

import ast
import dataclasses
import difflib
import os
import pathlib
import runpy
import typing
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from sparda_jax.checks import (
    ConfigError,
    instance,
    integer,
    number,
    one_line,
    optional,
    require,
    several,
    shown,
    text,
)
from sparda_jax.checks import text_path as check_path
from sparda_jax.config import ForecastReads, SparseConfig
from train.config_checks import check_export_best, check_source, settle_fields

_positive, _count = integer(1), integer(0)
# A seed is a key of JAX and of grain, 32 bits each; sources count on from it.
_seed = integer(0)
_fraction = number(least=0, most=1)
_half = number(least=0, most=0.5)
_rate = number(least=1e-12, most=1)
_momentum = number(least=0, most=0.9999999)
_norm = number(least=0, most=1e9)
_floor = number(least=0, most=1e-3)
_softness = number(least=1e-4, most=10)
# Weights are shares: one that is far too small would never have its turn.
_share = number(least=1e-6, most=1e6)
_maybe_positive = optional(_positive)

_maybe_minutes = optional(number(least=0, most=1e6))
_maybe_sparse = optional(instance(SparseConfig))


def _name(field: str, value: object) -> str:
    found = text(field, value)
    require(bool(found.strip()), field, value, "a text that is not empty")
    return found


def _source(field: str, value: object) -> tuple[str, float]:
    """A (name or path, weight) pair."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    require(pair, field, value, "(name or path, weight above 0)")
    source, weight = typing.cast(tuple[object, object], value)
    return check_source(f"{field}[0]", source), _share(f"{field}[1]", weight)


_sources = several(_source, "(name or path, weight) pairs")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Variant of the distillation loss; by default that of docs/algorithm.md §5.

    Attributes:
      teacher: Grid of the teacher's key means: "fine", kernel 2 stride 1, or
        "deployed", the grid that inference selects by: with `mask_short_rows`, as its
        first tokens have no teacher (docs/algorithm.md §7.3).
        "oracle": the attention mass that blocks truly hold; with target="recall".
      align: How the fine teacher is brought to the deployed grid.
      student: Bins of the KL: "cells", the windows that start in a chosen block, or
        "blocks", pooled to one score a block exactly as inference pools.
      target: What the student is to match: "mass", how the teacher's probability is
        spread (the KL), or, with student="blocks", "recall", which blocks the teacher
        chose: the loss is then a smooth count of misplaced blocks (`recall_loss`).
      softness: Of that count: how far from the line a block is clear of it, in spreads
        of a row's scores. Good heads want a sharp one.
      mask_short_rows: Leave out rows whose whole context fits the budget: inference
        never asks for a choice there.
      position_weight: "uniform", or "context": a row counts by the share of its context
        that the budget leaves out.
      on_policy: Hidden states come from Forecast routing instead of the teacher's.
      floor: Least probability of a bin. The reference's 1e-8 takes the gradient from
        bins that the student thinks impossible; 0 keeps it.
      tile: Query tokens per tile; None chooses by memory.
    """

    teacher: Literal["fine", "deployed", "oracle"] = "fine"
    align: Literal["max", "mean"] = "max"
    student: Literal["cells", "blocks"] = "cells"
    target: Literal["mass", "recall"] = "mass"
    softness: float = 0.1
    mask_short_rows: bool = False
    position_weight: Literal["uniform", "context"] = "uniform"
    on_policy: bool = False
    floor: float = 1e-8
    tile: int | None = None

    def __post_init__(self) -> None:
        settle_fields(self, floor=_floor, softness=_softness, tile=_maybe_positive)
        fits = self.target == "mass" or self.student == "blocks"
        allowed = '"mass" unless student is "blocks"'
        require(fits, "LossConfig.target", self.target, allowed)
        fits = self.target == "recall" or self.teacher != "oracle"
        wanted = '"recall" where teacher is "oracle"'
        require(fits, "LossConfig.target", self.target, wanted)


# The loss of the published weights: the deployed choice of blocks, as inference pools
# it, in the rows that choose at all.
PUBLISHED_LOSS = LossConfig(
    teacher="deployed",
    student="blocks",
    target="recall",
    mask_short_rows=True,
    floor=0.0,
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the reference's by default: docs/algorithm.md §5.6.

    Attributes:
      lr: Peak learning rate.
      beta1, beta2, eps, weight_decay: Of AdamW.
      clip: Largest norm of the gradient of all heads together; 0 for no limit.
      whiten: Adam and the clip work on heads of whitened inputs: a step then changes
        what heads answer by as much in every direction that inputs take. Needs
        init="regression", which knows the inputs' moments.
      schedule: What follows the warm-up: "constant", "cosine" or "linear".
      warmup_steps: Linear warm-up from 0; at most a tenth of `steps` is used.
      final_fraction: Learning rate at the end of "cosine" and "linear", of `lr`.
      steps: Optimizer steps.
      global_batch: Sequences per step, over all devices.
      micro_batch: Sequences per device at a time; the rest is accumulated.
      max_bad_steps: Consecutive steps with a loss or gradient that is not finite, each
        skipped, after which training stops.
    """

    lr: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float = 0.5
    whiten: bool = False
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    steps: int = 2000
    global_batch: int = 32
    micro_batch: int = 1
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        settle_fields(
            self,
            lr=_rate,
            eps=_rate,
            beta1=_momentum,
            beta2=_momentum,
            weight_decay=_fraction,
            final_fraction=_fraction,
            clip=_norm,
            warmup_steps=_count,
            steps=_positive,
            global_batch=_positive,
            micro_batch=_positive,
            max_bad_steps=_positive,
        )

    def accumulation(self, devices: int) -> int:
        """Micro batches per step on that many devices."""
        at_once = self.micro_batch * devices
        require(
            self.global_batch % at_once == 0,
            "OptimizerConfig.global_batch",
            self.global_batch,
            f"a multiple of micro_batch × devices = {self.micro_batch} × {devices}",
        )
        return self.global_batch // at_once


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, and how sequences are made of it.

    Attributes:
      sources: (name or path, weight) pairs. Names are "pydoc" and "stdlib", manual and
        library of the running Python, and "records" or "records:SEED" (`evaluation.
        records`); a path is a file, directory or a directory of `train.prepare`.
      seq_len: Tokens of a sequence, a multiple of the block size.
      packing: "documents" packs documents and pieces of documents, apart from each
        other; "long" takes whole sequences out of single documents and leaves out
        documents that are shorter; "joined" cuts all documents, one after the other,
        into whole sequences, through which attention goes as if each were one text.
      held_out: Share of the documents that is kept for evaluation.
      seed: Of the shuffle and the split.
    """

    sources: tuple[tuple[str, float], ...] = (("stdlib", 0.7), ("pydoc", 0.3))
    seq_len: int = 4096
    packing: Literal["documents", "long", "joined"] = "documents"
    held_out: float = 0.05
    seed: int = 42

    def __post_init__(self) -> None:
        settle_fields(
            self,
            sources=_sources,
            seq_len=_positive,
            seed=_seed,
            held_out=_half,
        )
        field = "DataConfig.sources"
        require(len(self.sources) > 0, field, self.sources, "at least one source")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation.

    Attributes:
      every: Steps between two evaluations; one is made at the end as well.
      batches: Sequences that are evaluated, at most.
      mass: Also measure the attention mass of the chosen blocks, in a second pass.
    """

    every: int = 100
    batches: int = 8
    mass: bool = True

    def __post_init__(self) -> None:
        settle_fields(self, every=_positive, batches=_positive)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk.

    Attributes:
      every: Steps between two checkpoints; one is made at the end as well.
      keep_last: Latest checkpoints that are kept.
      keep_best: Checkpoints with the best held-out recall that are kept beside them.
    """

    every: int = 50
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self) -> None:
        settle_fields(self, every=_positive, keep_last=_positive, keep_best=_count)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Devices.

    Attributes:
      devices: How many share the batch; None for all.
      fsdp: Each device holds a part of the frozen weights and gathers a layer's when it
        runs. False: each holds all of them.
    """

    devices: int | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        settle_fields(self, devices=_maybe_positive)


_loss, _optimizer = instance(LossConfig), instance(OptimizerConfig)
_data, _eval = instance(DataConfig), instance(EvalConfig)
_checkpoint, _parallel = instance(CheckpointConfig), instance(ParallelConfig)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      name: Of the run; part of file names.
      model: As for `sparda_jax.load`: a preset's name, file, directory or hub id.
      out: Directory of checkpoints, logs, curves and the trained weights.
      init: First Forecast weights: "from_query", the group mean of the consuming
        layer's query heads; "kaiming", uniform in ±1/√D as in the reference; or
        "regression" (`train.init`): least squares for every query head of the consuming
        layer, and weights of the heads in a group by the loss.
      init_batches: Batches that "regression" reads for the one, and for the other.
      queries: R, queries that the heads make for each kv head (`models.forecast`): 1 as
        in the reference, or up to as many as query heads share it; None: so many.
      reads: What the heads read of a layer: "input" as in the reference, or "attended",
        what its MLP reads: they know more then, and the next layer's fetch starts
        behind this layer's attention (`ModelConfig.forecast_reads`).
      sparse: Block geometry and budget; None takes the model's.
      dtype: Of the frozen weights; None is float32 on a CPU and bfloat16 elsewhere.
      attention: How the frozen layers attend: "blocks" visits the listed blocks;
        "masked" scores all keys and masks the others, which is faster where a sequence
        is only a few times the budget.
      implementation: Kernels of "blocks", as for `sparda_jax.load`.
      seed: Of the initialisation.
      max_minutes: Stop after the step at which this much time has passed, as if it
        were the last one; the same command continues. None for no limit.
      log_every: Steps between two lines of the log.
      export_best: The exported file holds the kept checkpoint with the best held-out
        recall, the regression's among them, in the place of the last step's.
      export_dtype: Of the matrices in the exported files.
      export_rank: Files hold a change of this rank of the model's query weights
        (`models.low_rank`) in the place of whole matrices; None: whole ones.
      tensorboard: Also write TensorBoard files (needs the package tensorboardX).
    """

    name: str = "distill"
    model: str = "smollm2-135m"
    out: str = "out/distill"
    init: Literal["from_query", "kaiming", "regression"] = "from_query"
    init_batches: int = 16
    queries: int | None = 1
    reads: ForecastReads = "input"
    sparse: SparseConfig | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    attention: Literal["blocks", "masked"] = "blocks"
    implementation: Literal["mosaic_gpu", "triton", "xla"] | None = None
    seed: int = 42
    max_minutes: float | None = None
    log_every: int = 1
    export_best: bool = False
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    export_rank: int | None = None
    tensorboard: bool = False
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        settle_fields(
            self,
            name=_name,
            model=check_path,
            out=check_path,
            init_batches=_positive,
            queries=_maybe_positive,
            export_rank=_maybe_positive,
            sparse=_maybe_sparse,
            seed=_seed,
            max_minutes=_maybe_minutes,
            log_every=_positive,
            loss=_loss,
            optimizer=_optimizer,
            data=_data,
            eval=_eval,
            checkpoint=_checkpoint,
            parallel=_parallel,
        )
        require(
            self.init == "regression" or not self.optimizer.whiten,
            "OptimizerConfig.whiten",
            self.optimizer.whiten,
            'False, or TrainConfig.init "regression"',
        )
        check_export_best(self)
        length, tile = self.data.seq_len, self.loss.tile
        if self.sparse is not None:
            block = self.sparse.block_size
            require(
                length % block == 0,
                "DataConfig.seq_len",
                length,
                f"a multiple of SparseConfig.block_size={block}",
            )
        if tile is not None:
            allowed = f"at most DataConfig.seq_len={length}"
            require(tile <= length, "LossConfig.tile", tile, allowed)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it continues, as JSON.

        Where things are written, how often, and on how many devices may change.
        """
        values = dataclasses.asdict(self)
        free = ("name", "out", "max_minutes", "log_every", "tensorboard", "eval")
        free = (*free, "checkpoint", "parallel", "attention", "implementation")
        for field in (*free, "export_best", "export_dtype", "export_rank"):
            del values[field]
        del values["optimizer"]["micro_batch"]
        # Runs from before there was a choice.
        values["sparse"] = self.sparse and self.sparse.to_json()
        for part, field, only in (
            (values, "queries", 1),
            (values, "reads", "input"),
            (values["loss"], "softness", 0.1),
            (values["optimizer"], "whiten", False),
        ):
            if part[field] == only:
                del part[field]
        values["data"]["sources"] = [list(pair) for pair in self.data.sources]
        return values


def load_config(path: str | os.PathLike) -> TrainConfig:
    """Runs a configuration file and returns what its `get_config()` returns.

    Raises:
      ConfigError: If there is no such file, or it does not do that.
    """
    file = pathlib.Path(check_path("config", path))
    try:
        found = file.is_file()
    except (OSError, ValueError):  # A name that is too long.
        found = False
    wanted = "a Python file with get_config()"
    require(found, "config", str(file), wanted)
    try:
        make = runpy.run_path(str(file)).get("get_config")
        require(callable(make), "config", str(file), wanted)
        assert callable(make)
        config = make()
    except ConfigError:
        raise
    # The file is the user's program: whatever it raises is about the file.
    except Exception as error:
        raise ConfigError(
            f"config={shown(str(file))} is not allowed: it must be {wanted}, and it "
            f"raised {type(error).__name__}: {one_line(str(error), 300)}"
        ) from error
    ok = isinstance(config, TrainConfig)
    require(ok, f"{file}: get_config()", config, "a train.config.TrainConfig")
    return config


def _fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all leaves, and their types."""
    kinds = typing.get_type_hints(type(config))
    leaves = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            leaves.update(_fields(value, name + "."))
        else:
            leaves[name] = kinds[field.name]
    return leaves


def _parse(text: str, kind: Any) -> Any:
    """The value that `text` stands for in a field of type `kind`."""
    if kind is str:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of doubtful escapes and the like.
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return {"true": True, "false": False}.get(text.lower(), text)
    return value


def _replaced(config: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:
    """All at once, so that fields that must fit together can change together."""
    values = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for head in {path[0] for path in changes if len(path) > 1}:
        inner = {path[1:]: x for path, x in changes.items() if path[0] == head}
        values[head] = _replaced(getattr(config, head), inner)
    return dataclasses.replace(config, **values)


def with_overrides(config: TrainConfig, settings: Iterable[str]) -> TrainConfig:
    """Applies `key=value` settings.

    A key is a dotted name (`optimizer.lr`), or its last part where only one field is
    called so (`lr`). `sparse.…` needs a configuration with a `sparse` of its own.

    Raises:
      ConfigError: If a key is unknown or stands for several fields, or a value is not
        allowed.
    """
    fields, changes = _fields(config), {}
    for setting in settings:
        key, separator, value = text("--set", setting).partition("=")
        require(bool(separator), "--set", setting, "of the form key=value")
        names = [name for name in fields if name == key]
        names = names or [name for name in fields if name.split(".")[-1] == key]
        if not names:
            near = difflib.get_close_matches(key[:80], fields, n=3, cutoff=0.3)
            hint = f" such as {', '.join(near)}" if near else ""
            require(False, "--set", key, f"a field of TrainConfig{hint}")
        require(len(names) == 1, "--set", key, f"one of {', '.join(names)}")
        changes[tuple(names[0].split("."))] = _parse(value, fields[names[0]])
    return _replaced(config, changes)
