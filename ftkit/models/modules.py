"""Helpers for any module: train and eval mode, number of parameters, a seed; copies, means and distances of weights."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Count parameters, shared ones once: those that training changes, and all."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw new weights from this seed and leave the global chance as it was."""
    with torch.random.fork_rng(devices=[]):  # new weights are drawn on the CPU
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode; afterwards each module is as it was, for frozen ones may differ from the rest."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def train_mode(model: nn.Module) -> None:
    """Train mode, but eval mode where all parameters are frozen: dropout and running statistics are still there."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def average_weights(
    model: nn.Module, old: Mapping[str, Tensor], share: float, *, skip: Collection[str] = ()
) -> nn.Module:
    """Move the weights back towards old ones: share x old + (1 - share) x new (WiSE-FT, Wortsman et al., 2022).

    Args:
        model: changed in place.
        old: from ``snapshot``, of this model before it was trained.
        share: of the old weights, in [0, 1]: with 0 the model stays as it is, with 1 it is the old one.
        skip: names of parameters to leave, as those of a new head, whose old weights know nothing.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of the old weights is {share!r}: give a number in [0, 1].")
    for name, weights in old.items():
        if name not in skip:
            model.get_parameter(name).lerp_(weights, share)
    return model


@torch.no_grad()
def weight_distance(model: nn.Module, old: Mapping[str, Tensor]) -> float:
    """Euclidean distance of the model's weights from old ones, over the parameters named there."""
    squares = [(model.get_parameter(name) - weights).square().sum() for name, weights in old.items()]
    return float(torch.stack(squares).sum().sqrt())
