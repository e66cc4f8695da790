"""Learning of tasks one after the other, with an evaluation of all tasks after each one."""

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
    """Results of learning a sequence of T tasks.

    Attributes:
        names: names of the tasks.
        evaluations: by split, T + 1 lists (before any training, and after each task) of T evaluations, one for each
            task; None while a growing head lacks the classes of a task.
        histories: history of the training of each task, with the cost of what the strategy does before and after it;
            empty if nothing was trained.
        distances: distance of the weights, without the heads, from the starting weights after each task.
    """

    names: list[str]
    evaluations: dict[str, list[list[Evaluation | None]]]
    histories: list[History] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)

    def matrix(self, split: str = "test") -> AccuracyMatrix:
        """Return the accuracy matrix of one of the evaluated splits; an evaluation that is None counts as 0."""
        stages = self.evaluations[split]
        accuracies = [[0.0 if part is None else part.accuracy for part in stage] for stage in stages]
        return AccuracyMatrix(accuracies[1:], accuracies[0], self.names)

    def evaluation(self, split: str = "test") -> Evaluation:
        """Return the evaluation of the final model on the rows of all tasks together."""
        return pooled(self.evaluations[split][-1])

    @property
    def history(self) -> History:
        """The histories of all tasks joined into one, with steps and epochs numbered consecutively."""
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
    """Train a model on one task after the other, and evaluate it on all tasks before the first one and after each.

    Heads without training rows stay unchanged, unless the strategy trains them as well (``Stage.old_heads``).

    Args:
        model: a model for these tasks; trained in place, and left as it is after the last task.
        tasks: the rows of each task by split, from ``TaskSequence.encode``.
        strategy: the strategy against forgetting.
        settings: settings for the training on each task. With ``keep_best``, the epoch that is best on the validation
            rows of the task is kept.
        splits: splits to evaluate on.
        callbacks: callbacks for the training on each task.

    Raises:
        ValueError: the tasks do not match the model, a task lacks a split, or label smoothing is used with several
            heads.
        KeyboardInterrupt: the training on a task was interrupted.
    """
    if len(tasks) != len(model.head_of):
        raise ValueError(
            f"The model is for {len(model.head_of)} tasks, not {len(tasks)}: give the tasks that it was built for."
        )
    for name, task in zip(model.task_names, tasks, strict=True):
        for split in ("train", *splits):
            if not task.get(split):
                raise ValueError(
                    f"The task {name} has no rows in the split {split!r}: add rows or choose other splits."
                )
    if settings.label_smoothing and (model.growing or len(model.columns) > 1):
        raise ValueError("label_smoothing would reward classes that are masked for a row: set it to 0.")
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
    """Train on the rows of a stage, with the heads of other tasks frozen."""
    if not stage.rows:
        return History()
    trained = {int(row["task"]) for row in stage.rows} | set(range(stage.index if stage.old_heads else 0))
    heads = stage.model.heads_of(range(stage.seen) if stage.model.growing else trained)
    for name, head in stage.model.head_parameters().items():
        if head not in heads:  # even with a gradient of zero, weight decay would change it
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
    """Evaluate the model on each task.

    Args:
        model, tasks, strategy: as for ``learn_sequence``.
        split: split to evaluate on.

    Returns:
        One evaluation per task; None for a task whose classes a growing head does not have yet.
    """
    evaluations = []
    for number, task in enumerate(tasks):
        known = not model.growing or number < model.seen
        if known:
            strategy.activate(model, number)
        evaluations.append(evaluate(model, task[split]) if known else None)
    return evaluations
