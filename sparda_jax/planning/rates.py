"""What a machine moves and computes, as given or as recorded for its device kind."""

import dataclasses

from pallas_kernels.dispatch import tuned_record
from sparda_jax.cache.routes import recorded_routes, route_names
from sparda_jax.checks import choice, number, optional, require, settle, text

# Dense bf16 peak of the vendor's data sheet, FLOP/s. A bound that decode seldom meets.
_PEAKS = (("NVIDIA H200", 989e12), ("NVIDIA H100", 989e12), ("NVIDIA A100", 312e12))


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine moves and computes.

    Attributes:
      memory: Device bytes a second, reads and writes counted.
      fetch: Bytes a second of blocks fetched from host memory by `route`.
      link: Bytes a second of one large copy to the device; None if not known.
      peak: FLOP/s of a matrix product; None leaves compute out of the bound.
      layer: Seconds that a layer of a decode step takes beside what these rates say;
        0 where it is not known: step times are then bounds.
      row: Seconds that each row adds to that where blocks are fetched: its plan of
        slots and what is looked at for it.
      decode: Seconds that a fetched block takes to be decoded beside its bytes, where
        the codec keeps it in fewer.
      route: How blocks are fetched.
      source: Where the figures come from.

    Example:
      >>> sj.Rates(memory=3e12, fetch=5e10).route
      'dynamic_slice'
    """

    memory: float
    fetch: float
    link: float | None = None
    peak: float | None = None
    layer: float = 0.0
    row: float = 0.0
    decode: float = 0.0
    route: str = "dynamic_slice"
    source: str = "given"

    def __post_init__(self) -> None:
        rate = number(above=0)
        settle(
            self,
            memory=rate,
            fetch=rate,
            link=optional(rate),
            peak=optional(rate),
            layer=number(least=0),
            row=number(least=0),
            decode=number(least=0),
            route=choice(*route_names()),
            source=text,
        )


def recorded_kinds() -> tuple[str, ...]:
    """The device kinds that rates are recorded for."""
    return tuple(kind for kind in recorded_routes() if _record(kind) is not None)


def recorded_rates(device_kind: str) -> Rates | None:
    """The figures that the project measured on a device kind, or None.

    Args:
      device_kind: As JAX names it ("NVIDIA H200"), or words of it that only one of the
        recorded kinds has ("H200").

    Raises:
      ConfigError: If the name is no text, or several kinds have its words.

    Example:
      >>> sj.recorded_rates("H100").fetch > 1e10
      True
      >>> sj.recorded_rates("a device without a record") is None
      True
    """
    name = text("device_kind", device_kind)
    kinds = recorded_kinds()
    words = set(name.lower().split())
    named = [kind for kind in kinds if words and words <= set(kind.lower().split())]
    if name in kinds:
        named = [name]
    require(
        len(named) <= 1,
        "device_kind",
        name,
        f"the name of one device: {', '.join(map(repr, named))} have it",
    )
    return _record(named[0]) if named else None


def recorded_costs(device_kind: str) -> dict[str, float]:
    """What whole steps of a device kind took beside its bandwidths, if recorded.

    Args:
      device_kind: As JAX names it.

    Returns:
      `layer`, `row` and `decode` of `Rates`; 0 where they were not recorded.
    """
    record = recorded_routes().get(device_kind, {})
    return {
        "layer": record.get("layer_us", 0) / 1e6,
        "row": record.get("row_ns", 0) / 1e9,
        "decode": record.get("decode_ns", 0) / 1e9,
    }


def _record(device_kind: str) -> Rates | None:
    routes = recorded_routes().get(device_kind, {})
    copy = tuned_record("paged_decode_attention", device_kind)
    memory = copy.get("copy_gigabytes_per_second")
    fetch = routes.get(routes.get("route", ""))
    if memory is None or fetch is None:
        return None
    peak = next((p for name, p in _PEAKS if device_kind.startswith(name)), None)
    link = routes.get("link")
    return Rates(
        memory=memory * 1e9,
        fetch=fetch * 1e9,
        link=None if link is None else link * 1e9,
        peak=peak,
        **recorded_costs(device_kind),
        route=routes["route"],
        source=f"recorded for {device_kind}, JAX {routes['jax']}",
    )
