"""Helpers for any PyTorch module: parameter counts, seeds, train and eval mode; weight copies, means and distances."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that train, and all parameters; shared ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw new weights from this seed and leave the global random state unchanged."""
    with torch.random.fork_rng(devices=[]):  # new weights are drawn on the CPU
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode, then restore the mode of each module; frozen modules may differ from the others."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def train_mode(model: nn.Module) -> None:
    """Set train mode, but eval mode for modules with frozen parameters only: no dropout, no new running statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def average_weights(
    model: nn.Module, old: Mapping[str, Tensor], share: float, *, skip: Collection[str] = ()
) -> nn.Module:
    """Move the weights back towards old ones: share x old + (1 - share) x new (WiSE-FT, Wortsman et al., 2022).

    Args:
        model: changed in place.
        old: a ``snapshot`` of this model before it was trained.
        share: share of the old weights in [0, 1]; 0 leaves the model unchanged, 1 restores the old weights.
        skip: names of parameters to leave unchanged, for example those of a head that was new before training.

    Returns:
        The same model.

    Raises:
        ValueError: the share is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of the old weights is {share!r}: give a number in [0, 1].")
    for name, weights in old.items():
        if name not in skip:
            model.get_parameter(name).lerp_(weights, share)
    return model


@torch.no_grad()
def weight_distance(model: nn.Module, old: Mapping[str, Tensor]) -> float:
    """Euclidean distance between the model's weights and old ones, over the parameters in ``old``."""
    squares = [(model.get_parameter(name) - weights).square().sum() for name, weights in old.items()]
    return float(torch.stack(squares).sum().sqrt())
