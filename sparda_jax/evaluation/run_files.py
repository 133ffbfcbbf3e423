"""The files of an evaluation: settings, samples and results, each written whole.

    OUT/run.json                                  settings, device, versions
    OUT/samples/TASK-LENGTH.jsonl                 what is asked, as RULER's rows
    OUT/samples/TASK-LENGTH.npz                   its token ids
    OUT/results/TASK-LENGTH-ATTENTION-BUDGET.jsonl   a line a sample
    OUT/reference/TASK-LENGTH.npz                 dense's own answers (agreement)
    OUT/seconds.jsonl                             what each cell took

A cell (task, length, attention, budget) is one file: it is there or it is not, so a run
that was killed goes on where it was, and its files are those of one that was not (but
for the seconds).
"""

import dataclasses
import functools
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sparda_jax.checkpoint.atomic import (
    cannot_write,
    new_file,
    write_json,
    write_text,
)
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import (
    MAX_TEXT,
    open_regular,
    parse_json,
    read_json,
    read_text,
)
from sparda_jax.checks import ConfigError, shown
from sparda_jax.evaluation.answers import DenseAnswer, Record
from sparda_jax.evaluation.run_checks import (
    check_records,
    check_sample,
    check_settings,
)
from sparda_jax.evaluation.samples import Asked, fingerprint, sample_of
from sparda_jax.evaluation.token_scores import Views

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
_MOST_TOLD = 4  # Differences that a refusal names.


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
    return "".join(
        json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
        for value in values
    )


def _read_lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]] | None:
    """The objects of a JSON Lines file and where each stands; None without the file.

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
        where = f"{path}: line {number}"
        value = parse_json(line, where)
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{where}: holds {shown(value)}, wanted a JSON object"
            )
        values.append((where, value))
    return values


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file, None if there is no such file.

    Raises:
      CheckpointError: It is damaged.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return None
    with file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        # NumPy, zip and zlib each raise kinds of their own for damaged bytes.
        except Exception as error:
            raise _damaged(path, str(error)) from error


def _damaged(path: pathlib.Path, why: str) -> CheckpointError:
    why = " ".join(why.split())[:200]
    return CheckpointError(
        f"{path}: is damaged ({why}): take another directory, or delete the "
        "files of this one's task, which are then made anew"
    )


def _is_integers(array: np.ndarray | None) -> bool:
    return array is not None and array.ndim == 1 and array.dtype.kind == "i"


def _differences(
    name: str, before: object, now: object
) -> Iterator[tuple[str, object, object]]:
    """The fields in which two settings differ, each with both its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(key, before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for n, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{name}[{n}]", one, other)
    elif before != now:
        yield name, before, now


def _other_settings(
    folder: pathlib.Path, found: Sequence[tuple[str, object, object]]
) -> ConfigError:
    told = found[:_MOST_TOLD]
    more = ", …" if len(found) > _MOST_TOLD else ""
    before = ", ".join(f"{name}={shown(value)}" for name, value, _ in told)
    now = ", ".join(shown(value) for *_, value in told)
    return ConfigError(
        f"out={str(folder)!r} was begun with {before}{more}, and this run has "
        f"{now}{more}: take another directory"
    )


def _read_cell(path: pathlib.Path) -> tuple[Cell, list[Record]] | None:
    """A cell and its records, None if there is no such file."""
    lines = _read_lines(path)
    if lines is None:
        return None
    if not lines:
        raise CheckpointError(f"{path}: is empty, wanted a line a sample")
    check_records(lines)
    names = [field.name for field in dataclasses.fields(Cell)]
    cell = Cell(**{name: lines[0][1][name] for name in names})
    return cell, [record for _, record in lines]


def _check_count(
    path: pathlib.Path, records: Sequence[Record], asked: int | None
) -> None:
    """Raises CheckpointError if a cell has lost samples, which no mean may hide."""
    if asked is not None and len(records) != asked:
        raise CheckpointError(
            f"{path}: holds {len(records)} records of {asked} samples: delete it, and "
            "the same `sparda eval` makes it anew"
        )


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
        check_settings(values, str(self.folder / "run.json"))
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
            found = list(_differences(name, before.get(name), settings.get(name)))
            if found:
                raise _other_settings(self.folder, found)
        known = before.get("task_files", {})
        for task, digest in settings["task_files"].items():
            if task in before["tasks"] and known.get(task) != digest:
                raise ConfigError(
                    f"out={str(self.folder)!r} was begun with another content of the "
                    f"task file {task!r}: take another directory, or rename the file"
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
            for name in ("labels", "task_files"):
                merged[name] = before.get(name, {}) | merged[name]
            merged["started"] = before.get("started")
        write_json(self.folder / "run.json", merged)

    def samples(self, task: str, length: int) -> list[Asked] | None:
        """What is asked, if it has been made; else None.

        Raises:
          CheckpointError: If a file is damaged.
        """
        rows = _read_lines(self.folder / "samples" / f"{task}-{length}.jsonl")
        path = self.folder / "samples" / f"{task}-{length}.npz"
        arrays = _read_arrays(path)
        if rows is None or arrays is None:
            return None
        tokens, counts = arrays.get("tokens"), arrays.get("counts")
        if not (_is_integers(tokens) and _is_integers(counts)):
            raise _damaged(path, "it has no rows of token ids")
        assert tokens is not None and counts is not None
        for where, row in rows:
            check_sample(row, where)
        samples = [sample_of(row) for _, row in rows]
        wanted = sum(len(sample.questions) or 1 for sample in samples)
        if (
            wanted != len(counts)
            or counts.sum() != len(tokens)
            or not wanted
            or counts.min() < 1
        ):
            raise _damaged(
                path,
                f"{len(counts)} rows of token ids for {wanted} prompts, "
                f"{len(tokens)} token ids for {counts.sum()}",
            )
        ids = iter(np.split(tokens, np.cumsum(counts)[:-1]))
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

    def check_prompts(self, task: str, length: int, asked: Sequence[Asked]) -> None:
        """Refuses samples made anew that results of their task do not belong to.

        Texts are made of the running Python's own manual, so another Python may make
        others.

        Args:
          task: Whose samples they are.
          length: Theirs.
          asked: As this run has made them.

        Raises:
          ConfigError: If a result is of another prompt; says which Python began.
          CheckpointError: If a file is damaged.
        """
        made = [fingerprint(one.ids[0].tolist()) for one in asked]
        for path in sorted((self.folder / "results").glob(f"{task}-{length}-*.jsonl")):
            found = _read_cell(path)
            if found is None or (found[0].task, found[0].length) != (task, length):
                continue
            for record in found[1]:
                number, known = record["index"], record.get("prompt")
                if known is None or made[number : number + 1] == [known]:
                    continue
                before = self.settings.get("python", "unknown")
                raise ConfigError(
                    f"out={str(self.folder)!r} has results of {task!r} at {length} "
                    f"tokens on other samples ({path.name}: sample {number}): it was "
                    f"begun by Python {before}, this is {platform.python_version()}, "
                    "and texts are made of Python's own manual: go on with the Python "
                    "that made them, or take another directory"
                )

    def result(self, cell: Cell) -> list[Record] | None:
        """The records of a cell that is done, else None.

        Raises:
          CheckpointError: If the file is damaged.
        """
        path = self.folder / "results" / cell.name
        found = _read_cell(path)
        if found is not None and found[0] != cell:
            raise CheckpointError(f"{path}: holds {shown(found[0].name)}")
        if found is not None:
            _check_count(path, found[1], self._asked(cell.task, cell.length))
        return None if found is None else found[1]

    def _asked(self, task: str, length: int) -> int | None:
        """How many samples there are; None where they are not in the directory."""
        rows = _read_lines(self.folder / "samples" / f"{task}-{length}.jsonl")
        return None if rows is None else len(rows)

    def write_result(self, cell: Cell, records: Sequence[Record]) -> None:
        """Writes a cell that is done."""
        head = dataclasses.asdict(cell)
        lines = _lines({**head, **record} for record in records)
        write_text(self.folder / "results" / cell.name, lines)

    def add_seconds(self, cell: Cell, **took: float | str) -> None:
        """Notes what a cell took."""
        path = self.folder / "seconds.jsonl"
        known = [row for _, row in _read_lines(path) or ()]
        write_text(path, _lines([*known, {**dataclasses.asdict(cell), **took}]))

    def cells(self) -> dict[Cell, list[Record]]:
        """All cells that are done.

        Raises:
          CheckpointError: If a file is damaged.
        """
        found: dict[Cell, list[Record]] = {}
        asked = functools.cache(self._asked)
        for path in sorted((self.folder / "results").glob("*.jsonl")):
            read = _read_cell(path)
            if read is None:  # deleted since
                continue
            cell, records = read
            if cell.name != path.name:
                raise CheckpointError(f"{path}: holds {shown(cell.name)}")
            _check_count(path, records, asked(cell.task, cell.length))
            found[cell] = records
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
        """Dense's own answers; empty if there are none.

        Raises:
          CheckpointError: If the file is damaged.
        """
        path = self._reference_path(task, length)
        arrays = _read_arrays(path)
        if arrays is None:
            return {}
        try:
            indices = sorted({int(name.split("/")[0]) for name in arrays})
            return {
                index: DenseAnswer(
                    arrays[f"{index}/answer"].tolist(),
                    Views(*(arrays[f"{index}/{name}"] for name in Views._fields)),
                )
                for index in indices
            }
        except (KeyError, ValueError) as error:
            raise _damaged(path, f"it has no {error}") from error
