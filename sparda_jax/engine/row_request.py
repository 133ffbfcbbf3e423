"""What the request of one row asks for, and what it has got."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.engine.generate_config import GenerateConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.stop_strings import (
    RowText,
    check_stop,
    pause_tokens,
    special_ids,
)
from sparda_jax.inference.generate import Request, stop_array
from sparda_jax.inference.sampling import SamplingConfig, sampling_of_rows
from sparda_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """What the request of one row asks for; by default nothing.

    Attributes:
      sampling: How its tokens are drawn.
      seed: Of its random stream.
      max_new: Output tokens at which it ends.
      stop_ids: Tokens that end it, the model's EOS included.
      stop: Texts that end it.
      min_new: Output tokens before which it does not end.
      include_stop: Whether its text ends behind its stop string.
      logprobs: Whether the log-probabilities of its tokens are wanted.
    """

    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    max_new: int = 0
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    min_new: int = 0
    include_stop: bool = False
    logprobs: bool = False

    @staticmethod
    def of(lm: LanguageModel, config: GenerateConfig, seed: int) -> "RowRequest":
        """A row of a request.

        Raises:
          ConfigError: If there are stop strings, and no tokenizer to find them, or a
            stop id is out of the vocabulary.
        """
        stop = tuple(config.stop)
        check_stop(lm, stop)
        eos = () if config.ignore_eos else lm.config.eos_ids
        ids = {*config.stop_ids, *eos, *special_ids(lm.tokenizer, stop)}
        stop_array(ids, lm.config)  # what is out of the vocabulary is refused here
        return RowRequest(
            sampling=config.sampling,
            seed=seed,
            max_new=config.max_new_tokens,
            stop_ids=frozenset(ids),
            stop=stop,
            min_new=config.min_new_tokens,
            include_stop=config.include_stop,
        )

    def text(self, tokenizer: Tokenizer | None) -> RowText:
        """The text of its output, which is empty yet."""
        return RowText(
            tokenizer,
            self.stop,
            first=self.min_new,
            include_stop=self.include_stop,
        )


@dataclasses.dataclass(frozen=True)
class RowOutput:
    """What a row has given so far.

    Attributes:
      tokens: Output token ids, with the one that ended it.
      text: Their text, up to the stop string that ended it.
      finish_reason: As in `GenerateOutput`; "cancelled" if it has not ended.
    """

    tokens: list[int]
    text: str
    finish_reason: str


def joined_request(
    lm: LanguageModel, asked: Sequence[RowRequest], rope: Rope
) -> Request:
    """What a call asks for that runs such rows; its `steps` are 0.

    Args:
      lm: The model.
      asked: What each row asks for.
      rope: Rotary frequencies of all.
    """
    stops = [stop_array(set(row.stop_ids), lm.config) for row in asked]
    texts = tuple(dict.fromkeys(text for row in asked for text in row.stop))
    return Request(
        sampling=sampling_of_rows(
            [row.sampling for row in asked], [row.seed for row in asked]
        ),
        stops=jax.device_put(np.stack(stops)),
        max_new=jax.device_put(np.array([row.max_new for row in asked], np.int32)),
        steps=jax.device_put(np.int32(0)),
        rope=rope,
        pause=pause_tokens(lm, texts),
        min_new=jax.device_put(np.array([row.min_new for row in asked], np.int32)),
        logged=jax.device_put(np.array(any(row.logprobs for row in asked))),
    )
