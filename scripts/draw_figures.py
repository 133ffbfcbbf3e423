"""Draws the figures of docs/how-it-works.md from recorded block lists of a real model.

    python scripts/draw_figures.py --traces benchmarks/traces --out docs/figures

The traces are those of `python -m benchmarks.trace record` with SmolLM2-135M over
Python's manual, by `infllm_v2` and by `sparda` with the published Forecast heads. The
figures are SVG with their own background, follow the reader's light or dark scheme, and
say everything by shape or number as well as by colour.
"""

import pathlib
from xml.sax.saxutils import escape

import numpy as np

from sparda_jax.checkpoint.atomic import new_file
from sparda_jax.checks import integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser, add_option
from sparda_jax.planning.traces import BlockTrace, read_trace

_STYLE = """
.paper{fill:#ffffff}.ink{fill:#1f2328}.line{stroke:#57606a;fill:none}
.held{fill:#0072B2}.new{fill:#D55E00}.forced{fill:none;stroke:#57606a}
.a{stroke:#0072B2;fill:#0072B2}.b{stroke:#D55E00;fill:#D55E00}
text{font:13px system-ui,sans-serif}.small{font-size:11px}
@media (prefers-color-scheme: dark){
.paper{fill:#0d1117}.ink{fill:#e6edf3}.line{stroke:#8b949e}
.held{fill:#56B4E9}.new{fill:#E69F00}.forced{stroke:#8b949e}
.a{stroke:#56B4E9;fill:#56B4E9}.b{stroke:#E69F00;fill:#E69F00}}
"""


class Drawing:
    """Shapes of one SVG."""

    def __init__(self, width: int, height: int, title: str):
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>',
            f'<rect class="paper" width="{width}" height="{height}"/>',
        ]

    def text(self, x: float, y: float, words: str, *, small=False, end=False) -> None:
        """Words that begin, or end, at a place."""
        kind = "ink small" if small else "ink"
        anchor = ' text-anchor="end"' if end else ""
        self._parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{anchor}>'
            f"{escape(words)}</text>"
        )

    def path(self, kind: str, route: str) -> None:
        """A path in a class's colours."""
        self._parts.append(f'<path class="{kind}" d="{route}"/>')

    def write(self, path: pathlib.Path) -> None:
        """Writes the file."""
        with new_file(path) as temporary:
            pathlib.Path(temporary).write_text("\n".join([*self._parts, "</svg>\n"]))


def _square(x: float, y: float, size: float) -> str:
    return f"M{x:.1f} {y:.1f}h{size}v{size}h{-size}z"


def _triangle(x: float, y: float, size: float) -> str:
    return f"M{x:.1f} {y + size:.1f}h{size}l{-size / 2} {-size}z"


def draw_lists(trace: BlockTrace, layer: int, steps: int, path: pathlib.Path) -> None:
    """What one kv head lists, token after token: forced, kept and new blocks."""
    lists = trace.listed[layer, 0, trace.prefill :][: steps + 1]
    first = trace.tokens + trace.prefill
    cell, left, top = 10, 70, 64
    blocks = lists.shape[1]
    drawing = Drawing(
        left + blocks * cell + 20, top + steps * cell + 20, "Block lists of one head"
    )
    new = sum(int((lists[s] & ~lists[s - 1]).sum()) for s in range(1, steps + 1))
    drawing.text(
        10,
        20,
        f"{trace.model}, layer {layer}, kv head 0: {trace.block_budget} of {blocks} "
        f"blocks a token; {new / steps:.1f} of them new at a step",
    )
    for place, (kind, shape, words) in enumerate(
        (
            ("forced", _square, "first and latest: always listed"),
            ("held", _square, "chosen, listed a token before"),
            ("new", _triangle, "chosen, and new: fetched"),
        )
    ):
        x = left + 220 * place
        drawing.path(kind, shape(x, 32, 8))
        drawing.text(x + 13, 40, words, small=True)
    drawing.text(10, 57, "token", small=True)
    drawing.text(left, 57, f"KV block (of {trace.block_size} tokens) →", small=True)
    for step in range(1, steps + 1):
        y = top + (step - 1) * cell
        if step % 8 == 1:
            drawing.text(left - 8, y + 8, f"{first + step:,}", small=True, end=True)
        own = (first + step) // trace.block_size
        for block in np.flatnonzero(lists[step]):
            x = left + block * cell
            local = own - trace.local_blocks <= block <= own
            if block < trace.init_blocks or local:
                drawing.path("forced", _square(x + 1, y + 1, 7))
            elif lists[step - 1, block]:
                drawing.path("held", _square(x + 1, y + 1, 8))
            else:
                drawing.path("new", _triangle(x + 1, y + 1, 8))
    drawing.write(path)


def recall_by_layer(own: BlockTrace, forecast: BlockTrace) -> np.ndarray:
    """Share of the own queries' chosen blocks that the forecast lists too, by layer."""
    forced = own.listed.all(2, keepdims=True)
    chosen = own.listed & ~forced
    chosen, other = (x[:, :, own.prefill :] for x in (chosen, forecast.listed))
    return (chosen & other).sum((1, 2, 3)) / chosen.sum((1, 2, 3))


def draw_recall(own: BlockTrace, forecast: BlockTrace, path: pathlib.Path) -> None:
    """How many of a layer's own choices the layer before it foresaw."""
    shares = recall_by_layer(own, forecast)
    left, top, width, height = 50, 44, 22, 180
    drawing = Drawing(left + width * len(shares) + 20, top + height + 40, "Recall")
    drawing.text(
        10,
        20,
        f"{own.model}: share of the blocks a layer's own queries choose that the "
        f"forecast lists too (mean {shares.mean():.2f})",
    )
    for value in (0.0, 0.5, 1.0):
        y = top + height * (1 - value)
        drawing.text(left - 8, y + 4, f"{value:.1f}", small=True, end=True)
        drawing.path("line", f"M{left} {y:.1f}h{width * len(shares)}")
    for layer, share in enumerate(shares):
        x, tall = left + layer * width, height * float(share)
        drawing.path(
            "held", f"M{x + 3} {top + height}v{-tall:.1f}h{width - 6}v{tall:.1f}z"
        )
        drawing.text(x + 3, top + height - tall - 4, f"{share * 100:.0f}", small=True)
        drawing.text(x + 5, top + height + 14, str(layer), small=True)
    drawing.text(left, top + height + 30, "layer; numbers are percent", small=True)
    drawing.write(path)


def draw_misses(own: BlockTrace, forecast: BlockTrace, path: pathlib.Path) -> None:
    """What must be fetched, by the size of the device's cache."""
    sizes = (1.0, 1.5, 2.0, 3.0, 4.0)
    curves = [
        ("a", "own queries ●", own.miss_curve(sizes)),
        ("b", "forecast ▲", forecast.miss_curve(sizes)),
    ]
    left, top, width, height = 60, 48, 460, 200
    top_share = max(float(max(curve)) for _, _, curve in curves) * 1.1
    drawing = Drawing(left + width + 130, top + height + 44, "Misses by cache size")
    drawing.text(
        10, 20, f"{own.model}: share of the chosen blocks that is not on the device"
    )
    for part in range(3):
        share = top_share * part / 2
        y = top + height * (1 - part / 2)
        drawing.text(left - 8, y + 4, f"{share:.0%}", small=True, end=True)
        drawing.path("line", f"M{left} {y:.1f}h{width}")
    for kind, name, curve in curves:
        at = [
            (
                left + width * (size - 1) / 3,
                top + height * (1 - float(miss) / top_share),
            )
            for size, miss in zip(sizes, curve, strict=True)
        ]
        route = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        drawing.path(f'{kind}" style="fill:none;stroke-width:2', f"M{route}")
        for x, y in at:
            shape = _triangle if kind == "b" else _square
            drawing.path(kind, shape(x - 4, y - 4, 8))
        side = -10 if kind == "a" else 0
        drawing.text(at[-1][0] + 8, at[-1][1] + 4 + side, name.replace("●", "■"))
        drawing.text(at[0][0] + 8, at[0][1] - 6, f"{float(curve[0]):.1%}", small=True)
    for size in sizes:
        x = left + width * (size - 1) / 3
        drawing.text(x - 6, top + height + 16, f"{size:g}×", small=True)
    drawing.text(
        left, top + height + 34, "device slots, in chosen blocks of a list", small=True
    )
    drawing.write(path)


def main() -> None:
    """Draws them all."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--traces", type=pathlib.Path, default="benchmarks/traces")
    parser.add_argument("--out", type=pathlib.Path, default="docs/figures")
    add_option(
        parser, "--layer", integer(0), metavar="N", default=10, help="whose lists"
    )
    add_option(
        parser, "--steps", integer(1), metavar="N", default=40, help="tokens shown"
    )
    arguments = parser.parse_args()
    own, forecast = (
        read_trace(arguments.traces / f"smollm2-135m_4k_prose_{name}.npz")
        for name in ("infllm_v2", "sparda")
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_lists(forecast, arguments.layer, arguments.steps, arguments.out / "lists.svg")
    draw_recall(own, forecast, arguments.out / "recall.svg")
    draw_misses(own, forecast, arguments.out / "misses.svg")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
