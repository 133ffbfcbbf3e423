"""One style for the plots of evaluations and reports.

A plot is told by marker, line and number as well as by colour, and is written twice:
`x.png` on white and `x-dark.png` for pages with a dark background. matplotlib is a part
of the extras `eval` and `train`; where it is missing, `available` is False and drawing
raises ConfigError.

    plots.save(path, lambda figure: plots.lines(figure, series, xlabel="blocks read"))
"""

import contextlib
import importlib.util
import io
import os
import pathlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparda_jax.checkpoint.atomic import new_file
from sparda_jax.checks import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The eight colours of Okabe and Ito, which people who see few colours tell apart;
# those in the middle of the scale are seen on white and on black.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6BB1",
    "#7F7F7F",
)
_MARKERS = "osD^vPX*hdp<>8"
_LINES = ("-", "--", "-.", ":")
# Names beside the points of more series than these would cover each other.
_MOST_NAMED = 6
_DARK = {"background": "#0d1117", "text": "#e6edf3", "grid": "#57606a"}
_LIGHT = {"background": "#ffffff", "text": "#1f2328", "grid": "#b0b7be"}


class Point(NamedTuple):
    """A value with its confidence interval.

    Attributes:
      x, y: Where it stands.
      low, high: The interval; None for none.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the series with that number.

    Colours repeat after 8 series, markers after 14, lines after 4: 56 series differ.
    """
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
    }


def dark_path(path: str | os.PathLike) -> pathlib.Path:
    """Where the form for dark pages of a plot is written."""
    path = pathlib.Path(path)
    return path.with_name(f"{path.stem}-dark{path.suffix}")


@contextlib.contextmanager
def _colours(dark: bool) -> Generator[None]:
    """matplotlib's settings while a figure is drawn and written."""
    import matplotlib as mpl

    chosen = _DARK if dark else _LIGHT
    text, background = chosen["text"], chosen["background"]
    settings = {
        "figure.facecolor": background,
        "savefig.facecolor": background,
        "axes.facecolor": background,
        "axes.edgecolor": text,
        "axes.labelcolor": text,
        "axes.titlecolor": text,
        "text.color": text,
        "xtick.color": text,
        "ytick.color": text,
        "grid.color": chosen["grid"],
        "grid.alpha": 0.5,
        "legend.framealpha": 0.6,
        "legend.facecolor": background,
        "legend.fontsize": 9,
        "font.size": 10,
        "lines.linewidth": 1.8,
        "lines.markersize": 6,
    }
    with mpl.rc_context(settings):
        yield


def save(
    path: str | os.PathLike,
    draw: Callable[["Figure"], None],
    *,
    size: tuple[float, float] = (8.0, 5.0),
) -> None:
    """Draws a figure and writes it for light and for dark pages.

    Args:
      path: A `.png`; its dark form stands beside it (`dark_path`).
      draw: Draws into an empty figure; called twice.
      size: Width and height in inches, of 120 dots.

    Raises:
      ConfigError: If matplotlib is not installed.
      CheckpointError: If the place cannot be written to.
    """
    for dark in (False, True):
        picture = png(draw, size=size, dark=dark)
        with new_file(dark_path(path) if dark else path) as temporary:
            pathlib.Path(temporary).write_bytes(picture)


def png(
    draw: Callable[["Figure"], None],
    *,
    size: tuple[float, float] = (8.0, 5.0),
    dark: bool = False,
) -> bytes:
    """A figure as the bytes of a PNG, for a notebook; equal figures give equal bytes.

    Args:
      draw: Draws into an empty figure.
      size: Width and height in inches, of 120 dots.
      dark: For pages with a dark background.

    Raises:
      ConfigError: If matplotlib is not installed.
    """
    if not available():
        raise ConfigError("plots need matplotlib: pip install 'sparda-jax[eval]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held = io.BytesIO()
    with _colours(dark):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(held, dpi=120, format="png", metadata={"Software": None})
    return held.getvalue()


def lines(
    figure: "Figure",
    series: Mapping[str, Sequence[Point]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log_x: bool = False,
) -> None:
    """A line a series, with error bars where points have intervals.

    A series of one point is drawn as a level line through it, as a mark to compare
    with. Where there are few series, each is also named beside its last point.
    """
    axes = figure.subplots()
    for index, (name, points) in enumerate(series.items()):
        points = sorted(points)
        if not points:
            continue
        x = [point.x for point in points]
        y = [point.y for point in points]
        low = [p.y - p.low if p.low is not None else 0.0 for p in points]
        high = [p.high - p.y if p.high is not None else 0.0 for p in points]
        look = style(index)
        errors = np.maximum(np.array([low, high]), 0.0)
        axes.errorbar(x, y, yerr=errors, label=name, capsize=3, **look)
        if len(points) == 1:
            axes.axhline(y[0], color=look["color"], linestyle=":", linewidth=1)
        if len(series) > _MOST_NAMED:
            continue
        axes.annotate(
            name,
            (x[-1], y[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(True)
    if series:
        axes.legend(loc="best", ncols=1 + len(series) // 8)


def heat_map(
    figure: "Figure",
    values: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    label: str = "",
    form: str = ".0f",
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """A table of coloured cells; up to 30 × 30 of them hold their numbers as well.

    Args:
      figure: Where to.
      values: [rows, columns]; NaN is left empty.
      rows, columns: Names.
      title: Above it.
      label: What the values are.
      form: Format of the numbers.
      limits: Values of the scale's ends; None takes the least and the greatest.
    """
    table = np.asarray(values, np.float64)
    axes = figure.subplots()
    image = axes.imshow(
        table, cmap="cividis", aspect="auto", vmin=limits[0], vmax=limits[1]
    )
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label=label)
    if max(table.shape) > 30:
        return
    low, high = image.get_clim()
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        if np.isfinite(value):
            bright = value - low > 0.6 * (high - low)
            axes.text(
                column,
                row,
                format(value, form),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if bright else "white",
            )
