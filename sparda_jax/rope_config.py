"""Settings of a model's rotary embedding; `sparda_jax.config` passes them on."""

import dataclasses
from typing import Literal, get_args

from sparda_jax.checks import (
    choice,
    integer,
    number,
    optional,
    require,
    settle,
    several,
)

RopeType = Literal["default", "linear", "llama3", "longrope", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, half-split ("rotate half") over the whole head.

    Attributes:
      kind: `default`, `linear` (position interpolation), `llama3` (frequency bands),
        `longrope` (per-dimension factor lists) or `yarn`.
      theta: Base of the inverse frequencies, theta^(-2k/H).
      factor: Context extension factor (`linear`, `llama3`, `yarn`).
      original_max: Context length that the unscaled model was trained for (`llama3`,
        `longrope`, `yarn`).
      low_freq_factor, high_freq_factor: Band limits of `llama3`.
      beta_fast, beta_slow: Band limits of `yarn`, in rotations over `original_max`.
      short_factors, long_factors: H/2 divisors each (`longrope`). The long list is
        used when the request can grow past `original_max` positions.
      attention_factor: Multiplier of cos and sin; None derives it (`longrope`: from
        `max_context`/`original_max`; `yarn`: 0.1·ln(factor) + 1).
      longrope_max: Longest context of `longrope` (the reference's max_position_...).
    """

    kind: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float | None = None
    longrope_max: int | None = None

    def __post_init__(self) -> None:
        positive = number(above=0)
        factors = several(positive, "finite numbers above 0")
        settle(
            self,
            kind=choice(*get_args(RopeType)),
            theta=positive,
            factor=positive,
            original_max=optional(integer(1)),
            low_freq_factor=positive,
            high_freq_factor=positive,
            beta_fast=positive,
            beta_slow=positive,
            short_factors=factors,
            long_factors=factors,
            attention_factor=optional(positive),
            longrope_max=optional(integer(1)),
        )
        if self.kind in ("llama3", "longrope", "yarn"):
            require(
                self.original_max is not None,
                "RopeConfig.original_max",
                self.original_max,
                f"a positive integer for kind {self.kind!r}",
            )
        if self.kind == "llama3":
            require(
                self.high_freq_factor > self.low_freq_factor,
                "RopeConfig.high_freq_factor",
                self.high_freq_factor,
                f"above low_freq_factor={self.low_freq_factor}",
            )
        if self.kind == "longrope":
            require(
                len(self.short_factors) == len(self.long_factors) > 0,
                "RopeConfig.short_factors",
                len(self.short_factors),
                f"as many values as long_factors ({len(self.long_factors)}), above 0",
            )
