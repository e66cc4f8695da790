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
    """Result of a retrieval in which each of N texts ranks M images.

    Studies and panels treat it like an ``Evaluation``; its accuracy is the recall at 1.

    Attributes:
        similarities: of each text (row) to each image (column), shape (N, M).
        labels: group number of each text, shape (N,); every image of that group is correct.
        loss: mean loss, in nats.
        image_labels: group number of each image, shape (M,). None means that image i belongs to text i.
    """

    similarities: NDArray[np.float32]
    labels: NDArray[np.int64]
    loss: float
    image_labels: NDArray[np.int64] | None = None

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """Rank, from 1, of the most similar correct image for each text, shape (N,). Ties count against the model."""
        is_correct = self.labels[:, None] == (self.labels if self.image_labels is None else self.image_labels)
        best = np.where(is_correct, self.similarities, -np.inf).max(axis=1, keepdims=True)
        return 1 + (~(self.similarities < best) & ~is_correct).sum(axis=1)  # not >=, so that NaN counts like a tie

    @cached_property
    def turned(self) -> "Retrieval":
        """The opposite direction: each image ranks the texts."""
        image_labels = self.labels if self.image_labels is None else self.image_labels
        return Retrieval(self.similarities.T, image_labels, self.loss, self.labels)

    def found(self, k: int) -> NDArray[np.bool_]:
        """Whether a correct image is among the first k, for each text, shape (N,)."""
        return self.ranks <= k

    def recall(self, k: int) -> float:
        """Share of texts with a correct image among the first k."""
        return float(self.found(k).mean())

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the first image is correct, for each text, shape (N,)."""
        return self.found(1)

    @property
    def accuracy(self) -> float:
        """The recall at 1."""
        return self.recall(1)

    @cached_property
    def ci95(self) -> tuple[float, float]:
        """95 % bootstrap interval of the recall at 1, over texts."""
        return bootstrap_interval(self.correct)

    @property
    def scores(self) -> dict[str, float]:
        """The scores that a study records, by name."""
        recalls = {f"recall_at_{k}": self.recall(k) for k in (1, 5, 10)}
        return {**recalls, "median_rank": float(np.median(self.ranks)), "loss": self.loss}

    def __repr__(self) -> str:
        def describe(retrieval: "Retrieval") -> str:
            scores = retrieval.scores
            recalls = ", ".join(f"{scores[f'recall_at_{k}']:.3f}" for k in (1, 5, 10))
            return f"recall at 1, 5, 10: {recalls}; median rank {scores['median_rank']:g}"

        count = self.similarities.shape[1]
        return f"text to image, {describe(self)}; image to text, {describe(self.turned)} ({count:,} images)"


def modality_gap(text: Tensor, image: Tensor) -> float:
    """Distance, in [0, 2], between the mean text and the mean image on the unit sphere (Liang et al., 2022).

    Args:
        text, image: embeddings, shape (N, D) each; they are normalised first.
    """
    return float((F.normalize(text, dim=-1).mean(0) - F.normalize(image, dim=-1).mean(0)).norm())


def alignment(text: Tensor, image: Tensor) -> float:
    """Mean squared distance, in [0, 4], between text and image of a pair on the unit sphere (Wang and Isola, 2020).

    Args:
        text, image: embeddings of N pairs, shape (N, D) each; they are normalised first.
    """
    return float((F.normalize(text, dim=-1) - F.normalize(image, dim=-1)).square().sum(-1).mean())


def uniformity(points: Tensor) -> float:
    """Logarithm of the mean of exp(-2 d²), d the distance of two points on the unit sphere (Wang and Isola, 2020).

    Args:
        points: embeddings, shape (N, D), N at least 2; they are normalised first. The mean is over all pairs of them.

    Returns:
        0 if all points coincide; the more evenly they are spread, the lower.
    """
    distances = torch.pdist(F.normalize(points.double(), dim=-1))
    return float((-2 * distances.square()).exp().mean().log())
