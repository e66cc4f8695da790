"""The CLIP loss (Radford et al., 2021) and the sigmoid loss (Zhai et al., 2023)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # of text, image, logit_scale and groups


def clip_loss(
    text: Tensor, image: Tensor, logit_scale: Tensor, groups: Tensor | None = None, *, normalise: bool = True
) -> Tensor:
    """The symmetric InfoNCE loss of CLIP (Radford et al., 2021): each text finds its image, and each image its text.

    A model that cannot tell the pairs apart scores ln B.

    Args:
        text, image: embeddings of B pairs, shape (B, D); row i of both belongs to pair i.
        logit_scale: natural logarithm of the factor on the similarities, a scalar.
        groups: group number of each pair, shape (B,). Pairs of one group say the same, so they are not each other's
            negatives. None treats all pairs as different.
        normalise: use cosines as similarities; False uses dot products.

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
    """The pairwise sigmoid loss of SigLIP (Zhai et al., 2023): is each of the B² combinations a pair, or not?

    Args:
        text, image, logit_scale, groups, normalise: as for ``clip_loss``.
        logit_bias: added to the logits, a scalar.

    Returns:
        The sum of the losses of the B² combinations, divided by B; a scalar, in nats.
    """
    logits = logit_scale.exp() * _similarities(text, image, normalise) + logit_bias
    is_pair = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    losses = -F.logsigmoid(torch.where(is_pair, logits, -logits))
    if groups is not None:
        losses = losses.masked_fill(_duplicates(groups), 0.0)
    return losses.sum() / len(logits)


def _similarities(text: Tensor, image: Tensor, normalise: bool) -> Tensor:
    if normalise:
        text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    return text @ image.T


def _duplicates(groups: Tensor) -> Tensor:
    """Mask of the combinations of two different pairs of one group, shape (B, B)."""
    return (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
