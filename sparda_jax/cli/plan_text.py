"""A plan as a table to read."""

import jax

from sparda_jax.machine import size_text
from sparda_jax.planning.plan import Option, Plan


def _gb(rate: float) -> str:
    return f"{rate / 1e9:,.0f}" if rate >= 1e11 else f"{rate / 1e9:.1f}"


def plan_text(result: Plan) -> str:
    """The plan as text."""
    rates, sparse = result.rates, result.sparse
    lines = [
        f"{result.model.name}, {result.attention}, {result.dtype}: {result.context:,} "
        f"tokens a sequence ({result.prompt:,} of prompt, {result.chunk:,} a prefill "
        "call)",
        f"{sparse.budget_text} of {-(-result.context // sparse.block_size):,} blocks "
        f"a token; limits {_limit(result)}",
        f"memory {_gb(rates.memory)} GB/s, fetch {_gb(rates.fetch)} GB/s"
        + (f" (link {_gb(rates.link)})" if rates.link else "")
        + (f", {rates.peak / 1e12:,.3g} TFLOP/s" if rates.peak else "")
        + f"; {rates.source}; JAX {jax.__version__} here",
        f"assumed: {result.miss:.1%} of listed blocks are fetched in the best "
        f"offloaded batch ({result.miss_source})",
        "",
    ]
    columns: list[tuple[str, Option]] = [
        ("resident", result.resident),
        ("offload", result.offload),
    ]
    for name, best in (
        ("resident", result.resident_best),
        ("offload", result.offload_best),
    ):
        if best is not None and best.batch != result.batch:
            columns.append((f"{name}, best", best))
    # Where a layer's own time is not known, step times are bounds.
    about = "about" if rates.layer else "at best"
    lines += _table(columns, about)
    alone = result.offload_alone
    if result.lookahead and alone is not None:
        lines += [
            "",
            f"without look-ahead, batch {alone.batch} offloaded takes {about} "
            f"{alone.step.seconds * 1e3:.1f} ms a step ({alone.tokens_per_second:,.0f} "
            "tokens/s)",
        ]
    lines += ["", f"verdict: {result.verdict}"]
    if result.resident_best is not None and result.offload_best is not None:
        own = f"{rates.layer * 1e6:.0f} us a layer (docs/offload.md)"
        lines.append(
            f"both are estimates: the bandwidths' bounds and {own}"
            if rates.layer
            else "both rates are bounds; resident batches reach a smaller share of "
            "theirs (docs/offload.md)"
        )
    if result.break_even is None:
        lines.append("at this context offload is ahead at no miss share")
    elif result.break_even >= 1:
        lines.append("at this context offload is ahead at any miss share")
    else:
        lines.append(
            f"at this context offload is ahead up to {result.break_even:.1%} misses"
        )
    if result.pays_from is None:
        lines.append("offload pays at no context")
    else:
        lines.append(f"offload starts to pay at {result.pays_from:,} tokens a sequence")
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join(lines)


def _limit(result: Plan) -> str:
    limits = result.limits
    found = [limit.source for limit in (limits.device, limits.host) if limit]
    return ", ".join(found)


def _table(columns: list[tuple[str, Option]], about: str) -> list[str]:
    width = 16
    names: list[str] = []
    # The widest points of two columns may differ: a part takes its first place.
    for _, option in columns:
        at = 0
        for name, _ in option.memory.parts():
            if name in names:
                at = names.index(name) + 1
            else:
                names.insert(at, name)
                at += 1

    def row(name: str, values: list[str]) -> str:
        return f"{name:30}" + "".join(f"{value:>{width}}" for value in values)

    parts = [dict(option.memory.parts()) for _, option in columns]
    options = [option for _, option in columns]
    lines = [
        row("", [name for name, _ in columns]),
        row("batch", [f"{option.batch:,}" for option in options]),
        *(
            row(name, [size_text(p[name]) if name in p else "–" for p in parts])
            for name in names
        ),
        row("device, at its widest", [size_text(o.memory.device) for o in options]),
        row(
            "host store",
            [size_text(o.memory.host) if o.memory.host else "–" for o in options],
        ),
        row("fits", ["yes" if o.fits else "no" for o in options]),
        row(
            f"decode step, {about}",
            [f"{o.step.seconds * 1e3:.1f} ms" for o in options],
        ),
        row("  waits for", [o.step.bound_by for o in options]),
        row(
            f"tokens/s, {about.replace('best', 'most')}",
            [f"{o.tokens_per_second:,.0f}" for o in options],
        ),
    ]
    return lines
