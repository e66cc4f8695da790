"""Figures of continual learning: their numbers, texts and axes."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from ftkit import plots
from ftkit.continual import plots as continual_plots
from ftkit.continual.accuracy_matrix import AccuracyMatrix

MATRIX = AccuracyMatrix([[0.9, 0.2, 0.5], [0.6, 0.8, 0.4], [0.7, 0.5, 0.9]], [0.5, 0.25, 0.3], ["a", "b", "c"])
POINTS = pd.DataFrame(
    {
        "strategy": ["ewc", "ewc", "low_rate"],
        "strength": [100.0, 1.0, 0.1],
        "new": [0.5, 0.9, 0.7],
        "old": [0.8, 0.3, 0.6],
    }
)
FIGURES = {
    "heat_map": lambda: continual_plots.heat_map(MATRIX),
    "over_time": lambda: continual_plots.over_time(MATRIX),
    "dots": lambda: continual_plots.dots(POINTS, "new", "old", xlabel="accuracy on the new one"),
    "plane": lambda: continual_plots.plane(POINTS, reference={"naive": (0.9, 0.3)}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_axes_are_labelled_and_no_figure_stays_open(monkeypatch, name):
    assert isinstance(FIGURES[name](), plots.Figure)
    assert not plt.get_fignums()
    seen = []
    monkeypatch.setattr(continual_plots, "Figure", lambda figure, alt, table: seen.append(figure))
    FIGURES[name]()
    assert all(ax.get_xlabel() and ax.get_ylabel() for figure in seen for ax in figure.axes)
    plt.close("all")


def test_tables_and_alt_texts_have_the_numbers_of_the_matrix():
    for name in ("heat_map", "over_time"):
        table = FIGURES[name]().table
        assert table.index[0] == "untrained"
        assert table.to_numpy().tolist() == [MATRIX.b.tolist(), *MATRIX.R.tolist()]
    assert "b 0.80 when learned, 0.50 in the end" in FIGURES["heat_map"]().alt
    assert "a 0.50, 0.90, 0.60, 0.70" in FIGURES["over_time"]().alt


def test_a_strategy_is_a_curve_from_weak_to_strong(monkeypatch):
    assert "ewc: at 100 new 0.50 old 0.80" in FIGURES["plane"]().alt
    assert FIGURES["plane"]().table.loc[("ewc", 1.0)].tolist() == [0.9, 0.3]
    seen = []
    monkeypatch.setattr(continual_plots, "Figure", lambda figure, alt, table: seen.append(figure))
    FIGURES["plane"]()
    curve, *_ = seen[0].axes[0].lines
    assert curve.get_xydata().tolist() == [[0.9, 0.3], [0.5, 0.8]]
    assert [text.get_text() for text in seen[0].axes[0].texts] == ["1", "100", "0.1"]
    plt.close("all")


def test_every_run_is_a_dot():
    figure = FIGURES["dots"]()
    assert figure.table.loc["ewc"].to_numpy().tolist() == [[0.5, 0.8], [0.9, 0.3]]
    assert "Old by accuracy on the new one, 3 runs; means: ewc 0.55 at 0.7, low rate 0.60 at 0.7." in figure.alt


ODD = ["$", "$$", "$5 to $10", "_x", "a_b^c", "<b>&", "100 %", "%s {}"]
ODD_MATRIX = AccuracyMatrix(np.full((8, 8), 0.5), [0.5] * 8, ODD)
ODD_POINTS = pd.DataFrame({"strategy": ODD, "strength": 1.0, "new": 0.5, "old": 0.5})
ODD_FIGURES = {
    "heat_map": lambda: continual_plots.heat_map(ODD_MATRIX),
    "over_time": lambda: continual_plots.over_time(ODD_MATRIX),
    "dots": lambda: continual_plots.dots(ODD_POINTS, "new", "old", xlabel="$ and $"),
    "plane": lambda: continual_plots.plane(ODD_POINTS, reference={"_$_$": (0.9, 0.3)}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD_FIGURES)
def test_no_character_of_a_name_has_a_meaning_in_a_figure(monkeypatch, name):
    assert len(ODD_FIGURES[name]().png) > 1000
    seen = []
    monkeypatch.setattr(continual_plots, "Figure", lambda figure, alt, table: seen.append(figure))
    ODD_FIGURES[name]()
    shown = [text for text in seen[0].findobj(Text) if text.get_text()]
    assert shown and not any(text.get_parse_math() for text in shown)
    if name != "heat_map":
        entries = [text.get_text().strip("\u200b") for text in seen[0].axes[0].get_legend().get_texts()]
        entries = {entry.replace("_", " ").strip() for entry in entries}
        assert entries >= {name.replace("_", " ").strip() for name in ODD}
    seen[0].draw_without_rendering()
    assert not [text for text in seen[0].findobj(Text) if "\\math" in text.get_text()]
    plt.close("all")


def test_figures_of_many_tasks_with_long_names_are_bounded(monkeypatch):
    names = [f"task {i} about a rather long subject" for i in range(60)]
    matrix = AccuracyMatrix(np.full((60, 60), 0.5), [0.5] * 60, names)
    for draw in (continual_plots.heat_map, continual_plots.over_time):
        figure = draw(matrix)
        assert len(figure.alt) <= 2000 and max(Image.open(io.BytesIO(figure.png)).size) < 2500
        assert figure.table.shape == (61, 60)
    seen = []
    monkeypatch.setattr(continual_plots, "Figure", lambda figure, alt, table: seen.append(figure))
    continual_plots.heat_map(matrix), continual_plots.over_time(matrix)
    assert not seen[0].axes[0].texts
    assert len(seen[0].axes[0].get_yticks()) <= 40 and len(seen[1].axes[0].get_xticks()) <= 40
    plt.close("all")


def test_a_strategy_looks_the_same_in_every_figure(monkeypatch):
    seen = []
    monkeypatch.setattr(continual_plots, "Figure", lambda figure, alt, table: seen.append(figure))
    names = ["ewc", "lora", "replay", "lwf", "own", "naive"]
    curves = pd.DataFrame({"strategy": names[:5], "strength": 1.0, "new": 0.5, "old": 0.5})
    continual_plots.plane(curves, reference={"naive": (0.6, 0.4)})
    for some in (names, names[::-1][1:]):
        runs = pd.DataFrame({"strategy": some, "distance": 1.0, "forgetting": 0.1})
        continual_plots.dots(runs, "distance", "forgetting", xlabel="distance")
    colours = [{line.get_label(): line.get_color() for line in seen[0].axes[0].lines}]
    for figure in seen[1:]:
        dots = figure.axes[0].collections
        colours.append({dot.get_label(): to_hex(dot.get_facecolor()[0]).upper() for dot in dots})
    assert {name: colour.upper() for name, colour in colours[0].items()} == colours[1]
    assert colours[2].items() <= colours[1].items() and len(set(colours[1].values())) == 6
    plt.close("all")
