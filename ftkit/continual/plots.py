"""Figures of continual learning."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ftkit.continual.accuracy_matrix import AccuracyMatrix
from ftkit.plots import COLOURS, STYLE, Figure, log_axis, look, method_looks, short, side_legend, ticks

_MAX_TASKS_WITH_NUMBERS = 20  # in a larger heat map the numbers do not fit into the cells


def heat_map(matrix: AccuracyMatrix) -> Figure:
    """Draw the accuracy on each task (column) before training and after each task (row); the task itself is framed.

    With more than 20 tasks, the cells have no numbers, and not every task has a label.
    """
    values = np.vstack([matrix.b, matrix.R])
    stages = ["untrained", *(f"after {name}" for name in matrix.names)]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        width, height = min(1.1 * len(matrix.names), 12), min(0.5 * len(stages), 10)
        figure, ax = plt.subplots(figsize=(2.6 + width, 1.6 + height))
        ax.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if len(matrix.names) <= _MAX_TASKS_WITH_NUMBERS:
            for (i, j), value in np.ndenumerate(values):
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        for j in range(len(matrix.names)):
            frame = plt.Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], lw=2.5)
            ax.add_patch(frame)
        ax.set_yticks(*ticks(stages))
        ax.set_xticks(*ticks(matrix.names), rotation=30, ha="right")
        ax.set(xlabel="accuracy on (framed: just learned)", ylabel="measured")
    summary = ", ".join(
        f"{name} {own:.2f} when learned, {last:.2f} in the end"
        for name, own, last in zip(matrix.names, matrix.R.diagonal(), matrix.R[-1], strict=True)
    )
    table = pd.DataFrame(values, index=stages, columns=list(matrix.names))
    return Figure(figure, f"Accuracy matrix: {summary}.", table)


def over_time(matrix: AccuracyMatrix) -> Figure:
    """Draw the accuracy on each task after each stage as a line, with a large mark where the task was just learned."""
    stages = ["untrained", *matrix.names]
    values = np.vstack([matrix.b, matrix.R])
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(7.5, 3.8))
        for j, name in enumerate(matrix.names):
            ax.plot(range(len(stages)), values[:, j], markersize=4, lw=1.4, label=short(name), **look(j))
            ax.plot(j + 1, values[j + 1, j], markersize=10, **look(j))
        ax.set_xticks(*ticks(stages), rotation=20, ha="right")
        ax.set(xlabel="after training on (large mark: just learned)", ylabel="accuracy", ylim=(0, 1.03))
        side_legend(ax)
    summary = "; ".join(
        f"{name} {', '.join(f'{value:.2f}' for value in values[:, j])}" for j, name in enumerate(matrix.names)
    )
    table = pd.DataFrame(values, index=stages, columns=list(matrix.names)).rename_axis("after")
    return Figure(figure, f"Accuracy of each task over time, untrained first: {summary}.", table)


def plane(points: pd.DataFrame, *, reference: Mapping[str, tuple[float, float]] | None = None) -> Figure:
    """Draw old against new accuracy: one curve per strategy, from its weakest to its strongest setting.

    Args:
        points: one row per strategy and strength, with the columns ``strategy``, ``strength``, ``new`` (accuracy on the
            task just learned) and ``old`` (accuracy on the tasks learned before).
        reference: (new, old) by name for strategies without a strength, drawn as large marks.
    """
    reference = reference or {}
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(7.5, 4.6))
        looks = method_looks([*points["strategy"].unique(), *reference])
        for name, curve in points.groupby("strategy", sort=False):
            curve = curve.sort_values("strength")
            label = short(str(name).replace("_", " "), 60)
            ax.plot(curve["new"], curve["old"], lw=1.2, markersize=5, label=label, **looks[name])
            weak, strong = curve.iloc[0], curve.iloc[-1]
            for end in [weak] if len(curve) == 1 else [weak, strong]:
                place = (end["new"], end["old"])
                ax.annotate(f"{end['strength']:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        for name, (new, old) in reference.items():
            label = short(name.replace("_", " "), 60)
            ax.plot(new, old, linestyle="", markersize=13, label=label, **looks[name])
        ax.set(xlabel="accuracy on the task just learned", ylabel="accuracy on the tasks learned before")
        side_legend(ax)
    summary = [
        f"{str(name).replace('_', ' ')}: "
        + ", ".join(f"at {p.strength:g} new {p.new:.2f} old {p.old:.2f}" for p in curve.itertuples())
        for name, curve in points.groupby("strategy", sort=False)
    ]
    summary += [f"{name.replace('_', ' ')}: new {new:.2f} old {old:.2f}" for name, (new, old) in reference.items()]
    table = points.set_index(["strategy", "strength"])
    return Figure(figure, f"New against old accuracy by strategy and strength. {'; '.join(summary)}.", table)


def dots(runs: pd.DataFrame, x: str, y: str, *, xlabel: str) -> Figure:
    """Draw one metric against another, one dot per run, with a colour and a shape for each strategy.

    Args:
        runs: one row per run, with the columns ``strategy``, x and y.
        x, y: names of the two columns; x must be positive, since its axis is logarithmic.
        xlabel: label of the x axis, with its unit.
    """
    ylabel = y.replace("_", " ")
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(7.5, 4))
        looks = method_looks(runs["strategy"].unique())
        for name, rows in runs.groupby("strategy", sort=False):
            ax.scatter(rows[x], rows[y], s=26, label=short(str(name).replace("_", " "), 60), **looks[name])
        log_axis(ax, runs[x])
        ax.set(xlabel=xlabel, ylabel=ylabel)
        side_legend(ax)
    summary = ", ".join(
        f"{str(name).replace('_', ' ')} {mean[y]:.2f} at {mean[x]:.3g}"
        for name, mean in runs.groupby("strategy", sort=False)[[x, y]].mean().iterrows()
    )
    alt = f"{ylabel[0].upper()}{ylabel[1:]} by {xlabel}, {len(runs)} runs; means: {summary}."
    return Figure(figure, alt, runs[["strategy", x, y]].set_index("strategy"))
