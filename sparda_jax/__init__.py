"""SparDA in JAX: Forecast-driven sparse attention over a long context.

import sparda_jax as sj
lm = sj.load("smollm2-135m", attention="infllm_v2")
out = sj.generate(lm, ["Once upon a time"], max_new_tokens=32)
print(out.texts[0], out.stats)
"""

from sparda_jax.config import (
    CacheConfig,
    ConfigError,
    ModelConfig,
    RopeConfig,
    SparseConfig,
)
from sparda_jax.engine.api import forward, generate, stream
from sparda_jax.engine.chat import ChatOutput, ChatStream, chat, stream_chat
from sparda_jax.engine.conversation import Conversation
from sparda_jax.engine.generate_config import GenerateConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.offload_stats import OffloadStats
from sparda_jax.engine.results import GenerateOutput, GenerateStats, StreamEvent
from sparda_jax.engine.stream import Stream
from sparda_jax.loading import load, with_attention
from sparda_jax.models.forecast import Forecast
from sparda_jax.models.presets import PRESETS
from sparda_jax.planning.measure import measure_rates
from sparda_jax.planning.plan import Plan, plan
from sparda_jax.planning.rates import Rates, recorded_rates
from sparda_jax.runtime import configure_cache, configure_offload
from sparda_jax.sparse.selectors import Selector, selector_names

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "CacheConfig",
    "ChatOutput",
    "ChatStream",
    "ConfigError",
    "Conversation",
    "Forecast",
    "GenerateConfig",
    "GenerateOutput",
    "GenerateStats",
    "LanguageModel",
    "ModelConfig",
    "PRESETS",
    "OffloadStats",
    "Plan",
    "Rates",
    "RopeConfig",
    "Selector",
    "SparseConfig",
    "Stream",
    "StreamEvent",
    "chat",
    "configure_cache",
    "configure_offload",
    "forward",
    "generate",
    "load",
    "measure_rates",
    "plan",
    "recorded_rates",
    "selector_names",
    "stream",
    "stream_chat",
    "with_attention",
]
