"""What came of a sequence of tasks, and the file from which a sequence that was killed goes on."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ftkit.callbacks import Checkpoint, History
from ftkit.matrix import AccuracyMatrix
from ftkit.metrics import Evaluation, pooled
from ftkit.multihead import MultiHead
from ftkit.tasks import Rows
from ftkit.training import TrainSettings

if TYPE_CHECKING:
    from ftkit.continual import Strategy


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


class SequenceFile:
    """The state of a sequence in a folder, replaced after each task in one move; without a folder nothing is kept."""

    def __init__(
        self,
        folder: str | Path | None,
        model: MultiHead,
        tasks: Sequence[Mapping[str, Rows]],
        strategy: "Strategy",
        settings: TrainSettings,
        splits: Sequence[str],
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.path = self.folder / "sequence.pt"
        rows = [row for task in tasks for split in ("train", "validation", *splits) for row in task.get(split, [])]
        self.identity = {
            **strategy.identity(),
            **settings.model_dump(),
            "splits": list(splits),
            "starting weights": _digest(model.state_dict().values()),
            "rows": _digest(value for row in rows for value in row.values()),
        }

    def checkpoint(self, index: int) -> list[Checkpoint]:
        """For the training of one task."""
        return [] if self.folder is None else [Checkpoint(self.folder / f"task_{index}.pt")]

    def resume(self, model: MultiHead, strategy: "Strategy", run: SequenceRun) -> bool:
        """Go back to the end of the last task that was learned, if there is one."""
        if self.folder is None or not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True)
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise ValueError(
                    f"The folder {self.folder.name} holds a run with {name}={state['identity'].get(name)}, "
                    f"this one has {value}: give another folder, or delete it to start anew."
                )
        model.load_state_dict(state["model"])
        strategy.load_state_dict(state["strategy"])
        run.histories = [History(**history) for history in state["histories"]]
        run.distances = state["distances"]
        for split, stages in state["evaluations"].items():
            run.evaluations[split] = [list(map(_evaluation, stage)) for stage in stages]
        model.seen = state["seen"]
        print(f"Resumed after {len(run.histories)} of {len(run.names)} tasks.")
        return True

    def write(self, model: MultiHead, strategy: "Strategy", run: SequenceRun) -> None:
        if self.folder is None:
            return
        evaluations = {
            split: [list(map(_plain, stage)) for stage in stages] for split, stages in run.evaluations.items()
        }
        state = {
            "identity": self.identity,
            "model": model.state_dict(),
            "strategy": strategy.state_dict(),
            "histories": [asdict(history) for history in run.histories],
            "distances": run.distances,
            "evaluations": evaluations,
            "seen": model.seen,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        torch.save(state, partial)
        partial.replace(self.path)
        for checkpoint in self.folder.glob("task_*.pt"):  # of tasks that are learned
            checkpoint.unlink()


def _plain(evaluation: Evaluation | None) -> tuple[Tensor, Tensor, float] | None:
    """As torch.load reads it back with weights only."""
    if evaluation is None:
        return None
    return torch.from_numpy(evaluation.labels), torch.from_numpy(evaluation.probabilities), evaluation.loss


def _evaluation(kept: tuple[Tensor, Tensor, float] | None) -> Evaluation | None:
    return None if kept is None else Evaluation(kept[0].numpy(), kept[1].numpy(), kept[2])


def _digest(values: Any) -> str:
    """A short fingerprint of numbers."""
    digest = hashlib.sha256()
    for value in values:
        array = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]
