import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib import font_manager
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import Image

from ftkit import plots
from ftkit.data.assets import registry
from ftkit.errors import AssetError
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
    "loss_panels": lambda: plots.loss_panels({"good": [HISTORY], "too high": [HISTORY]}, num_classes=2),
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
    assert table.loc["last 2, 100"].tolist() == [0.8, 0.7, 0.9, 4]
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


def test_live_runs_stand_beside_the_record_of_their_method(drawn: Callable) -> None:
    draw = lambda: plots.studies({"full": SUMMARY, "last_2": SUMMARY}, xlabel="k", live={"last_2": {100: 0.75, 7: 0.4}})  # noqa: E731
    rings = [line for line in drawn(draw).axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [ring.get_xydata().tolist() for ring in rings] == [[[100, 0.75], [7, 0.4]]]
    assert rings[0].get_markeredgecolor() == plots.METHODS["last_2"][0]
    assert "last 2, live run: 100 0.75, 7 0.40" in draw().alt
    table = draw().table
    assert table["live"].dropna().to_dict() == {"last 2, 7": 0.4, "last 2, 100": 0.75}
    assert {"run low", "run high"} <= set(table)


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


# The reader's text ------------------------------------------------------------------------------------------

ODD = ["$", "$$", r"$\frac$", "$5 to $10", "_x", "a_b^c", "<b>&amp;", "100 %", "%s {} \\alpha", "#1"]
ODD_RUNS = dict.fromkeys(ODD, METRICS["majority"])
ODD_FIGURES = {
    "scores": lambda: plots.scores(ODD_RUNS, axis="share of $ in $"),
    "learning_curves": lambda: plots.learning_curves({name: [HISTORY] for name in ODD[:7]}),
    "loss_panels": lambda: plots.loss_panels({name: [HISTORY] for name in ODD}),
    "confusion": lambda: plots.confusion(np.eye(len(ODD), dtype=int), ODD),
    "study": lambda: plots.study(SUMMARY, xlabel="$ and $", live={100: 0.75}, reference=("$_$", 0.5)),
    "studies": lambda: plots.studies(dict.fromkeys(ODD, SUMMARY), xlabel="$ and $", reference=("_$_$", 0.5)),
    "tradeoff": lambda: plots.tradeoff(
        pd.DataFrame([POINTS.iloc[0], POINTS.iloc[1]] * 5).set_axis(ODD, axis=0), xlabel="$ and $"
    ),
    "spectra": lambda: plots.spectra({name: [0.5, 0.8, 1.0] for name in ODD[:4]}, xlabel="$ and $"),
    "bars": lambda: plots.bars(pd.Series(0.5, index=ODD), xlabel="$ and $"),
    "slopes": lambda: plots.slopes(
        pd.DataFrame({"$": range(10), "_$$": range(10)}, index=ODD), xlabel="$ and $", ylabel="$ or $"
    ),
    "schedule": lambda: plots.schedule({name: [0, 1, 0.5] for name in ODD}),
}
LEGENDS = dict.fromkeys(("studies", "tradeoff", "slopes", "schedule"), ODD) | {
    "learning_curves": ODD[:7],
    "spectra": ODD[:4],
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], MatplotlibFigure]]:
    """A function that calls a function of plots, and returns the figure that it drew; it stays open until the end."""
    figures = []

    def draw(function: Callable[[], object]) -> MatplotlibFigure:
        with monkeypatch.context() as patch:
            patch.setattr(plots, "Figure", lambda figure, alt, table: figures.append(figure))
            function()
        return figures[-1]

    yield draw
    plt.close("all")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD_FIGURES)
def test_no_character_of_a_name_has_a_meaning_in_a_figure(name: str, drawn: Callable) -> None:
    assert min(Image.open(io.BytesIO(ODD_FIGURES[name]().png)).size) > 100
    figure = drawn(ODD_FIGURES[name])
    shown = [text for text in figure.findobj(Text) if text.get_text()]
    assert shown and not any(text.get_parse_math() for text in shown)
    if name in LEGENDS:
        legend = next(ax.get_legend() for ax in figure.axes if ax.get_legend())
        entries = [text.get_text().strip("\u200b").replace("_", " ").strip() for text in legend.get_texts()]
        assert {entry.replace("_", " ").strip() for entry in LEGENDS[name]} <= set(entries)
    figure.draw_without_rendering()
    assert not [text for text in figure.findobj(Text) if "\\math" in text.get_text()]  # as on a logarithmic axis


def test_names_are_escaped_and_not_set_as_formulas_in_the_html() -> None:
    page = plots.confusion(np.eye(2, dtype=int), ["$5 to $10", "<i>&amp;"])._repr_html_()
    assert "&lt;i&gt;&amp;amp;" in page and "<i>" not in page
    table = BeautifulSoup(page, "html.parser").table
    assert [cell.text for cell in table.select("thead th")] == ["", "$5 to $10", "<i>&amp;"]
    ignored = [set(parent.get("class", [])) for parent in (table, *table.parents)]
    assert any({"mathjax_ignore", "tex2jax_ignore"} <= classes for classes in ignored)


def test_ticks_of_a_logarithmic_axis_read_well(drawn: Callable) -> None:
    figure = drawn(lambda: plots.spectra({"change": np.linspace(0.1, 1, 300)}, xlabel="directions"))
    figure.draw_without_rendering()
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels() if text.get_text()]
    assert {"1", "10", "100"} <= set(labels)
    figure = drawn(lambda: plots.spectra({"change": [0.5, 0.6, 1.0]}, xlabel="directions"))
    figure.draw_without_rendering()  # less than a decade: further ticks have labels
    ax = figure.axes[0].xaxis
    assert {"1", "2", "3"} <= {text.get_text() for text in ax.get_ticklabels(minor=True) + ax.get_ticklabels()}


# Size -------------------------------------------------------------------------------------------------------


def test_a_confusion_of_many_classes_is_small_and_has_thinned_labels(drawn: Callable) -> None:
    names = [f"class number {i} of a shop with many goods" for i in range(150)]
    counts = np.random.default_rng(0).integers(0, 9, (150, 150))
    figure = plots.confusion(counts, names)
    assert len(figure.png) < 500_000 and max(Image.open(io.BytesIO(figure.png)).size) < 2000
    assert len(figure._repr_html_()) < 1_000_000
    assert figure.table.shape == (150, 150)
    assert "150 rows × 150 columns" in figure._repr_html_()
    ax, *_ = drawn(lambda: plots.confusion(counts, names)).axes
    assert not ax.texts
    shown = {int(tick): label.get_text() for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    assert 20 <= len(shown) <= 50
    assert all(label == f"{names[i][:31].rstrip()}…" for i, label in shown.items())


def test_a_confusion_of_few_classes_has_its_numbers(drawn: Callable) -> None:
    counts = np.arange(400).reshape(20, 20)
    ax, *_ = drawn(lambda: plots.confusion(counts, [f"c{i}" for i in range(20)])).axes
    assert [text.get_text() for text in ax.texts] == [f"{count}" for count in range(400)]
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"c{i}" for i in range(20)]
    ax, *_ = drawn(lambda: plots.confusion(np.eye(21), [f"c{i}" for i in range(21)])).axes
    assert not ax.texts


def test_long_names_and_alt_texts_are_bounded(drawn: Callable) -> None:
    long = "very " * 3000
    figures = [
        plots.confusion(np.eye(2, dtype=int), [long, "b"]),
        plots.bars(pd.Series([1.0, 2.0], index=[long, "b"]), xlabel="x"),
        plots.bars(pd.Series(1.0, index=[f"class {i}" for i in range(400)]), xlabel="x"),
        plots.bars(
            pd.Series(1.0, index=[f"class number {i} of a shop with many goods" for i in range(150)]), xlabel="x"
        ),
        plots.slopes(pd.DataFrame({"a": [1.0, 2], long: [1, 2]}, index=[long, "b"]), xlabel="x", ylabel="y"),
        plots.schedule({long: [1.0, 2]}),
        plots.scores({long: METRICS["majority"]}),
        plots.learning_curves({long: [HISTORY]}),
        plots.spectra({long: [0.5, 1]}, xlabel="k"),
        plots.studies({long: SUMMARY}, xlabel="k"),
        plots.tradeoff(POINTS.rename({"full": long}), xlabel="k"),
    ]
    for figure in figures:
        assert len(figure.alt) <= 2000 and Image.open(io.BytesIO(figure.png)).size[0] < 2500, figure.alt[:80]
        assert len(figure.png) < 500_000 and len(figure._repr_html_()) < 1_000_000, figure.alt[:80]
    assert figures[0].table.index[0] == long
    assert figures[2].alt.endswith("…")


# One look for a method -----------------------------------------------------------------------------------------


def test_no_two_methods_look_alike() -> None:
    assert len(set(plots.METHODS.values())) == len(plots.METHODS)
    assert {colour for colour, _ in plots.METHODS.values()} <= {*plots.COLOURS, "#888888"}


COMPARED = {
    "01": ["majority", "bag_of_words", "frozen_probe", "from_scratch", "full"],
    "02": ["majority", "linear_probe", "last_1", "last_2", "last_4", "gradual", "llrd", "full"],
    "03": ["majority", "frozen_probe", "bitfit", "ia3", "lora", "adapter", "full"],
    "04": ["majority", "zero_shot", "few_shot", "prompt_tuning", "prefix_tuning", "p_tuning", "lora", "encoder_full"],
    "05": ["naive", "joint", "frozen", "replay", "ewc", "l2sp", "lwf", "lora"],
    "06": ["guessing", "heads_only", "locked_image", "both", "from_scratch", "one_line_loss", "zero_shot"],
}


@pytest.mark.parametrize("lesson", COMPARED)
def test_the_methods_of_a_lesson_differ_in_colour(lesson: str) -> None:
    looks = plots.method_looks(COMPARED[lesson])
    assert len({look["color"] for look in looks.values()}) == len(looks)


def test_a_method_keeps_its_look_whatever_stands_beside_it_and_however_it_is_written() -> None:
    alone = plots.method_looks(["last_2"])["last_2"]
    for names in (["full", "lora", "last_2"], ["own way", "last 2"], ["last-2 (on record)", "other"], ["Last 2"]):
        looks = plots.method_looks(names)
        assert [look for name, look in looks.items() if "2" in name] == [alone]


def test_a_method_that_is_not_listed_gets_a_look_of_its_own_that_stays() -> None:
    alone = plots.method_looks(["my method"])["my method"]
    assert plots.method_looks(["my method", "majority"])["my method"] == alone
    names = [f"m{i}" for i in range(20)]
    looks = plots.method_looks(["full", *names])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 21
    few = plots.method_looks(["full", *names[:5]])
    assert len({look["color"] for look in few.values()}) == 6
    assert len(plots.method_looks([f"m{i}" for i in range(90)])) == 90  # more than there are looks


def test_a_method_looks_the_same_in_every_figure(drawn: Callable) -> None:
    names = ["full", "lora", "own", "last_2"]
    points = pd.DataFrame({"accuracy": 0.7, "low": 0.6, "high": 0.8, "cost": range(1, 5)}, index=names)
    entry = {"accuracy": 0.5, "ci95": (0.4, 0.6)}
    for order in (names, names[::-1]):
        looks = []
        for function in (
            lambda order=order: plots.tradeoff(points.loc[order], xlabel="x"),
            lambda order=order: plots.studies(dict.fromkeys(order, SUMMARY), xlabel="x"),
            lambda order=order: plots.scores(dict.fromkeys(order, entry)),
        ):
            bars = drawn(function).axes[0].containers
            lines = dict(zip(order, (bar.lines[0] for bar in bars), strict=True))
            looks.append({name: (line.get_color(), line.get_marker()) for name, line in lines.items() if name != "own"})
        curves = drawn(lambda order=order: plots.learning_curves({name: [HISTORY] for name in order})).axes[1].lines
        looks.append({n: (c.get_color(), c.get_marker()) for n, c in zip(order, curves, strict=True) if n != "own"})
        assert all(look == {name: plots.METHODS[name] for name in ("full", "lora", "last_2")} for look in looks)


# Seeds as dots, and the numbers that are drawn ------------------------------------------------------------------


def seeds_of(ax: plt.Axes) -> list[list[float]]:
    return [dots.get_offsets()[:, 0].tolist() for dots in ax.collections if isinstance(dots, PathCollection)]


def test_few_seeds_are_drawn_as_dots_and_not_as_an_interval(drawn: Callable) -> None:
    few = {"accuracy": 0.7, "ci95": (0.6, 0.8), "by_seed": [0.69, 0.7, 0.71]}
    one, many = few | {"by_seed": [0.7]}, few | {"by_seed": [0.7] * 10}
    draw = lambda: plots.scores({"lora": few, "full": one, "adapter": many})  # noqa: E731
    ax = drawn(draw).axes[0]
    assert seeds_of(ax) == [[0.69, 0.7, 0.71]]
    assert [bar.has_xerr for bar in ax.containers] == [False, True, True]
    assert "small dot: a seed; bar: 95 % interval" in ax.get_xlabel()
    assert "lora 0.70 (seeds 0.69, 0.70, 0.71), full 0.70, adapter 0.70" in draw().alt
    assert draw().table.loc["lora", ["run 1", "run 2", "run 3"]].tolist() == [0.69, 0.7, 0.71]
    assert "interval" not in plots.scores({"lora": few}).alt


def test_a_study_with_scores_by_seed_is_drawn_with_dots(drawn: Callable) -> None:
    summary = SUMMARY.assign(by_seed=[[0.4, 0.5, 0.6], [0.8, 0.8]])
    dots = [(10, 0.4), (10, 0.5), (10, 0.6), (100, 0.8), (100, 0.8)]
    single, several = (
        drawn(draw).axes[0]
        for draw in (
            lambda: plots.study(summary, xlabel="rows"),
            lambda: plots.studies({"full": summary, "lora": summary}, xlabel="rows"),
        )
    )
    for ax in (single, several):
        assert [tuple(place) for place in ax.lines[0].get_xydata()] == dots
        assert not [lines for lines in ax.collections if isinstance(lines, LineCollection)]
    assert "by_seed" not in plots.study(summary, xlabel="rows").table
    points = POINTS.assign(by_seed=[[0.7, 0.71], [0.8, 0.79]])
    ax = drawn(lambda: plots.tradeoff(points, xlabel="seconds")).axes[0]
    assert [bar.has_yerr for bar in ax.containers] == [False, False]
    assert "small dot: a seed" in ax.get_ylabel()


def test_the_grey_lines_of_a_majority_are_named_beside_the_axes(drawn: Callable) -> None:
    domains = {"films": METRICS["majority"], "tweets": METRICS["majority"] | {"majority": 0.68}}
    ax = drawn(lambda: plots.scores(domains)).axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["majority"]
    assert "tweets 0.50 (majority 0.68)" in plots.scores(domains).alt


def test_the_alt_text_of_learning_curves_has_the_numbers_that_are_drawn(drawn: Callable) -> None:
    other = History(steps=HISTORY.steps[:15], epochs=[EPOCHS[0], EPOCHS[0] | {"epoch": 2, "validation_loss": 0.3}])
    runs = {"full": [HISTORY, other], "from_scratch": [History(steps=HISTORY.steps[:3])]}
    for function in (plots.learning_curves, plots.loss_panels):
        draw = lambda function=function: function(runs, num_classes=3)  # noqa: E731
        axes = drawn(draw).axes
        lines = [line for ax in axes[: 1 if function is plots.learning_curves else 2] for line in ax.lines]
        training = [line.get_ydata()[-1] for line in lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 2]
        validation = [line for line in lines if line.get_linestyle() == "--" and len(line.get_xdata())]
        assert [list(line.get_ydata()) for line in validation] == [[0.5], [0.5, 0.3]]
        assert [list(line.get_xdata()) for line in validation] == [[20], [7.5, 15]]  # ends of the epochs, in steps
        alt = draw().alt
        assert f"full: training loss {np.mean(training[:2]):.2f}, validation loss 0.40, validation accuracy 0.70" in alt
        assert f"from scratch: training loss {training[2]:.2f}." in alt
        assert "A line marks ln 3 = 1.10." in alt
        assert any(list(line.get_ydata()) == [np.log(3)] * 2 for line in lines)
    assert "ln" not in plots.learning_curves(runs).alt


def test_marks_of_equal_cost_are_moved_on_the_paper_and_keep_their_values(drawn: Callable) -> None:
    costs = {"last_2": 3.7e6, "gradual": 2.27e7, "full": 2.27e7, "llrd": 2.27e7, "linear_probe": 770.0}
    points = pd.DataFrame({"accuracy": 0.7, "low": 0.6, "high": 0.8, "cost": pd.Series(costs)})
    figure = drawn(lambda: plots.tradeoff(points, xlabel="weights that train"))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    marks = dict(zip(points.index, (bar.lines[0] for bar in ax.containers), strict=True))
    assert {name: mark.get_xdata()[0] for name, mark in marks.items()} == costs
    shown = {name: mark.get_transform().transform(mark.get_xydata())[0, 0] for name, mark in marks.items()}
    true = {name: ax.transData.transform((cost, 0.7))[0] for name, cost in costs.items()}
    aside = {name: (shown[name] - true[name]) * 72 / figure.dpi for name in costs}
    assert aside == pytest.approx({"last_2": 0, "gradual": -10, "full": 0, "llrd": 10, "linear_probe": 0}, abs=1e-6)
    assert "almost equal cost: side by side" in ax.get_xlabel()
    inside = ax.get_window_extent()
    assert all(inside.x0 < x < inside.x1 for x in shown.values())
    assert "side by side" not in drawn(lambda: plots.tradeoff(POINTS, xlabel="seconds")).axes[0].get_xlabel()


def test_the_bars_of_methods_stay_inside_the_axes(drawn: Callable) -> None:
    for draw in (FIGURES["studies"], FIGURES["tradeoff"]):
        ax = drawn(draw).axes[0]
        low, high = ax.get_ylim()
        ends = [y for bars in ax.collections for segment in bars.get_segments() for y in segment[:, 1]]
        assert ends and all(low < y < high for y in ends)


# Fonts ------------------------------------------------------------------------------------------------------


def forget_fonts() -> None:
    plots._families_for.cache_clear()
    plots._fetch_font.cache_clear()


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As on a computer with no font but matplotlib's own; the list gets the names of the assets that are asked for."""
    asked = []

    def fetch(name: str) -> Path:
        asked.append(name)
        raise AssetError(f"The asset {name!r} is not cached.")

    usual = [entry for entry in font_manager.fontManager.ttflist if entry.name.startswith(("DejaVu Sans", "Last"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", usual)
    monkeypatch.setattr(plots.registry, "fetch", fetch)
    monkeypatch.setattr(plots, "_TOLD", set())
    forget_fonts()
    yield asked
    forget_fonts()


@pytest.mark.filterwarnings("error")
def test_without_a_font_for_a_script_one_sentence_is_printed_once(
    fonts: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    plots.confusion(np.eye(2, dtype=int), ["好评", "差评"])
    said = capsys.readouterr()
    assert said.out == (
        "No font on this computer has characters such as '好', so figures show boxes in their place: install a font "
        "that has them, or run `ftkit fetch cjk-font`.\n"
    )
    plots.confusion(np.eye(2, dtype=int), ["质量", "物流"])
    plots.bars(pd.Series([1.0], index=["好评"]), xlabel="x")
    assert capsys.readouterr().out == said.err == ""
    assert fonts == ["cjk-font"]
    plots.schedule({"บวก": [1.0]})
    assert capsys.readouterr().out == (
        "No font on this computer has characters such as 'ก', so figures show boxes in their place: install a font "
        "that has them.\n"
    )
    assert fonts == ["cjk-font"] and not caplog.records


@pytest.mark.filterwarnings("error")
def test_arabic_and_european_letters_and_unprintable_characters_need_nothing(
    fonts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["إيجابي", "שלילי", "übel", "плохо", "κακό", "kötü", "tab\tand\nline", "\u200bzero", "−½ …"]
    plots.confusion(np.eye(len(names), dtype=int), names)
    assert not fonts and capsys.readouterr().out == ""


@pytest.mark.filterwarnings("error")
def test_a_font_of_the_computer_is_used_for_what_the_usual_one_lacks(
    drawn: Callable, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    ours = FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    stix = FT2Font(font_manager.findfont("STIXGeneral")).get_charmap()
    letter = next(chr(code) for code in sorted(set(stix) - set(ours)) if chr(code).isalpha())
    figure = drawn(lambda: plots.confusion(np.eye(2, dtype=int), [f"a {letter}", "b"]))
    kept = plots.Figure(figure, "alt", pd.DataFrame())
    label, other = figure.axes[0].get_yticklabels()
    paths = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in label.get_fontfamily()]
    assert any(ord(letter) in FT2Font(path).get_charmap() for path in paths)
    assert len(other.get_fontfamily()) == 1
    assert len(kept.png) > 1000 and capsys.readouterr().out == "" and not caplog.records


@pytest.mark.filterwarnings("error")
def test_chinese_japanese_and_korean_are_drawn_with_the_pinned_font(
    fonts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    boxes = plots.confusion(np.eye(3, dtype=int), ["好评", "ひらがな", "한국어"]).png
    assert "cjk-font" in capsys.readouterr().out
    monkeypatch.undo()
    if registry.offline() and not registry.is_cached("cjk-font"):
        pytest.skip("FTKIT_OFFLINE is set and cjk-font is not cached")
    forget_fonts()
    assert plots.confusion(np.eye(3, dtype=int), ["好评", "ひらがな", "한국어"]).png != boxes
    assert capsys.readouterr().out == "" and not caplog.records
