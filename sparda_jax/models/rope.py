"""Rotary position embedding: plain, linear, llama3, LongRoPE and YaRN frequencies.

The rotation is half-split ("rotate half") over the whole head: channel k turns with
channel k + H/2 by the angle position · inv_freq_k (docs/algorithm.md §1.1).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparda_jax.config import ModelConfig, RopeConfig


def _llama3(rope: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    assert rope.original_max is not None
    wavelength = 2 * math.pi / inv_freq
    turns = rope.original_max / wavelength
    # 0 below the low band (fully stretched), 1 above the high band (untouched).
    keep = (turns - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    keep = np.clip(keep, 0.0, 1.0)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(rope: RopeConfig, inv_freq: np.ndarray, head_dim: int) -> np.ndarray:
    assert rope.original_max is not None

    def channel(rotations: float) -> float:
        """The channel that makes `rotations` turns over the original context."""
        ratio = rope.original_max / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low = max(math.floor(channel(rope.beta_fast)), 0)
    high = min(math.ceil(channel(rope.beta_slow)), head_dim - 1)
    span = max(high - low, 1e-3)
    stretch = np.clip((np.arange(head_dim // 2) - low) / span, 0.0, 1.0)
    return (1 - stretch) * inv_freq + stretch * inv_freq / rope.factor


def rope_frequencies(
    rope: RopeConfig, head_dim: int, length: int
) -> tuple[np.ndarray, float]:
    """Inverse frequencies and the multiplier of cos and sin.

    Args:
      rope: The embedding's configuration.
      head_dim: H, even.
      length: Most positions that the request can reach. LongRoPE takes its long list
        when this exceeds `original_max`. One list serves the whole request; the
        reference switches in mid-generation and leaves old keys with the other list
        (docs/algorithm.md §7.5).

    Returns:
      float32 inverse frequencies [H/2] and the scale m of cos and sin.

    Source: docs/algorithm.md §1.1; llama3 and YaRN as their papers and configurations.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inv_freq = rope.theta**-exponent
    scale = 1.0
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    elif rope.kind == "yarn":
        inv_freq = _yarn(rope, inv_freq, head_dim)
        scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    elif rope.kind == "longrope":
        assert rope.original_max is not None
        use_long = length > rope.original_max
        factors = rope.long_factors if use_long else rope.short_factors
        inv_freq = inv_freq / np.asarray(factors, np.float64)
        longest = rope.longrope_max or rope.original_max
        ratio = longest / rope.original_max
        if ratio > 1:
            scale = math.sqrt(1 + math.log(ratio) / math.log(rope.original_max))
    if rope.attention_factor is not None:
        scale = rope.attention_factor
    return inv_freq.astype(np.float32), scale


class Rope(NamedTuple):
    """Rotary frequencies of a request: inv_freq [H/2] and the scale of cos and sin."""

    inv_freq: Float[Array, " half"]
    scale: Float[Array, ""]


class RopeCosSin(NamedTuple):
    """cos and sin of tokens' angles, times the scale: [B, T, H/2] each, float32."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def model_rope(config: ModelConfig, length: int) -> Rope:
    """Frequencies of a model for a request of up to `length` positions."""
    inv_freq, scale = rope_frequencies(config.rope, config.head_dim, length)
    return Rope(jax.device_put(inv_freq), jax.device_put(np.float32(scale)))


def rope_cos_sin_at(rope: Rope, positions: Int[Array, "B T"]) -> RopeCosSin:
    """The rotation of every position; the same for all layers of a step."""
    angles = positions[..., None].astype(jnp.float32) * rope.inv_freq
    return RopeCosSin(jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale)


def apply_rope(
    x: Float[Array, "B T heads H"], rope_cos_sin: RopeCosSin
) -> Float[Array, "B T heads H"]:
    """Rotates every head of `x` to its position, in float32; returns x's dtype.

    Source: docs/algorithm.md §1.1 (RoPE), §4.2 for forecasts, at their own position.
    """
    cos, sin = rope_cos_sin.cos[:, :, None], rope_cos_sin.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
