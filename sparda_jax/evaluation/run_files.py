"""The files of an evaluation: settings, samples and results, each written whole.

    OUT/run.json                                  settings, device, versions
    OUT/samples/TASK-LENGTH.jsonl                 what is asked, as RULER's rows
    OUT/samples/TASK-LENGTH.npz                   its token ids
    OUT/results/TASK-LENGTH-ATTENTION-BUDGET.jsonl   a line a sample
    OUT/reference/TASK-LENGTH.npz                 dense's own answers (agreement)

A cell (task, length, attention, budget) is one file: it is there or it is not, so a run
that was killed goes on where it was, and its files are those of one that was not.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparda_jax.checkpoint.atomic import (
    cannot_write,
    new_file,
    write_json,
    write_text,
)
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import MAX_TEXT, parse_json, read_json, read_text
from sparda_jax.checks import ConfigError, shown
from sparda_jax.evaluation.answers import DenseAnswer, Record
from sparda_jax.evaluation.samples import Asked, sample_of
from sparda_jax.evaluation.token_scores import Views

FORMAT = 1
# What all cells of a directory must share; other settings may grow from run to run.
_FIXED = (
    "format",
    "model",
    "weights",
    "forecast",
    "tokenizer",
    "prompts",
    "dtype",
    "seed",
    "samples",
    "geometry",
    "cache",
)
_GROWING = ("attention", "tasks", "lengths", "devices", "commits")


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One table cell.

    Attributes:
      task, length: What is asked.
      attention: The selector's name.
      budget: Blocks a token reads; 0 for dense, which reads all.
    """

    task: str
    length: int
    attention: str
    budget: int

    @property
    def name(self) -> str:
        """Of its file."""
        budget = f"-{self.budget}" if self.budget else ""
        return f"{self.task}-{self.length}-{self.attention}{budget}.jsonl"


def _lines(values: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]] | None:
    """The objects of a JSON Lines file, None if there is no such file.

    Raises:
      CheckpointError: A line is no JSON object; names the line.
    """
    text = read_text(path, MAX_TEXT)
    if text is None:
        return None
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        value = parse_json(line, f"{path}: line {number}")
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{path}: line {number}: holds {shown(value)}, wanted a JSON object"
            )
        values.append(value)
    return values


class RunFiles:
    """The directory of an evaluation.

    Args:
      folder: Where.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    @property
    def settings(self) -> dict[str, Any]:
        """What `run.json` says.

        Raises:
          ConfigError: If there is none.
          CheckpointError: If it is damaged.
        """
        values = read_json(self.folder / "run.json")
        if values is None:
            raise ConfigError(
                f"{self.folder} holds no run.json: it must be the --out of an "
                "evaluation"
            )
        return values

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses a place that cannot be written to, or was begun otherwise.

        Raises:
          ConfigError: If it was begun with other settings.
          CheckpointError: If it cannot be written to.
        """
        place = self.folder.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise cannot_write(self.folder, NotADirectoryError(f"{place} is a file"))
        if not os.access(place, os.W_OK | os.X_OK):
            raise cannot_write(self.folder, PermissionError(f"{place} is read-only"))
        if not (self.folder / "run.json").exists():
            return
        before = self.settings
        for name in _FIXED:
            if before.get(name) != settings.get(name):
                raise ConfigError(
                    f"out={str(self.folder)!r} was begun with {name}="
                    f"{shown(before.get(name))}, and this run has "
                    f"{shown(settings.get(name))}: take another directory"
                )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Makes the directory, or goes on with it, after `check`.

        Raises:
          CheckpointError: If it cannot be written to.
        """
        try:
            for name in ("samples", "results", "reference"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        merged = dict(settings)
        if (self.folder / "run.json").exists():
            before = self.settings
            for name in _GROWING:
                known = before.get(name, [])
                merged[name] = [*known, *(x for x in merged[name] if x not in known)]
            merged["labels"] = before.get("labels", {}) | merged["labels"]
            merged["started"] = before.get("started")
        write_json(self.folder / "run.json", merged)

    def samples(self, task: str, length: int) -> list[Asked] | None:
        """What is asked, if it has been made; else None.

        Raises:
          CheckpointError: If a file is damaged.
        """
        rows = read_lines(self.folder / "samples" / f"{task}-{length}.jsonl")
        path = self.folder / "samples" / f"{task}-{length}.npz"
        if rows is None or not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            tokens, counts = arrays["tokens"], arrays["counts"]
        ids = iter(np.split(tokens, np.cumsum(counts)[:-1]))
        samples = [sample_of(row) for row in rows]
        return [
            Asked(sample, [next(ids) for _ in sample.questions or (None,)])
            for sample in samples
        ]

    def write_samples(self, task: str, length: int, asked: Sequence[Asked]) -> None:
        """Keeps what is asked, and its token ids: those take long to make."""
        rows = [ids for one in asked for ids in one.ids]
        with new_file(self.folder / "samples" / f"{task}-{length}.npz") as temporary:
            with temporary.open("wb") as file:
                np.savez_compressed(
                    file,
                    tokens=np.concatenate(rows).astype(np.int32),
                    counts=np.array([len(row) for row in rows], np.int32),
                )
        lines = _lines(one.sample.row() for one in asked)
        write_text(self.folder / "samples" / f"{task}-{length}.jsonl", lines)

    def result(self, cell: Cell) -> list[Record] | None:
        """The records of a cell that is done, else None."""
        return read_lines(self.folder / "results" / cell.name)

    def write_result(self, cell: Cell, records: Sequence[Record]) -> None:
        """Writes a cell that is done."""
        head = dataclasses.asdict(cell)
        lines = _lines({**head, **record} for record in records)
        write_text(self.folder / "results" / cell.name, lines)

    def cells(self) -> dict[Cell, list[Record]]:
        """All cells that are done.

        Raises:
          CheckpointError: If a file is damaged.
        """
        found: dict[Cell, list[Record]] = {}
        for path in sorted((self.folder / "results").glob("*.jsonl")):
            records = read_lines(path)
            if not records:
                raise CheckpointError(f"{path}: is empty, wanted a line a sample")
            fields = [field.name for field in dataclasses.fields(Cell)]
            missing = [name for name in fields if name not in records[0]]
            if missing:
                raise CheckpointError(f"{path}: line 1: has no {missing[0]!r}")
            found[Cell(**{name: records[0][name] for name in fields})] = records
        return found

    def _reference_path(self, task: str, length: int) -> pathlib.Path:
        return self.folder / "reference" / f"{task}-{length}.npz"

    def write_reference(
        self, task: str, length: int, answers: Mapping[int, DenseAnswer]
    ) -> None:
        """Keeps dense's own answers, for selectors that come later."""
        arrays: dict[str, Any] = {}
        for index, answer in answers.items():
            arrays[f"{index}/answer"] = np.asarray(answer.tokens, np.int32)
            for name, value in answer.views._asdict().items():
                arrays[f"{index}/{name}"] = value
        with new_file(self._reference_path(task, length)) as temporary:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)

    def reference(self, task: str, length: int) -> dict[int, DenseAnswer]:
        """Dense's own answers; empty if there are none."""
        path = self._reference_path(task, length)
        if not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as arrays:
            indices = sorted({int(name.split("/")[0]) for name in arrays.files})
            return {
                index: DenseAnswer(
                    arrays[f"{index}/answer"].tolist(),
                    Views(*(arrays[f"{index}/{name}"] for name in Views._fields)),
                )
                for index in indices
            }
