"""Penalties that hold a network to what it knew: EWC, L2-SP, distillation."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ftkit.models.modules import eval_mode
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths

OLD_LOGITS = "old_logits"  # the column of what the old model said of a row


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al., 2017): (strength / 2) sum_i F_i (theta_i - theta*_i)^2.

    It is zero until ``remember`` has been called. What several tasks ask for is added up, and a sum of such quadratics
    is again one, plus a constant: that is what is kept, at the same cost for many tasks as for one (Huszár, 2018).

    Args:
        strength: lambda, from 0.
        decay: for the online variant (Schwarz et al., 2018): the Fisher information of earlier tasks is multiplied by
            it, in [0, 1], at each new one, and all of it holds the model to its latest weights. None holds it to the
            weights after each task.

    Attributes:
        precision: by name of a parameter, the sum of F over the tasks.
        center: the weights that the model is held to.
        rest: the constant; what the tasks ask for differs, and no weights please them all.
    """

    def __init__(self, strength: float, *, decay: float | None = None) -> None:
        if not strength >= 0:
            raise ValueError(f"The strength of EWC is {strength!r}: give a number from 0.")
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"The decay of EWC is {decay!r}: give a share in [0, 1], or None.")
        self.strength, self.decay = strength, decay
        self.precision: dict[str, Tensor] = {}
        self.center: dict[str, Tensor] = {}
        self.rest = 0.0

    def remember(self, model: nn.Module, fisher: Mapping[str, Tensor]) -> None:
        """Hold a model from now on to the weights it has, as firmly as its Fisher information says.

        Args:
            model: just after it has learned a task.
            fisher: of that task, from ``diagonal_fisher``.
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
            share = torch.where(total > 0, new / total, 0.0)  # 0 / 0 where neither task asks for anything
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
        model: with the weights to stay near, w0: those that it has now.
        strength: alpha, from 0.
        new: names of the parameters that are new with the task, as those of its head; they are pulled to zero.
        beta: of the new ones.

    Raises:
        ValueError: a negative strength, a name that is no parameter's.
    """

    def __init__(self, model: nn.Module, strength: float, *, new: Collection[str] = (), beta: float = 0.01) -> None:
        if not (strength >= 0 and beta >= 0):
            raise ValueError(f"The strengths of L2-SP are {strength!r} and {beta!r}: give numbers from 0.")
        named = dict(model.named_parameters())
        for name in new:
            if name not in named:
                raise ValueError(f"The model has no parameter {name!r}: name the new ones as named_parameters() does.")
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
    """Keep saying what the old model said: strength x T^2 KL(softmax(z_old / T) || softmax(z / T)), batch mean.

    Learning without forgetting (Li and Hoiem, 2016) does so on the rows of a new task, for the heads of the old ones.
    The rows carry what the old model said of them, ``add_old_logits``, so that it is asked once for each, and not in
    every step.

    Args:
        model: the one that will be trained; from now on it drops the column ``old_logits`` of a batch, which is not
            for it.
        strength: from 0.
        temperature: T.
        heads: the columns of the logits, a sequence for each head, that are to stay; each has a softmax of its own, and
            their terms are added. None is one head of all columns.

    Raises:
        ValueError: a number out of range.
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
                f"The strength of distillation is {strength!r}, its temperature {temperature!r}: "
                "give a strength from 0, a temperature above 0."
            )
        self.strength, self.temperature, self.heads = strength, temperature, heads
        model.register_forward_pre_hook(_drop_old_logits, with_kwargs=True)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        """Raises ValueError: the rows do not carry what the old model said."""
        if OLD_LOGITS not in batch:
            raise ValueError("The training rows have no old_logits: train on add_old_logits(old_model, rows).")
        old, new = batch[OLD_LOGITS], _all_logits(outputs).float()
        total = _zero(model)
        for columns in [range(new.shape[1])] if self.heads is None else self.heads:
            wanted = (old[:, list(columns)] / self.temperature).log_softmax(-1)
            said = (new[:, list(columns)] / self.temperature).log_softmax(-1)
            total = total + F.kl_div(said, wanted, reduction="batchmean", log_target=True)
        return self.strength * self.temperature**2 * total


@torch.inference_mode()
def add_old_logits(model: nn.Module, rows: Any, *, batch_size: int = 64) -> list[dict[str, Any]]:
    """The rows with a further column ``old_logits``: what the model says of each now, in eval mode, shape (C,).

    Args:
        model: as for ``fit``; it is left in the mode it was in. Of one with several heads, all of them speak.
        rows: one split of what ``encode`` makes; they stay as they are.
        batch_size: rows a forward pass.
    """
    device = next(model.parameters()).device
    said: dict[int, Any] = {}
    with eval_mode(model):
        for indices in evaluation_batches(row_lengths(rows), batch_size):
            batch = make_batch(model, rows, indices, device)
            del batch["labels"]
            batch.pop(OLD_LOGITS, None)
            logits = _all_logits(model(**batch)).float().cpu().numpy()
            said.update(zip(indices.tolist(), logits, strict=True))
    return [{**rows[i], OLD_LOGITS: said[i]} for i in range(len(rows))]


def _all_logits(outputs: Any) -> Tensor:
    """Of a model with several heads those of all, masked nowhere."""
    return getattr(outputs, "all_logits", outputs.logits)


def _drop_old_logits(_model: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value for name, value in batch.items() if name != OLD_LOGITS}


def _zero(model: nn.Module) -> Tensor:
    return torch.zeros((), device=next(model.parameters()).device)


class _HalfSquares(torch.autograd.Function):
    """1/2 sum scale (weights - center)^2; scale None is 1.

    Autograd would keep and make several tensors of the size of all weights in every step, and memory is what a penalty
    of this kind takes its time with.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, center: Tensor, scale: Tensor | None) -> Tensor:
        pull = weights - center
        ctx.gradient = pull if scale is None else pull * scale
        return 0.5 * torch.dot(pull.flatten(), ctx.gradient.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # in place, so once; a second time fails
        return gradient.mul_(grad), None, None
