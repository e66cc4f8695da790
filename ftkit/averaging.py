"""Old and new weights of one network: how far apart they are, and a mean of the two."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


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
