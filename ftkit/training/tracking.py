"""Record losses, rates and scores with a tracker, such as tensorboard.

``ftkit run --track`` sets the environment variable FTKIT_TRACK of the notebook; without it nothing here does anything.
The trackers are those of accelerate.
"""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from ftkit.training.callbacks import Callback
from ftkit.training.state import TrainingRun

_fits = itertools.count(1)  # a notebook trains many networks, and each has curves of its own


class Tracking(Callback):
    """Hand every step and every epoch of a run on to a tracker.

    Args:
        tracker: an open tracker.
    """

    steers = False

    def __init__(self, tracker: GeneralTracker) -> None:
        self.tracker = tracker
        self._steps = self._epochs = 0  # handed on so far

    def on_start(self, run: TrainingRun) -> None:
        self._hand_on(run)  # what a resumed run has done before

    def on_step(self, run: TrainingRun) -> None:
        self._hand_on(run)

    def on_epoch(self, run: TrainingRun) -> None:
        self._hand_on(run)

    def _hand_on(self, run: TrainingRun) -> None:
        for row in run.history.steps[self._steps :]:
            _log(self.tracker, {f"step/{name}": value for name, value in row.items() if name != "step"}, row["step"])
        for row in run.history.epochs[self._epochs :]:
            scores = {f"epoch/{name}": value for name, value in row.items() if name != "epoch"}
            _log(self.tracker, scores, row["epoch"] * run.steps_per_epoch)
        self._steps, self._epochs = len(run.history.steps), len(run.history.epochs)


@contextlib.contextmanager
def tracked(run: TrainingRun) -> Iterator[list[Callback]]:
    """Open a tracker for a run of ``fit``, named after its number in the notebook and its seed, and close it.

    Args:
        run: the run; its settings become the tracker's hyperparameters.

    Yields:
        The callback that hands the run on; nothing if nothing is tracked, or by another process than the main one.
    """
    if not _folder() or not run.accelerator.is_main_process:
        yield []
        return
    name = f"fit {next(_fits):02d}, seed {run.settings.seed}"  # as wide as needed to be sorted by number
    with _opened(name, run.settings.model_dump()) as tracker:
        yield [Tracking(tracker)]


def track_scores(settings: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Record the results of a notebook; ``save_metrics`` calls this.

    The scores of each seed are recorded at the step that is the seed's number, the other figures once.

    Args:
        settings: settings of the notebook.
        metrics: entries by method, as for ``save_metrics``.
    """
    if not _folder():
        return
    by_seed: dict[int, dict[str, float]] = {}
    once = {}
    for method, entry in metrics.items():
        for figure, value in entry.items():
            if figure.endswith("by_seed") and isinstance(value, list | tuple):
                score = figure.removesuffix("by_seed").rstrip("_") or "accuracy"
                for seed, one in zip(entry.get("seeds") or [], value, strict=False):
                    by_seed.setdefault(seed, {})[f"{method}/{score} by seed"] = one
            elif figure == "ci95" and value is not None:
                once |= {f"{method}/{end}": bound for end, bound in zip(("low", "high"), value, strict=True)}
            elif isinstance(value, int | float) and not isinstance(value, bool):
                once[f"{method}/{figure}"] = value
    with _opened("scores", settings) as tracker:
        for seed in sorted(by_seed):
            _log(tracker, by_seed[seed], seed)
        _log(tracker, once, max(by_seed, default=0))


def _folder() -> Path | None:
    """Folder of the run that is to be tracked, None if nothing is."""
    if os.environ.get("FTKIT_TRACK") and os.environ.get("FTKIT_RUN_DIR"):
        return Path(os.environ["FTKIT_RUN_DIR"])
    return None


@contextlib.contextmanager
def _opened(name: str, settings: Mapping[str, Any]) -> Iterator[GeneralTracker]:
    """A tracker that FTKIT_TRACK names, for a part of the run with its own curves."""
    kind, folder = os.environ["FTKIT_TRACK"], _folder()
    full = f"{folder.name}, {name}"
    if kind == "tensorboard":
        made = LOGGER_TYPE_TO_CLASS[kind](name, folder / "tracking")
    elif kind == "wandb":
        os.environ |= {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}  # or it would write into the notebook
        (folder / "tracking").mkdir(exist_ok=True)
        made = LOGGER_TYPE_TO_CLASS[kind]("ftkit", name=full, group=folder.name, dir=folder / "tracking")
    elif kind == "mlflow":
        made = LOGGER_TYPE_TO_CLASS[kind]("ftkit", run_name=full)
    else:
        made = LOGGER_TYPE_TO_CLASS[kind]("ftkit", name=full)
    with _quiet():
        made.start()
    try:
        with _quiet():
            made.store_init_configuration({key: _plain(value) for key, value in settings.items()})
        yield made
    finally:
        with _quiet():
            made.finish()


def _log(tracker: GeneralTracker, values: Mapping[str, Any], step: int) -> None:
    with _quiet():
        tracker.log({re.sub(r"[^\w./ -]", "_", name): float(value) for name, value in values.items()}, step=int(step))


def _plain(value: Any) -> Any:
    """A setting as every tracker takes it: what is no number and no text becomes text."""
    return value if isinstance(value, int | float | str) else str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the messages of a tracker out of the notebook."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
