"""The accuracy matrix and its metrics: forgetting, backward and forward transfer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """Accuracy on each of T tasks, before any training and after training on each task in turn.

    Args:
        R: shape (T, T); R[i, j] is the accuracy, in [0, 1], on task j after training on task i.
        b: shape (T,); accuracy on each task before any training.
        names: names of the tasks, in the order in which they were learned.

    Raises:
        ValueError: there are fewer than two tasks, the shapes do not match, or a value is not an accuracy.
    """

    R: ArrayLike
    b: ArrayLike
    names: Sequence[str]

    def __post_init__(self) -> None:
        R, b = np.array(self.R, dtype=float), np.array(self.b, dtype=float)
        if len(self.names) < 2 or R.shape != (len(self.names),) * 2 or b.shape != (len(self.names),):
            raise ValueError(
                f"There are {len(self.names)} names, R has shape {R.shape} and b has shape {b.shape}: "
                "give T names, T x T accuracies and T baselines, with T at least 2."
            )
        for name, values in (("R", R), ("b", b)):
            wrong = values[~((values >= 0) & (values <= 1))]
            if wrong.size:
                raise ValueError(f"{name} contains {wrong[0]:g}: give accuracies from 0 to 1.")
        object.__setattr__(self, "R", R)
        object.__setattr__(self, "b", b)

    @cached_property
    def average_accuracy(self) -> float:
        """Mean final accuracy over all tasks: mean_j R[T, j]."""
        return float(self.R[-1].mean())

    @cached_property
    def learning_accuracy(self) -> float:
        """Mean accuracy on each task just after it was learned: mean_i R[i, i] (Riemer et al., 2019)."""
        return float(self.R.diagonal().mean())

    @cached_property
    def new_accuracy(self) -> float:
        """Final accuracy on the last task: R[T, T]."""
        return float(self.R[-1, -1])

    @cached_property
    def old_accuracy(self) -> float:
        """Mean final accuracy on the tasks before the last one: mean over j < T of R[T, j]."""
        return float(self.R[-1, :-1].mean())

    @cached_property
    def backward_transfer(self) -> float:
        """Effect of later training on earlier tasks: mean over i < T of R[T, i] - R[i, i].

        Forgetting makes it negative (Lopez-Paz and Ranzato, 2017).
        """
        return float((self.R[-1] - self.R.diagonal())[:-1].mean())

    @cached_property
    def forward_transfer(self) -> float:
        """Effect of training on tasks not yet learned: mean over i >= 2 of R[i-1, i] - b[i].

        By Lopez-Paz and Ranzato (2017).
        """
        return float((self.R.diagonal(1) - self.b[1:]).mean())

    @cached_property
    def forgetting_by_task(self) -> NDArray[np.float64]:
        """Drop of each task except the last from its best accuracy: max over l < T of R[l, j], minus R[T, j].

        Shape (T - 1,). It is negative for a task that improved during the last training (Chaudhry et al., 2018).
        """
        return self.R[:-1, :-1].max(axis=0) - self.R[-1, :-1]

    @cached_property
    def forgetting(self) -> float:
        """Mean of ``forgetting_by_task``."""
        return float(self.forgetting_by_task.mean())

    @cached_property
    def seen_accuracy(self) -> NDArray[np.float64]:
        """Mean accuracy on the tasks learned so far, after each task; shape (T,)."""
        return np.array([self.R[i, : i + 1].mean() for i in range(len(self.names))])

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name, for metrics.json."""
        return {
            "average_accuracy": self.average_accuracy,
            "new_accuracy": self.new_accuracy,
            "old_accuracy": self.old_accuracy,
            "learning_accuracy": self.learning_accuracy,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
        }

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.metrics().items())
        return f"{len(self.names)} tasks ({', '.join(self.names)}): {metrics}"
