"""The learning curve of a run, drawn while it trains."""

import base64
import html
import io
import threading
import time
from collections.abc import Sequence

import ipywidgets
import matplotlib as mpl
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ftkit.plots import COLOURS, NO_MATH, STYLE
from ftkit.training.callbacks import Callback
from ftkit.training.state import History, TrainingRun

_STATUS_SECONDS = 0.2

_DRAWING_SECONDS = 1.0

_DRAWING_SHARE = 30  # between two drawings, training gets this many times the seconds that the last one took


class LiveCurve(Callback):
    """Callback that shows a status line, the training loss by step and the validation accuracy by epoch.

    Each seed gets a line of its own. Create it in the main thread; afterwards one other thread may call it. The figure
    does without pyplot, which belongs to the main thread, and is created once: a new drawing only moves its lines.

    Attributes:
        status, image: widgets.
        stop: event; set it to end the run after the current step.
        total_steps: steps planned for the current seed, summed over the training runs started so far.
    """

    steers = False

    def __init__(self) -> None:
        self.status, self.image = ipywidgets.HTML(), ipywidgets.HTML()
        self.stop = threading.Event()
        self.total_steps = 0
        self._seeds: Sequence[int] = []
        self._history, self._index = History(), 0
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(5.6, 2.3), dpi=110)
            self._canvas = FigureCanvasAgg(figure)
            self._losses, self._scores = figure.subplots(1, 2)
            figure.subplots_adjust(left=0.1, right=0.98, bottom=0.22, top=0.9, wspace=0.35)
            for axes, xlabel, title in (
                (self._losses, "optimiser step (mean of the last 10)", "training loss (nats)"),
                (self._scores, "epoch", "validation accuracy"),
            ):
                axes.set_xlabel(xlabel, fontsize=8)
                axes.set_title(title, fontsize=9, loc="left")
                axes.tick_params(labelsize=8)  # set here: STYLE does not apply to ticks made in another thread
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        self._draw()

    def begin(self, seeds: Sequence[int]) -> None:
        """Empty the curve before a run with these seeds."""
        self.stop.clear()
        self._seeds = seeds
        for axes in (self._losses, self._scores):
            for line in list(axes.lines):
                line.remove()
        self._highest = 0.0

    def begin_seed(self, seed: int) -> None:
        """Prepare for one of the seeds."""
        self._index, self._history, self.total_steps = self._seeds.index(seed), History(), 0
        self.say(f"{self._seed_label()}preparing …")

    def end_seed(self) -> None:
        """Draw the last state of a seed, however it ended."""
        if self._history.steps:
            self._draw()

    def say(self, text: str, role: str | None = None) -> None:
        """Show a text as the status.

        Args:
            text: the text.
            role: ARIA role: a screen reader reads an "alert" out at once, a "status" when it is idle.
        """
        colour = "color: var(--jp-error-color1, #d32f2f); font-weight: bold" if role == "alert" else ""
        spoken = f'role="{role}"' if role else ""
        # two lines high, so that the curve below does not move
        style = f"line-height: 1.4; min-height: 2.8em; {colour}"
        self.status.value = f'<div {spoken} class="{NO_MATH}" style="{style}">{html.escape(text)}</div>'

    def on_start(self, run: TrainingRun) -> None:
        self._earlier = self.total_steps  # a seed may have several training runs, for example one per task
        self.total_steps += run.total_steps
        self._history, self._first_step = run.history, run.step
        self._start = self._next_status = self._next_drawing = time.monotonic()
        for axes in (self._losses, self._scores):
            for line in axes.lines:
                line.set_alpha(0.3)
        (self._loss_line,) = self._losses.plot([], [], color=COLOURS[0], lw=1.5)
        (self._score_line,) = self._scores.plot([], [], "o-", color=COLOURS[1], lw=1.5, ms=5)
        self._losses.set_xlim(0, run.total_steps)
        self._scores.set_xlim(0.5, run.settings.num_epochs + 0.5)
        self._end_if_asked(run)

    def on_step(self, run: TrainingRun) -> None:
        now = time.monotonic()
        if now >= self._next_status or run.step == run.total_steps:
            self._next_status = now + _STATUS_SECONDS
            self.say(self._progress(run.step, now - self._start))
        if now >= self._next_drawing:
            self._draw()
            took = time.monotonic() - now
            self._next_drawing = now + took + max(_DRAWING_SECONDS, _DRAWING_SHARE * took)
        self._end_if_asked(run)

    def on_epoch(self, run: TrainingRun) -> None:
        self.say(self._progress(run.step, time.monotonic() - self._start))
        self._end_if_asked(run)

    def _end_if_asked(self, run: TrainingRun) -> None:
        if self.stop.is_set():
            run.stop = True
            self.say(f"{self._seed_label()}stopped at step {run.step} of {run.total_steps}, evaluating …")

    def _seed_label(self) -> str:
        if len(self._seeds) == 1:
            return ""
        return f"seed {self._seeds[self._index]} ({self._index + 1} of {len(self._seeds)}): "

    def _last_accuracy(self) -> str:
        scores = [epoch["validation_accuracy"] for epoch in self._history.epochs if "validation_accuracy" in epoch]
        return f", validation accuracy {scores[-1]:.3f}" if scores else ""

    def _progress(self, step: int, seconds: float) -> str:
        """Status after a step, with the speed and the time left; ``seconds`` have passed since the first step."""
        rate = (step - self._first_step) / max(seconds, 1e-9)
        done = self._earlier + step
        left = (self.total_steps * (len(self._seeds) - self._index) - done) / max(rate, 1e-9)
        left = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        loss = f", loss {self._history.steps[-1]['loss']:.3f}" if self._history.steps else ""
        steps = f"step {done} of {self.total_steps}, {rate:.1f} steps/s, {left} left"
        return f"{self._seed_label()}{steps}{loss}{self._last_accuracy()}"

    def _draw(self) -> None:
        steps, alt = self._history.steps, "no run yet"
        if steps:
            smooth = pd.Series([step["loss"] for step in steps]).rolling(10, min_periods=1).mean()
            self._loss_line.set_data([step["step"] for step in steps], smooth)
            self._highest = max(self._highest, smooth.max())
            self._losses.set_ylim(0, 1.1 * self._highest)
            epochs = [epoch for epoch in self._history.epochs if "validation_accuracy" in epoch]
            accuracies = [epoch["validation_accuracy"] for epoch in epochs]
            self._score_line.set_data([epoch["epoch"] for epoch in epochs], accuracies)
            self._scores.relim()
            self._scores.autoscale_view(scalex=False)
            done = self._earlier + steps[-1]["step"]
            now = f"{self._seed_label()}loss {steps[-1]['loss']:.3f} at step {done} of {self.total_steps}"
            alt = f"{now}{self._last_accuracy()}"
        buffer = io.BytesIO()
        self._canvas.print_png(buffer, pil_kwargs={"compress_level": 1})
        image = base64.b64encode(buffer.getvalue()).decode("ascii")
        alt = html.escape(f"Training loss by step and validation accuracy by epoch: {alt}.")
        self.image.value = f'<img alt="{alt}" src="data:image/png;base64,{image}" style="max-width: 100%">'
