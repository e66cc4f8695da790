"""The control panel of a notebook: change a setting, press Train, watch the curve, compare the runs."""

import html
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from IPython import get_ipython
from ipywidgets import HTML, Accordion, Button, Dropdown, HBox, VBox
from torch import nn

from ftkit.errors import SettingsError
from ftkit.lab.kept.keeping import LastModel, write_model
from ftkit.lab.machine import release_threads
from ftkit.lab.results import (
    LEDGER,
    Outcome,
    append_to_ledger,
    mean_figures,
    method_entry,
    results_table,
    runs_folder,
)
from ftkit.lab.schema import NotebookSettings, in_words
from ftkit.lab.settings_file import format_settings, write_command
from ftkit.lab.widgets.controls import StaticPanel, make_controls
from ftkit.lab.widgets.display import in_one_line, somebody_is_there
from ftkit.lab.widgets.live_curve import LiveCurve
from ftkit.metrics import Evaluation, compare
from ftkit.plots import NO_MATH
from ftkit.training.callbacks import Callback
from ftkit.training.monitor import Meter

_STYLE = """<style>
.ftkit-runs { border-collapse: collapse; width: 100%; line-height: 1.4; }
.ftkit-runs th, .ftkit-runs td { padding: 0.3em 0.6em; text-align: right; border-bottom: 1px solid #8886; }
.ftkit-runs :is(th, td):is(:nth-child(2), :last-child) { text-align: left; min-width: 8em; }
</style>"""


@dataclass(frozen=True)
class PanelRun:
    """A run of a panel, with the results of at least one seed.

    Attributes:
        number: its number in the table, from 1.
        settings: its settings.
        outcomes: results, one per trained seed.
        total_steps: steps planned for the last of these seeds.
        error: error message if the run failed, else None.
    """

    number: int
    settings: NotebookSettings
    outcomes: Sequence[Outcome]
    total_steps: int
    error: str | None = None

    @property
    def split(self) -> str:
        """The split it is scored on: the first one of its outcomes."""
        return next(iter(self.outcomes[0].evaluations))

    @property
    def evaluations(self) -> list[Evaluation]:
        """Results on that split, one per seed."""
        return [outcome.evaluations[self.split] for outcome in self.outcomes]

    @cached_property
    def entry(self) -> dict[str, Any]:
        """The run's entry as in metrics.json."""
        histories = [outcome.history for outcome in self.outcomes]
        seeds = [outcome.seed for outcome in self.outcomes]
        weights = histories[0].trainable_parameters
        entry = method_entry(self.evaluations, histories, seeds=seeds, trainable_parameters=weights)
        return entry | mean_figures(self.outcomes)

    @property
    def ended(self) -> str:
        """How the run ended: "finished", or "stopped" or "failed" and where."""
        last, done, asked = self.outcomes[-1].history, len(self.outcomes), len(seeds_of(self.settings))
        seeds = f" after {done} of {asked} seeds" if done < asked else ""
        if self.error:
            return f"failed{seeds}: {self.error}"
        if last.ended != "finished":
            return f"stopped at step {len(last.steps)} of {self.total_steps}" + (
                f", seed {done} of {asked}" * (asked > 1)
            )
        return f"stopped{seeds}" if seeds else "finished"

    def describe(self, names: Sequence[str]) -> str:
        """Names and values of some of its settings as text."""
        return ", ".join(f"{name} {in_words(getattr(self.settings, name))}" for name in names)


def seeds_of(settings: NotebookSettings) -> list[int]:
    """Seeds that a run with these settings uses; ``[0]`` if the notebook has no seed setting."""
    return getattr(settings, "seeds", [0])


def varied(runs: Sequence[PanelRun], start: NotebookSettings) -> list[str]:
    """Names of the panel's settings in which at least one run differs from the start."""
    return [name for name in start.PANEL if any(getattr(r.settings, name) != getattr(start, name) for r in runs)]


def table_html(runs: Sequence[PanelRun], start: NotebookSettings) -> str:
    """Table of the runs as HTML: one row per run, with the settings in which any run differs from the start."""
    if not runs:
        return "<div>No run yet: press Train.</div>"
    names = varied(runs, start)
    table = results_table({str(run.number): run.entry for run in runs})
    splits = ", ".join(dict.fromkeys(run.split for run in runs))
    table = table.rename(columns={"accuracy": f"accuracy on {splits}", "seconds": "seconds per seed"})
    table.insert(0, "settings", [run.describe(names) or "as at the start" for run in runs])
    for name in dict.fromkeys(figure for run in runs for figure in mean_figures(run.outcomes)):
        values = [mean_figures(run.outcomes).get(name) for run in runs]
        table[name.replace("_", " ")] = ["–" if value is None else f"{value:.3f}" for value in values]
    table["ended"] = [run.ended for run in runs]
    return _STYLE + table.rename_axis(columns="run").to_html(classes=f"ftkit-runs {NO_MATH}", border=0, justify="unset")


def comparison_html(first: PanelRun, second: PanelRun) -> str:
    """Comparison of two runs as HTML: the settings in which they differ and the paired comparison of their scores."""
    if first is second:
        return "<div>Choose two different runs.</div>"
    names = [name for name in first.settings.PANEL if getattr(first.settings, name) != getattr(second.settings, name)]
    a, b = f"run {first.number}", f"run {second.number}"
    differ = (
        f"R{a[1:]} has {first.describe(names)}; {b} has {second.describe(names)}." if names else "No setting differs."
    )
    return "".join(
        f'<div class="{NO_MATH}">{html.escape(text)}</div>' for text in (differ, _verdict(first, second, a, b))
    )


def copy_html(settings: NotebookSettings) -> str:
    """What runs the whole lesson with these settings, as HTML to copy: a command, and a file for it."""
    given = {name: value for name, (_, value) in settings.differing().items()}
    command = write_command(settings.NOTEBOOK, settings.tier, given)
    file = format_settings(settings.NOTEBOOK, settings.tier, given)
    # a click selects the whole text; long lines wrap, and nothing is added where they do
    style = "margin: 0 0 0.6em; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.4; user-select: all"
    texts = {"In a shell:": command, "Or, as a file for `ftkit run --settings`:": file}
    return "".join(
        f'<div class="{NO_MATH}">{html.escape(label)}<pre tabindex="0" style="{style}">{html.escape(text)}</pre></div>'
        for label, text in texts.items()
    )


def _verdict(first: PanelRun, second: PanelRun, a: str, b: str) -> str:
    ours, theirs = first.evaluations, second.evaluations
    if first.split != second.split or not np.array_equal(ours[0].labels, theirs[0].labels):
        return f"Their scores cannot be paired: {a} and {b} were scored on different rows."
    if len(ours) != len(theirs):
        return f"Their scores cannot be paired: the number of seeds is {len(ours)} in {a} and {len(theirs)} in {b}."
    paired = compare([evaluation.correct for evaluation in ours], [evaluation.correct for evaluation in theirs])
    seeds = f" and {len(ours)} seeds" if len(ours) > 1 else ""
    scope = f"accuracy on {first.split}; in brackets, the 95 % interval over rows{seeds}"
    return f"{paired.sentence(a.capitalize(), b)} ({scope})."


_Train = Callable[[Any, int, Sequence[Callback]], Outcome]


_How = Callable[[Any], Mapping[str, Any]]


def panel(settings: NotebookSettings, train: _Train, *, how: _How | None = None) -> "Panel | StaticPanel":
    """Show the control panel; use it as the last expression of a cell.

    If nobody is there to use it, a static preview takes its place. While a run trains, do not run cells that train or
    draw random numbers: ``fit`` uses the global random generators, so both would get other numbers.

    Args:
        settings: values at the start; its ``PANEL`` names the settings that get a control.
        train: function called as ``train(settings, seed, callbacks)`` for one seed after the other. It trains with
            ``fit(…, callbacks=callbacks)`` and returns the outcome.
        how: called as ``how(settings)`` for what ``write_model`` needs to keep a model that was trained with these
            settings, such as its template and verbalizer; by default nothing.
    """
    return Panel(settings, train, how=how) if somebody_is_there() else StaticPanel(settings)


class Panel:
    """Widget with controls, buttons, live curve, table of runs, their comparison and their command; see ``panel``.

    A run trains in a thread, so that the kernel stays free; only one panel at a time can train.

    Attributes:
        controls: controls by name of the setting.
        runs: the runs in the table.
        thread: thread of the last run.
    """

    _training: ClassVar["Panel | None"] = None  # two runs of `fit` at once would share the global random generators

    def __init__(self, settings: NotebookSettings, train: _Train, *, how: _How | None = None) -> None:
        self.settings, self.train, self.how = settings, train, how
        self._trained: nn.Module | None = None  # by the last seed of the last run
        self._started = datetime.now().astimezone()  # the last run
        self.controls = make_controls(settings)
        self.runs: list[PanelRun] = []
        self.thread: threading.Thread | None = None
        self.train_button = Button(description="Train", button_style="primary", tooltip="train with these settings")
        self.stop_button = Button(description="Stop", disabled=True, tooltip="end the run after this step and keep it")
        self.reset_button = Button(description="Reset", tooltip="return to the settings at the start")
        self.keep_button = Button(description="Keep this model", disabled=True, tooltip="write it into runs/kept/")
        self.keep_button.on_click(self._keep)
        self.train_button.on_click(self._start)
        self.stop_button.on_click(self._stop)
        self.reset_button.on_click(self._reset)
        self.curve = LiveCurve()
        self.table, self.comparison = HTML(table_html([], settings)), HTML()
        style = {"description_width": "initial"}
        self.first, self.second = (Dropdown(description=text, style=style) for text in ("compare run", "with run"))
        self.first.observe(self._show_comparison, "value")
        self.second.observe(self._show_comparison, "value")
        self._pair = VBox([HBox([self.first, self.second]), self.comparison], layout={"display": "none"})
        self.copy = HTML()
        folded = Accordion([self.copy], titles=["These settings as a command and as a file"], selected_index=None)
        for control in self.controls.values():
            control.widget.observe(self._show_copy, "value")
        self._show_copy()

        left = VBox(
            [control.widget for control in self.controls.values()], layout={"width": "330px", "margin": "0 12px 0 0"}
        )
        keep = [self.keep_button] if "keep" in type(settings).model_fields else []
        buttons = HBox([self.train_button, self.stop_button, self.reset_button, *keep], layout={"flex_flow": "wrap"})
        right = VBox([buttons, self.curve.status, self.curve.image], layout={"width": "500px", "flex": "1 1 auto"})
        self._box = VBox([HBox([left, right], layout={"flex_flow": "row wrap"}), self.table, self._pair, folded])
        if get_ipython() is not None:  # after each cell, in its own thread, which may not be that of a click
            get_ipython().events.register("post_run_cell", _release_threads)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return self._box._repr_mimebundle_(**options)

    def _start(self, _: Button) -> None:
        if Panel._training is not None:
            self.curve.say("Another panel is training: press Stop to end its run, or wait until it ends.", "alert")
            self.stop_button.disabled = False
            return
        try:
            chosen = self._chosen()
        except SettingsError as error:
            self.curve.say(str(error), "alert")
            return
        Panel._training, self._trained = self, None
        self.train_button.disabled, self.stop_button.disabled, self.keep_button.disabled = True, False, True
        self.curve.begin(seeds_of(chosen))
        self.thread = threading.Thread(target=self._run, args=[chosen], daemon=True)
        self.thread.start()

    def _chosen(self) -> NotebookSettings:
        """The settings in the controls; raises SettingsError for a text that is not allowed."""
        return self.settings.changed(**{name: control.value for name, control in self.controls.items()})

    def _show_copy(self, _: Any = None) -> None:
        try:
            self.copy.value = copy_html(self._chosen())
        except SettingsError as error:
            self.copy.value = f'<div class="{NO_MATH}">{html.escape(str(error))}</div>'

    def _stop(self, _: Button) -> None:
        self.stop_button.disabled = True
        training = Panel._training  # read once: the thread may end at any moment
        if training is not None:
            training.curve.stop.set()

    def _reset(self, _: Button) -> None:
        for control in self.controls.values():
            control.reset()

    def _run(self, chosen: NotebookSettings) -> None:
        """Train all seeds, in a thread; the panel shows an error if there is one."""
        started = self._started = datetime.now().astimezone()
        try:
            with Meter() as cost:
                outcomes, error = self._train_seeds(chosen)
            if outcomes:
                self._add(PanelRun(len(self.runs) + 1, chosen, outcomes, self.curve.total_steps, error))
            if outcomes or error:
                self._record(chosen, started, cost, self.runs[-1] if outcomes else None, error)
            if error:
                self.curve.say(error, "alert")
            elif outcomes:
                self.curve.say(f"Run {len(self.runs)} {self.runs[-1].ended}.", "status")
            else:
                self.curve.say("Stopped before the first step: there is no result to keep.", "status")
        except Exception as problem:
            self.curve.say(in_one_line(problem), "alert")
        finally:
            Panel._training = None
            self.train_button.disabled, self.stop_button.disabled = False, True
            self.keep_button.disabled = self._trained is None

    def _train_seeds(self, chosen: NotebookSettings) -> tuple[list[Outcome], str | None]:
        """Train one seed after the other; returns their outcomes and the error that ended the run, if any."""
        outcomes: list[Outcome] = []
        for seed in seeds_of(chosen):
            if self.curve.stop.is_set():
                break
            self.curve.begin_seed(seed)
            last = LastModel()
            try:
                outcome = self.train(chosen, seed, [self.curve, last])
            except Exception as problem:
                self._trained = None
                return outcomes, in_one_line(problem)
            finally:
                self.curve.end_seed()
            if outcome.history.steps or not self.curve.stop.is_set():  # stopped before the first step: untrained
                outcomes.append(outcome)
                self._trained = last.model
        return outcomes, None

    def _keep(self, _: Button) -> None:
        if Panel._training is not None:
            self.curve.say("A panel is training: wait until its run ends, then keep this model.", "alert")
            return
        Panel._training = self
        self.train_button.disabled = self.keep_button.disabled = True
        self.curve.say("Writing the model …")
        self.thread = threading.Thread(target=self._write_model, daemon=True)
        self.thread.start()

    def _write_model(self) -> None:
        """Write the model of the last run, in a thread; the panel shows an error if there is one."""
        run = self.runs[-1]
        last = run.outcomes[-1]
        name = f"{run.settings.NOTEBOOK}-{self._started:%Y%m%d-%H%M%S}"
        try:
            write_model(
                self._trained,
                runs_folder() / "kept" / name,
                run.settings,
                method=getattr(run.settings, "method", "full"),
                seed=last.seed,
                test=last.evaluations.get("test"),
                **(self.how(run.settings) if self.how else {}),
            )
            several = f", seed {last.seed}, its last," if len(run.outcomes) > 1 else ""
            self.curve.say(f"The model of run {run.number}{several} is in runs/kept/{name}.", "status")
        except Exception as problem:
            self.curve.say(in_one_line(problem), "alert")
        finally:
            Panel._training = None
            self.train_button.disabled = self.keep_button.disabled = False

    def _add(self, run: PanelRun) -> None:
        """Add a run to the table and compare it with the reference run that the reader chose."""
        table = table_html([*self.runs, run], self.settings)
        self.runs.append(run)
        self.table.value = table
        names = varied(self.runs, self.settings)
        options = [(f"{run.number}: {run.describe(names) or 'as at the start'}", i) for i, run in enumerate(self.runs)]
        reference = self.second.value or 0
        self.first.options = self.second.options = options
        self.first.value, self.second.value = len(self.runs) - 1, reference
        self._pair.layout.display = "flex" if len(self.runs) > 1 else "none"

    def _show_comparison(self, _: Any) -> None:
        if None not in (self.first.value, self.second.value):
            self.comparison.value = comparison_html(self.runs[self.first.value], self.runs[self.second.value])

    def _record(
        self, chosen: NotebookSettings, started: datetime, cost: Meter, run: PanelRun | None, error: str | None
    ) -> None:
        """Append the run to the ledger."""
        entry = {
            "id": uuid.uuid4().hex,
            "source": "panel",
            "notebook": chosen.NOTEBOOK,
            "tier": chosen.tier,
            "started": started.isoformat(timespec="seconds"),
            "parameters": {name: value for name, (_, value) in chosen.differing().items()},
            "settings": chosen.model_dump(),
            "metrics": {"panel": run.entry | {"split": run.split}} if run else {},
            "seconds": cost.seconds,
            "peak_rss_mib": cost.peak_rss_mib,
            "error": error,
            "ended": "failed" if error else run.ended.split()[0],
        }
        append_to_ledger(runs_folder() / LEDGER, entry)


def _release_threads(result: Any) -> None:
    """End idle threads after each cell: they would slow down the panel's training."""
    release_threads()
