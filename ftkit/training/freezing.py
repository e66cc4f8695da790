"""Which layers train, from which epoch on, and at which learning rate."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

import pandas as pd
from accelerate import PartialState
from torch import nn

from ftkit.errors import FreezingError, did_you_mean
from ftkit.models.architecture import layer_groups
from ftkit.training.callbacks import Callback, Checkpoint
from ftkit.training.state import TrainingRun


def freeze(model: nn.Module, train: int | str | Sequence[str]) -> nn.Module:
    """Freeze all parameters but some; ``fit`` runs modules that are wholly frozen in eval mode.

    Args:
        model: changed in place: ``requires_grad`` of every parameter is set.
        train: what stays trainable. A number n stands for the last n groups of ``layer_groups``: 1 is the head alone, 3
            the head and two blocks. Otherwise one or more names or patterns of groups or parameters: "embeddings";
            ["layer *", "head"] (all but the embeddings); ["*.bias", "classifier.*"].

    Returns:
        The model.

    Raises:
        FreezingError: the model has no such group, parameter or number of groups.
    """
    if isinstance(train, int):
        groups = layer_groups(model)
        if not 1 <= train <= len(groups):
            raise FreezingError(f"train={train}, but the model has {len(groups)} groups: give 1 to {len(groups)}.")
        chosen = {id(p) for group in groups[-train:] for p in group.parameters.values()}
    else:
        chosen = _matching(model, [train] if isinstance(train, str) else train)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return model


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[int]:
    """Ids of the parameters that match the patterns."""
    named = {name: [p] for name, p in model.named_parameters(remove_duplicate=False)}
    with suppress(FreezingError):  # then only the names of parameters can be matched
        named |= {group.name: list(group.parameters.values()) for group in layer_groups(model)}
    chosen: set[int] = set()
    for pattern in patterns:
        found = [name for name in named if fnmatchcase(name, pattern)]
        if not found:
            raise FreezingError(f"The model has no group or parameter {pattern!r}: {did_you_mean(pattern, named)}")
        chosen |= {id(p) for name in found for p in named[name]}
    return chosen


class GradualUnfreezing(Callback):
    """Train the last group first, and unfreeze one more with each epoch (Howard and Ruder, 2018).

    All that is to train at some time must require a gradient before ``fit``, which builds its optimiser from that. If a
    run ends early, the groups that it did not reach stay frozen. It stands behind a Checkpoint, which sets the epoch.

    Args:
        groups: how many of ``layer_groups`` each epoch adds, the first epoch included.

    Raises:
        FreezingError: no group would ever train.
    """

    def __init__(self, groups: int = 1) -> None:
        if groups < 1:
            raise FreezingError(f"groups={groups} would never train anything: give 1 or more groups an epoch.")
        self.groups = groups

    def on_start(self, run: TrainingRun) -> None:
        """Raises FreezingError: fewer than two groups train, it stands before a Checkpoint, or in several processes."""
        _require_checkpoint(run, self, before=True)
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        groups = [[p for p in group.parameters.values() if id(p) in held] for group in layer_groups(run.model)]
        self._from_top = [parameters for parameters in reversed(groups) if parameters]
        if len(self._from_top) < 2:
            raise FreezingError(
                "GradualUnfreezing has nothing to unfreeze, because only one group is trainable: let all that is to "
                "train require a gradient before fit, as with freeze(model, train=4)."
            )
        if PartialState().num_processes > 1:
            raise FreezingError("GradualUnfreezing works in one process only: others would wait for frozen gradients.")
        self.on_epoch(run)

    def on_epoch(self, run: TrainingRun) -> None:
        unfrozen = self.groups * (1 + len(run.history.epochs))
        for depth, parameters in enumerate(self._from_top):
            for parameter in parameters:
                parameter.requires_grad_(depth < unfrozen)
                parameter.grad = None  # with a zero gradient the moments of AdamW would still move a frozen weight


def layer_rates(model: nn.Module, lr: float, factor: float) -> dict[str, float]:
    """The learning rate of each group, by name: lr * factor^(L - l), so the head (l = L) has the full rate.

    Discriminative rates (Howard and Ruder, 2018) use the factor 1 / 2.6; layer-wise decay often uses 0.9.

    Raises:
        FreezingError: the factor is not in (0, 1].
    """
    if not 0 < factor <= 1:
        raise FreezingError(f"A factor of {factor} is outside the range: give one above 0, up to 1.")
    groups = layer_groups(model)
    return {group.name: lr * factor ** (len(groups) - 1 - place) for place, group in enumerate(groups)}


class LayerwiseRates(Callback):
    """Train lower layers at lower rates, those of ``layer_rates``; weight decay stays as it is.

    It stands before a Checkpoint, which restores the optimiser by its parameter groups.

    Args:
        factor: the rate of a group divided by that of the group above it, in (0, 1].
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_start(self, run: TrainingRun) -> None:
        """Raises FreezingError: it stands behind a Checkpoint."""
        _require_checkpoint(run, self, before=False)
        rates = layer_rates(run.model, run.settings.lr, self.factor)
        rate_of = {id(p): rates[group.name] for group in layer_groups(run.model) for p in group.parameters.values()}
        split = []
        for options in run.optimizer.param_groups:
            for rate in sorted(set(rates.values()), reverse=True):
                parameters = [p for p in options["params"] if rate_of[id(p)] == rate]
                split += [{**options, "params": parameters, "initial_lr": rate}] if parameters else []
        run.optimizer.param_groups[:] = split


def _require_checkpoint(run: TrainingRun, callback: Callback, *, before: bool) -> None:
    """Refuse a Checkpoint on the wrong side of a callback: a resumed run would differ."""
    place = run.callbacks.index(callback)
    wrong = run.callbacks[place + 1 :] if before else run.callbacks[:place]
    if any(isinstance(other, Checkpoint) for other in wrong):
        first, second = ("Checkpoint", type(callback).__name__) if before else (type(callback).__name__, "Checkpoint")
        raise FreezingError(f"A resumed run would not be the same: put {first} before {second} in callbacks.")


def group_table(model: nn.Module, rates: Mapping[str, float] | float | None = None) -> pd.DataFrame:
    """A table with one row per layer group and a total: parameters, trainable ones, their share, peak learning rate.

    Args:
        model: as for ``freeze``.
        rates: the rate of each group, as from ``layer_rates``, or one rate for all; None omits the column.
    """
    groups = layer_groups(model)
    rows = []
    for group in groups:
        parameters = group.parameters.values()
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        row = {"group": group.name, "parameters": sum(p.numel() for p in parameters), "trainable": trainable}
        if rates is not None:
            rate = rates[group.name] if isinstance(rates, Mapping) else rates
            row["learning rate"] = rate if row["trainable"] else float("nan")
        rows.append(row)
    table = pd.DataFrame(rows)
    total = {"group": "all", "parameters": table["parameters"].sum(), "trainable": table["trainable"].sum()}
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    table.insert(3, "share", table["trainable"] / table["parameters"].clip(lower=1))
    return table.set_index("group")
