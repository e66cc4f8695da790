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

# Okabe and Ito (2008): distinguishable with the common forms of colour blindness
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
    """A figure as a notebook shows it: an image with alt text, and a table of its numbers that opens on a click.

    Args:
        drawn: the matplotlib figure; it is rendered as PNG and closed.
        alt: what the figure shows, for readers who cannot see it.
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
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel=f"{axis} (dot: mean over seeds; bar: 95 % interval)")
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
    listed = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in last.items())
    alt = f"Training loss by step and validation accuracy by epoch; mean loss at the last step: {listed}."
    return Figure(drawn, alt, pd.DataFrame(rows).set_index(["method", "run", "epoch"]))


def confusion(counts: ArrayLike, names: Sequence[str]) -> Figure:
    """Show a confusion matrix; the shade of a cell is its share of the row.

    Args:
        counts: number of rows by true class (row) and predicted class (column), shape (C, C).
        names: names of the C classes.
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
            ax.axhline(reference[1], color="0.6", zorder=0, label=reference[0])
        ax.set(xscale="log", xlabel=xlabel, ylabel=score)
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
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
            colour, marker = COLOURS[i % len(COLOURS)], "osD^v<>"[i % 7]
            label = name.replace("_", " ")
            ax.errorbar(x, summary["mean"], yerr=errors, fmt=f"{marker}-", color=colour, capsize=2, lw=1.2, label=label)
        if reference:
            ax.axhline(reference[1], color="0.6", zorder=0, label=reference[0])
        ax.set(xscale="log", xlabel=xlabel, ylabel=f"{score}\n(mean over seeds, 95 % interval)")
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
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
            look = {"fmt": "os^Dv<>"[i % 7], "color": COLOURS[i % len(COLOURS)], "capsize": 4, "markersize": 7}
            ax.errorbar(position[name], point["accuracy"], yerr=errors, label=str(name).replace("_", " "), **look)
        ax.set(xscale="log", xlabel=xlabel, ylabel="accuracy on the test rows\n(mean over seeds, 95 % interval)")
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if span > 100 else (1, 2, 5)))
        ax.xaxis.set_major_formatter(EngFormatter())
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
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
        for (name, share), dashes in zip(shares.items(), ("-", "--", "-.", ":"), strict=False):
            ax.plot(range(1, len(share) + 1), share, dashes, lw=2, label=name.replace("_", " "))
        ax.set(xscale="log", xlabel=xlabel, ylabel="share of the squared norm", ylim=(0, 1.03))
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
        drawn, ax = plt.subplots(figsize=(6.5, 0.28 * len(values) + 0.8))
        ax.barh(range(len(values)), values, height=0.7)
        ax.set(yticks=range(len(values)), yticklabels=values.index, xlabel=xlabel)
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
            ax.plot(positions, values, form, color=COLOURS[i % len(COLOURS)], lw=1, markersize=4, alpha=0.7, label=name)
        ax.plot(positions, table.mean(), "s-", color="black", lw=2.5, label="mean")
        ax.set(xticks=positions, xticklabels=table.columns, xlim=(-0.15, len(positions) - 0.85))
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
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
            ax.plot(range(1, len(values) + 1), values, label=name)
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
