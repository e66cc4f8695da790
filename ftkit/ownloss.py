"""A model that brings its own loss, for tasks whose loss is no cross-entropy over classes."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from ftkit.metrics import Evaluation


class OwnLoss(nn.Module, ABC):
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
