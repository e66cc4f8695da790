"""Ranks and recall of retrieval, and the geometry of the common space."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ftkit.metrics import bootstrap_interval


@dataclass(frozen=True)
class Retrieval:
    """Each of N texts ranks M images; in its place in a study or a panel, its accuracy is the recall at 1.

    Attributes:
        similarities: of texts (rows) and images (columns), shape (N, M).
        labels: the group of each text, shape (N,): any image of its group is right.
        loss: mean loss, in nats.
        image_labels: the group of each image, shape (M,); None where they are those of the texts, pair by pair.
    """

    similarities: NDArray[np.float32]
    labels: NDArray[np.int64]
    loss: float
    image_labels: NDArray[np.int64] | None = None

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """The place, from 1, of the best right image of each text, shape (N,); a wrong one as similar goes before."""
        right = self.labels[:, None] == (self.labels if self.image_labels is None else self.image_labels)
        best = np.where(right, self.similarities, -np.inf).max(axis=1, keepdims=True)
        return 1 + (~(self.similarities < best) & ~right).sum(axis=1)  # a NaN goes before too

    @cached_property
    def turned(self) -> "Retrieval":
        """The other way around: each image ranks the texts."""
        images = self.labels if self.image_labels is None else self.image_labels
        return Retrieval(self.similarities.T, images, self.loss, self.labels)

    def found(self, k: int) -> NDArray[np.bool_]:
        """Whether a right image is among the first k, for each text, shape (N,)."""
        return self.ranks <= k

    def recall(self, k: int) -> float:
        """Share of texts with a right image among the first k."""
        return float(self.found(k).mean())

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.found(1)

    @property
    def accuracy(self) -> float:
        return self.recall(1)

    @cached_property
    def ci95(self) -> tuple[float, float]:
        """Bootstrap interval of the recall at 1 over another draw of texts."""
        return bootstrap_interval(self.correct)

    @property
    def scores(self) -> dict[str, float]:
        """What a study records of it, by name."""
        recalls = {f"recall_at_{k}": self.recall(k) for k in (1, 5, 10)}
        return {**recalls, "median_rank": float(np.median(self.ranks)), "loss": self.loss}

    def __repr__(self) -> str:
        def told(retrieval: "Retrieval") -> str:
            scores = retrieval.scores
            recalls = ", ".join(f"{scores[f'recall_at_{k}']:.3f}" for k in (1, 5, 10))
            return f"recall at 1, 5, 10: {recalls}; median rank {scores['median_rank']:g}"

        count = self.similarities.shape[1]
        return f"text to image, {told(self)}; image to text, {told(self.turned)} (of {count:,})"


def modality_gap(text: Tensor, image: Tensor) -> float:
    """Distance, in [0, 2], of the mean text from the mean image on the sphere (Liang et al., 2022).

    Args:
        text, image: embeddings, (N, D) each; they are normalised here.
    """
    return float((F.normalize(text, dim=-1).mean(0) - F.normalize(image, dim=-1).mean(0)).norm())


def alignment(text: Tensor, image: Tensor) -> float:
    """Mean squared distance, in [0, 4], of the two sides of a pair on the sphere (Wang and Isola, 2020)."""
    return float((F.normalize(text, dim=-1) - F.normalize(image, dim=-1)).square().sum(-1).mean())


def uniformity(points: Tensor) -> float:
    """Logarithm of the mean of exp(-2 d²) over all pairs of points on the sphere (Wang and Isola, 2020).

    Args:
        points: embeddings, (N, D), N at least 2.

    Returns:
        0 where all points are one, lower the more evenly they lie.
    """
    distances = torch.pdist(F.normalize(points.double(), dim=-1))
    return float((-2 * distances.square()).exp().mean().log())
