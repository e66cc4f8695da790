"""A reader's progress over all lessons: exercises, and how well the ranges of their guesses hold."""

import html
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from ftkit.lab.course.exercises import all_exercises
from ftkit.lab.course.records import read_progress
from ftkit.plots import COLOURS, NO_MATH, STYLE, Figure


class Overview:
    """What a reader has done; shown as the last expression of a cell.

    Attributes:
        exercises: a row per exercise: lesson, the minutes that it takes, about, whether it is right, tries, hints,
            whether the solution was shown.
        ranges: how many ranges held the truth, in words.
        figure: the share of ranges that held the truth against the share that should; None without a range.
    """

    def __init__(self, exercises: pd.DataFrame, ranges: str, figure: Figure | None) -> None:
        self.exercises, self.ranges, self.figure = exercises, ranges, figure

    @property
    def _done(self) -> str:
        done = self.exercises["state"].eq("right").sum()
        return f"{done} of {len(self.exercises)} exercises are right."

    def __repr__(self) -> str:
        return f"{self._done} {self.ranges}\n{self.exercises.to_string()}"

    def _repr_html_(self) -> str:
        figure = self.figure._repr_html_() if self.figure else ""
        return (
            f'<div class="{NO_MATH}"><p>{self._done}</p>{self.exercises.to_html(border=0)}'
            f"<p>{html.escape(self.ranges)}</p></div>{figure}"
        )


def progress() -> Overview:
    """Show all exercises of the kit with what the reader did, and how well the ranges of their guesses hold."""
    kept = read_progress()
    rows = []
    for lesson, exercises in all_exercises().items():
        for exercise in exercises:
            entry = kept["exercises"].get(exercise.name, {})
            state = "right" if entry.get("right") else "not yet right" if entry.get("tries") else "not attempted"
            seen = "shown" if entry.get("solution") else ""
            done = (state, entry.get("tries", 0), entry.get("hints", 0), seen)
            rows.append((lesson, exercise.name, exercise.minutes, *done))
    table = pd.DataFrame(rows, columns=["lesson", "exercise", "minutes", "state", "tries", "hints", "solution"])
    return Overview(table.set_index(["lesson", "exercise"]), *_judge_ranges(kept["guesses"]))


def _judge_ranges(guesses: dict[str, dict[str, Any]]) -> tuple[str, Figure | None]:
    """How many ranges held the truth, in words and as a figure."""
    ranges = pd.DataFrame(
        [entry for entry in guesses.values() if entry["low"] < entry["high"]], columns=["low", "high", "sure", "truth"]
    )
    if ranges.empty:
        return "No guess was a range yet, so there is nothing to say of how well your ranges hold.", None
    ranges["held"] = ranges["truth"].between(ranges["low"], ranges["high"])
    shares = ranges.groupby("sure")["held"].agg(["sum", "count"])
    shares["low"], shares["high"] = zip(*(_interval(*counts) for counts in shares.to_numpy()), strict=True)
    words = " ".join(
        f"Of {row['count']:.0f} range{'' if row['count'] == 1 else 's'} that should hold the truth in "
        f"{100 * sure:.0f} % of cases, {row['sum']:.0f} did: {_verdict(sure, row['low'], row['high'])}."
        for sure, row in shares.iterrows()
    )
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(4.5, 4))
        ax.plot([0, 1], [0, 1], color="0.6", label="as sure as you said")
        held = shares["sum"] / shares["count"]
        errors = [held - shares["low"], shares["high"] - held]
        ax.errorbar(shares.index, held, yerr=errors, fmt="o", color=COLOURS[0], capsize=4, label="your ranges")
        ax.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="share that should hold the truth", ylabel="share that did")
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    listed = "; ".join(f"{100 * sure:.0f} %: {100 * share:.0f} %" for sure, share in held.items())
    alt = f"Share of your ranges that held the truth, by the share that should, with 95 % intervals. {listed}."
    return words, Figure(drawn, alt, shares.rename(columns={"sum": "held", "count": "ranges"}))


def _interval(held: float, count: float) -> tuple[float, float]:
    """95 % interval of the share that holds in the long run (Wilson)."""
    from scipy.stats import binomtest

    return tuple(binomtest(int(held), int(count)).proportion_ci(method="wilson"))


def _verdict(sure: float, low: float, high: float) -> str:
    if high < sure:
        return "they are too narrow"
    if low > sure:
        return "they are wider than they need be"
    return "so far, that agrees"
