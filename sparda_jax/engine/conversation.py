"""A cache to which turns are appended, and what it was made with."""

import dataclasses
import threading
import weakref
from typing import Any

import jax
import numpy as np

from sparda_jax.checks import integer
from sparda_jax.config import CacheConfig, ConfigError, ModelConfig, SparseConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.on_mesh import StateLayout
from sparda_jax.engine.turns import copied_state
from sparda_jax.inference.generate import GenerateState
from sparda_jax.models.decoder import Decoder
from sparda_jax.planning.limits import refuse_copy
from sparda_jax.sparse.selectors import Selector

# What of an offloaded cache's configuration stands in the form of its arrays, or in the
# tokens that it gives. Limits and statistics may change from turn to turn.
_FIXED_BY_OFFLOAD = (
    "device_blocks",
    "layer0",
    "route",
    "prefetch",
    "layers_ahead",
    "exactness",
    "codec",
)
# A name and the tokens that begin and end a text change nothing in a cache.
_FREE_OF_CONFIG = ("name", "bos_id", "eos_ids")
_MOST_ROWS = 2**16


@dataclasses.dataclass(frozen=True)
class MadeWith:
    """What a conversation's cache was filled with, and can be continued with alone.

    Attributes:
      model: The decoder; not kept alive by a conversation.
      config: Its shape.
      sparse: Block selection.
      selector: How blocks are chosen.
      cache: Where the KV lives, `auto` decided.
    """

    model: weakref.ref[Decoder]
    config: ModelConfig
    sparse: SparseConfig
    selector: Selector
    cache: CacheConfig

    @staticmethod
    def of(lm: LanguageModel, cache: CacheConfig) -> "MadeWith":
        """What a call with this model makes its conversation with."""
        return MadeWith(weakref.ref(lm.model), lm.config, lm.sparse, lm.selector, cache)

    def check(self, lm: LanguageModel) -> None:
        """Raises ConfigError unless a model continues what was begun with this."""
        if self.selector != lm.selector:
            _refuse("attention", self.selector.name, lm.selector.name)
        _check_fields("SparseConfig", self.sparse, lm.sparse)
        _check_fields("ModelConfig", self.config, lm.config, skip=_FREE_OF_CONFIG)
        if self.model() is not lm.model:
            raise ConfigError(
                "conversation was made with other weights than this model has: "
                "continue it with the model that began it"
            )
        if lm.cache.kind not in ("auto", self.cache.kind):
            _refuse("CacheConfig.kind", self.cache.kind, lm.cache.kind)
        if self.cache.kind == "offload":
            _check_fields("CacheConfig", self.cache, lm.cache, only=_FIXED_BY_OFFLOAD)
        elif self.cache.exactness != lm.cache.exactness:
            _refuse("CacheConfig.exactness", self.cache.exactness, lm.cache.exactness)


def _refuse(field: str, made: object, given: object) -> None:
    raise ConfigError(
        f"conversation was made with {field}={made!r}, and this model has {given!r}: "
        "continue it with what began it"
    )


def _check_fields(
    owner: str,
    made: object,
    given: object,
    *,
    only: tuple[str, ...] | None = None,
    skip: tuple[str, ...] = (),
) -> None:
    """Refuses the first field of two frozen configurations that differs."""
    for name in only or vars(made):
        if name not in skip and getattr(made, name) != getattr(given, name):
            _refuse(f"{owner}.{name}", getattr(made, name), getattr(given, name))


@dataclasses.dataclass(frozen=True)
class ChatHistory:
    """The messages of a conversation that `chat` made.

    Attributes:
      messages: All of them, the last answer too.
      prompt: Token ids of those before the answer, as the template wrote them last.
    """

    messages: tuple[dict[str, Any], ...]
    prompt: tuple[int, ...]


class _Claim:
    """Whether a turn has gone on from a conversation: one can, once.

    Attributes:
      taken: Whether one has.
      lock: Held while that is changed, or while the state must not be taken.
    """

    def __init__(self) -> None:
        self.taken = False
        self.lock = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """A cache to which further turns can be appended; used up by the next turn.

    `fork` copies it, so that many questions are asked on one prefill:

        read = sj.generate(lm, [document], max_new_tokens=1).conversation
        for question in questions:
            sj.generate(lm, [question], conversation=read.fork())

    Threads: of several that go on from one conversation the first does, the others get
    a ConfigError; any number may fork it.

    Attributes:
      state: Device state after the last turn.
      lengths: Tokens in the cache, per row.
      rope_length: Longest context that the rotary frequencies were chosen for.
      made_with: The model and the configuration that it can be continued with.
      layout: Of the state's arrays on a mesh; None on one device.
      chat: The messages that it holds, if `chat` made it.
    """

    state: GenerateState
    lengths: tuple[int, ...]
    rope_length: int
    made_with: MadeWith
    layout: StateLayout | None = None
    chat: ChatHistory | None = None
    _claim: _Claim = dataclasses.field(default_factory=_Claim, repr=False)

    @property
    def used_up(self) -> bool:
        """Whether another turn has gone on from here."""
        return self._claim.taken

    def check_unused(self) -> None:
        """Raises ConfigError if no turn can go on from here, or another one has."""
        if self.made_with.cache.kind == "evict":
            raise ConfigError(
                "conversation cannot go on or be forked: CacheConfig.kind='evict' has "
                "given back blocks of its prompt, which a further turn would read; "
                "begin it with kind='resident' or 'offload'"
            )
        if self.used_up:
            raise ConfigError(
                "conversation is used up, by a further turn or a stream that was made "
                "with it: continue with the one in that turn's output"
            )

    def take(self) -> GenerateState:
        """The state, for the one turn that goes on from here.

        The turn writes over the buffers, so no other may use them.

        Raises:
          ConfigError: If another turn has taken it.
        """
        with self._claim.lock:
            self.check_unused()
            self._claim.taken = True
        return self.state

    def fork(self, rows: int | None = None) -> "Conversation":
        """A copy with a cache of its own; this conversation stays as it is.

        The copy takes as much memory again, on the device and of the host store, its
        room for further turns included: cut to what is filled, it would be of another
        size, for which the next turn compiled programs of its own. (On the device a
        short conversation has room for 1,024 tokens, a small one for 4,608.)

        Args:
          rows: For a conversation of one row: copies of it in the new conversation, to
            ask that many questions in one call. None copies every row once.

        Raises:
          ConfigError: If the conversation is used up, has several rows to be copied
            `rows` times, the copy does not fit, or groups of a mesh's devices would
            have to exchange rows.

        Example:
          >>> read = sj.generate(lm, ["A document."], max_new_tokens=1).conversation
          >>> asked = [
          ...     sj.generate(lm, [q], max_new_tokens=2, conversation=read.fork())
          ...     for q in (" Who?", " Where?")
          ... ]
          >>> len(asked), read.lengths == read.fork().lengths
          (2, True)
        """
        lengths = self.lengths
        copied = self.state.lengths.shape[0]
        if rows is not None:
            copied = integer(1, _MOST_ROWS)("rows", rows)
            if len(lengths) != 1:
                raise ConfigError(
                    f"rows={rows} is not allowed: this conversation has {len(lengths)} "
                    "rows, and only one row can be copied several times"
                )
            lengths *= copied
        with self._claim.lock:
            self.check_unused()
            refuse_copy(self.state, copied, self.made_with.cache)
            state, layout = copied_state(
                self.state, self.layout, None if rows is None else copied
            )
            # Once these are done, a turn may write over the buffers.
            jax.block_until_ready(state)
        return dataclasses.replace(
            self, state=state, lengths=lengths, layout=layout, _claim=_Claim()
        )

    def __repr__(self) -> str:
        kind = self.made_with.cache.kind
        lengths = ", ".join(str(length) for length in self.lengths[:8])
        more = ", …" if len(self.lengths) > 8 else ""
        end = ", used up" if self.used_up else ""
        return (
            f"Conversation({len(self.lengths)} rows of {lengths}{more} tokens, "
            f"{kind}, attention={self.made_with.selector.name!r}{end})"
        )

    def check(self, lm: LanguageModel, rows: int) -> None:
        """Raises ConfigError unless `rows` prompts for a model can be appended."""
        self.check_unused()
        if len(self.lengths) != rows:
            raise ConfigError(
                f"prompts has {rows} sequences: the conversation has "
                f"{len(self.lengths)}; fork(rows=…) makes several of one"
            )
        self.made_with.check(lm)
        broken = np.flatnonzero(np.asarray(self.state.broken))
        if broken.size:
            raise ConfigError(
                f"conversation cannot go on: row {broken[0]} ended on logits that are "
                "not finite (finish_reasons says 'non_finite')"
            )
