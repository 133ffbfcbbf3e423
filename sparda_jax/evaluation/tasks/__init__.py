"""Tasks by name: every module of this folder has some, `TASKS`.

To add a task, add it to a module or add a module; nothing else names it.
"""

import importlib
import pkgutil
import types

from sparda_jax.checks import ConfigError, shown
from sparda_jax.evaluation.samples import Task

__all__ = ["Task", "get_task", "task_names"]


def _found() -> dict[str, Task]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {task.name: task for module in modules for task in module.TASKS}


_REGISTRY = types.MappingProxyType(_found())


def task_names() -> tuple[str, ...]:
    """All names."""
    return tuple(_REGISTRY)


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
      ConfigError: If there is none; names what there is.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ConfigError(
            f"tasks={shown(name)} is not allowed: it must be one of "
            f"{', '.join(task_names())}"
        )
    return _REGISTRY[name]
