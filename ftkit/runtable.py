"""The runs of a panel side by side: a table of them, and the paired comparison of two."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ftkit.metrics import Evaluation, compare
from ftkit.results import Outcome, mean_figures, method_entry, results_table
from ftkit.schema import NotebookSettings, in_words

STYLE = """<style>
.ftkit-runs { border-collapse: collapse; width: 100%; line-height: 1.4; }
.ftkit-runs th, .ftkit-runs td { padding: 0.3em 0.6em; text-align: right; border-bottom: 1px solid #8886; }
.ftkit-runs :is(th, td):is(:nth-child(2), :last-child) { text-align: left; min-width: 8em; }
</style>"""


@dataclass(frozen=True)
class PanelRun:
    """A run of a panel that has scores.

    Attributes:
        number: in the table, from 1.
        settings: that it was made with.
        outcomes: one for each seed that was trained, at least one.
        total_steps: that the last of these seeds was to take.
        error: why it ended, if it failed.
    """

    number: int
    settings: NotebookSettings
    outcomes: Sequence[Outcome]
    total_steps: int
    error: str | None = None

    @property
    def split(self) -> str:
        """That it is scored on: the first one."""
        return next(iter(self.outcomes[0].evaluations))

    @property
    def evaluations(self) -> list[Evaluation]:
        """On that split, one a seed."""
        return [outcome.evaluations[self.split] for outcome in self.outcomes]

    @cached_property
    def entry(self) -> dict[str, Any]:
        """As in metrics.json."""
        histories = [outcome.history for outcome in self.outcomes]
        seeds = [outcome.seed for outcome in self.outcomes]
        weights = histories[0].trainable_parameters
        entry = method_entry(self.evaluations, histories, seeds=seeds, trainable_parameters=weights)
        return entry | mean_figures(self.outcomes)

    @property
    def ended(self) -> str:
        """finished, stopped or failed, and where."""
        last, done, asked = self.outcomes[-1].history, len(self.outcomes), len(seeds_of(self.settings))
        seeds = f" after {done} of {asked} seeds" if done < asked else ""
        if self.error:
            return f"failed{seeds}: {self.error}"
        if last.ended != "finished":
            return f"stopped at step {len(last.steps)} of {self.total_steps}" + (
                f", seed {done} of {asked}" * (asked > 1)
            )
        return f"stopped{seeds}" if seeds else "finished"

    def told(self, names: Sequence[str]) -> str:
        """Some of its settings in words."""
        return ", ".join(f"{name} {in_words(getattr(self.settings, name))}" for name in names)


def seeds_of(settings: NotebookSettings) -> list[int]:
    """That a run of these settings trains; one, 0, where the notebook has none to set."""
    return getattr(settings, "seeds", [0])


def varied(runs: Sequence[PanelRun], start: NotebookSettings) -> list[str]:
    """Names of the panel's settings in which some run differs from the start."""
    return [name for name in start.PANEL if any(getattr(r.settings, name) != getattr(start, name) for r in runs)]


def table_html(runs: Sequence[PanelRun], start: NotebookSettings) -> str:
    """A row a run, with the settings in which any of them differs from the start."""
    if not runs:
        return "<div>No run yet: press Train.</div>"
    names = varied(runs, start)
    table = results_table({str(run.number): run.entry for run in runs})
    splits = ", ".join(dict.fromkeys(run.split for run in runs))
    table = table.rename(columns={"accuracy": f"accuracy on {splits}", "seconds": "seconds a seed"})
    table.insert(0, "settings", [run.told(names) or "as given" for run in runs])
    for name in dict.fromkeys(figure for run in runs for figure in mean_figures(run.outcomes)):
        values = [mean_figures(run.outcomes).get(name) for run in runs]
        table[name.replace("_", " ")] = ["–" if value is None else f"{value:.3f}" for value in values]
    table["ended"] = [run.ended for run in runs]
    return STYLE + table.rename_axis(columns="run").to_html(classes="ftkit-runs", border=0, justify="unset")


def comparison_html(first: PanelRun, second: PanelRun) -> str:
    """In which of the panel's settings two runs differ, and what the paired comparison of their scores says."""
    if first is second:
        return "<div>Choose two different runs.</div>"
    names = [name for name in first.settings.PANEL if getattr(first.settings, name) != getattr(second.settings, name)]
    a, b = f"run {first.number}", f"run {second.number}"
    differ = f"R{a[1:]} has {first.told(names)}; {b} has {second.told(names)}." if names else "No setting differs."
    return "".join(f"<div>{html.escape(text)}</div>" for text in (differ, _verdict(first, second, a, b)))


def _verdict(first: PanelRun, second: PanelRun, a: str, b: str) -> str:
    ours, theirs = first.evaluations, second.evaluations
    if first.split != second.split or not np.array_equal(ours[0].labels, theirs[0].labels):
        return f"Their scores can't be paired: {a} and {b} were scored on different rows."
    if len(ours) != len(theirs):
        return f"Their scores can't be paired: the number of seeds is {len(ours)} in {a} and {len(theirs)} in {b}."
    paired = compare([evaluation.correct for evaluation in ours], [evaluation.correct for evaluation in theirs])
    low, high = paired.ci95
    return (
        f"{a.capitalize()} {paired.verdict} {b}: accuracy on {first.split} {paired.difference:+.3f}, "
        f"95 % interval {low:+.3f} to {high:+.3f} (paired, {len(ours)} seed{'s' * (len(ours) > 1)})."
    )
