"""Figures of learning tasks in sequence."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ftkit.continual.accuracy_matrix import AccuracyMatrix
from ftkit.plots import COLOURS, STYLE, Figure

MARKERS = "osD^v<>"

REFERENCES = ({"marker": "*", "color": "black"}, {"marker": "*", "color": "0.55"}, {"marker": "P", "color": "black"})


def heat_map(matrix: AccuracyMatrix) -> Figure:
    """Accuracy on each task (column) before any training and after each task (row); a frame where both are the same."""
    values = np.vstack([matrix.b, matrix.R])
    stages = ["untrained", *(f"after {name}" for name in matrix.names)]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        drawn, ax = plt.subplots(figsize=(2.6 + 1.1 * len(matrix.names), 1.6 + 0.5 * len(stages)))
        ax.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        for j in range(len(matrix.names)):
            frame = plt.Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], lw=2.5)
            ax.add_patch(frame)
        ax.set(xticks=range(len(matrix.names)), yticks=range(len(stages)), yticklabels=stages)
        ax.set_xticks(range(len(matrix.names)), matrix.names, rotation=30, ha="right")
        ax.set(xlabel="accuracy on (framed: just learned)", ylabel="measured")
    learned = ", ".join(
        f"{name} {own:.2f} when learned, {last:.2f} in the end"
        for name, own, last in zip(matrix.names, matrix.R.diagonal(), matrix.R[-1], strict=True)
    )
    return Figure(drawn, f"Accuracy matrix: {learned}.", pd.DataFrame(values, index=stages, columns=list(matrix.names)))


def over_time(matrix: AccuracyMatrix) -> Figure:
    """Accuracy on each task after each stage of training, a line a task; a large dot where it was just learned."""
    stages = ["untrained", *matrix.names]
    values = np.vstack([matrix.b, matrix.R])
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 3.8))
        for j, name in enumerate(matrix.names):
            colour, marker = COLOURS[j % len(COLOURS)], MARKERS[j % len(MARKERS)]
            ax.plot(range(len(stages)), values[:, j], f"{marker}-", color=colour, markersize=4, lw=1.4, label=name)
            ax.plot(j + 1, values[j + 1, j], marker, color=colour, markersize=10)
        ax.set_xticks(range(len(stages)), stages, rotation=20, ha="right")
        ax.set(xlabel="after training on (large mark: just learned)", ylabel="accuracy", ylim=(0, 1.03))
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    told = "; ".join(
        f"{name} {', '.join(f'{value:.2f}' for value in values[:, j])}" for j, name in enumerate(matrix.names)
    )
    table = pd.DataFrame(values, index=stages, columns=list(matrix.names)).rename_axis("after")
    return Figure(drawn, f"Accuracy of each task over time, untrained first: {told}.", table)


def seen_over_time(matrices: Mapping[str, AccuracyMatrix]) -> Figure:
    """Mean accuracy on the tasks learned so far, a line a strategy.

    Args:
        matrices: by strategy, of the same tasks in the same order.
    """
    names = list(next(iter(matrices.values())).names)
    curves = {name.replace("_", " "): matrix.seen_accuracy for name, matrix in matrices.items()}
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 3.8))
        for i, (name, curve) in enumerate(curves.items()):
            look = _look(i)
            ax.plot(range(len(names)), curve, lw=1.4, markersize=6, label=name, **look)
        ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
        ax.set(xlabel="after training on", ylabel="mean accuracy on the tasks so far")
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    told = ", ".join(f"{name} {curve[-1]:.2f}" for name, curve in curves.items())
    return Figure(drawn, f"Mean accuracy on the tasks so far; in the end: {told}.", pd.DataFrame(curves, index=names))


def plane(points: pd.DataFrame, *, reference: Mapping[str, tuple[float, float]] | None = None) -> Figure:
    """New against old accuracy: each strategy a curve over its strength, from weak to strong.

    Args:
        points: a row a strategy and strength, with the columns ``strategy``, ``strength``, ``new`` (accuracy on what
            was just learned) and ``old`` (accuracy on what was learned before).
        reference: by name, (new, old) of strategies without a strength, each drawn as a large black or grey mark.
    """
    reference = reference or {}
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4.6))
        for i, (name, curve) in enumerate(points.groupby("strategy", sort=False)):
            curve = curve.sort_values("strength")
            look = _look(i)
            ax.plot(curve["new"], curve["old"], lw=1.2, markersize=5, label=str(name).replace("_", " "), **look)
            weak, strong = curve.iloc[0], curve.iloc[-1]
            for end in [weak] if len(curve) == 1 else [weak, strong]:
                place = (end["new"], end["old"])
                ax.annotate(f"{end['strength']:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        for i, (name, (new, old)) in enumerate(reference.items()):
            look = REFERENCES[i % len(REFERENCES)]
            ax.plot(new, old, linestyle="", markersize=13, label=name.replace("_", " "), **look)
        ax.set(xlabel="accuracy on the task just learned", ylabel="accuracy on the tasks learned before")
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    told = [
        f"{str(name).replace('_', ' ')}: "
        + ", ".join(f"at {p.strength:g} new {p.new:.2f} old {p.old:.2f}" for p in curve.itertuples())
        for name, curve in points.groupby("strategy", sort=False)
    ]
    told += [f"{name.replace('_', ' ')}: new {new:.2f} old {old:.2f}" for name, (new, old) in reference.items()]
    table = points.set_index(["strategy", "strength"])
    return Figure(drawn, f"New against old accuracy by strategy and strength. {'; '.join(told)}.", table)


def dots(runs: pd.DataFrame, x: str, y: str, *, xlabel: str) -> Figure:
    """One figure of each run against another, a dot a run, a colour and a shape for each strategy.

    Args:
        runs: a row a run, with the columns ``strategy``, x and y.
        x, y: names of the figures; x is positive, its axis logarithmic.
        xlabel: what x is, with its unit.
    """
    ylabel = y.replace("_", " ")
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 4))
        for i, (name, of_strategy) in enumerate(runs.groupby("strategy", sort=False)):
            ax.scatter(of_strategy[x], of_strategy[y], s=26, label=str(name).replace("_", " "), **_look(i))
        ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    told = ", ".join(
        f"{str(name).replace('_', ' ')} {mean[y]:.2f} at {mean[x]:.3g}"
        for name, mean in runs.groupby("strategy", sort=False)[[x, y]].mean().iterrows()
    )
    alt = f"{ylabel[0].upper()}{ylabel[1:]} by {xlabel}, {len(runs)} runs; means: {told}."
    return Figure(drawn, alt, runs[["strategy", x, y]].set_index("strategy"))


def _look(i: int) -> dict[str, str]:
    """Colour and marker of the i-th strategy; a colour that comes again has another marker."""
    again = i // len(COLOURS)
    return {"marker": MARKERS[(i + again) % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]}
