"""The CLIP loss (Radford et al., 2021) and the sigmoid loss (Zhai et al., 2023)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def clip_loss(
    text: Tensor, image: Tensor, logit_scale: Tensor, groups: Tensor | None = None, *, normalise: bool = True
) -> Tensor:
    """The symmetric InfoNCE loss of CLIP (Radford et al., 2021): each text finds its image, each image its text.

    A model that knows nothing scores ln B.

    Args:
        text, image: embeddings of B pairs, shape (B, D).
        logit_scale: logarithm of the factor on the similarities, a scalar.
        groups: a number for each pair, shape (B,); pairs of one number say the same, and are not each other's
            negatives. None takes all pairs for different.
        normalise: whether the similarities are cosines; else they are dot products.

    Returns:
        The mean loss, a scalar, in nats.
    """
    logits = logit_scale.exp() * _similarities(text, image, normalise)
    if groups is not None:
        logits = logits.masked_fill(_duplicates(groups), -torch.inf)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def siglip_loss(
    text: Tensor,
    image: Tensor,
    logit_scale: Tensor,
    groups: Tensor | None,
    logit_bias: Tensor,
    *,
    normalise: bool = True,
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (Zhai et al., 2023): each of the B² combinations is right or wrong.

    Args:
        text, image, logit_scale, groups, normalise: as for ``clip_loss``.
        logit_bias: added to the logits, a scalar.

    Returns:
        The summed loss of the B² combinations over B, a scalar, in nats.
    """
    logits = logit_scale.exp() * _similarities(text, image, normalise) + logit_bias
    right = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    losses = -F.logsigmoid(torch.where(right, logits, -logits))
    if groups is not None:
        losses = losses.masked_fill(_duplicates(groups), 0.0)
    return losses.sum() / len(logits)


def _similarities(text: Tensor, image: Tensor, normalise: bool) -> Tensor:
    if normalise:
        text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    return text @ image.T


def _duplicates(groups: Tensor) -> Tensor:
    """Which combinations, off the diagonal, are of one group, shape (B, B)."""
    return (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
