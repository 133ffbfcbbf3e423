"""`sparda adapt` and `sj.adapt`: Forecast heads for a model, from its file alone.

    sparda adapt --model ./my-model --text ./documents --minutes 20 \
        --out my-heads.safetensors

Windows and budget are chosen by measuring (`train.geometry`), heads are fitted by
regression and distilled for the time given (`train.run`), measured on text that was
held out, and written with a card and a plot. Beside the heads stands a folder of the
work, `<out>.work`: the same call goes on in it after an interruption.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import sparda_jax as sj
from sparda_jax.checkpoint.atomic import new_file, write_json, write_text
from sparda_jax.checks import (
    ConfigError,
    choice,
    file_to_write,
    flag,
    integer,
    number,
    optional,
    require,
    settle,
    several,
    text_path,
)
from sparda_jax.checks import path as check_path
from sparda_jax.cli.console import advance
from sparda_jax.config import ForecastReads, ModelConfig, SparseConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.documents import token_rows
from sparda_jax.evaluation.passkey import PasskeyTask
from sparda_jax.loading import default_dtype, open_model
from train.adapt_card import card, told, verdict
from train.adapt_passkeys import keep_passkeys, passkey_tasks, passkeys_found
from train.adapt_work import first_evaluation, kept, read_kept, same_call
from train.config import (
    PUBLISHED_LOSS,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.geometry import Geometry, candidates, choose_geometry
from train.memory import refuse_too_little_memory
from train.metrics import plot_curves
from train.run import train
from train.run_directory import check_writable

_HELD_OUT = 0.1
# Steps of a run that the clock ends.
_MANY = 100_000
_share = number(least=0, most=1)


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """What `adapt` is asked for.

    Attributes:
      model: As for `sparda_jax.load`.
      out: The file of the heads, `.safetensors`; a card (`.md`), a plot (`.png`) and
        the figures (`.json`) get its name.
      text: Files, directories or "stdlib" and "pydoc", which are taken if none is
        named.
      minutes: Of distillation, after the regression.
      steps: Steps of distillation in the place of `minutes`: then the result depends on
        the seed alone.
      seq_len: Tokens of a row; None: 16,384 on an accelerator, 2,048 on a CPU, or what
        the model takes.
      budget: Blocks that a token reads; None: the least that captures `least_mass`.
      kernel_size: Tokens of a window; None is measured.
      least_mass: Share of the attention that own queries must capture at the budget.
      queries: Queries of the heads for each kv head; None: one for each query head.
      reads: What they read of a layer (`train.config.TrainConfig`).
      rank: Of the file (`models.low_rank`); None: whole matrices.
      init_batches: Rows of the regression; None: 24 on an accelerator, 6 on a CPU.
      passkeys: Passkeys that are asked for at the end; 0 for none.
      dtype: Of the frozen weights; None is float32 on a CPU and bfloat16 elsewhere.
      seed: Of everything.
    """

    model: str
    out: str
    text: tuple[str, ...] = ()
    minutes: float = 10.0
    steps: int | None = None
    seq_len: int | None = None
    budget: int | None = None
    kernel_size: int | None = None
    least_mass: float = 0.95
    queries: int | None = None
    reads: ForecastReads = "input"
    rank: int | None = 64
    init_batches: int | None = None
    passkeys: int = 3
    dtype: Literal["float32", "bfloat16"] | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        maybe = optional(integer(1))
        settle(
            self,
            model=text_path,
            out=_heads_file,
            text=several(text_path, "files, directories, 'stdlib' or 'pydoc'"),
            minutes=number(above=0, most=1e5),
            steps=maybe,
            seq_len=maybe,
            budget=optional(integer(4)),
            kernel_size=optional(integer(2)),
            least_mass=_share,
            queries=maybe,
            reads=choice(*get_args(ForecastReads)),
            rank=maybe,
            init_batches=maybe,
            passkeys=integer(0),
            dtype=optional(choice("float32", "bfloat16")),
            seed=integer(0),
        )


def _heads_file(field: str, value: object) -> str:
    found = text_path(field, value)
    fits = pathlib.PurePath(found).suffix == ".safetensors"
    require(fits, field, value, "the name of a .safetensors file")
    return found


@dataclasses.dataclass(frozen=True)
class AdaptResult:
    """What `adapt` made.

    Attributes:
      heads: The file of the heads.
      card: Its card.
      sparse: Windows and budget that were chosen.
      figures: All figures, as JSON: `held_out`, `geometry`, `passkeys`, `verdict`.
      fit: Whether the model does with SparDA at this budget what was asked for.
    """

    heads: pathlib.Path
    card: pathlib.Path
    sparse: SparseConfig
    figures: dict[str, Any]
    fit: bool


def adapt(
    model: str | os.PathLike,
    *,
    out: str | os.PathLike,
    progress: bool = True,
    **options: Any,
) -> AdaptResult:
    """Makes Forecast heads for a model; see the module's text.

    Args:
      model: As for `sparda_jax.load`.
      out: The file of the heads.
      progress: Bars on standard error.
      **options: Fields of `AdaptConfig`.

    Raises:
      ConfigError: An option is not allowed; the model has no groups of query heads, no
        tokenizer, or not enough memory is there; the text is shorter than a row; or the
        folder of the work is of another call.
      CheckpointError: The model cannot be read, or a file cannot be written.
    """
    progress = flag("progress", progress)
    names = [field.name for field in dataclasses.fields(AdaptConfig)]
    for name in options:
        require(name in names, "adapt", name, f"one of {', '.join(names)}")
    paths = {"model": check_path("model", model), "out": check_path("out", out)}
    return run_adapt(AdaptConfig(**paths, **options), progress=progress)


def run_adapt(asked: AdaptConfig, *, progress: bool = True) -> AdaptResult:
    """`adapt` of a configuration."""
    config, tokens = _check(asked)
    heads = pathlib.Path(os.path.expanduser(asked.out)).absolute()
    check_writable(heads.parent)
    file_to_write("out", str(heads))
    work = check_writable(heads.with_name(heads.name + ".work"))
    identity = _identity(asked, tokens)
    same_call(work / "call.json", identity)
    done = read_kept(work / "done.json")
    if done is not None and heads.is_file():
        with kept(work / "done.json"):
            told(done)
            return _result(heads, done)
    sources = asked.text or ("stdlib", "pydoc")
    geometry = read_kept(work / "geometry.json")
    if geometry is None:
        tried, texts = _tried(asked, tokens), _texts(asked, sources, tokens)
        # Only now is it a call to go on with: another text may be named after a slip.
        write_json(work / "call.json", identity)
        geometry = _geometry(asked, config, tried, texts, tokens, progress)
        write_json(work / "geometry.json", geometry)
    with kept(work / "geometry.json"):
        SparseConfig(**geometry["sparse"])
        dict(geometry.get("passkeys") or {})
    result = train(
        _training(asked, sources, tokens, geometry["sparse"], work), progress=progress
    )
    assert result.evaluation is not None
    figures = {
        "call": identity,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "steps": int(result.state.step),  # 0: no step made them better
        "geometry": geometry,
        "regression": first_evaluation(work / "run" / "log.jsonl"),
        "held_out": result.evaluation.means(),
        "layers": result.evaluation.by_layer(),
    }
    with new_file(heads) as temporary:
        shutil.copyfile(result.forecast, temporary)
    del result  # the model is loaded once more, and finds its memory
    figures["passkeys"] = _passkeys(asked, heads, geometry, tokens, progress)
    figures["verdict"] = verdict(figures, asked.least_mass)
    write_text(heads.with_suffix(".md"), card(figures, heads.name))
    plot_curves(work / "run" / "log.jsonl", heads.with_suffix(".png"))
    write_json(heads.with_suffix(".json"), figures)
    write_json(work / "done.json", figures)
    return _result(heads, figures)


def _result(heads: pathlib.Path, figures: dict[str, Any]) -> AdaptResult:
    sparse = SparseConfig(**figures["geometry"]["sparse"])
    fit = bool(figures["verdict"]["fit"])
    return AdaptResult(heads, heads.with_suffix(".md"), sparse, figures, fit)


def _check(asked: AdaptConfig) -> tuple[ModelConfig, int]:
    """The model's shape and the tokens of a row; refuses before weights are read."""
    source = open_model(asked.model)
    config = source.config
    group = config.group_size
    if group == 1:
        raise ConfigError(
            f"model={config.name!r} has {config.num_heads} query heads and as many kv "
            "heads: it must have groups of query heads that share one (GQA), or a "
            "forecast costs as much as the query itself"
        )
    queries = asked.queries or group
    require(queries <= group, "queries", asked.queries, f"at most the group's {group}")
    if source.tokenizer is None:
        raise ConfigError(
            f"model={config.name!r} has no tokenizer, and texts are to be read: it "
            "must be a checkpoint with one"
        )
    on_cpu = jax.default_backend() == "cpu"
    tokens = asked.seq_len or min(config.max_context, 2048 if on_cpu else 16384)
    block = _block_size(source.sparse)
    tokens = tokens // block * block if asked.seq_len is None else tokens
    require(
        tokens % block == 0 and 8 * block <= tokens <= config.max_context,
        "seq_len",
        tokens,
        f"a multiple of {block} from {8 * block} to max_context={config.max_context}",
    )
    most = tokens // block - 1
    require(
        asked.budget is None or asked.budget <= most,
        "budget",
        asked.budget,
        f"at most {most}, one less than a row of {tokens} tokens has blocks",
    )
    dtype = default_dtype() if asked.dtype is None else jnp.dtype(asked.dtype)
    wide = dataclasses.replace(config, forecast_queries=queries)
    refuse_too_little_memory(wide, dtype, tokens)
    passkey_tasks(source.tokenizer, tokens, asked.passkeys, asked.seed)
    return config, tokens


def _block_size(sparse: SparseConfig | None) -> int:
    return 64 if sparse is None else sparse.block_size


def _identity(asked: AdaptConfig, tokens: int) -> dict[str, Any]:
    """What a call that goes on must share with the one before."""
    values: dict[str, Any] = {**dataclasses.asdict(asked), "seq_len": tokens}
    values["text"] = list(asked.text)
    for free in ("out", "minutes"):
        del values[free]
    return json.loads(json.dumps(values))


def _tried(asked: AdaptConfig, tokens: int) -> list[SparseConfig]:
    """The selections to measure: that of the checkpoint, or several windows."""
    own, kernel = open_model(asked.model).sparse, asked.kernel_size
    if own is not None:
        require(
            kernel in (None, own.kernel_size),
            "kernel_size",
            kernel,
            f"{own.kernel_size}, for which the checkpoint was made",
        )
        return [_with_room(own, tokens)]
    tried = candidates(tokens)
    if kernel is None:
        return tried
    stride = max(1, kernel // 2)
    return [dataclasses.replace(tried[0], kernel_size=kernel, kernel_stride=stride)]


def _texts(
    asked: AdaptConfig, sources: tuple[str, ...], tokens: int
) -> dict[str, np.ndarray]:
    """A row of held-out text of every source."""
    tokenizer = open_model(asked.model).tokenizer
    assert tokenizer is not None
    return {
        source: token_rows(
            source,
            tokenizer.encode,
            tokens=tokens,
            count=1,
            held_out=_HELD_OUT,
            seed=asked.seed,
        )
        for source in sources
    }


def _geometry(
    asked: AdaptConfig,
    config: ModelConfig,
    tried: list[SparseConfig],
    texts: dict[str, np.ndarray],
    tokens: int,
    progress: bool,
) -> dict[str, Any]:
    """Windows and budget as JSON: those of the checkpoint, or measured ones."""
    dtype = default_dtype() if asked.dtype is None else jnp.dtype(asked.dtype)
    # The report that measures compares with heads: these cost nothing.
    lm = sj.load(asked.model, forecast="from_query", dtype=dtype, storage="stacked")
    tasks, quiet = _tasks(asked, tokens), None if progress else True
    passkeys: list[dict[str, Any]] = []

    def keep(near: list[SparseConfig]) -> SparseConfig:
        if not tasks:
            return near[0]
        most = (1 + len(near)) * len(tasks)
        with tqdm(total=most, desc="passkeys", disable=quiet) as bar:
            kept = keep_passkeys(lm, near, tasks, bar.update)
        passkeys.append(kept.figures)
        return kept.sparse

    # Fewer local blocks are one more, where there are fewer.
    passes = len(tried) + (len(tried) > 1 and tried[0].local_blocks > 1)
    total = passes * len(texts) * config.num_layers
    with tqdm(total=total, desc="windows and budget", disable=quiet) as bar:
        found = choose_geometry(
            lm,
            texts,
            least_mass=asked.least_mass,
            tried=tried,
            budget=asked.budget,
            keep=keep,
            on_layer=lambda: advance(bar, 1),
        )
    return {**_as_json(found), "passkeys": passkeys[0] if passkeys else None}


def _with_room(own: SparseConfig, tokens: int) -> SparseConfig:
    """A checkpoint's own selection, with a budget that a row exceeds."""
    blocks = tokens // own.block_size
    if own.largest_budget < blocks:
        return own
    budget = max(4, blocks // 4)
    return dataclasses.replace(
        own, local_blocks=max(1, budget // 4), block_budget=budget, query_blocks=0
    )


def _as_json(found: Geometry) -> dict[str, Any]:
    return {
        "sparse": dataclasses.asdict(found.sparse),
        "own_mass": round(found.own_mass, 6),
        "oracle_mass": round(found.oracle_mass, 6),
        "reached": found.reached,
        "measured": found.measured,
    }


def _training(
    asked: AdaptConfig,
    sources: tuple[str, ...],
    tokens: int,
    sparse: dict[str, Any],
    work: pathlib.Path,
) -> TrainConfig:
    on_cpu = jax.default_backend() == "cpu"
    chosen = SparseConfig(**sparse)
    few = tokens <= 4 * chosen.largest_budget * chosen.block_size
    timed = asked.steps is None
    return TrainConfig(
        name="adapt",
        model=asked.model,
        out=str(work / "run"),
        init="regression",
        init_batches=asked.init_batches or (6 if on_cpu else 24),
        queries=asked.queries,
        reads=asked.reads,
        export_rank=asked.rank,
        # Least squares may be as good as it gets.
        export_best=True,
        export_dtype="bfloat16",
        sparse=chosen,
        dtype=asked.dtype,
        # A CPU visits block lists faster than it masks all keys.
        attention="masked" if few and not on_cpu else "blocks",
        seed=asked.seed,
        max_minutes=asked.minutes if timed else None,
        loss=PUBLISHED_LOSS,
        optimizer=OptimizerConfig(
            lr=1e-4 if timed else 2e-4,
            schedule="constant" if timed else "cosine",
            warmup_steps=5,
            final_fraction=0.05,
            steps=asked.steps or _MANY,
            global_batch=1,
        ),
        data=DataConfig(
            sources=tuple((source, 1.0) for source in sources),
            seq_len=tokens,
            packing="joined",
            held_out=_HELD_OUT,
            seed=asked.seed,
        ),
        eval=EvalConfig(every=_MANY, batches=2 if on_cpu else 6),
        checkpoint=CheckpointConfig(every=5, keep_last=1, keep_best=1),
    )


def _passkeys(
    asked: AdaptConfig,
    heads: pathlib.Path,
    geometry: dict[str, Any],
    tokens: int,
    progress: bool,
) -> dict[str, Any] | None:
    """Passkeys that dense attention, own queries and the heads find."""
    tasks = _tasks(asked, tokens)
    if not tasks:
        return None
    # Dense attention and own queries were asked when the windows were chosen.
    found = dict(
        geometry.get("passkeys") or {"asked": len(tasks), "tokens": len(tasks[0].ids)}
    )
    names = [x for x in ("dense", "infllm_v2", "sparda") if x not in found]
    lm = _loaded(asked, heads, geometry["sparse"])
    quiet = None if progress else True
    total = len(names) * len(tasks)
    with tqdm(total=total, desc="passkeys", disable=quiet) as bar:
        for name in names:
            chosen = sj.with_attention(lm, name)
            found[name] = passkeys_found(chosen, tasks, bar.update)
    return found


def _tasks(asked: AdaptConfig, tokens: int) -> list[PasskeyTask]:
    tokenizer = open_model(asked.model).tokenizer
    return passkey_tasks(tokenizer, tokens, asked.passkeys, asked.seed)


def _loaded(
    asked: AdaptConfig, heads: pathlib.Path, sparse: dict[str, Any]
) -> LanguageModel:
    dtype = default_dtype() if asked.dtype is None else jnp.dtype(asked.dtype)
    return sj.load(
        asked.model,
        attention="sparda",
        forecast=heads,
        sparse=SparseConfig(**sparse),
        dtype=dtype,
        storage="stacked",
    )
