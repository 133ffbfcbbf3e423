"""Selectors by name: every module of this folder has one, `SELECTOR`.

To add a selector, add a file; nothing else names it. Wherever a selector's name is
taken, a `Selector` of the caller's own is taken as well.
"""

import importlib
import pkgutil
import types

from sparda_jax.checks import ConfigError, shown, text
from sparda_jax.sparse.selector import Selector

__all__ = [
    "Selector",
    "ahead_names",
    "evicting_names",
    "get_selector",
    "selector_names",
]


def _found() -> dict[str, Selector]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.SELECTOR.name: module.SELECTOR for module in modules}


_REGISTRY = types.MappingProxyType(_found())


def selector_names() -> tuple[str, ...]:
    """All names.

    Example:
      >>> {"dense", "infllm_v2", "sparda"} <= set(sj.selector_names())
      True
    """
    return tuple(_REGISTRY)


def ahead_names() -> str:
    """Names of those that can look ahead, for messages."""
    return ", ".join(name for name, one in _REGISTRY.items() if one.looks_ahead)


def evicting_names() -> str:
    """Names of those whose caches can evict, for messages."""
    return ", ".join(name for name, one in _REGISTRY.items() if one.evicts)


def get_selector(name: str | Selector) -> Selector:
    """The selector of that name; a `Selector` is returned as it is.

    Raises:
      ConfigError: If there is none; names what there is.
    """
    if isinstance(name, Selector):
        text(f"{type(name).__name__}.name", getattr(name, "name", None))
        return name
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ConfigError(
            f"attention={shown(name)} is not allowed: it must be one of "
            f"{', '.join(selector_names())}"
        )
    return _REGISTRY[name]
