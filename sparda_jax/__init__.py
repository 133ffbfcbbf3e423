"""SparDA in JAX: Forecast-driven sparse attention over a long context.

import sparda_jax as sj
lm = sj.load("smollm2-135m", attention="infllm_v2")
out = sj.generate(lm, ["Once upon a time"], max_new_tokens=32)
print(out.texts[0], out.stats)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparda_jax.adapting import adapt
    from sparda_jax.checkpoint.errors import CheckpointError
    from sparda_jax.checks import ConfigError
    from sparda_jax.config import CacheConfig, ModelConfig, SparseConfig
    from sparda_jax.doctor import MachineReport, describe_device
    from sparda_jax.engine.api import forward, generate, stream
    from sparda_jax.engine.chat import ChatOutput, ChatStream, chat, stream_chat
    from sparda_jax.engine.conversation import Conversation
    from sparda_jax.engine.generate_config import GenerateConfig
    from sparda_jax.engine.model import LanguageModel
    from sparda_jax.engine.offload_stats import OffloadStats
    from sparda_jax.engine.results import GenerateOutput, GenerateStats, StreamEvent
    from sparda_jax.engine.stream import Stream
    from sparda_jax.evaluation.report import Report, read_report
    from sparda_jax.evaluation.run import evaluate
    from sparda_jax.loading import load, with_attention
    from sparda_jax.mesh import MeshConfig
    from sparda_jax.models.forecast import Forecast
    from sparda_jax.models.presets import PRESETS
    from sparda_jax.planning.measure import measure_rates
    from sparda_jax.planning.plan import Plan, plan
    from sparda_jax.planning.rates import Rates, recorded_rates
    from sparda_jax.rope_config import RopeConfig
    from sparda_jax.runtime import configure_cache, configure_offload
    from sparda_jax.sparse.selector import Selector
    from sparda_jax.sparse.selectors import selector_names

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "CacheConfig",
    "ChatOutput",
    "ChatStream",
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "Forecast",
    "GenerateConfig",
    "GenerateOutput",
    "GenerateStats",
    "LanguageModel",
    "MachineReport",
    "MeshConfig",
    "ModelConfig",
    "PRESETS",
    "OffloadStats",
    "Plan",
    "Rates",
    "Report",
    "RopeConfig",
    "Selector",
    "SparseConfig",
    "Stream",
    "StreamEvent",
    "adapt",
    "chat",
    "configure_cache",
    "configure_offload",
    "evaluate",
    "describe_device",
    "forward",
    "generate",
    "load",
    "measure_rates",
    "plan",
    "read_report",
    "recorded_rates",
    "selector_names",
    "stream",
    "stream_chat",
    "with_attention",
]

# Where each name is made. A name is imported when it is first asked for: `import
# sparda_jax` takes milliseconds, and a command that needs no model starts no JAX.
_HOMES = {
    "CacheConfig": "sparda_jax.config",
    "ChatOutput": "sparda_jax.engine.chat",
    "ChatStream": "sparda_jax.engine.chat",
    "CheckpointError": "sparda_jax.checkpoint.errors",
    "ConfigError": "sparda_jax.checks",
    "Conversation": "sparda_jax.engine.conversation",
    "Forecast": "sparda_jax.models.forecast",
    "GenerateConfig": "sparda_jax.engine.generate_config",
    "GenerateOutput": "sparda_jax.engine.results",
    "GenerateStats": "sparda_jax.engine.results",
    "LanguageModel": "sparda_jax.engine.model",
    "MachineReport": "sparda_jax.doctor",
    "MeshConfig": "sparda_jax.mesh",
    "ModelConfig": "sparda_jax.config",
    "PRESETS": "sparda_jax.models.presets",
    "OffloadStats": "sparda_jax.engine.offload_stats",
    "Plan": "sparda_jax.planning.plan",
    "Rates": "sparda_jax.planning.rates",
    "Report": "sparda_jax.evaluation.report",
    "RopeConfig": "sparda_jax.rope_config",
    "Selector": "sparda_jax.sparse.selector",
    "SparseConfig": "sparda_jax.config",
    "Stream": "sparda_jax.engine.stream",
    "StreamEvent": "sparda_jax.engine.results",
    "adapt": "sparda_jax.adapting",
    "chat": "sparda_jax.engine.chat",
    "configure_cache": "sparda_jax.runtime",
    "configure_offload": "sparda_jax.runtime",
    "evaluate": "sparda_jax.evaluation.run",
    "describe_device": "sparda_jax.doctor",
    "forward": "sparda_jax.engine.api",
    "generate": "sparda_jax.engine.api",
    "load": "sparda_jax.loading",
    "measure_rates": "sparda_jax.planning.measure",
    "plan": "sparda_jax.planning.plan",
    "read_report": "sparda_jax.evaluation.report",
    "recorded_rates": "sparda_jax.planning.rates",
    "selector_names": "sparda_jax.sparse.selectors",
    "stream": "sparda_jax.engine.api",
    "stream_chat": "sparda_jax.engine.chat",
    "with_attention": "sparda_jax.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
