"""Plans a deployment: what fits, how fast decode can be, and whether offload pays.

Memory is that of `planning.memory`; speed is the bound of `planning.step`.
"""

import dataclasses
import os

from jax.typing import DTypeLike

from sparda_jax.cache.codecs import named_codec
from sparda_jax.cache.routes import named_route
from sparda_jax.cache.settings import LayerSettings, OffloadSettings
from sparda_jax.checks import (
    ConfigError,
    float_dtype,
    instance,
    integer,
    number,
    optional,
    path,
    require,
)
from sparda_jax.config import CacheConfig, ModelConfig, SparseConfig
from sparda_jax.inference.shapes import Shapes, plan_shapes, tile_tokens
from sparda_jax.mesh import MeshConfig
from sparda_jax.models.sharding import config_of_device
from sparda_jax.planning.batches import batch_memory, fewest_slots
from sparda_jax.planning.limits import (
    Limit,
    MemoryLimits,
    largest_batch,
    shortfall,
)
from sparda_jax.planning.memory import GIB, MemoryPlan
from sparda_jax.planning.misses import MissCurve, published_curve, trace_curve
from sparda_jax.planning.rates import Rates
from sparda_jax.planning.shape import named_shape
from sparda_jax.planning.step import StepTime, step_time
from sparda_jax.sparse.selectors import Selector, ahead_names, get_selector

_LONGEST = 2**21
# Offloaded batches that are compared, up to the largest that fits.
_BATCHES = 12


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to run a batch: what it needs and how fast it can be.

    Attributes:
      memory: Bytes by part.
      step: The time of a decode step.
      fits: Whether it fits the limits.
      miss: Share of listed blocks that its slots miss.
    """

    memory: MemoryPlan
    step: StepTime
    fits: bool
    miss: float = 0.0

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.memory.batch

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all sequences."""
        return self.batch / self.step.seconds


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `sparda plan` shows; see `plan`.

    Attributes:
      model: The model.
      sparse: Block selection.
      attention: How blocks are chosen.
      context, prompt, chunk: Tokens in all, of the prompt, and of one prefill call.
      dtype: Type of weights and cache.
      limits: Device and host memory.
      rates: The machine.
      miss: Share of listed blocks that is fetched at this context, with the slots of
        `offload_best`; without it, of `offload`.
      miss_source: Where that is from, in words.
      lookahead: Whether fetches run beside compute.
      batch: The batch that was asked for, or 1.
      resident, offload: That batch in either way.
      resident_best, offload_best: The batch of most tokens a second, of those that fit;
        None if not even one does. More offloaded rows have fewer slots each.
      offload_alone: `offload_best` if every fetch were waited for.
      break_even: Largest miss share at which offload still gives more tokens a second
        at this context; None if it does at none.
      pays_from: Smallest context (of those tried, in steps of a factor of 1.5) from
        which offload gives more tokens a second; None if none does.
      notes: What to know about the figures.
    """

    model: ModelConfig
    sparse: SparseConfig
    attention: str
    context: int
    prompt: int
    chunk: int
    dtype: str
    limits: MemoryLimits
    rates: Rates
    miss: float
    miss_source: str
    lookahead: bool
    batch: int
    resident: Option
    offload: Option
    resident_best: Option | None
    offload_best: Option | None
    offload_alone: Option | None
    break_even: float | None
    pays_from: int | None
    notes: tuple[str, ...]

    @property
    def offload_pays(self) -> bool:
        """Whether offload gives more tokens a second at this context."""
        return _pays(self.resident_best, self.offload_best)

    @property
    def verdict(self) -> str:
        """Whether to offload, and why."""
        resident, offload = self.resident_best, self.offload_best
        if resident is None and offload is None:
            return (
                "does not fit: not even one sequence, resident or offloaded "
                f"({shortfall(self.offload.memory, self.limits)})"
            )
        if offload is None:
            return "do not offload: it does not fit in host memory, and resident does"
        many = f"{offload.batch} sequences, {offload.tokens_per_second:,.0f} tokens/s"
        if resident is None:
            return f"offload: not even one sequence fits resident; offloaded, {many}"
        ratio = offload.tokens_per_second / resident.tokens_per_second
        beside = f"resident {resident.batch}, {resident.tokens_per_second:,.0f}"
        if ratio > 1:
            text = f"offload: {ratio:.2f}x the tokens/s ({many}; {beside})"
            if self.batch <= resident.batch:
                text += (
                    f". At batch {self.batch} do not offload: it fits resident, where "
                    "no step waits for a fetch"
                )
            return text
        text = f"do not offload: {ratio:.2f}x the tokens/s ({many}; {beside})"
        if self.batch > resident.batch and self.offload.fits:
            text += f". Only if {self.batch} sequences must run at a time: they fit"
        return text


def _misses(miss: float | None, trace: str | None, attention: str) -> MissCurve | float:
    """What a request says of misses: a share, or a curve over the slots."""
    if miss is None:
        return published_curve(attention) if trace is None else trace_curve(trace)
    require(
        trace is None,
        "trace",
        trace,
        f"None beside miss={miss}: one of the two says how many blocks are missed",
    )
    return float(miss)


def _pays(resident: Option | None, offload: Option | None) -> bool:
    if offload is None:
        return False
    if resident is None:
        return True
    return offload.tokens_per_second > resident.tokens_per_second


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Everything but the context, the batch and the kind of cache."""

    config: ModelConfig
    sparse: SparseConfig
    selector: Selector
    cache: CacheConfig
    rates: Rates
    limits: MemoryLimits
    misses: MissCurve | float
    dtype: str
    max_new: int
    chunk: int | None
    mesh: MeshConfig

    def settings(self, kind: str, *, lookahead: bool = True) -> LayerSettings:
        offload = None
        if kind == "offload":
            ahead = self.selector.looks_ahead and self.cache.prefetch != "none"
            route = named_route(self.rates.route)
            codec = named_codec(self.cache.codec)
            offload = OffloadSettings(route, ahead and lookahead, codec=codec)
        return LayerSettings(
            config_of_device(self.config, self.mesh.model),
            self.sparse,
            self.selector,
            offload=offload,
            parts=self.mesh.model,
        )

    @property
    def miss_source(self) -> str:
        """Where the share of misses is from."""
        return "given" if isinstance(self.misses, float) else self.misses.source

    def shapes(self, context: int, batch: int = 1) -> Shapes:
        prompt = context - self.max_new
        piece = min(prompt, self.chunk or prompt)
        device = self.limits.device
        return plan_shapes(
            piece,
            farthest_start=(prompt - 1) // piece * piece,
            longest=prompt,
            max_new=self.max_new,
            tile_size=tile_tokens("gpu", None if device is None else device.size),
            block_size=self.sparse.block_size,
            batch=batch,
        )

    def miss(self, capacity: int, cache: CacheConfig | None = None) -> float:
        """Share of listed blocks that is fetched in a cache of that many tokens."""
        if isinstance(self.misses, float):
            return self.misses
        room = capacity // self.sparse.block_size
        cache = self.cache if cache is None else cache
        slots = cache.slots(room, self.selector.list_width(room, self.sparse))
        return self.misses.share(slots, self.sparse)

    def memory(
        self, kind: str, context: int, batch: int, *, lookahead: bool = True
    ) -> tuple[CacheConfig, MemoryPlan]:
        """The cache with its slots counted, and what the request takes."""
        how = self.settings(kind, lookahead=lookahead)
        shapes = self.shapes(context, batch)
        return batch_memory(how, self.cache, self.limits, batch, shapes, self.dtype)

    def option(
        self, kind: str, context: int, batch: int, *, lookahead: bool = True
    ) -> Option:
        cache, memory = self.memory(kind, context, batch, lookahead=lookahead)
        miss = self.miss(memory.capacity, cache)
        step = step_time(
            self.settings(kind, lookahead=lookahead),
            cache,
            self.rates,
            batch=batch,
            capacity=memory.capacity,
            context=context,
            dtype=self.dtype,
            miss=miss,
        )
        missed = miss if kind == "offload" else 0.0
        return Option(memory, step, shortfall(memory, self.limits) is None, missed)

    def most(self, kind: str, context: int) -> int:
        """The largest batch that fits; 0 if none does."""

        caches = fewest_slots(self.cache)[: 1 if kind == "resident" else None]
        ways = [dataclasses.replace(self, cache=cache) for cache in caches]

        def fits(batch: int) -> bool:
            plans = (way.memory(kind, context, batch)[1] for way in ways)
            return any(shortfall(plan, self.limits) is None for plan in plans)

        return largest_batch(fits)

    def best(self, kind: str, context: int, most: int | None = None) -> Option | None:
        """The batch of most tokens a second; `most` of them fit, if that is known."""
        most = self.most(kind, context) if most is None else most
        if not most:
            return None
        if kind == "resident":
            return self.option(kind, context, most)
        # Fewer rows have more slots each. A batch is worth no more care than a step of
        # a dozenth.
        sizes = {max(1, most * part // _BATCHES) for part in range(1, _BATCHES + 1)}
        options = [self.option(kind, context, size) for size in sorted(sizes)]
        return max(options, key=lambda option: option.tokens_per_second)

    def pays(self, context: int) -> bool:
        resident = self.best("resident", context)
        return _pays(resident, self.best("offload", context))

    def pays_from(self) -> int | None:
        """The smallest context at which offload is ahead."""
        block = self.sparse.block_size
        size = self.sparse.largest_budget * block
        while size <= _LONGEST:
            for context in (size, size * 3 // 2):
                if context > self.max_new and self.pays(context):
                    return context
            size *= 2
        return None

    def break_even(self, context: int) -> float | None:
        """The largest miss share at which offload is ahead, to a thousandth."""

        resident = self.best("resident", context)
        # What fits does not depend on what misses.
        most = self.most("offload", context)

        def ahead(thousandths: int) -> bool:
            there = dataclasses.replace(self, misses=thousandths / 1000)
            return _pays(resident, there.best("offload", context, most))

        low, high = -1, 1001
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if ahead(middle) else (low, middle)
        return None if low < 0 else low / 1000


def plan(
    model: str | os.PathLike | ModelConfig,
    *,
    context: int,
    hbm_gib: float,
    host_gib: float,
    rates: Rates,
    batch: int = 1,
    attention: str | Selector = "sparda",
    sparse: SparseConfig | None = None,
    cache: CacheConfig | None = None,
    miss: float | None = None,
    trace: str | os.PathLike | None = None,
    dtype: DTypeLike = "bfloat16",
    max_new_tokens: int = 256,
    prefill_chunk: int | None = 8192,
    mesh: MeshConfig | None = None,
) -> Plan:
    """What fits in a machine's memory, how fast decode can be, whether offload pays.

    No weights are needed, and nothing is allocated.

    Args:
      model: A preset's name, a GGUF file, a directory with a config.json, a hub id
        "org/name", or a shape.
      context: Tokens of each sequence, prompt and output together. May be longer than
        the model's own: this is a plan, and says so in its notes.
      hbm_gib: Device memory, GiB.
      host_gib: Host memory for the KV store, GiB.
      rates: The machine: `recorded_rates`, `measure_rates` or figures of your own.
      batch: The batch to look at beside the largest one.
      attention: How blocks are chosen.
      sparse: Block selection; None takes the model's own, else the preset's of the
        same shape.
      cache: Slots, look-ahead and where layer 0 lives; its kind does not matter.
      miss: Share of listed blocks that is not in a slot, 0 to 1; a run's
        `stats.offload.hit_rate` is 1 minus its own. None takes it by the number of
        slots from a trace's curve.
      trace: Block trace (`planning.traces`) to take the curve from; None takes the
        published one of the same attention.
      dtype: Type of weights and cache.
      max_new_tokens: Output tokens of each sequence.
      prefill_chunk: Tokens of one prefill call, as `stream` takes it; None is the
        whole prompt at once, as `generate` does it.
      mesh: Devices that share rows and layers. Bytes are then those of one device, of
        `hbm_gib` each and an equal share of `host_gib`; batches and tokens a second
        those of one of the `data` groups.

    Raises:
      ConfigError: If an argument is not allowed.

    Example:
      >>> rates = sj.recorded_rates("H100")
      >>> plan = sj.plan(
      ...     "minicpm4.1-8b", context=131072, hbm_gib=80.0, host_gib=512.0, rates=rates
      ... )
      >>> plan.resident_best.batch < plan.offload_best.batch
      True
    """
    selector = get_selector(attention)
    max_new_tokens = integer(1)("max_new_tokens", max_new_tokens)
    context = integer(max_new_tokens + 1, _LONGEST)("context", context)
    batch = integer(1)("batch", batch)
    prefill_chunk = optional(integer(1))("prefill_chunk", prefill_chunk)
    size = number(above=0, most=2**30)
    hbm_gib, host_gib = size("hbm_gib", hbm_gib), size("host_gib", host_gib)
    rates = instance(Rates)("rates", rates)
    miss = optional(number(least=0, most=1))("miss", miss)
    trace = optional(path)("trace", trace)
    dtype = float_dtype("dtype", dtype)
    mesh = optional(instance(MeshConfig))("mesh", mesh) or MeshConfig()
    host_gib /= mesh.size
    sparse = optional(instance(SparseConfig))("sparse", sparse)
    cache = optional(instance(CacheConfig))("cache", cache) or CacheConfig()
    if isinstance(model, ModelConfig):
        config, own = model, SparseConfig()
    else:
        config, own = named_shape(path("model", model))
    sparse = own if sparse is None else sparse
    selector.check(config, has_forecast=True)
    sparse.check_layers(config)
    config_of_device(config, mesh.model)
    if cache.prefetch == "lookahead" and not selector.looks_ahead:
        raise ConfigError(
            f"CacheConfig.prefetch='lookahead' is not allowed with "
            f"attention={selector.name!r}: only an attention that forecasts can look "
            f"ahead ({ahead_names()})"
        )
    planner = _Planner(
        config=config,
        sparse=sparse,
        selector=selector,
        cache=cache,
        rates=rates,
        limits=MemoryLimits(
            device=Limit(round(hbm_gib * GIB), f"{hbm_gib:g} GiB of device memory"),
            host=Limit(round(host_gib * GIB), f"{host_gib:g} GiB of host memory"),
        ),
        misses=_misses(miss, trace, selector.name),
        dtype=dtype.name,
        max_new=max_new_tokens,
        # Rows that switch to dense attention by length cannot be cut into pieces.
        chunk=prefill_chunk if sparse.dense_len <= 0 else None,
        mesh=mesh,
    )
    best = planner.best("offload", context)
    alone = None
    if best is not None:
        alone = planner.option("offload", context, best.batch, lookahead=False)
    one = planner.option("offload", context, batch)
    offload = planner.settings("offload").offload
    assert offload is not None
    return Plan(
        model=config,
        sparse=sparse,
        attention=selector.name,
        context=context,
        prompt=context - max_new_tokens,
        chunk=min(context - max_new_tokens, planner.chunk or context),
        dtype=planner.dtype,
        limits=planner.limits,
        rates=rates,
        miss=one.miss if best is None else best.miss,
        miss_source=planner.miss_source,
        lookahead=offload.lookahead,
        batch=batch,
        resident=planner.option("resident", context, batch),
        offload=one,
        resident_best=planner.best("resident", context),
        offload_best=best,
        offload_alone=alone,
        break_even=planner.break_even(context),
        pays_from=planner.pays_from(),
        notes=_notes(planner, context, one.miss if best is None else best.miss),
    )


def _step_source(rates: Rates) -> str:
    if not rates.layer:
        return "bounds from bandwidths"
    return f"from bandwidths and {rates.layer * 1e6:.0f} us a layer beside them"


def _notes(planner: _Planner, context: int, miss: float) -> tuple[str, ...]:
    config, notes, mesh = planner.config, [], planner.mesh
    if mesh.size > 1:
        notes.append(
            f"mesh {mesh.text}: bytes are those of one device and its share of the "
            "host's, batches and tokens/s those of one group of "
            f"{mesh.model} ({mesh.data} in all); sums between devices are not counted"
        )
    if context > config.max_context:
        notes.append(
            f"{context:,} tokens are more than the {config.max_context:,} that model "
            f"{config.name!r} takes as it is: a run needs a checkpoint with extended "
            "rotary frequencies (LongRoPE lists)"
        )
    capacity = planner.shapes(context).capacity
    if capacity > context:
        notes.append(
            f"lengths are bucketed: the cache has room for {capacity:,} tokens a "
            "sequence"
        )
    notes.append(
        f"misses: {miss:.1%} of the listed blocks, with the slots of the best batch "
        f"({planner.miss_source}); measure yours with sparda generate --cache offload "
        "--stats"
    )
    notes.append(
        f"step times are {_step_source(planner.rates)}, for sequences at full length; "
        "no measurement"
    )
    if planner.rates.peak is None:
        notes.append("compute is left out of the bounds: the peak is not known")
    return tuple(notes)
