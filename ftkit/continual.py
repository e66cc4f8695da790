"""Learn tasks one after the other, and measure all of them after each: the accuracy matrix of a strategy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ftkit.averaging import snapshot, weight_distance
from ftkit.callbacks import Callback, History
from ftkit.gradients import Penalty
from ftkit.meter import Meter
from ftkit.metrics import Evaluation
from ftkit.multihead import MultiHead
from ftkit.sequencerun import SequenceFile, SequenceRun
from ftkit.tasks import Rows
from ftkit.training import TrainSettings, evaluate, fit


@dataclass
class Stage:
    """What is about to be learned, for a strategy to change.

    Attributes:
        model: the network; all that is to train requires a gradient.
        tasks: the rows of all tasks by split.
        index: number of the task, from 0.
        settings: of the training.
        rows: to train on; none where there is nothing to train.
        validation: rows to choose the best epoch on.
        penalties: for the loss.
        seen: tasks whose classes a growing head has by now.
        old_heads: whether the heads of earlier tasks train too, though no row is theirs.
    """

    model: MultiHead
    tasks: Sequence[Mapping[str, Rows]]
    index: int
    settings: TrainSettings
    rows: Rows
    validation: Rows
    penalties: list[Penalty]
    seen: int
    old_heads: bool = False

    @property
    def new_heads(self) -> set[str]:
        """Names of the parameters of heads that no earlier task has trained."""
        fresh = {self.model.head_of[self.index]} - self.model.heads_of(range(self.index))
        return {name for name, head in self.model.head_parameters().items() if head in fresh}


class Strategy:
    """Naive fine-tuning on one task after the other; what the others do differently, they override.

    Args:
        strength: the one knob of a strategy; this one has none.
    """

    strength: float | None = None

    def set_up(self, model: MultiHead) -> None:
        """Before the first task."""

    def before(self, stage: Stage) -> None:
        """Before each task, with the weights that the one before left."""
        stage.model.requires_grad_(True)

    def after(self, stage: Stage) -> None:
        """After each task, before anything is measured."""

    def activate(self, model: MultiHead, task: int) -> None:
        """Before a task is measured."""

    def distance(self, model: MultiHead, start: Mapping[str, Tensor]) -> float:
        """How far the weights, heads aside, have come from those before any training."""
        return weight_distance(model, start)

    def state_dict(self) -> dict[str, Any]:
        """What cannot be had again from the weights and rows when a sequence is resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""

    def identity(self) -> dict[str, Any]:
        """What tells this strategy from another: its class and its numbers."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, int | float | str | None)}
        return {"strategy": type(self).__name__, **plain}


def learn_sequence(
    model: MultiHead,
    tasks: Sequence[Mapping[str, Rows]],
    strategy: Strategy,
    settings: TrainSettings,
    *,
    splits: Sequence[str] = ("test",),
    folder: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> SequenceRun:
    """Train a model on one task after the other, and measure it on all of them before the first and after each.

    Heads that no training row is of stay as they are.

    Args:
        model: for these tasks; trained in place, and left as the last task leaves it.
        tasks: the rows of each by split, from ``TaskSequence.encode``.
        strategy: what is done against forgetting.
        settings: of the training of each task. With ``keep_best`` the epoch is kept that is best on the validation
            rows of the task.
        splits: to measure on.
        folder: to keep the state in after each task and, of the one in training, every 100 steps and each epoch. The
            same call goes on from it, if it was killed at whatever moment, and gives the same run. None keeps nothing.
        callbacks: for the training of each task.

    Raises:
        ValueError: tasks that are not the model's, a split they lack, label smoothing with several heads, a folder
            that holds another run.
        KeyboardInterrupt: the training of a task was interrupted; a folder has it up to the last state written.
    """
    if len(tasks) != len(model.head_of):
        raise ValueError(
            f"The model is for {len(model.head_of)} tasks, not {len(tasks)}: give the tasks of its sequence."
        )
    for name, task in zip(model.task_names, tasks, strict=True):
        for split in ("train", *splits):
            if not task.get(split):
                raise ValueError(f"The task {name} has no rows of the split {split!r}: give some, or other splits.")
    if settings.label_smoothing and (model.growing or len(model.columns) > 1):
        raise ValueError("label_smoothing would ask for classes that a row is not scored among: set it to 0.")
    memory = SequenceFile(folder, model, tasks, strategy, settings, splits)
    strategy.set_up(model)
    heads = model.head_parameters()
    start = {name: weights for name, weights in snapshot(model).items() if name not in heads}
    run = SequenceRun(model.task_names, {split: [] for split in splits})
    if not memory.resume(model, strategy, run):
        model.seen = 0
        for split, stages in run.evaluations.items():
            stages.append(measure(model, tasks, strategy, split))
    for index in range(len(run.histories), len(tasks)):
        task = tasks[index]
        stage = Stage(model, tasks, index, settings, task["train"], task.get("validation", []), [], index + 1)
        with Meter() as cost:
            strategy.before(stage)
            model.seen = stage.seen
            history = _train(stage, [*memory.checkpoint(index), *callbacks])
            strategy.after(stage)
        history.seconds, history.peak_rss_mib = cost.seconds, cost.peak_rss_mib
        run.histories.append(history)
        run.distances.append(strategy.distance(model, start))
        for split, stages in run.evaluations.items():
            stages.append(measure(model, tasks, strategy, split) if history.steps else stages[-1])
        memory.write(model, strategy, run)
    return run


def _train(stage: Stage, callbacks: Sequence[Callback]) -> History:
    if not stage.rows:
        return History()
    trained = {int(row["task"]) for row in stage.rows} | set(range(stage.index if stage.old_heads else 0))
    heads = stage.model.heads_of(range(stage.seen) if stage.model.growing else trained)
    for name, head in stage.model.head_parameters().items():
        if head not in heads:  # with a gradient of zero, weight decay would still move it
            stage.model.get_parameter(name).requires_grad_(False)
    data = {"train": stage.rows}
    if stage.settings.keep_best and stage.validation:
        data["validation"] = stage.validation
    history = fit(stage.model, data, stage.settings, penalties=stage.penalties, callbacks=callbacks)
    if history.ended == "interrupted":
        raise KeyboardInterrupt
    return history


def measure(
    model: MultiHead, tasks: Sequence[Mapping[str, Rows]], strategy: Strategy, split: str = "test"
) -> list[Evaluation | None]:
    """What the model answers now, a task an evaluation; None where a growing head lacks the classes of a task.

    Args:
        model, tasks, strategy: as for ``learn_sequence``.
        split: of the tasks.
    """
    evaluations = []
    for number, task in enumerate(tasks):
        known = not model.growing or number < model.seen
        if known:
            strategy.activate(model, number)
        evaluations.append(evaluate(model, task[split]) if known else None)
    return evaluations
