"""Figures with alt text and a table of their numbers."""

import base64
import functools
import html
import io
import itertools
import logging
import unicodedata
import warnings
import zlib
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
from matplotlib.transforms import ScaledTranslation, Transform
from numpy.typing import ArrayLike

from ftkit.data.assets import registry
from ftkit.errors import AssetError
from ftkit.training.state import History

# Okabe and Ito (2008): distinguishable with the common forms of colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_MARKERS = "os^Dv<>"

_BLUE, _VERMILLION, _GREEN, _PINK, _ORANGE, _SKY, _BLACK = COLOURS

_GREY = "#888888"

# one look for a method in all lessons; methods that a lesson compares differ in colour, relatives share one
METHODS = {
    # what needs no training of the network
    "majority": (_GREY, "X"),
    "guessing": (_GREY, "P"),
    "bag_of_words": (_PINK, "^"),
    "frozen_probe": (_ORANGE, "D"),
    "linear_probe_mean": (_ORANGE, "p"),
    "linear_probe": (_ORANGE, "s"),
    "zero_shot": (_BLACK, "o"),
    "zero_shot_best": (_BLACK, "^"),
    "zero_shot_worst": (_BLACK, "v"),
    "few_shot": (_SKY, "s"),
    "calibrated": (_SKY, "D"),
    # fine-tuning and freezing
    "full": (_BLUE, "o"),
    "encoder_full": (_BLUE, "s"),
    "from_scratch": (_VERMILLION, "v"),
    "last_1": (_SKY, "^"),
    "last_n": (_GREEN, "s"),
    "last_2": (_GREEN, "v"),
    "last_4": (_PINK, "D"),
    "gradual": (_VERMILLION, "<"),
    "llrd": (_BLACK, ">"),
    # adapters and prompts
    "bitfit": (_PINK, "s"),
    "ia3": (_SKY, "o"),
    "lora": (_VERMILLION, "o"),
    "lora_all_linear": (_VERMILLION, "s"),
    "adapter": (_GREEN, "o"),
    "prompt_tuning": (_GREEN, "^"),
    "prefix_tuning": (_PINK, "o"),
    "p_tuning": (_ORANGE, "o"),
    # one task after another
    "naive": (_BLUE, "v"),
    "joint": (_BLACK, "*"),
    "frozen": (_GREY, "s"),
    "replay": (_GREEN, "D"),
    "ewc": (_PINK, "v"),
    "l2sp": (_SKY, "v"),
    "lwf": (_ORANGE, "^"),
    "low_rate": (_BLUE, "<"),
    "wise_ft": (_BLACK, "<"),
    # texts and images
    "heads_only": (_ORANGE, "v"),
    "locked_image": (_SKY, "<"),
    "both": (_BLUE, "D"),
    "one_line_loss": (_PINK, "<"),
}

_FEW = 10  # seeds; fewer are drawn as dots, since an interval of so few is rough

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
        with registry.reading("cjk-font") as folder:
            (path,) = folder.iterdir()
            font_manager.fontManager.addfont(path)
    except AssetError:  # no network, or a damaged file: figures are drawn without it
        return False
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
    """Choose colour and marker of the i-th series; when colours repeat, the markers differ."""
    repeats = i // len(COLOURS)
    return {"marker": _MARKERS[(i + repeats) % len(_MARKERS)], "color": COLOURS[i % len(COLOURS)]}


def method_looks(names: Iterable[object]) -> dict[Any, dict[str, str]]:
    """Choose colour and marker of each method of a figure: those of ``METHODS``, which are the same in all lessons.

    A method that is not listed gets a look that depends on its name, or, if others of this figure have its colour, the
    next colour that none of them has.

    Args:
        names: of the methods; "last 2" and "last_2 (on record)" are last_2.
    """
    names = list(names)
    taken = {name: METHODS[_key(name)] for name in names if _key(name) in METHODS}
    for name in names:
        if name not in taken:
            first, pairs, colours = zlib.crc32(str(name).encode()), set(taken.values()), {c for c, _ in taken.values()}
            order = [look(first % len(COLOURS) + i) for i in range(len(COLOURS) * len(_MARKERS))]
            free = [(one["color"], one["marker"]) for one in order]
            free = [pair for pair in free if pair not in pairs] or free  # in a figure of more, looks repeat
            taken[name] = next((pair for pair in free if pair[0] not in colours), free[0])
    return {name: {"color": taken[name][0], "marker": taken[name][1]} for name in names}


def _key(name: object) -> str:
    return "_".join(str(name).partition(" (")[0].lower().replace("-", " ").split())


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
    """Plot the accuracy of each method: its mean, and a small dot for each seed, or its 95 % interval.

    Args:
        metrics: by method, as in metrics.json: ``accuracy``; ``by_seed`` and ``ci95``, of which the seeds are drawn if
            there are from 2 to 9; and, if a grey line is to mark it, ``majority``.
        axis: label of the axis of the accuracy.
    """
    names = [name.replace("_", " ") for name in metrics]
    values = [method["accuracy"] for method in metrics.values()]
    low, high = zip(*(method["ci95"] for method in metrics.values()), strict=True)
    by_seed = [method.get("by_seed") or [] for method in metrics.values()]
    by_seed = [seeds if 1 < len(seeds) < _FEW else [] for seeds in by_seed]
    usual = {"color": COLOURS[0], "marker": "o"}
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7, 0.55 * len(names) + 0.9))
        for i, name in enumerate(metrics):
            style = method_looks([name])[name] if _key(name) in METHODS else usual
            if by_seed[i]:
                ax.scatter(by_seed[i], [i + 0.22] * len(by_seed[i]), s=14, color=style["color"], lw=0, alpha=0.8)
            errors = None if by_seed[i] else _error_bars([values[i]], [low[i]], [high[i]])
            ax.errorbar([values[i]], [i], xerr=errors, linestyle="", capsize=4, markersize=7, **style)
        for i, value in enumerate(values):
            ax.annotate(f"{value:.2f}", (value, i), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
        for i, method in enumerate(metrics.values()):
            if "majority" in method:
                label = None if any("majority" in other for other in list(metrics.values())[:i]) else "majority"
                ax.plot([method["majority"]] * 2, [i - 0.3, i + 0.3], color="0.4", label=label)
        if ax.get_legend_handles_labels()[1]:
            side_legend(ax)
        ax.set_yticks(range(len(names)), [short(name, 100) for name in names])
        parts = ["large mark: mean over seeds"] if any(by_seed) else ["dot: mean over seeds"]
        parts += ["small dot: a seed"] if any(by_seed) else []
        parts += ["bar: 95 % interval"] if not all(by_seed) else []
        ax.set_xlabel(f"{axis}\n({'; '.join(parts)})")
        ax.set_ylim(len(names) - 0.4, -0.7)
    listed = ", ".join(
        f"{name} {value:.2f}"
        + (f" (seeds {', '.join(f'{score:.2f}' for score in seeds)})" if seeds else "")
        + (f" (majority {method['majority']:.2f})" if "majority" in method else "")
        for name, value, seeds, method in zip(names, values, by_seed, metrics.values(), strict=True)
    )
    table = pd.DataFrame({"accuracy": values, "low": low, "high": high}, index=names)
    for seed in range(max(map(len, by_seed), default=0)):
        table[f"run {seed + 1}"] = [seeds[seed] if seed < len(seeds) else None for seeds in by_seed]
    shown = "" if all(by_seed) else ", with 95 % interval"
    return Figure(drawn, f"{axis[:1].upper()}{axis[1:]}{shown}: {listed}.", table)


def learning_curves(runs: Mapping[str, Sequence[History]], *, num_classes: int | None = None) -> Figure:
    """Plot the losses by step and the validation accuracy by epoch, one line per seed of each method.

    Args:
        runs: by method, the history of each seed.
        num_classes: C, to mark ln C, the loss of a classifier that finds all classes equally likely; None: no mark.
    """
    looks = method_looks(runs)
    with plt.rc_context(STYLE):
        drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
        for name, histories in runs.items():
            for seed, history in enumerate(histories):
                _draw_losses(left, history, looks[name])
                known = [epoch for epoch in history.epochs if "validation_accuracy" in epoch]
                label = short(name.replace("_", " "), 60) if seed == 0 else None
                places, heights = [e["epoch"] for e in known], [e["validation_accuracy"] for e in known]
                right.plot(places, heights, alpha=0.8, markersize=5, label=label, **looks[name])
        _mark_chance(left, num_classes)
        left.set(xlabel=f"optimiser step\n({_HOW_LOSSES})", ylabel="loss (nats)", ylim=(0, None))
        right.set(xlabel="epoch", ylabel="validation accuracy")
        right.set_xticks(
            sorted({epoch["epoch"] for histories in runs.values() for h in histories for epoch in h.epochs})
        )
        side_legend(right)
    told = f"Losses by step and validation accuracy by epoch; at the end, mean over seeds: {_ends(runs)}."
    return Figure(drawn, told + _chance(num_classes), _epochs(runs))


def loss_panels(runs: Mapping[str, Sequence[History]], *, num_classes: int | None = None) -> Figure:
    """Plot training and validation loss by step in a small panel per run, all on one scale, to compare their shapes.

    Args:
        runs: by title of the panel, the history of each seed.
        num_classes: as for ``learning_curves``.
    """
    columns = min(len(runs), 4)
    lines = -(-len(runs) // columns)
    with plt.rc_context(STYLE):
        size = (2.4 * columns + 0.6, 2.3 * lines + 0.4)
        drawn, grid = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for ax in grid.flat[len(runs) :]:
            ax.set_axis_off()
        for ax, (name, histories) in zip(grid.flat, runs.items(), strict=False):
            for history in histories:
                _draw_losses(ax, history, look(0))
            _mark_chance(ax, num_classes)
            ax.set_title(short(name.replace("_", " ")), fontsize=10)
            ax.set_xlabel("optimiser step")
        for row in grid:
            row[0].set(ylabel="loss (nats)", ylim=(0, None))
        drawn.supxlabel(_HOW_LOSSES, fontsize=9)
    told = f"Losses by step, a panel per run; at the end, mean over seeds: {_ends(runs)}."
    return Figure(drawn, told + _chance(num_classes), _epochs(runs))


_HOW_LOSSES = "line: training, mean of the last 10; marks: validation"


def _smooth(history: History) -> pd.Series:
    """Training loss by step, from 1: the mean of the last 10 steps."""
    losses = pd.Series([step["loss"] for step in history.steps], dtype=float)
    return losses.rolling(10, min_periods=1).mean().set_axis(range(1, len(losses) + 1))


def _draw_losses(ax: plt.Axes, history: History, style: Mapping[str, str]) -> None:
    ax.plot(_smooth(history), color=style["color"], alpha=0.7, lw=1.2)
    known = [epoch for epoch in history.epochs if "validation_loss" in epoch]
    per_epoch = len(history.steps) / max((epoch["epoch"] for epoch in history.epochs), default=1)
    places, heights = [epoch["epoch"] * per_epoch for epoch in known], [epoch["validation_loss"] for epoch in known]
    ax.plot(places, heights, linestyle="--", lw=1, markersize=5, alpha=0.9, **style)


def _mark_chance(ax: plt.Axes, num_classes: int | None) -> None:
    if num_classes is not None:
        height = float(np.log(num_classes))
        ax.axhline(height, color="0.5", lw=1, zorder=0)
        back = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8}
        place = {"xy": (0, height), "xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
        ax.annotate(f"ln {num_classes} = {height:.2f}", xytext=(2, 2), fontsize=8, color="0.3", bbox=back, **place)


def _chance(num_classes: int | None) -> str:
    return "" if num_classes is None else f" A line marks ln {num_classes} = {np.log(num_classes):.2f}."


def _ends(runs: Mapping[str, Sequence[History]]) -> str:
    """The last values that are drawn, as a mean over the seeds, for an alt text."""
    texts = []
    for name, histories in runs.items():
        last = {"training loss": [_smooth(history).iloc[-1] for history in histories if history.steps]}
        for figure in ("validation_loss", "validation_accuracy"):
            known = [[epoch[figure] for epoch in history.epochs if figure in epoch] for history in histories]
            last[figure.replace("_", " ")] = [values[-1] for values in known if values]
        said = (f"{what} {np.mean(values):.2f}" for what, values in last.items() if values)
        texts.append(f"{name.replace('_', ' ')}: {', '.join(said)}")
    return "; ".join(texts)


def _epochs(runs: Mapping[str, Sequence[History]]) -> pd.DataFrame:
    rows = [
        {"method": name, "run": seed, **epoch}
        for name, histories in runs.items()
        for seed, history in enumerate(histories)
        for epoch in history.epochs
    ]
    return pd.DataFrame(rows).set_index(["method", "run", "epoch"])


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
        summary: from ``Study.summary``. With a column ``by_seed`` of lists of fewer than ten scores, these are drawn as
            dots, and no intervals.
        xlabel: name and unit of the parameter.
        live: scores of runs made just now, by value of the parameter; the study need not have that value.
        reference: name and score of a baseline, drawn as a grey line.
    """
    live = live or {}
    score = str(summary.columns.name or "score").replace("_", " ")
    values = sorted({*summary.index, *live})
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        if dots := _dots(summary):
            ax.plot(*zip(*dots, strict=True), "o", color=COLOURS[0], markersize=4, alpha=0.6, mew=0, label="a seed")
        else:
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
    table = (
        summary.drop(columns="by_seed", errors="ignore")
        .reindex(values)
        .rename(columns=lambda name: name.replace("_", " "))
    )
    table = table.astype({"seeds": "Int64"}).assign(live=pd.Series(live, dtype=float)).rename_axis(index=xlabel)
    return Figure(drawn, f"{score.capitalize()} by {xlabel}, mean over seeds. {listed}.", table)


def studies(
    summaries: Mapping[str, pd.DataFrame],
    *,
    xlabel: str,
    live: Mapping[str, Mapping[float, float]] | None = None,
    reference: tuple[str, float] | None = None,
) -> Figure:
    """Plot the scores of several methods in a recorded study against one parameter, on a logarithmic axis.

    Args:
        summaries: by method, each from ``Study.summary``; a column ``by_seed`` as for ``study``. Methods stand a little
            apart, or their marks would hide one another; the ticks are at the true values.
        xlabel: name and unit of the parameter.
        live: by method, scores of runs made just now by value of the parameter; drawn as rings.
        reference: name and score of a baseline, drawn as a grey line.
    """
    live = live or {}
    score = str(next(iter(summaries.values())).columns.name or "score").replace("_", " ")
    values = sorted(
        {value for summary in summaries.values() for value in summary.index}.union(
            *(map(float, v) for v in live.values())
        )
    )
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        looks, drawn_at = method_looks(summaries), []
        for i, (name, summary) in enumerate(summaries.items()):
            aside = _aside(ax, 3 * (i - (len(summaries) - 1) / 2))
            dots = _dots(summary)
            if dots:
                ax.plot(
                    *zip(*dots, strict=True), "o", color=looks[name]["color"], markersize=3, alpha=0.5, mew=0, **aside
                )
            errors = None if dots else _error_bars(summary["mean"], summary["low"], summary["high"])
            label = short(name.replace("_", " "), 60)
            style = {"capsize": 2, "lw": 1.2, "label": label, **looks[name], **aside}
            ax.errorbar(summary.index, summary["mean"], yerr=errors, **style)
            ends = [summary["mean"]] if dots else [summary["low"], summary["high"]]
            drawn_at += dots + [place for end in ends for place in end.items()]
            if runs := list(live.get(name, {}).items()):
                colour = looks[name]["color"]
                ax.plot(*zip(*runs, strict=True), "o", mfc="none", mec=colour, markersize=11, mew=1.5, **aside)
                drawn_at += runs
        if reference:
            ax.axhline(reference[1], color="0.6", zorder=0, label=short(reference[0], 60))
        spread = "small dot: a seed" if all(map(_dots, summaries.values())) else "95 % interval"
        spread += "; ring: live run" if any(live.values()) else ""
        ax.set(xscale="log", xlabel=xlabel, ylabel=f"{score}\n(mean over seeds, {spread})")
        ax.update_datalim([place for place in drawn_at if np.isfinite(place).all()])
        ax.autoscale_view()
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        side_legend(ax)
    listed = [
        f"{name.replace('_', ' ')}: {', '.join(f'{value:g} {mean:.2f}' for value, mean in summary['mean'].items())}"
        for name, summary in summaries.items()
    ]
    listed += [
        f"{name.replace('_', ' ')}, live run: {', '.join(f'{value:g} {height:.2f}' for value, height in runs.items())}"
        for name, runs in live.items()
        if runs
    ]
    listed += [f"{reference[0]} {reference[1]:.2f}"] if reference else []
    columns = ["mean", "low", "high", "seeds"]
    table = pd.concat(
        {name: summary.reindex(sorted({*summary.index, *live.get(name, {})})) for name, summary in summaries.items()}
    )
    table["seeds"] = table["seeds"].astype("Int64")
    if any(live.values()):
        columns = ["mean", "low", "high", "run_low", "run_high", "seeds", "live"]
        table["live"] = [live.get(name, {}).get(value) for name, value in table.index]
    table = table[columns].rename(columns=lambda name: name.replace("_", " "))
    table.index = pd.Index(
        [f"{name}, {value:g}".replace("_", " ") for name, value in table.index], name=f"method, {xlabel}"
    )
    return Figure(drawn, f"{score.capitalize()} by {xlabel}, mean over seeds. {'; '.join(listed)}.", table)


def tradeoff(points: pd.DataFrame, *, xlabel: str) -> Figure:
    """Plot the accuracy of each method, with its interval, against its cost, on a logarithmic axis.

    Args:
        points: indexed by method, with the columns cost, accuracy, low and high; a column ``by_seed`` as for ``study``.
            Methods of almost equal cost stand side by side, around their true place, and the label of the axis says so.
        xlabel: name and unit of the cost.
    """
    places = _side_by_side(points["cost"])
    moved = "\n(methods of almost equal cost: side by side)" if any(places.values()) else ""
    looks = method_looks(points.index)
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        any_bars, drawn_at = False, []
        for name, point in points.iterrows():
            aside = _aside(ax, places[name])
            dots = _dots(points.loc[[name]].set_index("cost"))
            if dots:
                ax.plot(
                    *zip(*dots, strict=True), "o", color=looks[name]["color"], markersize=3.5, alpha=0.5, mew=0, **aside
                )
            errors = None if dots else _error_bars([point["accuracy"]], [point["low"]], [point["high"]])
            any_bars |= not dots
            label = short(str(name).replace("_", " "), 60)
            style = {"capsize": 4, "markersize": 7, "linestyle": "", "label": label, **looks[name], **aside}
            ax.errorbar([point["cost"]], [point["accuracy"]], yerr=errors, **style)
            ends = ["accuracy"] if dots else ["accuracy", "low", "high"]
            drawn_at += dots + [(point["cost"], point[end]) for end in ends]
        log_axis(ax, points["cost"])
        ax.update_datalim([place for place in drawn_at if np.isfinite(place).all()])
        ax.autoscale_view()
        ax.xaxis.set_major_formatter(EngFormatter())
        spread = "95 % interval" if any_bars else "small dot: a seed"
        ax.set(xlabel=f"{xlabel}{moved}", ylabel=f"accuracy on the test rows\n(mean over seeds, {spread})")
        side_legend(ax)
    listed = ", ".join(f"{n} {p['accuracy']:.2f} at {p['cost']:.3g}".replace("_", " ") for n, p in points.iterrows())
    return Figure(drawn, f"Accuracy by {xlabel}: {listed}.", points.drop(columns="by_seed", errors="ignore"))


def _side_by_side(costs: pd.Series) -> dict[Any, float]:
    """Points by which each mark is moved to the side, so that marks of almost equal cost do not hide one another."""
    near = 0.02 * np.log(costs.max() / costs.min())  # as a share of the axis
    clusters: list[list[Any]] = []
    previous = 0.0
    for name, cost in costs.sort_values(kind="stable").items():
        if clusters and np.log(cost / previous) <= near:
            clusters[-1].append(name)
        else:
            clusters.append([name])
        previous = cost
    return {name: 10 * (i - (len(names) - 1) / 2) for names in clusters for i, name in enumerate(names)}


def _aside(ax: plt.Axes, points: float) -> dict[str, Transform]:
    """Keyword that moves marks to the side by a distance on the paper, which leaves their values as they are.

    The limits of the axes then have to be told of the marks.
    """
    return {"transform": ax.transData + ScaledTranslation(points / 72, 0, ax.figure.dpi_scale_trans)}


def _dots(table: pd.DataFrame) -> list[tuple[Any, float]]:
    """Index and score of each seed, if they are given and few enough to be drawn one by one."""
    if "by_seed" not in table or any(len(scores) >= _FEW for scores in table["by_seed"]):
        return []
    return [(value, score) for value, scores in table["by_seed"].items() for score in scores]


def spectra(held: Mapping[str, ArrayLike], *, xlabel: str) -> Figure:
    """Plot how much of a change in weights lies in its k largest singular directions, against k, one line per change.

    Args:
        held: by name of the change, the share of the squared norm in the first k directions for k = 1 … K, shape (K,).
        xlabel: label of the axis of k, which is logarithmic.
    """
    shares = {name: np.asarray(share) for name, share in held.items()}
    looks = method_looks(shares)
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, 3.4))
        for (name, share), dashes in zip(shares.items(), itertools.cycle(("-", "--", "-.", ":")), strict=False):
            label = short(name.replace("_", " "), 60)
            ax.plot(range(1, len(share) + 1), share, dashes, lw=2, color=looks[name]["color"], label=label)
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
        looks = method_looks(table.index)
        for name, values in table.iterrows():
            style = {"lw": 1, "markersize": 4, "alpha": 0.7, **looks[name]}
            ax.plot(positions, values, label=short(name, 60), **style)
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
