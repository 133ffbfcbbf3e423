"""Plots: told apart without colour, written whole for light and dark pages."""

import numpy as np
import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError
from sparda_jax.evaluation import plots

pytest.importorskip("matplotlib")


def _pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_series_differ_by_more_than_colour():
    looks = [plots.style(n) for n in range(14)]
    assert len({look["marker"] for look in looks}) == 14
    # Those that share a colour differ in marker as well.
    whole = {tuple(plots.style(n).values()) for n in range(56)}
    assert len(whole) == 56


def test_two_forms_and_equal_bytes(tmp_path):
    series = {
        "dense": [plots.Point(64, 90.0)],
        "sparda": [plots.Point(16, 80.0, 70.0, 88.0), plots.Point(32, 85.0)],
    }

    def draw(figure):
        plots.lines(figure, series, xlabel="blocks", ylabel="score", log_x=True)

    path = tmp_path / "x.png"
    plots.save(path, draw)
    first = path.read_bytes()
    plots.save(path, draw)
    assert path.read_bytes() == first
    assert _pixels(path).mean() > 0.8
    assert _pixels(plots.dark_path(path)).mean() < 0.3


@pytest.mark.parametrize(("count", "named"), [(3, 3), (12, 0)])
def test_names_stand_beside_few_series(count, named):
    from matplotlib.figure import Figure

    figure = Figure()
    series = {f"s{n}": [plots.Point(1, n), plots.Point(2, n)] for n in range(count)}
    plots.lines(figure, series, xlabel="x", ylabel="y")
    assert len(figure.axes[0].texts) == named
    assert len(figure.axes[0].get_legend().get_texts()) == count


def test_heat_map_holds_its_numbers(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    values = np.array([[1.0, np.nan], [50.0, 99.0]])
    plots.heat_map(figure, values, rows=["a", "b"], columns=["c", "d"])
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["1", "50", "99"]


def test_unwritable_place_and_missing_library(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="cannot be written"):
        plots.save(tmp_path / "missing" / "x.png", lambda figure: None)
    monkeypatch.setattr(plots, "available", lambda: False)
    with pytest.raises(ConfigError, match=r"sparda-jax\[eval\]"):
        plots.save(tmp_path / "x.png", lambda figure: None)
