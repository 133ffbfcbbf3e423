"""The passkeys of `adapt`: which windows keep them, and what the heads find."""

import dataclasses
from collections.abc import Callable
from typing import Any

import sparda_jax as sj
from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checks import ConfigError
from sparda_jax.config import SparseConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.passkey import PasskeyTask, passkey_task

_DEPTHS = (0.1, 0.5, 0.9)
# Tokens that a passkey's prompt leaves of a row.
_ANSWER = 64


def passkey_tasks(
    tokenizer: Tokenizer | None, tokens: int, count: int, seed: int
) -> list[PasskeyTask]:
    """What is asked for; nothing without a chat template.

    Raises:
      ConfigError: A row is too short for the document of a passkey.
    """
    if tokenizer is None or not tokenizer.has_chat_template:
        return []
    try:
        return [
            passkey_task(
                tokenizer,
                tokens=tokens - _ANSWER,
                depth=_DEPTHS[index % len(_DEPTHS)],
                seed=seed + index,
            )
            for index in range(count)
        ]
    except ConfigError as error:
        raise ConfigError(
            f"seq_len={tokens} is not allowed with passkeys={count}: without "
            f"the {_ANSWER} for the answer, {error}; or passkeys must be 0"
        ) from error


def passkeys_found(
    lm: LanguageModel,
    tasks: list[PasskeyTask],
    on_task: Callable[[], object] = lambda: None,
) -> int:
    """How many of them the model's attention finds."""
    count = 0
    for task in tasks:
        out = sj.generate(lm, [list(task.ids)], max_new_tokens=12)
        count += task.solved_by(out.texts[0])
        on_task()
    return count


@dataclasses.dataclass(frozen=True)
class Kept:
    """A selection of several, and the passkeys that own queries find with them.

    Attributes:
      sparse: The first that finds as many as dense attention, else one that finds most.
      figures: `asked`, `tokens`, `dense`, `infllm_v2` (with `sparse`) and `windows`:
        of every kernel size that was tried.
    """

    sparse: SparseConfig
    figures: dict[str, Any]


def keep_passkeys(
    lm: LanguageModel,
    selections: list[SparseConfig],
    tasks: list[PasskeyTask],
    on_task: Callable[[], object] = lambda: None,
) -> Kept:
    """Tries selections, coarsest windows first, until one keeps dense's passkeys.

    Attention mass hardly tells windows apart that lose a needle and such that keep it.

    Args:
      lm: The model, with any attention.
      selections: At least one, in the order of preference.
      tasks: Passkeys, at least one.
      on_task: Called after each of them and each attention (progress).
    """
    dense = passkeys_found(sj.with_attention(lm, "dense"), tasks, on_task)
    found: list[tuple[SparseConfig, int]] = []
    for sparse in selections:
        own = sj.with_attention(lm, "infllm_v2", sparse=sparse)
        found.append((sparse, passkeys_found(own, tasks, on_task)))
        if found[-1][1] >= dense:
            break
    # `max` keeps the first of equals: the coarsest windows.
    sparse, most = max(found, key=lambda one: one[1])
    figures = {
        "asked": len(tasks),
        "tokens": len(tasks[0].ids),
        "dense": dense,
        "infllm_v2": most,
        "windows": {str(one.kernel_size): count for one, count in found},
    }
    return Kept(sparse, figures)
