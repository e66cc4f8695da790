"""The control panel of a notebook: turn a setting, press Train, watch the curve, compare the runs."""

import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, ClassVar

from IPython import get_ipython
from ipywidgets import HTML, Button, Dropdown, HBox, VBox

from ftkit import ledger
from ftkit.callbacks import Callback
from ftkit.controls import Picture, make_controls
from ftkit.livecurve import LiveCurve
from ftkit.machine import release_threads
from ftkit.meter import Meter
from ftkit.results import Outcome, runs_folder
from ftkit.runtable import PanelRun, comparison_html, seeds_of, table_html, varied
from ftkit.schema import NotebookSettings, SettingsError

Train = Callable[[Any, int, Sequence[Callback]], Outcome]


def panel(settings: NotebookSettings, train: Train) -> "Panel | Picture":
    """The control panel, as the last expression of a cell; where nobody is there to use it, its picture.

    While a run goes on, leave the cells alone that train or draw random numbers: ``fit`` uses the global random
    generators, so that either would disturb the other.

    Args:
        settings: what the controls start with; its ``PANEL`` names those that get one.
        train: called as ``train(settings, seed, callbacks)`` for each seed in turn; gives the outcome of one run,
            which it makes with ``fit(…, callbacks=callbacks)``.
    """
    return Panel(settings, train) if somebody_is_there() else Picture(settings)


def somebody_is_there() -> bool:
    """Whether the running cell was sent by a person: tools that execute notebooks allow no ``input()``."""
    kernel = getattr(get_ipython(), "kernel", None)
    request = kernel.get_parent() if kernel else {}
    return request.get("content", {}).get("allow_stdin", False)


class Panel:
    """Controls, buttons, live curve, table of runs and their comparison; see ``panel``.

    A run trains in a thread of its own, one run at a time in all panels, so that the kernel stays free.

    Attributes:
        controls: by name of the setting.
        runs: that joined the table.
        thread: of the last run.
    """

    _training: ClassVar["Panel | None"] = None  # fit can't be run twice at once: its random generators are global

    def __init__(self, settings: NotebookSettings, train: Train) -> None:
        self.settings, self.train = settings, train
        self.controls = make_controls(settings)
        self.runs: list[PanelRun] = []
        self.thread: threading.Thread | None = None
        self.train_button = Button(description="Train", button_style="primary", tooltip="train with these settings")
        self.stop_button = Button(description="Stop", disabled=True, tooltip="end after this step and keep the run")
        self.reset_button = Button(description="Reset", tooltip="back to the settings at the start")
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

        left = VBox(
            [control.widget for control in self.controls.values()], layout={"width": "330px", "margin": "0 12px 0 0"}
        )
        buttons = HBox([self.train_button, self.stop_button, self.reset_button])
        right = VBox([buttons, self.curve.status, self.curve.picture], layout={"width": "500px", "flex": "1 1 auto"})
        self._box = VBox([HBox([left, right], layout={"flex_flow": "row wrap"}), self.table, self._pair])
        if get_ipython() is not None:  # the thread that runs the cells may be another than that of a click
            get_ipython().events.register("post_run_cell", _release_threads)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return self._box._repr_mimebundle_(**options)

    def _start(self, _: Button) -> None:
        if Panel._training is not None:
            self.curve.say("Another panel is training: press Stop to end its run, or wait for it.", "alert")
            self.stop_button.disabled = False
            return
        try:
            chosen = self.settings.changed(**{name: control.value for name, control in self.controls.items()})
        except SettingsError as error:
            self.curve.say(str(error), "alert")
            return
        Panel._training = self
        self.train_button.disabled, self.stop_button.disabled = True, False
        self.curve.begin(seeds_of(chosen))
        self.thread = threading.Thread(target=self._run, args=[chosen], daemon=True)
        self.thread.start()

    def _stop(self, _: Button) -> None:
        self.stop_button.disabled = True
        training = Panel._training  # its thread may end at any moment
        if training is not None:
            training.curve.stop.set()

    def _reset(self, _: Button) -> None:
        for control in self.controls.values():
            control.reset()

    def _run(self, chosen: NotebookSettings) -> None:
        """A whole run, in its thread; what goes wrong is said in the panel."""
        started = datetime.now().astimezone()
        try:
            with Meter() as cost:
                outcomes, error = self._train_seeds(chosen)
            if outcomes:
                self._join(PanelRun(len(self.runs) + 1, chosen, outcomes, self.curve.total_steps, error))
            if outcomes or error:
                self._record(chosen, started, cost, self.runs[-1] if outcomes else None, error)
            if error:
                self.curve.say(error, "alert")
            elif outcomes:
                self.curve.say(f"Run {len(self.runs)} {self.runs[-1].ended}.", "status")
            else:
                self.curve.say("Stopped before the first step: there is nothing to keep.", "status")
        except Exception as problem:
            self.curve.say(in_one_line(problem), "alert")
        finally:
            Panel._training = None
            self.train_button.disabled, self.stop_button.disabled = False, True

    def _train_seeds(self, chosen: NotebookSettings) -> tuple[list[Outcome], str | None]:
        """The outcomes there are, and the error that ended the run if one did."""
        outcomes: list[Outcome] = []
        for seed in seeds_of(chosen):
            if self.curve.stop.is_set():
                break
            self.curve.begin_seed(seed)
            try:
                outcome = self.train(chosen, seed, [self.curve])
            except Exception as problem:
                return outcomes, in_one_line(problem)
            finally:
                self.curve.end_seed()
            if outcome.history.steps or not self.curve.stop.is_set():  # else it is untrained
                outcomes.append(outcome)
        return outcomes, None

    def _join(self, run: PanelRun) -> None:
        """Put a run into the table, and beside the one that was chosen to compare with."""
        table = table_html([*self.runs, run], self.settings)
        self.runs.append(run)
        self.table.value = table
        names = varied(self.runs, self.settings)
        options = [(f"{run.number}: {run.told(names) or 'as given'}", i) for i, run in enumerate(self.runs)]
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
        """A line in the ledger."""
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
        ledger.append(runs_folder() / ledger.NAME, entry)


def _release_threads(result: Any) -> None:
    """After each cell: what it left waiting would slow the panel's training."""
    release_threads()


def in_one_line(problem: Exception) -> str:
    """What is said of an error: ours are sentences, of others the kind matters too."""
    lines = str(problem).splitlines() or [""]
    kind = "" if isinstance(problem, ValueError | RuntimeError) and lines[0] else type(problem).__name__
    return ": ".join(filter(None, [kind, lines[0]]))
