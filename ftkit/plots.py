"""Figures with alt text and a table of their numbers."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.ticker import EngFormatter, LogLocator
from numpy.typing import ArrayLike

from ftkit.training.state import History

# Okabe and Ito (2008): distinct to the common forms of colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 11,
    "figure.dpi": 110,
}


class Figure:
    """A drawn figure as a notebook shows it: image with alt text, and a table that opens on a click.

    Args:
        drawn: the matplotlib figure; it is rendered and closed.
        alt: what there is to see, for those who don't see it.
        table: the plotted numbers.
    """

    def __init__(self, drawn: MatplotlibFigure, alt: str, table: pd.DataFrame) -> None:
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", bbox_inches="tight")
        plt.close(drawn)
        self.png, self.alt, self.table = buffer.getvalue(), alt, table

    def __repr__(self) -> str:
        return f"[figure: {self.alt}]"

    def _repr_html_(self) -> str:
        image = base64.b64encode(self.png).decode("ascii")
        numbers = self.table.to_html(border=0, na_rep="", float_format="{:.3f}".format)
        return (
            f'<img alt="{html.escape(self.alt)}" src="data:image/png;base64,{image}" style="max-width: 100%">'
            f"<details><summary>the numbers</summary>{numbers}</details>"
        )


def scores(metrics: Mapping[str, Mapping[str, Any]], *, axis: str = "accuracy on the test rows") -> Figure:
    """A dot with its 95 % interval for each method, from the dict that goes into metrics.json.

    Where an entry has a ``majority``, a grey line marks it.
    """
    names = [name.replace("_", " ") for name in metrics]
    values = [method["accuracy"] for method in metrics.values()]
    low, high = zip(*(method["ci95"] for method in metrics.values()), strict=True)
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7, 0.55 * len(names) + 0.9))
        ax.errorbar(values, range(len(names)), xerr=_arms(values, low, high), fmt="o", capsize=4, markersize=7)
        for i, value in enumerate(values):
            ax.annotate(f"{value:.2f}", (value, i), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
        for i, method in enumerate(metrics.values()):
            if "majority" in method:
                ax.plot([method["majority"]] * 2, [i - 0.3, i + 0.3], color="0.4", label="majority" if i == 0 else None)
                ax.legend(frameon=False, loc="lower left")
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel=f"{axis} (dot: mean over seeds; bar: 95 % interval)")
        ax.set_ylim(len(names) - 0.4, -0.7)
    told = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, values, strict=True))
    table = pd.DataFrame({"accuracy": values, "low": low, "high": high}, index=names)
    return Figure(drawn, f"{axis[:1].upper()}{axis[1:]}, with 95 % interval: {told}.", table)


def learning_curves(runs: Mapping[str, Sequence[History]]) -> Figure:
    """Training loss by step and validation accuracy by epoch, a thin line for each seed of each method."""
    with plt.rc_context(STYLE):
        drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
        rows = []
        for colour, (name, histories) in zip(COLOURS, runs.items(), strict=False):
            for seed, history in enumerate(histories):
                label = name.replace("_", " ") if seed == 0 else None
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
    told = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in last.items())
    alt = f"Training loss by step and validation accuracy by epoch; mean loss at the last step: {told}."
    return Figure(drawn, alt, pd.DataFrame(rows).set_index(["method", "run", "epoch"]))


def confusion(counts: ArrayLike, names: Sequence[str]) -> Figure:
    """A confusion matrix: true class by row, predicted class by column; the shade is the share of the row.

    Args:
        counts: shape (C, C).
        names: of the C classes.
    """
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 1.6 + 0.8 * len(names)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        drawn, ax = plt.subplots(figsize=(side + 0.6, side))
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(counts):
            ax.text(j, i, f"{count:,}", ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
        ticks = range(len(names))
        ax.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names, xlabel="predicted", ylabel="true")
        ax.tick_params(axis="x", rotation=45 if len(names) > 3 else 0)
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
    """A recorded study: score by the values of one parameter, on a logarithmic axis.

    Args:
        summary: from ``Study.summary``.
        xlabel: name and unit of the parameter.
        live: scores of runs made just now, by value; one may be of a value that the study has not.
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
            ax.plot(*zip(*live.items(), strict=True), "D", color=COLOURS[1], markersize=6, label="run live just now")
        if reference:
            ax.axhline(reference[1], color="0.6", zorder=0, label=reference[0])
        ax.set(xscale="log", xlabel=xlabel, ylabel=score)
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    told = ", ".join(f"{value:g}: {mean:.2f}" for value, mean in summary["mean"].items())
    told += "".join(f"; run live just now, {value:g}: {height:.2f}" for value, height in live.items())
    table = summary.reindex(values).rename(columns=lambda name: name.replace("_", " "))
    table = table.astype({"seeds": "Int64"}).assign(live=pd.Series(live, dtype=float)).rename_axis(index=xlabel)
    return Figure(drawn, f"{score.capitalize()} by {xlabel}, mean over seeds. {told}.", table)


def studies(
    summaries: Mapping[str, pd.DataFrame], *, xlabel: str, reference: tuple[str, float] | None = None
) -> Figure:
    """A recorded study of several methods: score by the values of one parameter, a line each, on a logarithmic axis.

    Args:
        summaries: by method, from ``Study.summary``.
        xlabel: name and unit of the parameter.
        reference: name and score of a baseline, drawn as a grey line.
    """
    score = str(next(iter(summaries.values())).columns.name or "score").replace("_", " ")
    values = sorted({value for summary in summaries.values() for value in summary.index})
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        for i, (name, summary) in enumerate(summaries.items()):
            x = summary.index * 1.03 ** (i - len(summaries) / 2)  # side by side, or bars would hide one another
            arms = _arms(summary["mean"], summary["low"], summary["high"])
            colour, marker = COLOURS[i % len(COLOURS)], "osD^v<>"[i % 7]
            label = name.replace("_", " ")
            ax.errorbar(x, summary["mean"], yerr=arms, fmt=f"{marker}-", color=colour, capsize=2, lw=1.2, label=label)
        if reference:
            ax.axhline(reference[1], color="0.6", zorder=0, label=reference[0])
        ax.set(xscale="log", xlabel=xlabel, ylabel=f"{score}\n(mean over seeds, 95 % interval)")
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    told = [
        f"{name.replace('_', ' ')}: {', '.join(f'{value:g} {mean:.2f}' for value, mean in summary['mean'].items())}"
        for name, summary in summaries.items()
    ]
    told += [f"{reference[0]} {reference[1]:.2f}"] if reference else []
    table = pd.concat(summaries, names=["method"])[["mean", "low", "high", "seeds"]]
    return Figure(drawn, f"{score.capitalize()} by {xlabel}, mean over seeds. {'; '.join(told)}.", table)


def tradeoff(points: pd.DataFrame, *, xlabel: str) -> Figure:
    """Accuracy of each method, with its interval, against what it costs, on a logarithmic axis.

    Args:
        points: by method: cost, accuracy, low and high.
        xlabel: what the cost is, with its unit.
    """
    span = points["cost"].max() / points["cost"].min()
    place: dict[str, float] = {}
    for name, cost in points["cost"].sort_values(kind="stable").items():  # those of about one cost stand side by side
        place[name] = max(cost, span**0.02 * max(place.values(), default=0))
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        for i, (name, point) in enumerate(points.iterrows()):
            arms = _arms([point["accuracy"]], [point["low"]], [point["high"]])
            look = {"fmt": "os^Dv<>"[i % 7], "color": COLOURS[i % len(COLOURS)], "capsize": 4, "markersize": 7}
            ax.errorbar(place[name], point["accuracy"], yerr=arms, label=str(name).replace("_", " "), **look)
        ax.set(xscale="log", xlabel=xlabel, ylabel="accuracy on the test rows\n(mean over seeds, 95 % interval)")
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if span > 100 else (1, 2, 5)))
        ax.xaxis.set_major_formatter(EngFormatter())
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    told = ", ".join(f"{n} {p['accuracy']:.2f} at {p['cost']:.3g}".replace("_", " ") for n, p in points.iterrows())
    return Figure(drawn, f"Accuracy by {xlabel}: {told}.", points)


def spectra(held: Mapping[str, ArrayLike], *, xlabel: str) -> Figure:
    """How much of a change the largest k singular directions hold, by k on a logarithmic axis, a line each.

    Args:
        held: by name, shape (K,): the share of the squared norm in the first k directions, k from 1.
        xlabel: what has the directions.
    """
    shares = {name: np.asarray(share) for name, share in held.items()}
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, 3.4))
        for (name, share), dashes in zip(shares.items(), ("-", "--", "-.", ":"), strict=False):
            ax.plot(range(1, len(share) + 1), share, dashes, lw=2, label=name.replace("_", " "))
        ax.set(xscale="log", xlabel=xlabel, ylabel="share of the squared norm", ylim=(0, 1.03))
        ax.legend(frameon=False)
    told = ", ".join(f"{name} {share[0]:.2f} in the first" for name, share in shares.items())
    table = pd.DataFrame({name: pd.Series(share, index=range(1, len(share) + 1)) for name, share in shares.items()})
    return Figure(drawn, f"Share of the change in the first k {xlabel}: {told}.", table.rename_axis("k"))


def bars(values: pd.Series, *, xlabel: str) -> Figure:
    """A bar for each value, by its name, the first on top."""
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, 0.28 * len(values) + 0.8))
        ax.barh(range(len(values)), values, height=0.7)
        ax.set(yticks=range(len(values)), yticklabels=values.index, xlabel=xlabel)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    told = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    return Figure(drawn, f"{xlabel[0].upper()}{xlabel[1:]}: {told}.", values.to_frame(xlabel))


def slopes(table: pd.DataFrame, *, xlabel: str, ylabel: str) -> Figure:
    """How each row's value changes from one column to the next, a line a row, the mean of all beside them."""
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(5.5, 3.4))
        places = range(len(table.columns))
        for i, (name, values) in enumerate(table.iterrows()):
            form = f"{'o^D'[i // len(COLOURS) % 3]}-"  # a colour that comes again has another marker
            ax.plot(places, values, form, color=COLOURS[i % len(COLOURS)], lw=1, markersize=4, alpha=0.7, label=name)
        ax.plot(places, table.mean(), "s-", color="black", lw=2.5, label="mean")
        ax.set(xticks=places, xticklabels=table.columns, xlim=(-0.15, len(places) - 0.85))
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    means = ", ".join(f"{column} {value:.2f}" for column, value in table.mean().items())
    return Figure(drawn, f"{ylabel[0].upper()}{ylabel[1:]}, a line each; their mean: {means}.", table)


def schedule(rates: Mapping[str, Sequence[float]]) -> Figure:
    """Learning rate by optimiser step, a line a schedule."""
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, 2.8))
        for name, values in rates.items():
            ax.plot(range(1, len(values) + 1), values, label=name)
        ax.set(xlabel="optimiser step", ylabel="learning rate")
        ax.legend(frameon=False)
    peaks = ", ".join(f"{name} peaks at {max(values):g}" for name, values in rates.items())
    return Figure(drawn, f"Learning rate by step: {peaks}.", pd.DataFrame(rates).rename_axis("step"))


def _arms(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Lengths of error bars to both sides."""
    return [
        [value - end for value, end in zip(values, low, strict=True)],
        [end - value for value, end in zip(values, high, strict=True)],
    ]
