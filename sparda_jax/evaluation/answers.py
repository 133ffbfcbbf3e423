"""Runs samples on a model with one way to attend: a record a sample, whatever happens.

Every selector gets the same token ids in the same batches. A sample that fails stays in
the results with a score of 0 and the reason.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparda_jax.checks import ConfigError
from sparda_jax.engine.api import generate
from sparda_jax.engine.conversation import Conversation
from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.run_checks import QUARTERS
from sparda_jax.evaluation.samples import LEAST_SCORED, Asked, Sample, Task, fingerprint
from sparda_jax.evaluation.scoring import METRICS
from sparda_jax.evaluation.task_files import FileTask
from sparda_jax.evaluation.token_scores import (
    Views,
    divergence,
    score_tokens,
    view_of_answer,
)

# A request that does not fit is refused before it runs, or fails while it does.
_TOO_MUCH = (ConfigError, jax.errors.JaxRuntimeError)
DENSE = "dense"  # The selector that all others are compared with.
_NO_ANSWER = ConfigError("dense attention has no answer to compare with")
type AnyTask = Task | FileTask
type Record = dict[str, Any]
type Advance = Callable[[int], None]


def _share(counts: tuple[int, int]) -> float | None:
    attended, present = counts
    return round(attended / present, 6) if present else None


def _failed(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_NOT_FINITE = "logits are not finite"


def _record(sample: Sample, ids: list[int], **values: Any) -> Record:
    return {
        "index": sample.index,
        "prompt_tokens": len(ids),
        "prompt": fingerprint(ids),
        **({} if sample.depth is None else {"depth": round(sample.depth, 4)}),
        **values,
    }


def _scored(
    sample: Sample, ids: list[int], score: float, failed: bool, **values: Any
) -> Record:
    """A record of an answer; one whose logits are not finite scores nothing."""
    record = _record(sample, ids, score=0.0 if failed else round(score, 4), **values)
    return record | {"failed": _NOT_FINITE} if failed else record


def _broken(sample: Sample, ids: list[int], error: Exception) -> Record:
    return _record(sample, ids, score=0.0, tokens=0, failed=_failed(error))


class Runner:
    """Runs tasks on models.

    Args:
      batch: Samples that run together.
      advance: Called with the number of samples that are done.
    """

    def __init__(self, *, batch: int, advance: Advance) -> None:
        self._batch = batch
        self._advance = advance

    def run(
        self,
        lm: LanguageModel,
        task: AnyTask,
        samples: Sequence[Asked],
        reference: dict[int, "DenseAnswer"],
    ) -> list[Record]:
        """Records of all samples, in their order.

        Args:
          lm: The model, with its way to attend.
          task: Whose samples they are.
          samples: What is asked.
          reference: Dense attention's own answers by sample, for `agreement`: they are
            put in by the run with dense attention, and read by all others.
        """
        if task.kind == "generate":
            return self._generate(lm, task, samples)
        one = {
            "fork": self._fork,
            "perplexity": self._perplexity,
            "agreement": self._agreement,
        }[task.kind]
        records = []
        for sample in samples:
            records.append(one(lm, task, sample, reference))
            self._advance(1)
        return records

    def _generate(
        self, lm: LanguageModel, task: AnyTask, samples: Sequence[Asked]
    ) -> list[Record]:
        size = min(self._batch, len(samples))
        records: list[Record] = []
        for first in range(0, len(samples), size):
            part = list(range(first, min(first + size, len(samples))))
            asked = [samples[n].sample for n in part]
            ids = [samples[n].ids[0].tolist() for n in part]
            records += self._together(lm, task, asked, ids, size)
            self._advance(len(part))
        return records

    def _together(
        self,
        lm: LanguageModel,
        task: AnyTask,
        samples: list[Sample],
        ids: list[list[int]],
        size: int,
    ) -> list[Record]:
        """One batch. One that fails for want of memory is run in two halves."""
        # The last batch has the size of the others: it needs no program of its own.
        filled = [*ids, *[ids[-1]] * (size - len(ids))]
        try:
            out = generate(lm, filled, max_new_tokens=task.max_new_tokens)
        except _TOO_MUCH as error:
            if size == 1:
                return [_broken(samples[0], ids[0], error)]
            half = -(-size // 2)
            return [
                record
                for first in range(0, len(samples), half)
                for record in self._together(
                    lm,
                    task,
                    samples[first : first + half],
                    ids[first : first + half],
                    half,
                )
            ]
        read = _share(out.stats.decode_blocks)
        answers = zip(samples, ids, out.tokens, out.finish_reasons, strict=False)
        return [
            self._answered(lm, task, sample, row, tokens, finish, read)
            for sample, row, tokens, finish in answers
        ]

    def _answered(
        self,
        lm: LanguageModel,
        task: AnyTask,
        sample: Sample,
        ids: list[int],
        tokens: list[int],
        finish: str,
        read: float | None,
    ) -> Record:
        assert lm.tokenizer is not None
        text = lm.tokenizer.decode(tokens)
        name = sample.metric or task.metric
        # The beginning of an object is a part of it.
        whole = sample.answer_prefix + text if name == "fields" else text
        failed = finish == "non_finite"
        return _scored(
            sample,
            ids,
            METRICS[name](whole, sample.outputs),
            failed,
            output=text,
            outputs=list(sample.outputs),
            tokens=len(tokens),
            finish=finish,
            read=read,
        )

    def _fork(
        self,
        lm: LanguageModel,
        task: AnyTask,
        asked: Asked,
        reference: dict[int, "DenseAnswer"],
    ) -> Record:
        """Several questions on one prefilled context, all in one batch."""
        del reference
        assert lm.tokenizer is not None
        sample, rows = asked.sample, [ids.tolist() for ids in asked.ids]
        shared = _common_prefix(rows)
        try:
            forks = _read(lm, rows[0][:shared], len(rows))
            tails = [ids[shared:] for ids in rows]
            out = generate(
                lm,
                [tail[1:] for tail in tails],
                max_new_tokens=task.max_new_tokens,
                conversation=_continued_with(forks, [tail[0] for tail in tails]),
            )
        except _TOO_MUCH as error:
            return _broken(sample, rows[0], error)
        texts = [lm.tokenizer.decode(tokens) for tokens in out.tokens]
        scores = [
            METRICS[task.metric](text, question.outputs)
            for text, question in zip(texts, sample.questions, strict=True)
        ]
        failed = "non_finite" in out.finish_reasons
        return _scored(
            sample,
            rows[0],
            float(np.mean(scores)),
            failed,
            output=texts,
            outputs=[list(question.outputs) for question in sample.questions],
            tokens=round(float(np.mean([len(tokens) for tokens in out.tokens])), 2),
            finish=list(out.finish_reasons),
            read=_share(out.stats.decode_blocks),
        )

    def _perplexity(
        self,
        lm: LanguageModel,
        task: AnyTask,
        asked: Asked,
        reference: dict[int, "DenseAnswer"],
    ) -> Record:
        """Mean surprise of a text, whole and by quarters of its positions."""
        del task, reference
        sample, ids = asked.sample, asked.ids[0].tolist()
        if len(ids) < LEAST_SCORED:
            failed = f"{len(ids)} tokens, wanted at least {LEAST_SCORED}"
            return _record(sample, ids, failed=failed)
        try:
            scores = score_tokens(lm, ids)
        except _TOO_MUCH as error:
            return _record(sample, ids, failed=_failed(error))
        surprises = scores.surprises.astype(np.float64)
        if not np.all(np.isfinite(surprises)):
            return _record(sample, ids, failed=_NOT_FINITE)
        parts = np.array_split(surprises, QUARTERS)
        return _record(
            sample,
            ids,
            surprise=round(float(surprises.mean()), 6),
            by_position=[round(float(part.mean()), 6) for part in parts],
            likeliest=round(100 * float(scores.likeliest.mean()), 4),
        )

    def _agreement(
        self,
        lm: LanguageModel,
        task: AnyTask,
        asked: Asked,
        reference: dict[int, "DenseAnswer"],
    ) -> Record:
        """Dense's own answer, seen by another: first choices alike, and divergence."""
        sample, ids = asked.sample, asked.ids[0].tolist()
        try:
            if lm.selector.name == DENSE:
                room = task.max_new_tokens
                out = generate(lm, [ids], max_new_tokens=room, ignore_eos=True)
                answer = out.tokens[0]
                views = view_of_answer(lm, ids, answer, None)
                reference[sample.index] = DenseAnswer(answer, views)
            dense = reference.get(sample.index)
            if dense is None:
                return _broken(sample, ids, _NO_ANSWER)
            views = view_of_answer(lm, ids, dense.tokens, dense.views.tokens)
        except _TOO_MUCH as error:
            return _broken(sample, ids, error)
        far = divergence(dense.views.logs, views.logs)
        mean = float(far.mean())
        same = views.likeliest == np.asarray(dense.tokens[1:])
        return _record(
            sample,
            ids,
            score=round(100 * float(same.mean()), 4) if math.isfinite(mean) else 0.0,
            tokens=len(dense.tokens),
            kl=round(mean, 6) if math.isfinite(mean) else None,
            **({} if math.isfinite(mean) else {"failed": "logits are not finite"}),
        )


@dataclasses.dataclass(frozen=True)
class DenseAnswer:
    """Dense attention's answer and what it thought before each of its tokens."""

    tokens: list[int]
    views: Views


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with; at least one token is left of each."""
    shortest = min(map(len, rows)) - 2
    for place in range(shortest):
        if len({row[place] for row in rows}) > 1:
            return place
    return shortest


def _read(lm: LanguageModel, prompt: list[int], rows: int) -> Conversation:
    """So many rows that have read a prompt."""
    read = generate(lm, [prompt], max_new_tokens=1, ignore_eos=True)
    return read.conversation.fork(rows=rows) if rows > 1 else read.conversation


def _continued_with(conversation: Conversation, tokens: list[int]) -> Conversation:
    """The conversation with other tokens to go on with than those it had sampled."""
    state = conversation.state
    pending = np.array(state.pending)
    pending[: len(tokens)] = tokens
    state = state._replace(pending=jnp.asarray(pending))
    return dataclasses.replace(conversation, state=state)
