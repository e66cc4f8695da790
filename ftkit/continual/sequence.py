"""Learn tasks one after the other, and evaluate all of them after each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ftkit.continual.accuracy_matrix import AccuracyMatrix
from ftkit.continual.strategies import Stage, Strategy
from ftkit.data.tasks import Rows
from ftkit.metrics import Evaluation, pooled
from ftkit.models.heads import MultiHead
from ftkit.models.modules import snapshot
from ftkit.training.callbacks import Callback
from ftkit.training.loop import evaluate, fit
from ftkit.training.monitor import Meter
from ftkit.training.state import History, TrainSettings


@dataclass
class SequenceRun:
    """What came of a sequence of T tasks.

    Attributes:
        names: of the tasks.
        evaluations: by split, before any training and after each task, on the rows of each task: T + 1 lists of T;
            None where a growing head has no classes of a task yet.
        histories: of the training of each task, its cost with that of what the strategy does before and after; where
            nothing was trained, an empty one.
        distances: of the weights from the start after each task, heads left out.
    """

    names: list[str]
    evaluations: dict[str, list[list[Evaluation | None]]]
    histories: list[History] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)

    def matrix(self, split: str = "test") -> AccuracyMatrix:
        """The accuracies on one of the splits that were measured."""
        measured = self.evaluations[split]
        accuracies = [[0.0 if part is None else part.accuracy for part in stage] for stage in measured]
        return AccuracyMatrix(accuracies[1:], accuracies[0], self.names)

    def evaluation(self, split: str = "test") -> Evaluation:
        """Of the model in the end, on the rows of all tasks together."""
        return pooled(self.evaluations[split][-1])

    @property
    def history(self) -> History:
        """The histories of all tasks as one, steps and epochs numbered through."""
        steps = [step for history in self.histories for step in history.steps]
        epochs = [epoch for history in self.histories for epoch in history.epochs]
        return History(
            steps=[{**step, "step": number} for number, step in enumerate(steps, 1)],
            epochs=[{**epoch, "epoch": number} for number, epoch in enumerate(epochs, 1)],
            ended=next((history.ended for history in self.histories if history.ended != "finished"), "finished"),
            trainable_parameters=max(history.trainable_parameters for history in self.histories),
            seconds=sum(history.seconds for history in self.histories),
            peak_rss_mib=max(history.peak_rss_mib for history in self.histories),
        )


def learn_sequence(
    model: MultiHead,
    tasks: Sequence[Mapping[str, Rows]],
    strategy: Strategy,
    settings: TrainSettings,
    *,
    splits: Sequence[str] = ("test",),
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
        callbacks: for the training of each task.

    Raises:
        ValueError: tasks that are not the model's, a split they lack, label smoothing with several heads.
        KeyboardInterrupt: the training of a task was interrupted.
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
    strategy.set_up(model)
    heads = model.head_parameters()
    start = {name: weights for name, weights in snapshot(model).items() if name not in heads}
    run = SequenceRun(model.task_names, {split: [] for split in splits})
    model.seen = 0
    for split, stages in run.evaluations.items():
        stages.append(evaluate_tasks(model, tasks, strategy, split))
    for index, task in enumerate(tasks):
        stage = Stage(model, tasks, index, settings, task["train"], task.get("validation", []), [], index + 1)
        with Meter() as cost:
            strategy.before(stage)
            model.seen = stage.seen
            history = _train(stage, callbacks)
            strategy.after(stage)
        history.seconds, history.peak_rss_mib = cost.seconds, cost.peak_rss_mib
        run.histories.append(history)
        run.distances.append(strategy.distance(model, start))
        for split, stages in run.evaluations.items():
            stages.append(evaluate_tasks(model, tasks, strategy, split) if history.steps else stages[-1])
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


def evaluate_tasks(
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
