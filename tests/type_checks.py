"""Types and shapes of our functions, checked while tests run.

`jaxtyping` binds the arguments of every call, to compare sizes across them, which takes
longer than most functions without arrays: those are checked by beartype alone. What
checks a function is made when it is called first: tests call only a part of them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import jaxtyping
from beartype import beartype

_with_shapes = jaxtyping.jaxtyped
_PACKAGES = ("sparda_jax", "pallas_kernels", "train")


def _may_have_shapes(annotation: Any) -> bool:
    """Whether sizes stand in an annotation; text that names nothing may have them."""
    if isinstance(annotation, str):
        return True
    if get_origin(annotation) is Literal:
        return False
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    parts = [getattr(annotation, "__value__", None), *get_args(annotation)]
    return any(
        _may_have_shapes(one)
        for part in parts
        for one in (part if isinstance(part, list) else [part])
        if one is not None
    )


def _annotations(function: Callable) -> list[Any]:
    try:
        return list(inspect.get_annotations(function, eval_str=True).values())
    except (NameError, AttributeError):  # of what only a type checker imports
        return list(inspect.get_annotations(function).values())


def _checked(function: Callable, typechecker: Any) -> Callable:
    check: Callable | None = None

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal check
        if jaxtyping.config.jaxtyping_disable:
            return function(*arguments, **named)
        if check is None:
            if any(map(_may_have_shapes, _annotations(function))):
                check = _with_shapes(function, typechecker=typechecker)
            else:
                check = beartype(function)
        return check(*arguments, **named)

    return call


def _jaxtyped(made: Any, *, typechecker: Any) -> Any:
    """In the place of `jaxtyping.jaxtyped` on what our modules define."""
    if not inspect.isclass(made):
        return _checked(made, typechecker)
    if "__dataclass_fields__" in vars(made) and "__init__" in vars(made):
        made.__init__ = _checked(vars(made)["__init__"], typechecker)
    return made


def install() -> None:
    """Checks what is imported from our packages from now on."""
    jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(
        _jaxtyped, typechecker=typechecker
    )
    jaxtyping.install_import_hook(_PACKAGES, "beartype.beartype")
