"""Figures of continual learning: their numbers, texts and axes."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

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
