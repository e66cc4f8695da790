"""What is added to the loss or takes its place: penalties, class weights, a loss of the model's own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftkit.metrics import Evaluation


class Penalty(Protocol):
    """A term added to the loss."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        """The term for one batch, a scalar; over the batches of a step it is averaged, weighted by their rows."""


def make_class_weights(setting: str | Sequence[float] | None, labels: Sequence[int], num_classes: int) -> Tensor | None:
    """The weight of each class in the loss, shape (C,); None for no weights.

    "balanced" is N / (C n_c) as in scikit-learn, whose own function refuses a class without rows; here it weighs 0.

    Raises:
        ValueError: the number of weights differs from the number of classes.
    """
    num_classes = max(num_classes, 1 + max(labels))
    if setting == "balanced":
        counts = torch.bincount(torch.tensor(labels), minlength=num_classes).float()
        return torch.where(counts > 0, counts.sum() / (num_classes * counts.clamp(min=1)), 0.0)
    if setting is not None and len(setting) != num_classes:
        raise ValueError(f"class_weights has {len(setting)} values for {num_classes} classes: give one for each.")
    return None if setting is None else torch.tensor(setting)


class ModelWithLoss(nn.Module, ABC):
    """A model that computes its own loss: its forward pass returns an object with ``loss``.

    ``loss`` is the mean over the rows of the batch, a scalar. ``fit`` and ``evaluate`` then ignore logits and labels.

    Attributes:
        memory_advice: what to try if a batch does not fit into memory.
    """

    memory_advice = "try a smaller batch_size"

    @abstractmethod
    def measure(self, rows: Any, batch_size: int) -> Evaluation:
        """Score rows; the model is already in eval mode.

        Args:
            rows: the rows of one split.
            batch_size: rows per forward pass.
        """

    def after_step(self) -> None:
        """Hook after each optimiser step, for example to clamp a parameter to its allowed range."""
