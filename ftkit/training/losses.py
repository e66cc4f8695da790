"""What is added to the loss or takes its place: penalties, class weights, a loss of the model's own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftkit.metrics import Evaluation


class Penalty(Protocol):
    """A term that is added to the loss."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        """The term for one batch, a scalar; over the batches of a step it is averaged by their rows."""


def make_class_weights(setting: str | Sequence[float] | None, labels: Sequence[int], num_classes: int) -> Tensor | None:
    """The weight of each class, shape (C,): "balanced" is N / (C n_c), as in scikit-learn, 0 for an absent class.

    Raises:
        ValueError: the number of weights given is not that of the classes.
    """
    num_classes = max(num_classes, 1 + max(labels))
    if setting == "balanced":
        counts = torch.bincount(torch.tensor(labels), minlength=num_classes).float()
        return torch.where(counts > 0, counts.sum() / (num_classes * counts.clamp(min=1)), 0.0)
    if setting is not None and len(setting) != num_classes:
        raise ValueError(f"class_weights has {len(setting)} values for {num_classes} classes: give one for each.")
    return None if setting is None else torch.tensor(setting)


class ModelWithLoss(nn.Module, ABC):
    """What ``fit`` and ``evaluate`` ask of such a model, beside a forward pass that gives an object with ``loss``.

    ``loss`` is the mean over the rows of the batch, a scalar; the loop does not look at logits or labels then.

    Attributes:
        memory_advice: what to try where a batch does not fit into memory.
    """

    memory_advice = "try a smaller batch_size"

    @abstractmethod
    def measure(self, rows: Any, batch_size: int) -> Evaluation:
        """Score rows in eval mode; the model is in it already.

        Args:
            rows: of one split.
            batch_size: rows a forward pass.
        """

    def after_step(self) -> None:
        """After each optimiser step: put back within bounds what must be."""
