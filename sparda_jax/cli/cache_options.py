"""The command line's options for the KV cache, and what it prints of it."""

import argparse
from typing import Any, get_args

from sparda_jax.checks import choice, integer
from sparda_jax.cli.options import add_option
from sparda_jax.config import (
    OLD_ROUTES,
    CacheConfig,
    CacheKind,
    HostCodec,
    Prefetch,
    Route,
    device_blocks,
)
from sparda_jax.engine.offload_stats import OffloadStats


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `cache_config` reads."""
    group = parser.add_argument_group("KV cache")
    add_option(
        group,
        "--cache",
        choice(*get_args(CacheKind)),
        words=get_args(CacheKind),
        default="auto",
        help="where KV lives: on the device (resident), in host memory with the blocks "
        "in use on the device (offload), or on the device if it fits, else in host "
        "memory (auto); evict (snapkv, window): on the device, and only the blocks of "
        "a prompt that its answer can list",
    )
    add_device_blocks_option(group, default="auto")
    add_option(
        group,
        "--prefetch",
        choice(*get_args(Prefetch)),
        words=get_args(Prefetch),
        help="offload: fetch the next layer's blocks while this one computes "
        "(lookahead), wait for them (none), or decide by measurement (auto); default: "
        "lookahead where the attention forecasts, none otherwise",
    )
    add_layers_ahead_option(group)
    add_layer0_option(group)
    add_route_option(
        group, "how blocks are fetched; auto takes what is recorded for the device"
    )
    add_codec_option(group)
    add_option(
        group,
        "--exactness",
        choice("forecast", "verify"),
        words=("forecast", "verify"),
        default="forecast",
        help="verify: the layer's own queries have the last word, and blocks that the "
        "forecast missed are fetched",
    )
    add_option(
        group,
        "--recall-every",
        integer(0),
        metavar="N",
        default=0,
        help="compare the forecast with the own queries' choice every N steps "
        "(for --stats); 0 never",
    )


def add_device_blocks_option(group: Any, *, default: str | None = None) -> None:
    """Adds --device-blocks; a default of None is a block list's length."""
    least = "" if default else "; default: a block list's length"
    add_option(
        group,
        "--device-blocks",
        device_blocks,
        metavar="C",
        default=default,
        help="offload: device slots per layer and kv head, or auto: as many as the "
        f"device has room for, up to all blocks{least}",
    )


def add_layers_ahead_option(group: Any) -> None:
    """Adds --layers-ahead."""
    add_option(
        group,
        "--layers-ahead",
        integer(1, 8),
        metavar="N",
        default=1,
        help="offload: how many layers before its use a block list is made, so that "
        "its fetch has their time; more than 1 changes what is chosen",
    )


def add_layer0_option(group: Any) -> None:
    """Adds --layer0."""
    add_option(
        group,
        "--layer0",
        choice("auto", "resident", "offload"),
        words=("auto", "resident", "offload"),
        default="auto",
        help="where layer 0's KV lives, for which nothing can look ahead; auto: in "
        "host memory where the slots that fill the device hold two lists and more, and "
        "not all blocks; else on the device",
    )


def add_lookahead_option(group: Any) -> None:
    """Adds --prefetch where nothing can decide by measurement."""
    add_option(
        group,
        "--prefetch",
        choice("lookahead", "none"),
        words=("lookahead", "none"),
        help="look-ahead where the attention forecasts",
    )


def add_codec_option(group: Any) -> None:
    """Adds --host-codec."""
    add_option(
        group,
        "--host-codec",
        choice(*get_args(HostCodec)),
        words=get_args(HostCodec),
        default="exact",
        help="how full blocks are kept in host memory: as they are, or in 8 bits a "
        "number (int8_slots: in device slots as well)",
    )


def add_route_option(group: Any, help: str) -> None:
    """Adds --route, which takes the routes' former names as well."""
    add_option(
        group,
        "--route",
        choice(*get_args(Route), *OLD_ROUTES),
        words=get_args(Route),
        default="auto",
        help=help,
    )


def cache_config(arguments: argparse.Namespace) -> CacheConfig:
    """The `CacheConfig` that the options ask for."""
    return CacheConfig(
        kind=arguments.cache,
        device_blocks=arguments.device_blocks,
        prefetch=arguments.prefetch,
        layers_ahead=arguments.layers_ahead,
        layer0=arguments.layer0,
        route=arguments.route,
        exactness=arguments.exactness,
        codec=arguments.host_codec,
        recall_every=arguments.recall_every,
    )


def cache_lines(stats: OffloadStats) -> list[str]:
    """What `--stats` says of an offloaded cache: totals, then a line per layer."""
    how = "one layer ahead" if stats.lookahead else "on demand"
    rate = stats.hit_rate
    lines = [
        f"offload  route {stats.route}, {how}",
        f"         {stats.hits} hits, {stats.misses} misses"
        + ("" if rate is None else f" ({rate:.1%} hits)")
        + f", {stats.fetched_bytes / 1e6:.1f} MB fetched"
        + (f", {stats.repaired} repaired" if stats.repaired else ""),
    ]
    if stats.recall is not None:
        lines.append(
            f"         the forecast found {stats.recall:.1%} of the blocks that the "
            "layers' own queries choose by score (sampled steps)"
        )
    lines.append("layer      hits  misses       MB  repaired  recall")
    rows = zip(
        stats.hits_by_layer,
        stats.misses_by_layer,
        stats.repaired_by_layer,
        stats.recall_by_layer,
        strict=True,
    )
    for layer, (hits, misses, repaired, recall) in enumerate(rows):
        if hits + misses == 0:
            lines.append(f"{layer:5}         –       –        –         –       –")
            continue
        megabytes = misses * stats.block_bytes / 1e6
        share = "–" if recall is None else f"{recall:.1%}"
        lines.append(
            f"{layer:5} {hits:9} {misses:7} {megabytes:8.2f} {repaired:9} {share:>7}"
        )
    return lines
