"""Configuration of a training run: frozen dataclasses that check themselves.

A run is described by one small Python file whose `get_config()` returns a
`TrainConfig`; `with_overrides` applies `--set key=value` to it.
"""

import ast
import dataclasses
import difflib
import math
import pathlib
import runpy
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from sparda_jax.config import ConfigError, SparseConfig


def check(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r} is not allowed: it must be {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


class _Checked:
    """Field checks that the configurations share."""

    def _ints(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            ok = _is_int(value) and value >= least
            allowed = f"an integer of at least {least}"
            check(ok, f"{type(self).__name__}.{name}", value, allowed)

    def _numbers(self, low: float, high: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            ok = _is_number(value) and low <= value <= high
            allowed = f"a number in [{low}, {high}]"
            check(ok, f"{type(self).__name__}.{name}", value, allowed)

    def _choices(self) -> None:
        """Checks all fields whose type is a Literal, or bool."""
        for name, kind in typing.get_type_hints(type(self)).items():
            value, field = getattr(self, name), f"{type(self).__name__}.{name}"
            if typing.get_origin(kind) is Literal:
                choices = typing.get_args(kind)
                check(value in choices, field, value, f"one of {choices}")
            elif kind is bool:
                check(isinstance(value, bool), field, value, "True or False")


@dataclasses.dataclass(frozen=True)
class LossConfig(_Checked):
    """Variant of the distillation loss; the defaults are the reference's (§5).

    Attributes:
      teacher: Grid of the teacher's key means: "fine", kernel 2 stride 1, or
        "deployed", the grid that inference selects by. With "deployed" the first
        kernel_size − 1 tokens have no teacher; use `mask_short_rows` with it (§10.3).
      align: How the fine teacher is brought to the deployed grid.
      student: Bins of the KL: "cells", the windows that start in a chosen block, or
        "blocks", pooled to one score a block exactly as inference pools.
      target: What the student is to match: "mass", how the teacher's probability is
        spread (the KL), or, with student="blocks", "recall", which blocks the teacher
        chose: the loss is then a smooth count of misplaced blocks (`recall_loss`).
      mask_short_rows: Leave out rows whose whole context fits the budget: inference
        never asks for a choice there.
      position_weight: "uniform", or "context": a row counts by the share of its context
        that the budget leaves out.
      on_policy: Hidden states come from Forecast routing instead of the teacher's.
      floor: Least probability of a bin. The reference's 1e-8 takes the gradient from
        bins that the student thinks impossible; 0 keeps it.
      tile: Query tokens per tile; None chooses by memory.
    """

    teacher: Literal["fine", "deployed"] = "fine"
    align: Literal["max", "mean"] = "max"
    student: Literal["cells", "blocks"] = "cells"
    target: Literal["mass", "recall"] = "mass"
    mask_short_rows: bool = False
    position_weight: Literal["uniform", "context"] = "uniform"
    on_policy: bool = False
    floor: float = 1e-8
    tile: int | None = None

    def __post_init__(self) -> None:
        self._choices()
        self._numbers(0.0, 1e-3, "floor")
        fits = self.target == "mass" or self.student == "blocks"
        allowed = '"mass" unless student is "blocks"'
        check(fits, "LossConfig.target", self.target, allowed)
        if self.tile is not None:
            self._ints(1, "tile")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Checked):
    """AdamW and its schedule; the defaults are the reference's (runtime A3).

    Attributes:
      lr: Peak learning rate.
      beta1, beta2, eps, weight_decay: Of AdamW.
      clip: Largest norm of the gradient of all heads together; 0 for no limit.
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
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    steps: int = 2000
    global_batch: int = 32
    micro_batch: int = 1
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        self._choices()
        self._ints(1, "steps", "global_batch", "micro_batch", "max_bad_steps")
        self._ints(0, "warmup_steps")
        self._numbers(0.0, 1.0, "weight_decay", "final_fraction")
        self._numbers(0.0, 0.9999999, "beta1", "beta2")
        self._numbers(0.0, 1e9, "clip")
        self._numbers(1e-12, 1.0, "lr", "eps")

    def accumulation(self, devices: int) -> int:
        """Micro batches per step on that many devices."""
        at_once = self.micro_batch * devices
        check(
            self.global_batch % at_once == 0,
            "OptimizerConfig.global_batch",
            self.global_batch,
            f"a multiple of micro_batch × devices = {self.micro_batch} × {devices}",
        )
        return self.global_batch // at_once


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
    """Text, and how sequences are made of it.

    Attributes:
      sources: (name or path, weight) pairs. Names are "pydoc" and "stdlib", the manual
        text and the library of the running Python; a path is a file or directory of
        .txt, .md, .rst, .py, .gz and .jsonl, or a directory of `train.prepare`.
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
        self._choices()
        self._ints(1, "seq_len")
        self._ints(0, "seed")
        self._numbers(0.0, 0.5, "held_out")
        field = "DataConfig.sources"
        check(len(self.sources) > 0, field, self.sources, "at least one source")
        for item in self.sources:
            pair = isinstance(item, tuple) and len(item) == 2
            ok = pair and isinstance(item[0], str) and _is_number(item[1])
            check(ok and item[1] > 0, field, item, "(name or path, weight above 0)")


@dataclasses.dataclass(frozen=True)
class EvalConfig(_Checked):
    """Held-out evaluation.

    Attributes:
      every: Steps between two evaluations; one is made at the end as well.
      batches: Sequences that are evaluated, at most.
      mass: Also measure the attention mass that the chosen blocks capture (a second
        pass over all scores).
    """

    every: int = 100
    batches: int = 8
    mass: bool = True

    def __post_init__(self) -> None:
        self._choices()
        self._ints(1, "every", "batches")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Checked):
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
        self._ints(1, "every", "keep_last")
        self._ints(0, "keep_best")


@dataclasses.dataclass(frozen=True)
class ParallelConfig(_Checked):
    """Devices.

    Attributes:
      devices: How many share the batch; None for all.
      fsdp: Each device holds a part of the frozen weights and gathers a layer's when it
        runs. False: each holds all of them.
    """

    devices: int | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        self._choices()
        if self.devices is not None:
            self._ints(1, "devices")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Checked):
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
      export_dtype: Of the matrices in the exported files.
      tensorboard: Also write TensorBoard files (needs the package tensorboardX).
    """

    name: str = "distill"
    model: str = "smollm2-135m"
    out: str = "out/distill"
    init: Literal["from_query", "kaiming", "regression"] = "from_query"
    init_batches: int = 16
    sparse: SparseConfig | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    attention: Literal["blocks", "masked"] = "blocks"
    implementation: Literal["mosaic_gpu", "triton", "xla"] | None = None
    seed: int = 42
    max_minutes: float | None = None
    log_every: int = 1
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    tensorboard: bool = False
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        self._choices()
        self._ints(1, "log_every", "init_batches")
        self._ints(0, "seed")
        for name in ("name", "model", "out"):
            value = getattr(self, name)
            ok = isinstance(value, str) and bool(value)
            check(ok, f"TrainConfig.{name}", value, "a non-empty text")
        if self.max_minutes is not None:
            self._numbers(0.0, 1e6, "max_minutes")
        names = ("mosaic_gpu", "triton", "xla", None)
        field = "TrainConfig.implementation"
        check(
            self.implementation in names, field, self.implementation, f"one of {names}"
        )
        kinds = ("float32", "bfloat16", None)
        check(self.dtype in kinds, "TrainConfig.dtype", self.dtype, f"one of {kinds}")
        if self.sparse is not None:
            block = self.sparse.block_size
            check(
                self.data.seq_len % block == 0,
                "DataConfig.seq_len",
                self.data.seq_len,
                f"a multiple of SparseConfig.block_size={block}",
            )

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it continues, as JSON.

        Where things are written, how often, and on how many devices may change.
        """
        values = dataclasses.asdict(self)
        free = ("name", "out", "max_minutes", "log_every", "tensorboard", "eval")
        free = (*free, "checkpoint", "parallel", "attention", "implementation")
        for field in (*free, "export_dtype"):
            del values[field]
        del values["optimizer"]["micro_batch"]
        values["data"]["sources"] = [list(pair) for pair in self.data.sources]
        return values


def load_config(path: str | pathlib.Path) -> TrainConfig:
    """Runs a configuration file and returns what its `get_config()` returns.

    Raises:
      ConfigError: If there is no such file, or it does not do that.
    """
    path = pathlib.Path(path)
    check(path.is_file(), "config", str(path), "a Python file with get_config()")
    scope = runpy.run_path(str(path))
    make = scope.get("get_config")
    check(callable(make), "config", str(path), "a Python file with get_config()")
    assert callable(make)
    config = make()
    ok = isinstance(config, TrainConfig)
    check(ok, f"{path}: get_config()", config, "a train.config.TrainConfig")
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


def _parse(name: str, text: str, kind: Any) -> Any:
    """The value that `text` stands for in a field of type `kind`."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is float and _is_int(value):
        return float(value)
    if kind is bool and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    if name == "data.sources" and isinstance(value, list | tuple):
        return tuple(tuple(item) for item in value)
    return value


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    head, *rest = path
    if rest:
        value = _replaced(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: value})


def with_overrides(config: TrainConfig, settings: Iterable[str]) -> TrainConfig:
    """Applies `key=value` settings.

    A key is a dotted name (`optimizer.lr`), or its last part where only one field is
    called so (`lr`). `sparse.…` needs a configuration with a `sparse` of its own.

    Raises:
      ConfigError: If a key is unknown or stands for several fields, or a value is not
        allowed.
    """
    for setting in settings:
        key, separator, text = setting.partition("=")
        check(bool(separator), "--set", setting, "of the form key=value")
        fields = _fields(config)
        names = [name for name in fields if name == key]
        names = names or [name for name in fields if name.split(".")[-1] == key]
        if not names:
            near = difflib.get_close_matches(key, fields, n=3, cutoff=0.3)
            hint = f" such as {', '.join(near)}" if near else ""
            check(False, "--set", key, f"a field of TrainConfig{hint}")
        check(len(names) == 1, "--set", key, f"one of {', '.join(names)}")
        value = _parse(names[0], text, fields[names[0]])
        config = _replaced(config, names[0].split("."), value)
    return config
