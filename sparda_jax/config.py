"""Frozen, validated configurations of a model, its sparse attention and its cache.

Every configuration checks itself when it is constructed, so that a wrong value is
reported by field name before any device work. Letters follow the glossary: B batch,
T query positions, S key positions, N query heads, K kv heads, G = N/K, H head dim,
M blocks, P selected blocks, W compressed-key windows, L layers.
"""

import dataclasses
import types
import warnings
from typing import Any, Literal, get_args

from sparda_jax.checks import (
    LARGEST_BYTES,
    ConfigError,
    choice,
    flag,
    instance,
    integer,
    number,
    optional,
    require,
    settle,
    several,
    text,
)
from sparda_jax.rope_config import RopeConfig

__all__ = [
    "CacheConfig",
    "CacheKind",
    "ConfigError",
    "ModelConfig",
    "Prefetch",
    "RopeConfig",
    "Route",
    "SparseConfig",
]

CacheKind = Literal["resident", "offload", "auto", "evict"]
Prefetch = Literal["lookahead", "none", "auto"]
HostCodec = Literal["exact", "int8", "int8_slots"]
KeyCodec = Literal["exact", "int8"]
# What Forecast heads read of a layer.
ForecastReads = Literal["input", "attended"]
Route = Literal["auto", "mosaic", "triton", "dynamic_slice", "host_loop"]
# What routes were called before; to be taken for one version more.
OLD_ROUTES = types.MappingProxyType({"slices": "dynamic_slice", "steps": "host_loop"})

# Bounds that no model passes by far: what is beyond them is a damaged or hostile file,
# whose arithmetic would not end.
_WIDTH = 2**20
_BLOCKS = 2**24


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one decoder; see `sparda_jax.models.presets`.

    Attributes:
      name: Label for messages.
      vocab_size, hidden_size, ffn_size, num_layers: V, D, F, L; F is that of one expert
        where there are experts.
      num_heads, num_kv_heads, head_dim: N, K, H. N must be a multiple of K.
      rms_norm_eps: Epsilon of every RMSNorm.
      rope: Rotary embedding.
      tie_embeddings: The head is the transposed embedding.
      attention_bias: Q, K and V projections have a bias (Qwen2).
      output_bias: The attention's output projection has a bias.
      qk_norm: RMSNorm over each q and k head before RoPE (Qwen3).
      key_bias: NOSA's value-derived additive key bias, c = A ⊙ softplus(delta(v)).
      num_experts, experts_per_token: E experts in every layer, of which a router gives
        each token that many; 0 for one MLP.
      normalize_router: A token's router probabilities are divided by their sum.
      shared_ffn_size: Inner width of an expert that all tokens share, times a gate of
        its own (Qwen2-MoE); 0 for none.
      embed_scale: Multiplier of the embeddings (muP scale_emb).
      residual_scale: Multiplier of both sublayer outputs (muP scale_depth/√L).
      logits_divisor: Divisor of the final hidden state (muP D/dim_model_base).
      max_context: Longest sequence, prompt and generated tokens together.
      forecast_queries: R, queries that Forecast heads make for each kv head; loading
        heads sets it (`models.forecast`).
      forecast_reads: What Forecast heads read of a layer: "input", its normalised input
        as in the reference, or "attended", what its MLP reads; loading heads sets it.
      bos_id: Token put before a plain prompt; None for none.
      eos_ids: Tokens that end a sequence.
    """

    name: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    key_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_router: bool = True
    shared_ffn_size: int = 0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    forecast_queries: int = 1
    forecast_reads: ForecastReads = "input"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        width, positive = integer(1, _WIDTH), number(above=0)
        settle(
            self,
            name=text,
            vocab_size=integer(1, 2**24),
            hidden_size=width,
            ffn_size=width,
            num_layers=integer(1, 4096),
            num_heads=width,
            num_kv_heads=width,
            head_dim=width,
            max_context=integer(1, 2**40),
            rms_norm_eps=positive,
            rope=instance(RopeConfig),
            tie_embeddings=flag,
            attention_bias=flag,
            output_bias=flag,
            qk_norm=flag,
            key_bias=flag,
            num_experts=integer(0, _WIDTH),
            experts_per_token=integer(0, _WIDTH),
            normalize_router=flag,
            shared_ffn_size=integer(0, _WIDTH),
            embed_scale=positive,
            residual_scale=positive,
            logits_divisor=positive,
            forecast_queries=width,
            forecast_reads=choice(*get_args(ForecastReads)),
            bos_id=optional(integer(0)),
            eos_ids=several(integer(0), "token ids", ordered=False),
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "ModelConfig.num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(
            self.forecast_queries <= self.group_size,
            "ModelConfig.forecast_queries",
            self.forecast_queries,
            f"at most the {self.group_size} query heads of a kv head",
        )
        require(self.head_dim % 2 == 0, "ModelConfig.head_dim", self.head_dim, "even")
        self._check_experts()
        if self.rope.kind == "longrope":
            require(
                len(self.rope.short_factors) == self.head_dim // 2,
                "ModelConfig.rope.short_factors",
                len(self.rope.short_factors),
                f"head_dim/2 = {self.head_dim // 2} values",
            )
        specials = self.eos_ids if self.bos_id is None else (self.bos_id, *self.eos_ids)
        for token in specials:
            require(
                token < self.vocab_size,
                "ModelConfig.eos_ids/bos_id",
                token,
                f"a token id in [0, {self.vocab_size})",
            )

    def _check_experts(self) -> None:
        experts, used = self.num_experts, self.experts_per_token
        require(
            min(1, experts) <= used <= experts,
            "ModelConfig.experts_per_token",
            used,
            f"from 1 to num_experts={experts}" if experts else "0 without experts",
        )
        require(
            experts > 0 or self.shared_ffn_size == 0,
            "ModelConfig.shared_ffn_size",
            self.shared_ffn_size,
            "0 without experts",
        )

    @property
    def dense_mlp(self) -> bool:
        """Whether a layer has one MLP for all tokens, and no experts."""
        return self.num_experts == 0

    @property
    def group_size(self) -> int:
        """G, query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def guesses_queries(self) -> bool:
        """Whether Forecast heads guess each head's query, which any windows score."""
        return 1 < self.forecast_queries == self.group_size


def _block_budget(field: str, value: object) -> int | tuple[int, ...]:
    """A check of a budget: blocks, or blocks by layer."""
    blocks = integer(1, _BLOCKS)
    if not isinstance(value, list | tuple):
        return blocks(field, value)
    budgets = several(blocks, "blocks, one number a layer")(field, value)
    require(budgets != (), field, value, "one number a layer, or one for all")
    return budgets


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """Block selection (docs/algorithm.md §2.1, §3, §4.3); all counts are in blocks.

    A row keeps `block_budget` blocks in all: the `init_blocks` first ones, its own
    block with the `local_blocks` before it, and the best-scored others.

    Attributes:
      kernel_size, kernel_stride: Tokens a compressed key averages, and tokens between
        two of them (κ, σ); κ = 2σ.
      block_size: Tokens of one KV block (β), a multiple of `kernel_stride`.
      init_blocks: Leading blocks that are always selected (I).
      local_blocks: Blocks before the query's own that are always selected (W), so
        W + 1 local blocks in all.
      block_budget: Selected blocks in all, forced ones included (P of docs/algorithm.md
        §2.1); or a tuple of one number a layer. Lists are as long as the largest, and
        training takes it.
      query_blocks: NOSA only: blocks that the first stage adds to init and local ones
        before the query-agnostic stage fills the budget (docs/algorithm.md §3 step 3).
      dense_len: Sequences with fewer keys attend densely; −1 never (docs/algorithm.md
        §2.6).
      mask_future_blocks: Blocks after the query's own are masked before top-k. False
        reproduces the reference's Forecast prefill literally (docs/algorithm.md §7.2)
        and exists for parity alone: prefill then runs as one query tile.
      forecast_decode_only: `sparda` prefills with the query's own scores and uses the
        Forecast for decode only.
      dense_key_bias: NOSA's key bias also applies where attention is dense. The
        reference drops it there (docs/algorithm.md §7.4); False reproduces that.
      compressed_keys: How key means are kept: `exact`, in the model's type, or `int8`,
        in 8 bits a number with a scale a window. That halves what a row takes on the
        device beside its blocks, and what is read to score by a Forecast of one query a
        kv head; for several, and for own queries, they are decoded first. It changes a
        few choices.

    Example:
      >>> sparse = sj.SparseConfig(block_size=64, block_budget=96)
      >>> sparse.block_budget * sparse.block_size  # tokens that a token reads at most
      6144
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    local_blocks: int = 32
    block_budget: int | tuple[int, ...] = 96
    query_blocks: int = 24
    dense_len: int = -1
    mask_future_blocks: bool = True
    forecast_decode_only: bool = False
    dense_key_bias: bool = True
    compressed_keys: KeyCodec = "exact"

    def __post_init__(self) -> None:
        tokens, blocks = integer(1, _WIDTH), integer(1, _BLOCKS)
        settle(
            self,
            kernel_size=tokens,
            kernel_stride=tokens,
            block_size=tokens,
            init_blocks=integer(0, _BLOCKS),
            local_blocks=blocks,
            block_budget=_block_budget,
            query_blocks=integer(0, _BLOCKS),
            dense_len=integer(-1),
            mask_future_blocks=flag,
            forecast_decode_only=flag,
            dense_key_bias=flag,
            compressed_keys=choice(*get_args(KeyCodec)),
        )
        require(
            self.kernel_size == 2 * self.kernel_stride,
            "SparseConfig.kernel_size",
            self.kernel_size,
            f"twice kernel_stride={self.kernel_stride}",
        )
        require(
            self.block_size % self.kernel_stride == 0
            and self.block_size >= self.kernel_size,
            "SparseConfig.block_size",
            self.block_size,
            f"a multiple of kernel_stride={self.kernel_stride} and at least "
            f"kernel_size={self.kernel_size}",
        )
        require(
            self.smallest_budget >= self.forced_blocks,
            "SparseConfig.block_budget",
            self.block_budget,
            f"at least the {self.forced_blocks} forced blocks "
            f"({self.init_blocks} init + {self.local_blocks} + 1 local)",
        )

    def to_json(self) -> dict[str, Any]:
        """The fields, for files: a later one that changes nothing is left out.

        Older versions read such files then, and records of theirs are of the same
        geometry.
        """
        values = dataclasses.asdict(self)
        if self.compressed_keys == "exact":
            del values["compressed_keys"]
        return values

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budget of every layer, or one for all of them."""
        budget = self.block_budget
        return budget if isinstance(budget, tuple) else (budget,)

    @property
    def largest_budget(self) -> int:
        """Blocks that a token of any layer selects at most."""
        return max(self.budgets)

    @property
    def smallest_budget(self) -> int:
        """Blocks that a token of any layer may select at least."""
        return min(self.budgets)

    @property
    def budget_text(self) -> str:
        """The budget in words."""
        if not isinstance(self.block_budget, tuple):
            return str(self.block_budget)
        return f"{self.smallest_budget} to {self.largest_budget} by layer"

    def check_layers(self, config: ModelConfig) -> None:
        """Raises ConfigError unless budgets by layer are one for each of a model's."""
        require(
            not isinstance(self.block_budget, tuple)
            or len(self.block_budget) == config.num_layers,
            "SparseConfig.block_budget",
            self.block_budget,
            f"one number, or one for each of the {config.num_layers} layers of "
            f"{config.name!r}",
        )

    @property
    def forced_blocks(self) -> int:
        """Most blocks that are selected whatever their score: I + W + 1."""
        return self.init_blocks + self.local_blocks + 1

    @property
    def windows_per_block(self) -> int:
        """ρ = β/σ, compressed keys that start in one block."""
        return self.block_size // self.kernel_stride


def device_blocks(field: str, value: object) -> int | str:
    """A check of C, slots of a row and kv head: a number, or `auto`.

    Raises:
      ConfigError: If it is neither.
    """
    if isinstance(value, str) and value == "auto":
        return value
    return integer(1, _BLOCKS, hint=" or 'auto'")(field, value)


def route_name(field: str, value: object) -> Route:
    """A check of a route's name; an old one is taken with a warning.

    Raises:
      ConfigError: If there is no such route.
    """
    if isinstance(value, str) and value in OLD_ROUTES:
        warnings.warn(
            f"{field}={value!r} is called {OLD_ROUTES[value]!r} now; the old name will "
            "go with the next version",
            FutureWarning,
            stacklevel=2,
        )
        value = OLD_ROUTES[value]
    return choice(*get_args(Route))(field, value)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Where the KV cache lives, and how its blocks come to the device.

    Attributes:
      kind: `resident`: all KV on the device. `offload`: all KV in host memory, the
        blocks in use in device slots. `auto`: resident if it fits, else offload (what
        the command line and the server take where nothing is said).
        `evict`: on the device, and of a prompt only the blocks that its answer can
        still list, with an attention that drops the others for good (`snapkv`,
        `window`); no further turn reads such a cache.
      device_blocks: C, device slots per layer, row and kv head (`offload`). `auto`: as
        many as the device has room for beside all else, up to all blocks. None: as many
        as a block list is long, the least that there can be. Or a number: slots beyond
        a list's length keep blocks that may be listed again. A conversation keeps the C
        of its first turn.
      prefetch: `lookahead`: layer l's Forecast starts the fetch for layer l + 1, while
        layer l computes. `none`: a layer selects and fetches for itself, and waits.
        `auto`: decided by measurement (`planning.auto`). None is `lookahead` where
        the attention forecasts, else `none`.
      layers_ahead: How many layers ahead of its use a list is made in decode, and its
        fetch started: with 2, layer l's hidden state chooses for layer l + 2, whose
        blocks have two layers' time to arrive, by a Forecast head that was trained on
        layer l + 1's. It changes what is chosen, with every `prefetch`.
      layer0: Where layer 0's KV lives, for which nothing can look ahead. `auto`: in
        host memory where `device_blocks="auto"` finds room for two lists and more, and
        not for all blocks, or where the request fits only so; else on the device.
      route: How blocks are fetched (`cache.routes`); `auto` takes the recorded one.
      exactness: `forecast`: the forecast list is what is attended. `verify`: the
        layer's own queries choose, the forecast only prefetches, and what it missed is
        fetched before attention: the output is that of own-query selection.
      codec: How blocks are kept in host memory (`cache.codecs`). `exact`: in the
        model's type. `int8`: in 8 bits a number, K with a scale a channel of a block, V
        with one a token, which halves host memory and transfers. A block is rounded
        once, when it is full; the growing one is exact, and layer 0 where it is on the
        device. `int8_slots`: device slots hold blocks so as well, which halves them.
      recall_every: Every so many decode steps the forecast is compared with the
        own-query choice for the statistics; 0 never.
      device_limit, host_limit: Bytes that may be used; None takes what the device and
        the machine report. A request that cannot fit is refused before it allocates.

    Example:
      >>> sj.CacheConfig(kind="offload", device_blocks=32).prefetch is None
      True
      >>> sj.CacheConfig(recall_every=-1)
      Traceback (most recent call last):
      ...
      ConfigError: CacheConfig.recall_every=-1 is not allowed: …
    """

    kind: CacheKind = "resident"
    device_blocks: int | Literal["auto"] | None = "auto"
    prefetch: Prefetch | None = None
    layers_ahead: int = 1
    layer0: Literal["auto", "resident", "offload"] = "auto"
    route: Route = "auto"
    exactness: Literal["forecast", "verify"] = "forecast"
    codec: HostCodec = "exact"
    recall_every: int = 0
    device_limit: int | None = None
    host_limit: int | None = None

    def __post_init__(self) -> None:
        size = optional(integer(1, LARGEST_BYTES))
        settle(
            self,
            kind=choice(*get_args(CacheKind)),
            device_blocks=optional(device_blocks),
            prefetch=optional(choice(*get_args(Prefetch))),
            layers_ahead=integer(1, 8),
            layer0=choice("auto", "resident", "offload"),
            route=route_name,
            exactness=choice("forecast", "verify"),
            codec=choice(*get_args(HostCodec)),
            recall_every=integer(0),
            device_limit=size,
            host_limit=size,
        )
        require(
            self.layers_ahead == 1 or self.kind == "offload",
            "CacheConfig.layers_ahead",
            self.layers_ahead,
            f"1 with kind={self.kind!r}: only what is fetched is worth choosing so far "
            "ahead; use kind='offload'",
        )

    def slots(self, num_blocks: int, width: int) -> int:
        """C for a cache of that many blocks whose lists have that length.

        Of `auto` it is the least; `planning.slots` says how many more fit.

        Raises:
          ConfigError: If the slots cannot hold one block list.
        """
        if self.device_blocks is None or self.device_blocks == "auto":
            return min(width, num_blocks)
        require(
            self.device_blocks >= min(width, num_blocks),
            "CacheConfig.device_blocks",
            self.device_blocks,
            f"at least {min(width, num_blocks)}, the blocks that one token attends to "
            "(forced ones included)",
        )
        return min(self.device_blocks, num_blocks)
