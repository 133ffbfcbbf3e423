"""`evaluate`: every selector on the same samples, cell by cell, resumable."""

import dataclasses
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from sparda_jax.checks import (
    ConfigError,
    flag,
    integer,
    non_empty_text,
    number,
    optional,
    path,
    require,
    several,
    shown,
)
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.requests import model_of_one_group
from sparda_jax.evaluation.answers import (
    DENSE,
    AnyTask,
    DenseAnswer,
    Record,
    Runner,
)
from sparda_jax.evaluation.run_files import Cell, RunFiles
from sparda_jax.evaluation.run_settings import run_settings
from sparda_jax.evaluation.samples import Asked, Prompts, Sample
from sparda_jax.evaluation.statistics import estimate
from sparda_jax.evaluation.task_files import FileTask, read_task_file
from sparda_jax.evaluation.tasks import Task, get_task
from sparda_jax.inference.sampling import MOST_SEED
from sparda_jax.loading import with_attention
from sparda_jax.sparse.selectors import Selector, get_selector, selector_names

FLOOR = 50.0
# Whose records have a score of 0 … 100 that a floor makes sense for.
SCORED = ("generate", "fork")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?) ?%")


class Variant(NamedTuple):
    """A way to attend: a selector and a budget.

    Attributes:
      lm: The model that attends so.
      budget: Blocks a token reads; 0 where that has no such number.
    """

    lm: LanguageModel
    budget: int

    @property
    def is_dense(self) -> bool:
        """Whether it is what all others are measured by."""
        return self.lm.selector.name == DENSE


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of `evaluate` has done.

    Attributes:
      out: The directory.
      done, planned: Cells with results, and all of them.
      skipped: Cells that need no results: dense was under the floor.
    """

    out: pathlib.Path
    done: int
    planned: int
    skipped: int

    @property
    def complete(self) -> bool:
        """Whether all cells are done."""
        return self.done + self.skipped == self.planned


def check_budget(field: str, value: object) -> int | str:
    """Checks a number of blocks, or a share of them as "25%"."""
    if isinstance(value, str):
        match = _PERCENT.fullmatch(value.strip())
        if match and 0 < float(match.group(1)) <= 100:
            return value.strip()
    return integer(1, hint=" blocks, or a share of them such as '25%'")(field, value)


def _blocks(budget: int | str, length: int, lm: LanguageModel) -> int:
    """A budget in blocks, at a length."""
    if isinstance(budget, int):
        return budget
    share = float(budget.rstrip("% ")) / 100
    return max(1, round(share * -(-length // lm.sparse.block_size)))


def _selector(field: str, value: Any) -> Selector | None:
    """Checks a selector or its name; None stands for "all"."""
    return None if isinstance(value, str) and value == "all" else get_selector(value)


def chosen_selectors(
    lm: LanguageModel, attention: Sequence[str | Selector]
) -> list[Selector]:
    """The selectors by name, dense first; "all" is every one that fits the model.

    Raises:
      ConfigError: If there is no such selector, or it does not fit.
    """
    found = [get_selector(DENSE)]
    for selector in several(_selector, "selectors")("attention", attention):
        if selector is None:
            found += [s for s in map(get_selector, selector_names()) if _fits(lm, s)]
            continue
        with_attention(lm, selector)  # says why it does not fit
        found.append(selector)
    return list({selector.name: selector for selector in found}.values())


def _fits(lm: LanguageModel, selector: Selector) -> bool:
    try:
        with_attention(lm, selector)
    except ConfigError:
        return False
    return True


def _variants(
    lm: LanguageModel,
    selectors: Sequence[Selector],
    budgets: Sequence[int | str],
    length: int,
) -> list[Variant]:
    """All ways to attend at a length, dense first."""
    sparse = [
        dataclasses.replace(lm.sparse, block_budget=blocks)
        for blocks in dict.fromkeys(_blocks(b, length, lm) for b in budgets)
    ]
    variants = []
    for selector in selectors:
        if selector.dense:
            variants.append(Variant(with_attention(lm, selector), 0))
            continue
        for chosen in sparse or [lm.sparse]:
            # Layers may have budgets of their own: then it is their mean.
            blocks = round(float(np.mean(chosen.block_budget)))
            own = with_attention(lm, selector, sparse=chosen)
            variants.append(Variant(own, blocks))
    return variants


class _Plan(NamedTuple):
    """A task at a length: its samples and those that `dense` must answer first."""

    task: AnyTask
    length: int
    samples: list[Asked]


def _planned(
    files: RunFiles,
    tasks: Sequence[AnyTask],
    lengths: Sequence[int],
    prompts: Prompts,
    count: int,
    seed: int,
) -> tuple[list[_Plan], list[_Plan]]:
    """All samples, before anything runs; and those of them that were made anew."""
    plans, new = [], []
    for length in lengths:
        for task in tasks:
            asked = files.samples(task.name, length)
            if asked is None:
                made = task.samples(prompts, length=length, count=count, seed=seed)
                asked = [Asked(s, _encoded(prompts, task, s)) for s in made]
                new.append(_Plan(task, length, asked))
            plans.append(_Plan(task, length, asked))
    return plans, new


def _encoded(prompts: Prompts, task: AnyTask, sample: Sample) -> list[np.ndarray]:
    if task.kind == "perplexity":
        rows = [prompts.text_ids(sample.input)]
    else:
        rows = prompts.all_ids(sample)
    return [np.asarray(row, np.int32) for row in rows]


def _under_floor(records: Sequence[Record], task: AnyTask, floor: float) -> bool:
    if task.kind not in SCORED:
        return False
    scores = [record["score"] for record in records if "score" in record]
    return bool(scores) and estimate(scores).mean < floor


def evaluate(
    lm: LanguageModel,
    *,
    out: str | os.PathLike,
    attention: Sequence[str | Selector] = ("all",),
    tasks: Sequence[str] = ("passkey",),
    lengths: Sequence[int] = (2048,),
    budgets: Sequence[int | str] = (),
    samples: int = 20,
    seed: int = 42,
    batch: int | None = None,
    floor: float | int = FLOOR,
    task_files: Sequence[str | os.PathLike] = (),
    time_limit: float | int | None = None,
    progress: bool = False,
    commit: str | None = None,
) -> Outcome:
    """Runs tasks with several selectors, and keeps a record of every sample.

    All selectors get the same token ids in the same batches. Results are written cell
    by cell (task, length, selector, budget); a call with the same `out` goes on where
    one was cut off, and may add selectors, tasks, lengths and budgets.
    `read_report(out)` makes the tables.

        lm = sj.load("smollm2-135m")
        sj.evaluate(lm, attention=["infllm_v2", "sparda"], tasks=["passkey"], out="out")

    Args:
      lm: A loaded model with a tokenizer.
      out: Directory of the results.
      attention: Names or `Selector`s; dense is always run, as the measure of the
        others. "all" is every selector that fits the model.
      tasks: Names of `evaluation.tasks`.
      lengths: Tokens of prompt and answer together.
      budgets: Blocks a token reads, or shares of a length's blocks as "25%"; none is
        the model's own budget.
      samples: Samples of each task and length.
      seed: Of the samples.
      batch: Samples that run together; None is 4 on a CPU and 8 elsewhere.
      floor: A task on which dense scores less is not measured: the other selectors are
        not run on it, and tables say so.
      task_files: Files of others: RULER's rows or SCBench's as JSON Lines, LongBench
        v2 as JSON, or a text for perplexity.
      time_limit: Seconds after which no further cell is begun.
      progress: Show a bar on standard error, and what each cell took.
      commit: Which state of the code this is, for `run.json`; None asks git, which
        knows it in a checkout alone.

    Returns:
      How far it has come.

    Raises:
      ConfigError: If an argument is not allowed, a task or selector does not exist or
        does not fit, a length is beyond the context, or `out` was begun with other
        settings, or has results on other samples than this Python makes.
      CheckpointError: If a file is damaged, or `out` cannot be written to.
    """
    begun = time.monotonic()
    lm = model_of_one_group("lm", lm)
    if lm.tokenizer is None:
        raise ConfigError(f"{lm.no_tokenizer}: tasks are texts")
    count = integer(1, 2**16)("samples", samples)
    seed = integer(0, MOST_SEED)("seed", seed)
    size = optional(integer(1, 4096))("batch", batch)
    limit = optional(number(above=0))("time_limit", time_limit)
    floor = number(least=0, most=100)("floor", floor)
    progress = flag("progress", progress)
    commit = optional(non_empty_text)("commit", commit)
    files = RunFiles(pathlib.Path(path("out", out)))
    lengths = _checked_lengths(lm, lengths)
    chosen = _chosen_tasks(tasks, task_files)
    selectors = chosen_selectors(lm, attention)
    wanted = several(check_budget, "budgets")("budgets", budgets)
    variants = {n: _variants(lm, selectors, wanted, n) for n in lengths}
    prompts = Prompts(lm.tokenizer, lm.config)
    settings = {
        **run_settings(lm, prompts, selectors, commit),
        "seed": seed,
        "samples": count,
        "floor": floor,
        "tasks": [task.name for task in chosen],
        "task_files": {t.name: t.digest for t in chosen if isinstance(t, FileTask)},
        "lengths": list(lengths),
    }
    files.check(settings)
    plans, made = _planned(files, chosen, lengths, prompts, count, seed)
    for plan in made:
        files.check_prompts(plan.task.name, plan.length, plan.samples)
    files.begin(settings)
    for plan in made:
        files.write_samples(plan.task.name, plan.length, plan.samples)
    size = size or (4 if jax.default_backend() == "cpu" else 8)
    cells = sum(len(variants[plan.length]) for plan in plans)
    total = sum(len(variants[plan.length]) * len(plan.samples) for plan in plans)
    with tqdm(total=total, unit="sample", disable=None if progress else True) as bar:
        ends = None if limit is None else begun + limit
        work = _Work(files, size, floor, ends, bar, tell=progress)
        for length in lengths:
            here = [plan for plan in plans if plan.length == length]
            for variant in variants[length]:
                for plan in here:
                    bar.set_description(work.describe(plan, variant))
                    work.do(plan, variant)
    return Outcome(files.folder, work.done, cells, work.skipped)


def _checked_lengths(lm: LanguageModel, lengths: Sequence[int]) -> tuple[int, ...]:
    checked = several(integer(1), "lengths")("lengths", lengths)
    require(len(checked) > 0, "lengths", lengths, "at least one length")
    for length in checked:
        if length > lm.config.max_context:
            raise ConfigError(
                f"lengths={length} is not allowed: it must be at most "
                f"{lm.config.max_context}, the context of model {lm.config.name!r}"
            )
    return tuple(dict.fromkeys(checked))


def _task(field: str, value: Any) -> Task:
    """Checks the name of a task."""
    return get_task(value)


def _chosen_tasks(
    tasks: Sequence[str], task_files: Sequence[str | os.PathLike]
) -> list[AnyTask]:
    named = several(_task, "names of tasks")("tasks", tasks)
    chosen: list[AnyTask] = list({task.name: task for task in named}.values())
    files: dict[str, FileTask] = {}
    for file in several(path, "files")("task_files", task_files):
        task = read_task_file(file)
        if files.setdefault(task.name, task).digest != task.digest:
            raise ConfigError(
                f"task_files={shown(file)} is not allowed: another file is task "
                f"{task.name!r} as well; rename one of them"
            )
    chosen += files.values()
    if not chosen:
        raise ConfigError(f"tasks={shown(tasks)} is empty: name at least one task")
    return chosen


class _Work:
    """Does the cells of a run, one by one, until its time is over."""

    def __init__(
        self,
        files: RunFiles,
        batch: int,
        floor: float,
        ends: float | None,
        bar: tqdm,
        *,
        tell: bool,
    ) -> None:
        self._files = files
        self._floor = floor
        self._ends = ends
        self._bar, self._tell = bar, tell
        self._runner = Runner(batch=batch, advance=self._advance)
        self._dense: dict[tuple[str, int], list[Record]] = {}
        self._dense_lm: LanguageModel | None = None
        self.done = 0
        self.skipped = 0

    def _advance(self, samples: int) -> None:
        self._bar.update(samples)

    def describe(self, plan: _Plan, variant: Variant) -> str:
        """What runs, for a progress bar."""
        budget = f" {variant.budget}" if variant.budget else ""
        name = variant.lm.selector.name
        return f"{plan.task.name} {plan.length} {name}{budget}"

    def do(self, plan: _Plan, variant: Variant) -> None:
        """Runs a cell, unless it is done, needs no results, or time is over."""
        key = plan.task.name, plan.length
        if variant.is_dense:
            self._dense_lm = variant.lm
        cell = Cell(*key, variant.lm.selector.name, variant.budget)
        records = self._files.result(cell)
        if records is None:
            dense = self._dense.get(key)
            if dense and _under_floor(dense, plan.task, self._floor):
                self.skipped += 1
                self._advance(len(plan.samples))
                return
            # Without dense there is nothing to compare with, as when time is over.
            late = self._ends is not None and time.monotonic() >= self._ends
            if late or (dense is None and not variant.is_dense):
                return
            records = self._run(plan, variant, cell)
        else:
            self._advance(len(plan.samples))
        if variant.is_dense:
            self._dense[key] = records
        self.done += 1

    def _run(self, plan: _Plan, variant: Variant, cell: Cell) -> list[Record]:
        begun, compiling = time.perf_counter(), PROGRAMS.seconds
        compares = plan.task.kind == "agreement"
        others = compares and not variant.is_dense
        reference = self._reference(plan) if others else {}
        records = self._runner.run(variant.lm, plan.task, plan.samples, reference)
        if compares and variant.is_dense:
            self._files.write_reference(plan.task.name, plan.length, reference)
        self._files.write_result(cell, records)
        seconds = round(time.perf_counter() - begun, 2)
        compiling = round(PROGRAMS.seconds - compiling, 2)
        self._files.add_seconds(
            cell,
            seconds=seconds,
            compiling=compiling,
            device=jax.devices()[0].device_kind,
        )
        if self._tell:
            self._bar.write(
                f"{self.describe(plan, variant)}: {_told(records)}, {seconds:.1f} s, "
                f"{compiling:.1f} of them compiling",
                file=sys.stderr,
            )
        return records

    def _reference(self, plan: _Plan) -> dict[int, DenseAnswer]:
        """Dense's own answers: those that are kept, or made again if some are not."""
        kept = self._files.reference(plan.task.name, plan.length)
        if all(asked.sample.index in kept for asked in plan.samples):
            return kept
        assert self._dense_lm is not None  # dense is the first of all variants
        made: dict[int, DenseAnswer] = {}
        runner = Runner(batch=1, advance=lambda _: None)
        runner.run(self._dense_lm, plan.task, plan.samples, made)
        self._files.write_reference(plan.task.name, plan.length, made)
        return made


def _told(records: Sequence[Record]) -> str:
    """What came out of a cell, for a line of progress."""
    scores = [record["score"] for record in records if "score" in record]
    failed = sum("failed" in record for record in records)
    told = f"{estimate(scores).mean:.1f}, " if scores else ""
    return f"{told}{len(records)} samples" + (f", {failed} failed" if failed else "")
