"""From a `CacheConfig` to how one request is run, `auto` decided by measurement.

Prefetch can cost more than it hides, and offload is never faster than a resident cache
that fits. So `kind="auto"` takes a resident cache where the planner says that it fits;
and `prefetch="auto"` decodes the first steps on demand, takes their time and the bytes
that they missed, and looks ahead from then on if what the device is known to hide of a
fetch is worth it.
"""

import dataclasses
import functools

from jax.typing import DTypeLike

from pallas_kernels.device import current_device_kind
from sparda_jax.cache.codecs import named_codec
from sparda_jax.cache.routes import FetchRoute, recorded_routes, resolve_route
from sparda_jax.cache.settings import OffloadSettings
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.planning.measure import measure_fetch
from sparda_jax.runtime import warn_if_serial
from sparda_jax.sparse.selectors import Selector, ahead_names, evicting_names

# Steps that `prefetch="auto"` decodes on demand: to warm up, and to measure.
PROBE_WARM, PROBE_TIMED = 4, 8
# Looking ahead must save this share of a step: scoring and staging are not free.
_WORTH = 0.03


def offload_settings(cache: CacheConfig, selector: Selector) -> OffloadSettings | None:
    """How an offloaded cache is decoded; None for a resident one.

    With `prefetch="auto"` these are the settings that look ahead; `on_demand` gives
    the others, which share the cache's form.

    Raises:
      ConfigError: If the attention cannot do what the configuration asks for, or the
        route cannot run on this device.
    """
    if cache.kind == "evict" and not selector.evicts:
        raise ConfigError(
            f"CacheConfig.kind='evict' is not allowed with attention="
            f"{selector.name!r}: it must be one that lists no block again which it has "
            f"left out at the prompt's end ({evicting_names()})"
        )
    if cache.kind in ("resident", "evict"):
        return None
    codec = named_codec(cache.codec)
    if selector.attends_tokens and codec.in_slots:
        raise ConfigError(
            f"CacheConfig.codec={cache.codec!r} is not allowed with "
            f"attention={selector.name!r}: attention to single tokens reads slots in "
            "the model's type; use codec='exact' or 'int8'"
        )
    forecasts = selector.looks_ahead
    if cache.prefetch == "lookahead" and not forecasts:
        raise ConfigError(
            f"CacheConfig.prefetch='lookahead' is not allowed with "
            f"attention={selector.name!r}: only an attention that forecasts can look "
            f"ahead ({ahead_names()}); use prefetch='none'"
        )
    if cache.exactness == "verify" and not forecasts:
        raise ConfigError(
            f"CacheConfig.exactness='verify' is not allowed with "
            f"attention={selector.name!r}: it verifies a forecast "
            f"({ahead_names()}), and this attention makes none"
        )
    route = resolve_route(cache.route)
    if not route.in_program and cache.exactness == "verify":
        raise ConfigError(
            f"CacheConfig.route={route.name!r} is not allowed with exactness='verify': "
            "a layer is one program there, and verifying fetches inside of it"
        )
    if cache.layers_ahead > 1 and (selector.hands_on_scores or not route.in_program):
        which = f"CacheConfig.route={route.name!r}"
        if selector.hands_on_scores:
            which = f"attention={selector.name!r}"
        raise ConfigError(
            f"CacheConfig.layers_ahead={cache.layers_ahead} is not allowed with "
            f"{which}: there a layer looks one layer ahead, or none"
        )
    settings = OffloadSettings(
        route=route,
        lookahead=forecasts and cache.prefetch != "none",
        verify=cache.exactness == "verify",
        recall_every=cache.recall_every if forecasts else 0,
        codec=codec,
        layers_ahead=cache.layers_ahead,
    )
    if settings.on_side_stream:
        warn_if_serial()
    return settings


def on_demand(offload: OffloadSettings) -> OffloadSettings:
    """The same without looking ahead."""
    return dataclasses.replace(offload, lookahead=False)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the first steps showed, on demand.

    Attributes:
      step_seconds: Time of one step.
      missed_bytes: Bytes that one step fetched.
      fetch_rate: Bytes a second of the fetch route, measured apart.
      hidden: Share of a fetch that the device is recorded to hide behind compute.
    """

    step_seconds: float
    missed_bytes: float
    fetch_rate: float
    hidden: float

    @property
    def fetch_seconds(self) -> float:
        """A step's time on the link, at most the step."""
        return min(self.missed_bytes / self.fetch_rate, self.step_seconds)

    @property
    def saved_seconds(self) -> float:
        """What looking ahead would hide: no more than there is compute."""
        compute = self.step_seconds - self.fetch_seconds
        return min(self.hidden * self.fetch_seconds, compute)

    @property
    def look_ahead(self) -> bool:
        """Whether that is worth it."""
        return self.saved_seconds > _WORTH * self.step_seconds

    def reason(self) -> str:
        """The decision in words, with its figures."""
        choice = "one layer ahead" if self.look_ahead else "on demand"
        return (
            f"{choice}: of {self.step_seconds * 1e3:.2f} ms a step on demand, "
            f"{self.missed_bytes / 1e6:.2f} MB missed take "
            f"{self.fetch_seconds * 1e3:.2f} ms at {self.fetch_rate / 1e9:.1f} GB/s; "
            f"looking ahead would hide {self.saved_seconds * 1e3:.2f} ms of them"
        )


def hidden_share(route: FetchRoute) -> float:
    """Share of a fetch that runs beside compute on this device, as recorded; else 0."""
    record = recorded_routes().get(current_device_kind(), {})
    return record.get("hidden_percent", {}).get(route.name, 0) / 100


@functools.cache
def fetch_rate(
    route: FetchRoute, block_size: int, head_dim: int, dtype: DTypeLike
) -> float:
    """Bytes a second of the fetch route on this device, measured once a process."""
    return measure_fetch(
        route, block_size=block_size, head_dim=head_dim, dtype=dtype
    ).rate
