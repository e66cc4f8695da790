"""The gradient of one optimiser step, however its rows are cut into batches and spread over processes."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from ftkit.batching import IGNORED, make_batch
from ftkit.callbacks import TrainingRun
from ftkit.ownloss import OwnLoss


class Penalty(Protocol):
    """A term that is added to the loss."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        """The term for one batch, a scalar; over the batches of a step it is averaged by their rows."""


def accumulate_gradients(
    accelerator: Accelerator,
    wrapped: nn.Module,
    run: TrainingRun,
    group: list[Any],
    class_weights: Tensor | None,
    penalties: Sequence[Penalty],
) -> float:
    """Add up the gradients of one step's batches as if they were one large batch; returns its mean loss.

    Each batch's summed loss is divided by the weight of the whole group, which is the number of its labels or the sum
    of their class weights, so that it does not matter how the rows are cut into batches and spread over processes, nor
    that a last batch is small.
    """
    mine = group[accelerator.process_index :: accelerator.num_processes]
    idle = not mine  # an epoch's last step may not have a batch for every process: this one then adds nothing
    batches = [make_batch(run.model, run.data["train"], rows, accelerator.device) for rows in mine or group[:1]]
    total_rows = sum(len(rows) for rows in group)
    counted = [batch["labels"][batch["labels"] != IGNORED] for batch in batches]
    weight = sum(len(labels) if class_weights is None else class_weights[labels].sum() for labels in counted)
    total_weight = accelerator.reduce(torch.as_tensor(weight, device=accelerator.device) * (not idle), "sum")
    mean_loss = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        with nullcontext() if i == len(batches) - 1 else accelerator.no_sync(wrapped):
            if isinstance(run.model, OwnLoss):
                outputs = wrapped(**batch)
                summed = outputs.loss * len(counted[i])
            else:
                outputs = wrapped(**{name: value for name, value in batch.items() if name != "labels"})
                summed = F.cross_entropy(
                    outputs.logits.float(),
                    counted[i],
                    weight=class_weights,
                    label_smoothing=run.settings.label_smoothing,
                    reduction="sum",
                )
            loss = summed / total_weight
            for penalty in penalties:
                loss = loss + penalty(run.model, batch, outputs) * len(batch["labels"]) / total_rows
            loss = loss * (not idle)
            mean_loss += loss.detach()
            accelerator.backward(loss * accelerator.num_processes)  # processes average their gradients
    return float(accelerator.reduce(mean_loss, "sum"))


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
