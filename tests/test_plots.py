import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from ftkit import plots
from ftkit.training.state import History

METRICS = {
    "majority": {"accuracy": 0.5, "ci95": (0.4, 0.6)},
    "full <&>": {"accuracy": 0.8, "ci95": (0.75, 0.85)},
}
EPOCHS = [{"epoch": 1, "train_loss": 0.6, "validation_loss": 0.5, "validation_accuracy": 0.7}]
HISTORY = History(steps=[{"step": i + 1, "loss": 1 / (i + 1), "lr": 1e-3} for i in range(20)], epochs=EPOCHS)
SUMMARY = pd.DataFrame(
    {"mean": [0.5, 0.8], "low": [0.4, 0.7], "high": [0.6, 0.9], "run_low": 0.3, "run_high": 0.95, "seeds": [5, 4]},
    index=pd.Index([10, 100], name="rows"),
).rename_axis(columns="test_accuracy")

POINTS = pd.DataFrame(
    {"accuracy": [0.7, 0.8], "low": [0.65, 0.75], "high": [0.75, 0.85], "cost": [1.0, 30.0]}, index=["last_2", "full"]
)

FIGURES = {
    "scores": lambda: plots.scores(METRICS),
    "learning_curves": lambda: plots.learning_curves({"full": [HISTORY, HISTORY], "from_scratch": [HISTORY]}),
    "confusion": lambda: plots.confusion(np.array([[8, 2], [1, 9]]), ["negative", "positive"]),
    "study": lambda: plots.study(SUMMARY, xlabel="rows", live={100: 0.75, 300: 0.9}, reference=("majority", 0.5)),
    "studies": lambda: plots.studies({"full": SUMMARY, "last_2": SUMMARY}, xlabel="rows"),
    "tradeoff": lambda: plots.tradeoff(POINTS, xlabel="seconds"),
    "spectra": lambda: plots.spectra({"full": [0.5, 0.8, 1.0], "lora": [0.9, 1.0]}, xlabel="directions"),
    "bars": lambda: plots.bars(pd.Series([0.6, 0.1], index=["' bad'", "' good'"]), xlabel="probability"),
    "slopes": lambda: plots.slopes(
        pd.DataFrame({"before": [0.5, 0.6], "after": [0.7, 0.8]}, index=["a", "b"]), xlabel="when", ylabel="accuracy"
    ),
    "schedule": lambda: plots.schedule({"linear": [0, 1, 0.5], "cosine": [0, 1, 0.7]}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_an_image_with_alt_text_and_a_table_of_its_numbers(name: str) -> None:
    figure = FIGURES[name]()
    page = BeautifulSoup(figure._repr_html_(), "html.parser")
    image = Image.open(io.BytesIO(base64.b64decode(page.img["src"].partition(",")[2])))
    pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 100
    assert pixels.std() > 5  # something is drawn
    assert len(page.img["alt"]) > 20
    assert page.details.table is not None
    assert repr(figure) == f"[figure: {page.img['alt']}]"
    assert not plt.get_fignums()  # an open figure would appear in the notebook a second time


def test_the_table_holds_the_plotted_numbers() -> None:
    table = plots.scores(METRICS).table
    assert table.loc["full <&>"].tolist() == [0.8, 0.75, 0.85]
    assert "full &lt;&amp;&gt;" in plots.scores(METRICS)._repr_html_()
    assert plots.confusion(np.array([[8, 2], [1, 9]]), ["a", "b"]).table.loc["a", "b"] == 2
    assert "85%" in plots.confusion(np.array([[8, 2], [1, 9]]), ["a", "b"]).alt


def test_a_study_shows_recorded_and_live_runs_side_by_side() -> None:
    figure = FIGURES["study"]()
    assert list(figure.table.columns) == ["mean", "low", "high", "run low", "run high", "seeds", "live"]
    assert figure.table.index.tolist() == [10, 100, 300]  # the last one has a live run only
    assert figure.table.loc[100].tolist() == [0.8, 0.7, 0.9, 0.3, 0.95, 4, 0.75]
    assert np.isnan(figure.table.loc[10, "live"])
    assert "NaN" not in figure._repr_html_().partition("<table")[2]  # it may occur in the encoded image
    assert "<table" in figure._repr_html_()
    assert "100: 0.80" in figure.alt and "; live run, 100: 0.75" in figure.alt
    assert plots.study(SUMMARY, xlabel="rows").table["live"].isna().all()


def test_the_bars_of_a_study_are_its_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(plots, "Figure", lambda drawn, alt, table: seen.append(drawn))
    FIGURES["study"]()
    ax = seen[0].axes[0]
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == "test accuracy"
    runs, means = ([segment[:, 1].tolist() for segment in bars.get_segments()] for bars in ax.collections)
    assert runs == [[0.3, 0.95], [0.3, 0.95]]
    assert means == [[0.4, 0.6], [0.7, 0.9]]
    plt.close("all")


def test_figures_of_several_methods_keep_the_numbers_of_each_apart() -> None:
    table = FIGURES["studies"]().table
    assert table.loc[("last_2", 100)].tolist() == [0.8, 0.7, 0.9, 4]
    assert "last 2: 10 0.50, 100 0.80" in FIGURES["studies"]().alt
    assert "last 2 0.70 at 1, full 0.80 at 30" in FIGURES["tradeoff"]().alt
    spectra = FIGURES["spectra"]().table
    assert spectra.loc[2].tolist() == [0.8, 1.0]
    assert np.isnan(spectra.loc[3, "lora"])


def test_a_baseline_is_drawn_and_named_with_several_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(plots, "Figure", lambda drawn, alt, table: seen.append((drawn, alt)))
    plots.studies({"full": SUMMARY}, xlabel="rows", reference=("zero-shot", 0.65))
    drawn, alt = seen[0]
    lines = {line.get_label(): line.get_ydata() for line in drawn.axes[0].lines}
    assert list(lines["zero-shot"]) == [0.65, 0.65]
    assert "zero-shot 0.65" in alt
    plt.close("all")


def test_bars_and_slopes_describe_what_they_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "' bad' 0.60" in FIGURES["bars"]().alt
    assert "before 0.55, after 0.75" in FIGURES["slopes"]().alt
    seen = []
    monkeypatch.setattr(plots, "Figure", lambda drawn, alt, table: seen.append(drawn.axes[0]))
    FIGURES["bars"](), FIGURES["slopes"]()
    assert [bar.get_width() for bar in seen[0].patches] == [0.6, 0.1]
    assert [text.get_text() for text in seen[0].get_yticklabels()] == ["' bad'", "' good'"]
    assert [list(line.get_ydata()) for line in seen[1].lines] == [[0.5, 0.7], [0.6, 0.8], [0.55, 0.75]]
    plt.close("all")


def test_axes_are_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(plots, "Figure", lambda drawn, alt, table: seen.append(drawn))
    for draw in FIGURES.values():
        draw()
    assert all(ax.get_xlabel() for figure in seen for ax in figure.axes)
    plt.close("all")
