"""Tasks out of files that users have: RULER, SCBench, LongBench v2, or a plain text."""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.files import MAX_TEXT, parse_json, read_text
from sparda_jax.checks import ConfigError, shown
from sparda_jax.evaluation.samples import (
    LEAST_SCORED,
    Kind,
    Prompts,
    Question,
    Sample,
)
from sparda_jax.evaluation.tasks import task_names

_ANSWER_ROOM = 128
_LETTERS = "ABCD"


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A task whose samples are the rows of a file.

    Attributes:
      name, summary, family, max_new_tokens, metric, kind: As those of `Task`.
      rows: The samples, with lengths not known yet.
      where: File and line of each row, for messages.
      digest: A short hash of the file's content.
      truncates: Texts that are too long lose their middle (LongBench v2's rule).
    """

    name: str
    summary: str
    family: str
    max_new_tokens: int
    metric: str
    kind: Kind
    rows: tuple[Sample, ...]
    where: tuple[str, ...]
    digest: str
    truncates: bool = False

    def samples(
        self, prompts: Prompts, *, length: int, count: int, seed: int
    ) -> list[Sample]:
        """The first `count` rows.

        Raises:
          ConfigError: If one does not fit the length.
        """
        del seed
        if self.kind == "perplexity":
            pieces = _cut_text(prompts, self.rows[0].input, length, count)
            if not pieces:
                raise ConfigError(
                    f"{self.where[0]} at lengths={length}: has too few tokens, wanted "
                    f"at least {LEAST_SCORED}"
                )
            return pieces
        found = []
        for sample, where in zip(self.rows[:count], self.where, strict=False):
            needed = prompts.longest(sample) + self.max_new_tokens
            if needed > length and self.truncates:
                sample = _without_middle(prompts, sample, length - self.max_new_tokens)
                needed = prompts.longest(sample) + self.max_new_tokens
            if needed > length:
                raise ConfigError(
                    f"lengths={length} is not allowed: {where} needs {needed} tokens "
                    "with this tokenizer"
                )
            position = prompts.position(sample)
            found.append(
                dataclasses.replace(
                    sample, length=needed, token_position_answer=position
                )
            )
        return found


def _cut_text(prompts: Prompts, text: str, length: int, count: int) -> list[Sample]:
    """Pieces of a text of about `length` tokens, one after the other."""
    pieces: list[Sample] = []
    begin = 0
    while len(pieces) < count and begin < len(text):
        size = 8 * length  # more characters than any text needs
        ids = prompts.text_ids(text[begin : begin + size])
        while len(ids) > length:
            size = min(size - 1, int(size * length / len(ids)))
            ids = prompts.text_ids(text[begin : begin + size])
        if len(ids) < LEAST_SCORED or (len(ids) < length // 2 and pieces):
            break  # a rest, with too few tokens for the last positions
        piece = text[begin : begin + size]
        pieces.append(Sample(len(pieces), piece, (), len(ids)))
        begin += size
    return pieces


def _without_middle(prompts: Prompts, sample: Sample, most: int) -> Sample:
    """The sample with as much of its input's middle taken out as is needed."""
    text, keep = sample.input, len(sample.input)
    while True:
        needed = prompts.longest(sample)
        if needed <= most or keep < 2:
            return sample
        keep = min(keep - 1, int(keep * most / needed))
        cut = text[: keep // 2] + text[len(text) - (keep - keep // 2) :]
        sample = dataclasses.replace(sample, input=cut)


def _field(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{where}: {name} is {show(value)}, wanted a {kind.__name__}"
        )
    return value


def _references(value: object, where: str, field: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(map(_is_reference, values)):
        raise CheckpointError(
            f"{where}: {field} is {show(value)}, wanted texts or finite numbers, at "
            "least one and none empty"
        )
    return tuple(str(v) for v in values)


def _is_reference(value: object) -> bool:
    """Whether it can be looked for: every answer holds an empty text."""
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _ruler(row: Mapping[str, Any], index: int, where: str) -> Sample:
    prefix = row.get("answer_prefix", row.get("gen_prefix", ""))
    if not isinstance(prefix, str):
        raise CheckpointError(
            f"{where}: answer_prefix is {show(prefix)}, wanted a text"
        )
    return Sample(
        index,
        _field(row, "input", str, where),
        _references(row.get("outputs"), where, "outputs"),
        answer_prefix=prefix,
    )


def _scbench(row: Mapping[str, Any], index: int, where: str) -> Sample:
    questions = []
    for number, turn in enumerate(_field(row, "multi_turns", list, where)):
        place = f"{where}: multi_turns[{number}]"
        if not isinstance(turn, dict):
            raise CheckpointError(f"{place} is {show(turn)}, wanted an object")
        asked = _field(turn, "input", str, place)
        questions.append(
            Question(f"\n\n{asked}", _references(turn.get("answer"), place, "answer"))
        )
    if not questions:
        raise CheckpointError(f"{where}: multi_turns is empty, wanted questions")
    context = _field(row, "context", str, where)
    return Sample(index, context, (), questions=tuple(questions))


def _longbench(row: Mapping[str, Any], index: int, where: str) -> Sample:
    choices = [_field(row, f"choice_{x}", str, where) for x in _LETTERS]
    answer = _field(row, "answer", str, where)
    if answer not in tuple(_LETTERS):
        raise CheckpointError(f"{where}: answer is {show(answer)}, wanted A, B, C or D")
    listed = "\n".join(
        f"({letter}) {text}" for letter, text in zip(_LETTERS, choices, strict=True)
    )
    return Sample(
        index,
        f"{_field(row, 'context', str, where)}\n\n"
        f"{_field(row, 'question', str, where)}\n{listed}\n\n"
        'Answer in this form: "The correct answer is (X)".',
        (answer,),
    )


@dataclasses.dataclass(frozen=True)
class _Format:
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], int, str], Sample]
    family: str
    metric: str
    kind: Kind
    truncates: bool = False


_FORMATS = (
    _Format(("input", "outputs"), _ruler, "RULER file", "all", "generate"),
    _Format(("context", "multi_turns"), _scbench, "SCBench file", "all", "fork"),
    _Format(
        ("context", "question", "choice_A", "answer"),
        _longbench,
        "LongBench v2 file",
        "choice",
        "generate",
        truncates=True,
    ),
)


def _rows(path: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Where each row stands, and the row."""
    if path.endswith(".json"):
        values: Sequence[Any] = parse_json(text, path)
        if not isinstance(values, list):
            raise CheckpointError(f"{path}: holds {show(values)}, wanted a JSON array")
        places = [f"{path}: entry {n}" for n in range(len(values))]
    else:
        numbered = [
            (n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        places = [f"{path}: line {n}" for n, _ in numbered]
        values = [
            parse_json(line, place)
            for place, (_, line) in zip(places, numbered, strict=True)
        ]
    for place, value in zip(places, values, strict=True):
        if not isinstance(value, dict):
            raise CheckpointError(f"{place}: holds {show(value)}, wanted a JSON object")
    return list(zip(places, values, strict=True))


def _format_of(where: str, row: Mapping[str, Any]) -> _Format:
    """The format whose fields a row has."""
    for form in _FORMATS:
        if all(field in row for field in form.fields):
            return form
    known = "; ".join(f"{form.family}: {', '.join(form.fields)}" for form in _FORMATS)
    raise CheckpointError(
        f"{where}: has the fields {show(json.dumps(sorted(row)))}, wanted those of "
        f"one of: {known}"
    )


def read_task_file(path: str) -> FileTask:
    """Reads a file of RULER, SCBench or LongBench v2, or a text for perplexity.

    What a file is is told by the fields of its first row; `.txt` and `.md` are texts.

    Raises:
      ConfigError: If there is no such file.
      CheckpointError: If it is malformed; names the line.
    """
    text = read_text(path, MAX_TEXT)
    if text is None:
        raise ConfigError(f"task_files={shown(path)}: No such file")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = re.sub(r"\W+", "_", pathlib.Path(path).stem).strip("_") or "file"
    name = f"file_{name}" if name in task_names() else name
    if path.endswith((".txt", ".md")):
        if not text.strip():
            raise CheckpointError(f"{path}: is empty, wanted a text")
        sample = Sample(0, text, ())
        summary = f"perplexity of {path}, by position"
        return FileTask(
            name, summary, "perplexity", 0, "", "perplexity", (sample,), (path,), digest
        )
    rows = _rows(path, text)
    if not rows:
        raise CheckpointError(f"{path}: is empty, wanted a row a sample")
    form = _format_of(*rows[0])
    samples = [form.read(row, n, place) for n, (place, row) in enumerate(rows)]
    return FileTask(
        name,
        f"the rows of {path}",
        form.family,
        _ANSWER_ROOM,
        form.metric,
        form.kind,
        tuple(samples),
        tuple(place for place, _ in rows),
        digest,
        form.truncates,
    )
