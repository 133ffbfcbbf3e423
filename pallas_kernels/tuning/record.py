"""What a record says, given the times that were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def default_order(
    configs: Mapping[str, Sequence[Mapping[str, Any]]],
    failed: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Who was right and faster than XLA in every case tuned, the fastest first.

    Args:
      configs: entries by implementation, as in the record.
      failed: implementations without a right candidate, with the case's sizes.

    Returns:
      Names, "xla" last. Times are summed over the cases that all of them have.
    """
    out = {entry["implementation"] for entry in failed}
    times = {
        name: {str(e["when"]): e["milliseconds"] for e in entries}
        for name, entries in configs.items()
        if name not in out
        and all(
            e["xla_milliseconds"] is None or e["milliseconds"] < e["xla_milliseconds"]
            for e in entries
        )
    }
    shared = set.intersection(*map(set, times.values())) if times else set()
    total = {name: sum(found[w] for w in shared) for name, found in times.items()}
    return [*sorted(total, key=lambda name: total[name]), "xla"]


def case_orders(
    configs: Mapping[str, Sequence[Mapping[str, Any]]], default: Sequence[str]
) -> list[dict[str, Any]]:
    """Orders of the calls whose fastest implementations are not the default's.

    Args:
      configs: entries by implementation, as in the record.
      default: the order of all cases together.

    Returns:
      The record's ``orders``: the names of ``default``, the fastest first.
    """
    times: dict[str, dict[str, float]] = {}
    for name, entries in configs.items():
        for entry in entries:
            if entry.get("order"):
                of_call = times.setdefault(json.dumps(entry["order"]), {})
                of_call[name] = of_call.get(name, 0.0) + entry["milliseconds"]
    orders = []
    for when, found in times.items():
        *names, last = default
        # One without a time in these cases stays behind those that have one.
        names.sort(key=lambda name: found.get(name, float("inf")))
        if [*names, last] != list(default):
            orders.append({"when": json.loads(when), "default": [*names, last]})
    return orders


def merged(
    old: Mapping[str, Any], new: Mapping[str, Any], partial: bool
) -> dict[str, Any]:
    """A record with another run's entries in it.

    Args:
      old: what the file holds; empty for a new one.
      new: the record of a run.
      partial: the run was about some of the cases, so that what ``old`` lacks it still
        lacks.

    Returns:
      ``old`` with the values of ``new``; settings for sizes that ``new`` did not tune
      stay. The default order follows from all entries, unless some are without XLA's
      time, as written by hand: then it is the old one if ``partial``, else the new one.
    """
    done = [
        {"implementation": name, "when": entry["when"]}
        for name, entries in new["configs"].items()
        for entry in entries
    ] + new["failed"]
    configs: dict[str, list[Any]] = {}
    for name in [*new["configs"], *old.get("configs", {})]:
        kept = [
            e
            for e in old.get("configs", {}).get(name, [])
            if {"implementation": name, "when": e["when"]} not in done
        ]
        configs[name] = [*new["configs"].get(name, []), *kept]
    failed = [x for x in old.get("failed", []) if x not in done] + new["failed"]
    unfinished = new["unfinished"]
    if partial:
        unfinished = [x for x in old.get("unfinished", []) if x not in done]
    standing = old if partial and old else new
    order, orders = standing["default"], standing.get("orders", [])
    if all("xla_milliseconds" in e for entries in configs.values() for e in entries):
        order = default_order(configs, failed)
        orders = case_orders(configs, order)
    key = "relative_error_against_xla"
    out = {
        **old,
        **new,
        "default": order,
        "orders": orders,
        key: {**old.get(key, {}), **new[key]},
        "configs": configs,
        "failed": failed,
        "unfinished": unfinished,
    }
    optional = ("orders", "failed", "unfinished")
    return {k: v for k, v in out.items() if v or k not in optional}
