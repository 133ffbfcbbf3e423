"""`sj.adapt`: Forecast heads for a model, by the package above this one."""

import importlib.metadata
import os
from typing import Any

from sparda_jax.checks import ConfigError


def adapt(
    model: str | os.PathLike,
    *,
    out: str | os.PathLike,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Makes Forecast heads for a model: measures, fits, distils, evaluates, writes.

    It needs the trainer, `pip install 'sparda-jax[train]'`, which this package does not
    import: it is found by its entry point.

    Args:
      model: As for `load`.
      out: The file of the heads, `.safetensors`; a card, a plot and all figures get its
        name. `<out>.work` beside it holds the work: the same call goes on in it.
      progress: Bars on standard error.
      **options: Fields of `train.adapt.AdaptConfig`: `text`, `minutes` or `steps`,
        `seq_len`, `budget`, `kernel_size`, `least_mass`, `queries`, `reads`, `rank`,
        `init_batches`, `passkeys`, `dtype`, `seed`.

    Returns:
      A `train.adapt.AdaptResult`: `heads`, `card`, `sparse`, `figures` and `fit`.

    Raises:
      ConfigError: The trainer is not installed, an option is not allowed, or the model
        or the text cannot be used.
      CheckpointError: A file cannot be read or written.
    """
    for entry in importlib.metadata.entry_points(
        group="sparda.functions", name="adapt"
    ):
        try:
            run = entry.load()
        except ImportError as error:
            raise ConfigError(
                f"adapt needs a package that is missing ({error.name}): "
                "pip install 'sparda-jax[train]'"
            ) from error
        return run(model, out=out, progress=progress, **options)
    raise ConfigError("adapt is not installed: pip install 'sparda-jax[train]'")
