"""Figures with alt text and a table of their numbers."""

import base64
import functools
import html
import io
import itertools
import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager, patheffects
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.font_manager import FontProperties, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator
from numpy.typing import ArrayLike

from ftkit.data.assets import registry
from ftkit.errors import AssetError
from ftkit.training.state import History

# Okabe and Ito (2008): distinguishable with the common forms of colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_MARKERS = "os^Dv<>"

_MAX_CLASSES_WITH_NUMBERS = 20  # in a larger matrix the numbers do not fit into the cells

_MAX_ALT = 2000  # characters

_MAX_TABLE = {"max_rows": 400, "max_cols": 30}  # of the table below a figure

NO_MATH = "mathjax_ignore tex2jax_ignore"  # classes of HTML in which Jupyter does not set $…$ as a formula

STYLE = {
    "text.parse_math": False,  # the reader's texts may have dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 11,
    "figure.dpi": 110,
}


class Figure:
    """A figure as a notebook shows it: an image with alt text, and a table of its numbers that opens on a click.

    Args:
        drawn: the matplotlib figure; it is rendered as PNG and closed.
        alt: what the figure shows, for readers who cannot see it; the end of a very long one is left out.
        table: the plotted numbers.
    """

    def __init__(self, drawn: MatplotlibFigure, alt: str, table: pd.DataFrame) -> None:
        buffer = io.BytesIO()
        with _without_font_warnings():
            _find_fonts(drawn)
            drawn.savefig(buffer, format="png", bbox_inches="tight")
        plt.close(drawn)
        self.png, self.table = buffer.getvalue(), table
        self.alt = alt if len(alt) <= _MAX_ALT else f"{alt[: _MAX_ALT - 1]}…"

    def __repr__(self) -> str:
        return f"[figure: {self.alt}]"

    def _repr_html_(self) -> str:
        image = base64.b64encode(self.png).decode("ascii")
        table = self.table
        cut = len(table) > _MAX_TABLE["max_rows"] or len(table.columns) > _MAX_TABLE["max_cols"]
        options = {"border": 0, "na_rep": "", "float_format": "{:.3f}".format, "show_dimensions": cut}
        numbers = table.to_html(**options, **_MAX_TABLE)
        return (
            f'<img alt="{html.escape(self.alt)}" src="data:image/png;base64,{image}" style="max-width: 100%">'
            f'<details class="{NO_MATH}"><summary>the numbers</summary>{numbers}</details>'
        )


_TOLD: set[str] = set()  # the scripts for which a missing font was reported


@contextmanager
def _without_font_warnings() -> Iterator[None]:
    """Keep matplotlib from reporting fonts and characters: ``_find_fonts`` says once what a reader can do."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            yield
    finally:
        log.setLevel(level)


def _find_fonts(drawn: MatplotlibFigure) -> None:
    """Give each text with characters that the usual font lacks further fonts that have them; say if there are none."""
    usual = get_font(font_manager.findfont(FontProperties()))
    lacking = {
        text: characters
        for text in drawn.findobj(Text)
        if (characters := {c for c in text.get_text() if c.isprintable() and not usual.get_char_index(ord(c))})
    }
    if not lacking:
        return
    families, missing = _families_for(frozenset().union(*lacking.values()))
    for text in lacking:
        text.set_fontfamily([*text.get_fontfamily(), *families])
        if any(_font(family).style_name == "Thin" for family in families):  # matplotlib cannot set the weight of a font
            stroke = 0.04 * text.get_fontsize()
            text.set_path_effects([patheffects.withStroke(linewidth=stroke, foreground=text.get_color())])
    for character in sorted(missing):
        pinned = _is_east_asian(character)
        script = "East Asian" if pinned else unicodedata.name(character, "unknown").split()[0]
        if script not in _TOLD:
            cure = ", or run `ftkit fetch cjk-font`" if pinned else ""
            print(
                f"No font on this computer has characters such as {character!r}, so figures show boxes in their place: "
                f"install a font that has them{cure}."
            )
        _TOLD.add(script)


@functools.cache
def _fetch_font() -> bool:
    """Make the pinned font known to matplotlib; return whether it is there. Once, or each figure would wait for it."""
    try:
        (path,) = registry.fetch("cjk-font").iterdir()
    except AssetError:  # no network: figures are drawn without it
        return False
    font_manager.fontManager.addfont(path)
    return True


@functools.lru_cache(maxsize=64)
def _families_for(characters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Return the families of fonts that have these characters, and the characters that none has.

    If the fonts of this computer lack letters of Chinese, Japanese or Korean, the pinned font is fetched.
    """
    families, missing = _installed_families(characters)
    if any(map(_is_east_asian, missing)) and _fetch_font():
        families, missing = _installed_families(characters)
    return families, missing


def _installed_families(characters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """The same, of the fonts that matplotlib knows now."""
    names = " ".join(unicodedata.name(character, "") for character in characters)
    form = "JP" if "HIRAGANA" in names or "KATAKANA" in names else "KR" if "HANGUL" in names else "SC"
    files = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist if entry.style == "normal"}
    has: dict[str, frozenset[str]] = {}
    # of fonts that have as many of the characters, first those with the letter forms of the language, then sans serifs
    for family in sorted(files, key=lambda name: (not name.endswith(form), "sans" not in name.lower(), name)):
        if "Color" in family or "Resort" in family:  # pictures, or boxes for all characters
            continue
        with suppress(OSError, RuntimeError):  # damaged, or of a kind that matplotlib cannot draw
            font = get_font(files[family])
            has[family] = _those_in(font, characters) if font.scalable else frozenset()
    families, missing = [], characters
    while most := max(has, key=lambda family: len(has[family] & missing), default=None):
        if not has.pop(most) & missing:
            break
        if found := _those_in(_font(most), missing):  # matplotlib may choose another file of the family
            families.append(most)
            missing -= found
    return families, missing


def _those_in(font: FT2Font, characters: frozenset[str]) -> frozenset[str]:
    return frozenset(character for character in characters if font.get_char_index(ord(character)))


def _font(family: str) -> FT2Font:
    return get_font(font_manager.findfont(FontProperties(family=[family])))


def _is_east_asian(character: str) -> bool:
    """Whether it is a letter of Chinese, Japanese or Korean."""
    return unicodedata.east_asian_width(character) in "WF" and unicodedata.category(character)[0] == "L"


def short(text: object, most: int = 32) -> str:
    """Return a text as a figure shows it: in one line, and with an ellipsis in place of the end of a long one.

    Args:
        text: name of a class, caption, or other label.
        most: number of characters.
    """
    line = " ".join(str(text).split())
    line = line if len(line) <= most else f"{line[: most - 1].rstrip()}…"
    return f"\u200b{line}" if line.startswith("_") else line  # a leading underscore would hide it in a legend


def ticks(names: Iterable[object], most: int = 40) -> tuple[list[int], list[str]]:
    """Return positions and texts of tick labels: every n-th of the names, so that no more than ``most`` are shown."""
    texts = [short(name) for name in names]
    chosen = range(0, len(texts), -(-len(texts) // most) or 1)
    return list(chosen), [texts[i] for i in chosen]


def look(i: int) -> dict[str, str]:
    """Choose colour and marker of the i-th method; when colours repeat, the markers differ."""
    repeats = i // len(COLOURS)
    return {"marker": _MARKERS[(i + repeats) % len(_MARKERS)], "color": COLOURS[i % len(COLOURS)]}


def side_legend(ax: plt.Axes) -> None:
    """Put the legend to the right of the axes, in columns of at most 25 entries."""
    columns = -(-len(ax.get_legend_handles_labels()[1]) // 25) or 1
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns)


def log_axis(ax: plt.Axes, values: Iterable[float]) -> None:
    """Make the x axis logarithmic, with ticks that suit the span of the values (all positive) and need no formula."""
    values = list(values)
    span = max(values) / min(values)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if span > 100 else (1, 2, 5) if span > 10 else range(1, 10)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()


def scores(metrics: Mapping[str, Mapping[str, Any]], *, axis: str = "accuracy on the test rows") -> Figure:
    """Plot the accuracy of each method as a dot with its 95 % interval.

    Args:
        metrics: by method, as in metrics.json: ``accuracy``, ``ci95`` and, if a grey line is to mark it, ``majority``.
        axis: label of the axis of the accuracy.
    """
    names = [name.replace("_", " ") for name in metrics]
    values = [method["accuracy"] for method in metrics.values()]
    low, high = zip(*(method["ci95"] for method in metrics.values()), strict=True)
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7, 0.55 * len(names) + 0.9))
        ax.errorbar(values, range(len(names)), xerr=_error_bars(values, low, high), fmt="o", capsize=4, markersize=7)
        for i, value in enumerate(values):
            ax.annotate(f"{value:.2f}", (value, i), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
        for i, method in enumerate(metrics.values()):
            if "majority" in method:
                ax.plot([method["majority"]] * 2, [i - 0.3, i + 0.3], color="0.4", label="majority" if i == 0 else None)
                ax.legend(frameon=False, loc="lower left")
        ax.set_yticks(range(len(names)), [short(name, 100) for name in names])
        ax.set_xlabel(f"{axis} (dot: mean over seeds; bar: 95 % interval)")
        ax.set_ylim(len(names) - 0.4, -0.7)
    listed = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, values, strict=True))
    table = pd.DataFrame({"accuracy": values, "low": low, "high": high}, index=names)
    return Figure(drawn, f"{axis[:1].upper()}{axis[1:]}, with 95 % interval: {listed}.", table)


def learning_curves(runs: Mapping[str, Sequence[History]]) -> Figure:
    """Plot training loss by step and validation accuracy by epoch, one thin line per seed of each method.

    Args:
        runs: by method, the history of each seed.
    """
    with plt.rc_context(STYLE):
        drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
        rows = []
        for i, (name, histories) in enumerate(runs.items()):
            colour = look(i)["color"]
            for seed, history in enumerate(histories):
                label = short(name.replace("_", " "), 60) if seed == 0 else None
                losses = pd.Series([step["loss"] for step in history.steps])
                smooth = losses.rolling(10, min_periods=1).mean()
                left.plot(losses.index + 1, smooth, color=colour, alpha=0.8, lw=1.5, label=label)
                validated = [epoch for epoch in history.epochs if "validation_accuracy" in epoch]
                epochs = [epoch["epoch"] for epoch in validated]
                accuracies = [epoch["validation_accuracy"] for epoch in validated]
                right.plot(epochs, accuracies, "o-", color=colour, alpha=0.8, label=label)
                rows += [{"method": name, "run": seed, **epoch} for epoch in history.epochs]
        left.set(xlabel="optimiser step (mean of the last 10)", ylabel="training loss (nats)", ylim=(0, None))
        right.set(xlabel="epoch", ylabel="validation accuracy")
        right.set_xticks(sorted({row["epoch"] for row in rows}))
        left.legend(frameon=False)
    last = {name: np.mean([h.steps[-1]["loss"] for h in histories]) for name, histories in runs.items()}
    listed = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in last.items())
    alt = f"Training loss by step and validation accuracy by epoch; mean loss at the last step: {listed}."
    return Figure(drawn, alt, pd.DataFrame(rows).set_index(["method", "run", "epoch"]))


def confusion(counts: ArrayLike, names: Sequence[str]) -> Figure:
    """Show a confusion matrix; the shade of a cell is its share of the row.

    With more than 20 classes, the cells have no numbers, and not every class has a label.

    Args:
        counts: number of rows by true class (row) and predicted class (column), shape (C, C).
        names: names of the C classes.
    """
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = len(names) > _MAX_CLASSES_WITH_NUMBERS
    cell = min(0.8, 8 / len(names))  # inches
    side = 1.6 + cell * len(names)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        drawn, ax = plt.subplots(figsize=(side + 0.6, side))
        shown = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if many:
            drawn.colorbar(shown, ax=ax, fraction=0.04, pad=0.02, label="share of the row").outline.set_visible(False)
        else:
            size = min(11, 22 * cell)
            for (i, j), count in np.ndenumerate(counts):
                colour = "white" if share[i, j] > 0.5 else "black"
                ax.text(j, i, f"{count:,}", ha="center", va="center", color=colour, fontsize=size)
        positions, labels = ticks(names)
        ax.set(xticks=positions, yticks=positions, xticklabels=labels, yticklabels=labels)
        ax.set(xlabel="predicted", ylabel="true")
        ax.tick_params(labelsize=8 if many else 11)
        ax.tick_params(axis="x", rotation=90 if many else 45 if len(names) > 3 else 0)
    right = counts.trace() / counts.sum()
    alt = f"Confusion matrix of {counts.sum():,} rows; {right:.0%} lie on the diagonal."
    return Figure(drawn, alt, pd.DataFrame(counts, index=names, columns=names))


def study(
    summary: pd.DataFrame,
    *,
    xlabel: str,
    live: Mapping[float, float] | None = None,
    reference: tuple[str, float] | None = None,
) -> Figure:
    """Plot the score of a recorded study against one parameter, on a logarithmic axis.

    Args:
        summary: from ``Study.summary``.
        xlabel: name and unit of the parameter.
        live: scores of runs made just now, by value of the parameter; the study need not have that value.
        reference: name and score of a baseline, drawn as a grey line.
    """
    live = live or {}
    score = str(summary.columns.name or "score").replace("_", " ")
    values = sorted({*summary.index, *live})
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        for low, high, width, label in (
            ("run_low", "run_high", 1.2, "95 % interval of one further run"),
            ("low", "high", 4.5, "95 % interval of the mean"),
        ):
            ax.vlines(summary.index, summary[low], summary[high], color=COLOURS[0], lw=width, label=label)
        ax.plot(summary.index, summary["mean"], "o-", color=COLOURS[0], markersize=7, lw=1.2, label="mean over seeds")
        if live:
            ax.plot(*zip(*live.items(), strict=True), "D", color=COLOURS[1], markersize=6, label="live run")
        if reference:
            ax.axhline(reference[1], color="0.6", zorder=0, label=short(reference[0], 60))
        ax.set(xscale="log", xlabel=xlabel, ylabel=score)
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        side_legend(ax)
    listed = ", ".join(f"{value:g}: {mean:.2f}" for value, mean in summary["mean"].items())
    listed += "".join(f"; live run, {value:g}: {height:.2f}" for value, height in live.items())
    table = summary.reindex(values).rename(columns=lambda name: name.replace("_", " "))
    table = table.astype({"seeds": "Int64"}).assign(live=pd.Series(live, dtype=float)).rename_axis(index=xlabel)
    return Figure(drawn, f"{score.capitalize()} by {xlabel}, mean over seeds. {listed}.", table)


def studies(
    summaries: Mapping[str, pd.DataFrame], *, xlabel: str, reference: tuple[str, float] | None = None
) -> Figure:
    """Plot the scores of several methods in a recorded study against one parameter, on a logarithmic axis.

    Args:
        summaries: by method, each from ``Study.summary``.
        xlabel: name and unit of the parameter.
        reference: name and score of a baseline, drawn as a grey line.
    """
    score = str(next(iter(summaries.values())).columns.name or "score").replace("_", " ")
    values = sorted({value for summary in summaries.values() for value in summary.index})
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        for i, (name, summary) in enumerate(summaries.items()):
            x = summary.index * 1.03 ** (i - len(summaries) / 2)  # a little apart, or the bars would hide one another
            errors = _error_bars(summary["mean"], summary["low"], summary["high"])
            label = short(name.replace("_", " "), 60)
            ax.errorbar(x, summary["mean"], yerr=errors, **look(i), capsize=2, lw=1.2, label=label)
        if reference:
            ax.axhline(reference[1], color="0.6", zorder=0, label=short(reference[0], 60))
        ax.set(xscale="log", xlabel=xlabel, ylabel=f"{score}\n(mean over seeds, 95 % interval)")
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        side_legend(ax)
    listed = [
        f"{name.replace('_', ' ')}: {', '.join(f'{value:g} {mean:.2f}' for value, mean in summary['mean'].items())}"
        for name, summary in summaries.items()
    ]
    listed += [f"{reference[0]} {reference[1]:.2f}"] if reference else []
    table = pd.concat(summaries, names=["method"])[["mean", "low", "high", "seeds"]]
    return Figure(drawn, f"{score.capitalize()} by {xlabel}, mean over seeds. {'; '.join(listed)}.", table)


def tradeoff(points: pd.DataFrame, *, xlabel: str) -> Figure:
    """Plot the accuracy of each method, with its interval, against its cost, on a logarithmic axis.

    Args:
        points: indexed by method, with the columns cost, accuracy, low and high.
        xlabel: name and unit of the cost.
    """
    span = points["cost"].max() / points["cost"].min()
    position: dict[str, float] = {}
    for name, cost in points["cost"].sort_values(kind="stable").items():  # methods of almost equal cost: side by side
        position[name] = max(cost, span**0.02 * max(position.values(), default=0))
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        for i, (name, point) in enumerate(points.iterrows()):
            errors = _error_bars([point["accuracy"]], [point["low"]], [point["high"]])
            label = short(str(name).replace("_", " "), 60)
            size = {"capsize": 4, "markersize": 7}
            ax.errorbar(position[name], point["accuracy"], yerr=errors, label=label, linestyle="", **look(i), **size)
        log_axis(ax, points["cost"])
        ax.xaxis.set_major_formatter(EngFormatter())
        ax.set(xlabel=xlabel, ylabel="accuracy on the test rows\n(mean over seeds, 95 % interval)")
        side_legend(ax)
    listed = ", ".join(f"{n} {p['accuracy']:.2f} at {p['cost']:.3g}".replace("_", " ") for n, p in points.iterrows())
    return Figure(drawn, f"Accuracy by {xlabel}: {listed}.", points)


def spectra(held: Mapping[str, ArrayLike], *, xlabel: str) -> Figure:
    """Plot how much of a change in weights lies in its k largest singular directions, against k, one line per change.

    Args:
        held: by name of the change, the share of the squared norm in the first k directions for k = 1 … K, shape (K,).
        xlabel: label of the axis of k, which is logarithmic.
    """
    shares = {name: np.asarray(share) for name, share in held.items()}
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, 3.4))
        for (name, share), dashes in zip(shares.items(), itertools.cycle(("-", "--", "-.", ":")), strict=False):
            ax.plot(range(1, len(share) + 1), share, dashes, lw=2, label=short(name.replace("_", " "), 60))
        log_axis(ax, [1, *map(len, shares.values())])
        ax.set(xlabel=xlabel, ylabel="share of the squared norm", ylim=(0, 1.03))
        ax.legend(frameon=False)
    listed = ", ".join(f"{name} {share[0]:.2f} in the first" for name, share in shares.items())
    table = pd.DataFrame({name: pd.Series(share, index=range(1, len(share) + 1)) for name, share in shares.items()})
    return Figure(drawn, f"Share of the change in the first k {xlabel}: {listed}.", table.rename_axis("k"))


def bars(values: pd.Series, *, xlabel: str) -> Figure:
    """Plot a horizontal bar for each value, the first on top.

    Args:
        values: indexed by name.
        xlabel: name and unit of the values.
    """
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, min(0.28 * len(values), 12) + 0.8))
        ax.barh(range(len(values)), values, height=0.7)
        ax.set_yticks(*ticks(values.index))
        ax.set_xlabel(xlabel)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    listed = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    return Figure(drawn, f"{xlabel[0].upper()}{xlabel[1:]}: {listed}.", values.to_frame(xlabel))


def slopes(table: pd.DataFrame, *, xlabel: str, ylabel: str) -> Figure:
    """Plot how the value of each row changes from column to column, one line per row, and their mean.

    Args:
        table: the values.
        xlabel: what the columns are.
        ylabel: name and unit of the values.
    """
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(5.5, 3.4))
        positions = range(len(table.columns))
        for i, (name, values) in enumerate(table.iterrows()):
            form = f"{'o^D'[i // len(COLOURS) % 3]}-"  # another marker when the colours repeat
            style = {"color": COLOURS[i % len(COLOURS)], "lw": 1, "markersize": 4, "alpha": 0.7}
            ax.plot(positions, values, form, label=short(name, 60), **style)
        ax.plot(positions, table.mean(), "s-", color="black", lw=2.5, label="mean")
        ax.set(xticks=positions, xticklabels=map(short, table.columns), xlim=(-0.15, len(positions) - 0.85))
        ax.set(xlabel=xlabel, ylabel=ylabel)
        side_legend(ax)
    means = ", ".join(f"{column} {value:.2f}" for column, value in table.mean().items())
    return Figure(drawn, f"{ylabel[0].upper()}{ylabel[1:]}, one line per row; mean: {means}.", table)


def schedule(rates: Mapping[str, Sequence[float]]) -> Figure:
    """Plot the learning rate against the optimiser step, one line per schedule.

    Args:
        rates: by name of the schedule, the rate at each step.
    """
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, 2.8))
        for name, values in rates.items():
            ax.plot(range(1, len(values) + 1), values, label=short(name, 60))
        ax.set(xlabel="optimiser step", ylabel="learning rate")
        ax.legend(frameon=False)
    peaks = ", ".join(f"{name} peaks at {max(values):g}" for name, values in rates.items())
    return Figure(drawn, f"Learning rate by step: {peaks}.", pd.DataFrame(rates).rename_axis("step"))


def _error_bars(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Lengths of the error bars below and above the values."""
    return [
        [value - end for value, end in zip(values, low, strict=True)],
        [end - value for value, end in zip(values, high, strict=True)],
    ]
