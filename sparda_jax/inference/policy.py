"""From a `CacheConfig` to how one request is run."""

from sparda_jax.cache.fetch import resolve_route
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.inference.layer_store import OffloadSettings
from sparda_jax.runtime import warn_if_serial
from sparda_jax.sparse.selectors import Selector


def offload_settings(cache: CacheConfig, selector: Selector) -> OffloadSettings | None:
    """How an offloaded cache is decoded; None for a resident one.

    Raises:
      ConfigError: If the attention cannot do what the configuration asks for, or the
        route cannot run on this device.
    """
    if cache.kind == "resident":
        return None
    forecasts = selector.needs_forecast
    if cache.prefetch == "lookahead" and not forecasts:
        raise ConfigError(
            f"CacheConfig.prefetch='lookahead' is not allowed with "
            f"attention={selector.name!r}: only an attention that forecasts can look "
            "ahead (sparda); use prefetch='none'"
        )
    if cache.exactness == "verify" and not forecasts:
        raise ConfigError(
            f"CacheConfig.exactness='verify' is not allowed with "
            f"attention={selector.name!r}: it verifies a forecast (sparda), and this "
            "attention makes none"
        )
    route = resolve_route(cache.route)
    if route == "steps" and cache.exactness == "verify":
        raise ConfigError(
            "CacheConfig.route='steps' is not allowed with exactness='verify': a layer "
            "is one program there, and verifying fetches inside of it"
        )
    settings = OffloadSettings(
        route=route,
        lookahead=forecasts and cache.prefetch != "none",
        verify=cache.exactness == "verify",
        recall_every=cache.recall_every if forecasts else 0,
    )
    if settings.aside:
        warn_if_serial()
    return settings
