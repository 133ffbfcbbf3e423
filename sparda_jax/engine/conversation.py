"""A cache to which turns are appended, and what it was made with."""

import dataclasses
import threading
import weakref

import numpy as np

from sparda_jax.cache.offload import OffloadCache
from sparda_jax.config import CacheConfig, ConfigError, ModelConfig, SparseConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.inference.generate import GenerateState
from sparda_jax.models.decoder import Decoder
from sparda_jax.sparse.selectors import Selector

# What of an offloaded cache's configuration stands in the form of its arrays, or in the
# tokens that it gives. Limits and statistics may change from turn to turn.
_FIXED_BY_OFFLOAD = ("device_blocks", "layer0", "route", "prefetch", "exactness")
# A name and the tokens that begin and end a text change nothing in a cache.
_FREE_OF_CONFIG = ("name", "bos_id", "eos_ids")


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


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """A cache to which further turns can be appended; used up by the next turn.

    Attributes:
      state: Device state after the last turn.
      lengths: Tokens in the cache, per row.
      rope_length: Longest context that the rotary frequencies were chosen for.
      made_with: The model and the configuration that it can be continued with.
    """

    state: GenerateState
    lengths: tuple[int, ...]
    rope_length: int
    made_with: MadeWith
    # Held by the one turn that goes on from here: one thread can take it, once.
    _taken: threading.Lock = dataclasses.field(
        default_factory=threading.Lock, repr=False
    )

    @property
    def used_up(self) -> bool:
        """Whether another turn has gone on from here."""
        return self._taken.locked()

    def check_unused(self) -> None:
        """Raises ConfigError if another turn has gone on from here."""
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
        if not self._taken.acquire(blocking=False):
            self.check_unused()
        return self.state

    def __repr__(self) -> str:
        kind = "offload" if isinstance(self.state.cache, OffloadCache) else "resident"
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
                f"{len(self.lengths)}"
            )
        self.made_with.check(lm)
        broken = np.flatnonzero(np.asarray(self.state.broken))
        if broken.size:
            raise ConfigError(
                f"conversation cannot go on: row {broken[0]} ended on logits that are "
                "not finite (finish_reasons says 'non_finite')"
            )
