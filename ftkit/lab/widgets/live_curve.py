"""The learning curve of a run in progress."""

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

from ftkit.plots import COLOURS, STYLE
from ftkit.training.callbacks import Callback
from ftkit.training.state import History, TrainingRun

STATUS_SECONDS = 0.2

DRAWING_SECONDS = 1.0

DRAWING_SHARE = 30  # training goes on for this many times as long as the last drawing took


class LiveCurve(Callback):
    """A line of status, and the training loss by step and validation accuracy by epoch, a line a seed.

    Make it in the main thread; it may then be called from any one other. The figure is not pyplot's, which belongs
    to the main thread, and is made once: a new drawing only moves its lines.

    Attributes:
        status, image: widgets.
        stop: set it to end the run after the step it is in.
        total_steps: that the last seed was to take, in all trainings that it has begun.
    """

    def __init__(self) -> None:
        self.status, self.image = ipywidgets.HTML(), ipywidgets.HTML()
        self.stop = threading.Event()
        self.total_steps = 0
        self._seeds: Sequence[int] = []
        self._history, self._place = History(), 0
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
                axes.tick_params(labelsize=8)  # said here, for ticks that are made in another thread
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        self._draw()

    def begin(self, seeds: Sequence[int]) -> None:
        """Before a run of these seeds: an empty curve."""
        self.stop.clear()
        self._seeds = seeds
        for axes in (self._losses, self._scores):
            for line in list(axes.lines):
                line.remove()
        self._highest = 0.0

    def begin_seed(self, seed: int) -> None:
        """Before one of them."""
        self._place, self._history, self.total_steps = self._seeds.index(seed), History(), 0
        self.say(f"{self._of_seed()}getting ready …")

    def end_seed(self) -> None:
        """After it, however it ended: draw its last state."""
        if self._history.steps:
            self._draw()

    def say(self, text: str, role: str | None = None) -> None:
        """Show a text as the status; role "alert" is read out at once by a screen reader, "status" when it is idle."""
        colour = "color: var(--jp-error-color1, #d32f2f); font-weight: bold" if role == "alert" else ""
        spoken = f'role="{role}"' if role else ""
        # two lines high, so that the curve below stays where it is
        style = f"line-height: 1.4; min-height: 2.8em; {colour}"
        self.status.value = f'<div {spoken} style="{style}">{html.escape(text)}</div>'

    def on_start(self, run: TrainingRun) -> None:
        self._earlier = self.total_steps  # of trainings before this one, where a seed has several, a task each
        self.total_steps += run.total_steps
        self._history, self._first_step = run.history, run.step
        self._start = self._tell_at = self._draw_at = time.monotonic()
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
        if now >= self._tell_at or run.step == run.total_steps:
            self._tell_at = now + STATUS_SECONDS
            self.say(self._told(run.step, now - self._start))
        if now >= self._draw_at:
            self._draw()
            took = time.monotonic() - now
            self._draw_at = now + took + max(DRAWING_SECONDS, DRAWING_SHARE * took)
        self._end_if_asked(run)

    def on_epoch(self, run: TrainingRun) -> None:
        self.say(self._told(run.step, time.monotonic() - self._start))
        self._end_if_asked(run)

    def _end_if_asked(self, run: TrainingRun) -> None:
        if self.stop.is_set():
            run.stop = True
            self.say(f"{self._of_seed()}stopped at step {run.step} of {run.total_steps}, measuring …")

    def _of_seed(self) -> str:
        if len(self._seeds) == 1:
            return ""
        return f"seed {self._seeds[self._place]} ({self._place + 1} of {len(self._seeds)}): "

    def _scored(self) -> str:
        scores = [epoch["validation_accuracy"] for epoch in self._history.epochs if "validation_accuracy" in epoch]
        return f", validation accuracy {scores[-1]:.3f}" if scores else ""

    def _told(self, step: int, seconds: float) -> str:
        """The status after a step of a seed that has gone on for so many seconds."""
        rate = (step - self._first_step) / max(seconds, 1e-9)
        place = self._earlier + step
        left = (self.total_steps * (len(self._seeds) - self._place) - place) / max(rate, 1e-9)
        left = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        loss = f", loss {self._history.steps[-1]['loss']:.3f}" if self._history.steps else ""
        steps = f"step {place} of {self.total_steps}, {rate:.1f} steps/s, {left} left"
        return f"{self._of_seed()}{steps}{loss}{self._scored()}"

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
            place = self._earlier + steps[-1]["step"]
            now = f"{self._of_seed()}loss {steps[-1]['loss']:.3f} at step {place} of {self.total_steps}"
            alt = f"{now}{self._scored()}"
        buffer = io.BytesIO()
        self._canvas.print_png(buffer, pil_kwargs={"compress_level": 1})
        image = base64.b64encode(buffer.getvalue()).decode("ascii")
        alt = html.escape(f"Training loss by step and validation accuracy by epoch: {alt}.")
        self.image.value = f'<img alt="{alt}" src="data:image/png;base64,{image}" style="max-width: 100%">'
