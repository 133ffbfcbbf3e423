"""What `adapt` says of the heads that it made: a verdict, and a card to keep."""

from typing import Any

# Of the chosen blocks, found; and of the attention that own queries capture, lost.
_RECALL, _LOST = 0.85, 0.01


def verdict(figures: dict[str, Any], least_mass: float) -> dict[str, Any]:
    """Whether SparDA does with this model what was asked for, and why not.

    Args:
      figures: `geometry`, `held_out` and `passkeys` of `train.adapt`.
      least_mass: Attention mass that own queries were to capture.
    """
    geometry, held = figures["geometry"], figures["held_out"]
    sparse = geometry["sparse"]
    reasons = []
    if not geometry["reached"]:
        reasons.append(
            f"the model's own queries capture {geometry['own_mass']:.3f} of the "
            f"attention in {sparse['block_budget']} blocks, and {least_mass:g} was "
            "asked for: a larger budget may do, or this model does not suit sparse "
            "attention"
        )
    lost = held["own_mass"] - held["forecast_mass"]
    if lost > _LOST:
        reasons.append(
            f"the heads lose {lost:.3f} of the attention that own queries capture "
            f"({_LOST:g} is allowed): train longer, or on more text"
        )
    if held["recall"] < _RECALL:
        reasons.append(
            f"the heads find {held['recall']:.3f} of the chosen blocks, {_RECALL:g} is "
            "wanted: train longer, on more text, or with more queries a kv head"
        )
    keys = figures["passkeys"]
    if keys is not None and keys["sparda"] < keys["dense"]:
        reasons.append(
            f"of {keys['asked']} passkeys SparDA finds {keys['sparda']}, own queries "
            f"{keys['infllm_v2']} and dense attention {keys['dense']}"
        )
    return {"fit": not reasons, "reasons": reasons}


def told(figures: dict[str, Any]) -> str:
    """The verdict in words, a line a reason."""
    found, sparse = figures["verdict"], figures["geometry"]["sparse"]
    tokens = figures["call"]["seq_len"]
    read = f"{sparse['block_budget']} of {tokens // sparse['block_size']} blocks"
    if found["fit"]:
        return f"fit for sparse attention at {tokens:,} tokens, reading {read}"
    lines = [f"not fit for sparse attention at {tokens:,} tokens, reading {read}:"]
    return "\n".join([*lines, *(f"- {reason}" for reason in found["reasons"])])


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(map(cell, line))} |" for line in lines]


def _by_windows(found: dict[str, int] | None) -> str:
    """What own queries found by the windows that were tried; nothing if by one."""
    if found is None or len(found) < 2:
        return ""
    told = ", ".join(f"of {kernel} keys {count}" for kernel, count in found.items())
    return f" Own queries by windows {told}."


def card(figures: dict[str, Any], name: str) -> str:
    """The card, Markdown."""
    call, geometry = figures["call"], figures["geometry"]
    sparse, held = geometry["sparse"], figures["held_out"]
    columns = ("recall", "recall_at_budget", "forecast_mass", "own_mass", "oracle_mass")
    titles = ("recall", "at budget", "mass", "own-query mass", "oracle mass")
    cut = "" if call["rank"] is None else f", rank {call['rank']}"
    rows = [(f"the file{cut}", *(held[x] for x in columns))]
    if figures["regression"] is not None:
        first = figures["regression"]
        rows.insert(0, ("regression, whole", *(first[x] for x in columns)))
    texts = ", ".join(call["text"] or ("stdlib", "pydoc"))
    queries = call["queries"] or "as many as query heads"
    layers = [
        (str(layer), *(figures["layers"][x][layer] for x in columns))
        for layer in range(len(figures["layers"]["recall"]))
    ]
    shown = ("budget", "own_mass", "oracle_mass")
    lines = [
        f"# Forecast heads {name}",
        "",
        f"For the model `{call['model']}`: {told(figures)}",
        "",
        f"* Text: {texts}; a tenth of the documents held out. Seed {call['seed']}.",
        f"* Heads: {queries} a kv head, rank of the file {call['rank']}; "
        f"{figures['steps']} steps of one row of {call['seq_len']} tokens after the "
        "regression.",
        f"* Selection: windows of {sparse['kernel_size']} keys every "
        f"{sparse['kernel_stride']}, blocks of {sparse['block_size']}, budget "
        f"{sparse['block_budget']} ({sparse['init_blocks']} init, "
        f"{sparse['local_blocks']} + 1 local).",
        f"* {figures['device']}, JAX {figures['jax']}.",
        "",
        "## Held-out figures, means of the layers",
        *_table(("heads", *titles), rows),
        "",
    ]
    keys = figures["passkeys"]
    if keys is not None:
        found = ", ".join(f"{x} {keys[x]}" for x in ("dense", "infllm_v2", "sparda"))
        lines += [
            f"Passkeys at {keys['tokens']} tokens, of {keys['asked']}: {found}."
            + _by_windows(keys.get("windows")),
            "",
        ]
    lines += [
        "## Windows and budgets that were measured (own queries, no Forecast)",
        *_table(
            ("window", "local", "budget", "own-query mass", "oracle mass"),
            [
                (x["kernel_size"], x.get("local_blocks"), *(x[name] for name in shown))
                for x in geometry["measured"]
            ],
        ),
        "",
        "## By layer",
        *_table(("layer", *titles), layers),
        "",
    ]
    return "\n".join(lines)
