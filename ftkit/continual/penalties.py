"""Penalties that keep a network close to what it has learned: EWC, L2-SP, distillation."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ftkit.models.modules import eval_mode
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths

_OLD_LOGITS = "old_logits"  # column with the logits of the old model


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al., 2017): (strength / 2) sum_i F_i (theta_i - theta*_i)^2.

    The penalty is zero until ``remember`` is called. With several tasks, their penalties are added. The sum of such
    quadratics is again a quadratic plus a constant, and only that is stored, so many tasks cost no more memory or time
    than one (Huszár, 2018).

    Args:
        strength: lambda, 0 or more.
        decay: for online EWC (Schwarz et al., 2018): factor in [0, 1] by which the Fisher information of earlier tasks
            is multiplied at each new task; all of it then pulls towards the latest weights. None is plain EWC, where
            each task pulls towards the weights that it ended with.

    Attributes:
        precision: sum of F over the tasks, by parameter name.
        center: weights that the model is pulled towards, by parameter name.
        rest: the constant; it is above 0 if the tasks pull towards different weights.

    Raises:
        ValueError: the strength is negative, or the decay is outside [0, 1].
    """

    def __init__(self, strength: float, *, decay: float | None = None) -> None:
        if not strength >= 0:
            raise ValueError(f"The strength of EWC is {strength!r}: give a number of at least 0.")
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"The decay of EWC is {decay!r}: give a number in [0, 1], or None.")
        self.strength, self.decay = strength, decay
        self.precision: dict[str, Tensor] = {}
        self.center: dict[str, Tensor] = {}
        self.rest = 0.0

    def remember(self, model: nn.Module, fisher: Mapping[str, Tensor]) -> None:
        """Add a task: from now on, pull the model towards its current weights, in proportion to ``fisher``.

        Args:
            model: the model, just after it has learned the task.
            fisher: Fisher information of the task, from ``diagonal_fisher``.
        """
        for name, new in fisher.items():
            weights = model.get_parameter(name).detach()
            if self.decay is not None or name not in self.precision:
                old = self.precision.get(name)
                self.precision[name] = new.clone() if old is None else self.decay * old + new
                self.center[name] = weights.clone()
                continue
            old, center = self.precision[name], self.center[name]
            total = old + new
            share = torch.where(total > 0, new / total, 0.0)  # avoids 0 / 0
            self.rest += 0.5 * float((old * share * (weights - center).square()).sum())
            self.precision[name], self.center[name] = total, center + share * (weights - center)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        terms = [
            _HalfSquares.apply(parameter, self.center[name], self.precision[name])
            for name, parameter in model.named_parameters()
            if name in self.precision and parameter.requires_grad
        ]
        return self.strength * (sum(terms, start=_zero(model)) + self.rest)


class L2SP:
    """L2-SP (Li et al., 2018): (strength / 2) ||w_shared - w0_shared||^2 + (beta / 2) ||w_new||^2.

    Args:
        model: the model with its starting weights, w0.
        strength: alpha, 0 or more.
        new: names of parameters that are new with the task, such as those of its head; they are pulled towards zero.
        beta: strength for the new parameters, 0 or more.

    Raises:
        ValueError: a strength is negative, or a name in ``new`` is not a parameter of the model.
    """

    def __init__(self, model: nn.Module, strength: float, *, new: Collection[str] = (), beta: float = 0.01) -> None:
        if not (strength >= 0 and beta >= 0):
            raise ValueError(f"The strengths of L2-SP are {strength!r} and {beta!r}: give numbers of at least 0.")
        named = dict(model.named_parameters())
        for name in new:
            if name not in named:
                raise ValueError(f"The model has no parameter {name!r}: use names from model.named_parameters().")
        self.strength, self.beta = strength, beta
        self.start = {name: p.detach().clone() for name, p in named.items() if p.requires_grad and name not in new}
        self.new = frozenset(new)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        shared, new = _zero(model), _zero(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name in self.start:
                shared = shared + _HalfSquares.apply(parameter, self.start[name], None)
            elif parameter.requires_grad and name in self.new:
                new = new + 0.5 * parameter.square().sum()
        return self.strength * shared + self.beta * new


class Distillation:
    """Distillation from the old model: strength x T^2 KL(softmax(z_old / T) || softmax(z / T)), mean over the batch.

    Learning without forgetting (Li and Hoiem, 2016) applies it to the rows of a new task, for the heads of the old
    ones. The rows carry the old model's logits, from ``add_old_logits``, so they are computed once per row and not in
    every step.

    Args:
        model: the model to train; it will ignore the column ``old_logits`` of a batch from now on.
        strength: 0 or more.
        temperature: T, above 0.
        heads: for each head to preserve, its columns of the logits; each head has its own softmax, and their terms are
            added. None treats all columns as one head.

    Raises:
        ValueError: the strength or the temperature is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float = 1.0,
        *,
        temperature: float = 2.0,
        heads: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not strength >= 0 or not temperature > 0:
            raise ValueError(
                f"The strength of distillation is {strength!r} and its temperature is {temperature!r}: "
                "give a strength of at least 0 and a temperature above 0."
            )
        self.strength, self.temperature, self.heads = strength, temperature, heads
        model.register_forward_pre_hook(_drop_old_logits, with_kwargs=True)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        """Raises ValueError: the rows have no column ``old_logits``."""
        if _OLD_LOGITS not in batch:
            raise ValueError("The training rows have no old_logits: train on add_old_logits(old_model, rows).")
        old, new = batch[_OLD_LOGITS], _all_logits(outputs).float()
        total = _zero(model)
        for columns in [range(new.shape[1])] if self.heads is None else self.heads:
            old_log_p = (old[:, list(columns)] / self.temperature).log_softmax(-1)
            new_log_p = (new[:, list(columns)] / self.temperature).log_softmax(-1)
            total = total + F.kl_div(new_log_p, old_log_p, reduction="batchmean", log_target=True)
        return self.strength * self.temperature**2 * total


@torch.inference_mode()
def add_old_logits(model: nn.Module, rows: Any, *, batch_size: int = 64) -> list[dict[str, Any]]:
    """Add the column ``old_logits``: the logits that the model gives each row now, in eval mode, shape (C,).

    Args:
        model: as for ``fit``; its train or eval mode is left unchanged. If it has several heads, all of them answer.
        rows: rows of one split, from ``encode``; they are not changed.
        batch_size: rows per forward pass.

    Returns:
        New rows with the additional column.
    """
    device = next(model.parameters()).device
    old_logits: dict[int, Any] = {}
    with eval_mode(model):
        for indices in evaluation_batches(row_lengths(rows), batch_size):
            batch = make_batch(model, rows, indices, device)
            del batch["labels"]
            batch.pop(_OLD_LOGITS, None)
            logits = _all_logits(model(**batch)).float().cpu().numpy()
            old_logits.update(zip(indices.tolist(), logits, strict=True))
    return [{**rows[i], _OLD_LOGITS: old_logits[i]} for i in range(len(rows))]


def _all_logits(outputs: Any) -> Tensor:
    """Return the logits; for a model with several heads those of all heads, without masks."""
    return getattr(outputs, "all_logits", outputs.logits)


def _drop_old_logits(_model: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value for name, value in batch.items() if name != _OLD_LOGITS}


def _zero(model: nn.Module) -> Tensor:
    return torch.zeros((), device=next(model.parameters()).device)


class _HalfSquares(torch.autograd.Function):
    """1/2 sum scale (weights - center)^2; scale None is 1.

    Plain autograd would allocate and keep several tensors as large as the weights in every step, and moving memory is
    what takes most of the time in such a penalty.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, center: Tensor, scale: Tensor | None) -> Tensor:
        pull = weights - center
        ctx.gradient = pull if scale is None else pull * scale
        return 0.5 * torch.dot(pull.flatten(), ctx.gradient.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, so a second backward pass fails
        return gradient.mul_(grad), None, None
