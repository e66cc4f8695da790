"""The exercises of lesson 06, the CLIP loss."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ftkit.lab.course.judging import Exercise, loss_and_gradient


def exercise_clip_loss() -> Exercise:
    """The loss that draws each image to its text and away from the others."""

    def my_clip_loss(text, image, s):
        logits = s.exp() * F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
        targets = torch.arange(len(text), device=text.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    def of(logits):
        """The mean of both directions."""
        targets = torch.arange(len(logits))
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    def cosines(text, image):
        return F.normalize(text, dim=1) @ F.normalize(image, dim=1).T

    def ordinary(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pairs, width = rng.integers(3, 8), rng.integers(3, 6)
        text, image = torch.tensor(2 * rng.normal(size=(2, pairs, width)), dtype=torch.float32)
        return text, image, torch.tensor(rng.uniform(1, 2), dtype=torch.float32)

    def texts_only(text, image, s):
        """only one direction: each image must find its text, too"""
        return F.cross_entropy(s.exp() * cosines(text, image), torch.arange(len(text)))

    def images_only(text, image, s):
        """only one direction: each text must find its image, too"""
        return F.cross_entropy(s.exp() * cosines(image, text), torch.arange(len(text)))

    def both_added(text, image, s):
        """the mean of the two directions, not their sum"""
        return 2 * my_clip_loss(text, image, s)

    def summed(text, image, s):
        """the mean over the pairs, not the sum"""
        return len(text) * my_clip_loss(text, image, s)

    def no_scale(text, image, s):
        """multiply the cosines by exp(s)"""
        return of(cosines(text, image)) + 0 * s

    def s_itself(text, image, s):
        """the factor is exp(s), not s"""
        return of(s * cosines(text, image))

    def divided(text, image, s):
        """multiply by exp(s), do not divide"""
        return of(cosines(text, image) / s.exp())

    def long_vectors(text, image, s):
        """normalise both first, or the longest vector wins"""
        return of(s.exp() * text @ image.T)

    def wrong_dimension(text, image, s):
        """each row is a vector: normalise over dimension 1, not 0"""
        return of(s.exp() * F.normalize(text, dim=0) @ F.normalize(image, dim=0).T)

    return Exercise(
        "clip-loss",
        my_clip_loss,
        (ordinary,),
        (
            texts_only, images_only, both_added, summed, no_scale, s_itself, divided, long_vectors, wrong_dimension,
        ),
        (
            "The logits are the cosines of all texts with all images, times exp(s): a matrix of shape (N, N).",
            "The cosines are the product of the normalised texts with the transposed normalised images.",
            "Each row is a classification whose right class is its own number; so is each column: "
            "take the mean of both cross-entropies.",
        ),
        minutes=12,
        difficulty=3,
        outcome=loss_and_gradient,
    )  # fmt: skip


def exercise_recall_at_k() -> Exercise:
    """The share of queries that find what is theirs among the first k."""

    def recall_at(similarities, k):
        own = similarities.diagonal()[:, None]
        ranks = 1 + (similarities > own).sum(axis=1)
        return (ranks <= k).mean()

    def ordinary(rng: np.random.Generator) -> tuple[NDArray, int]:
        size = int(rng.integers(6, 12))
        return rng.normal(size=(size, size)) + 0.7 * np.eye(size), int(rng.integers(1, 5))

    def counted(similarities, k):
        """a share between 0 and 1, not a count"""
        return recall_at(similarities, k) * len(similarities)

    def columns_ask(similarities, k):
        """the rows ask, and the columns are searched: it is the other way round"""
        return recall_at(similarities.T, k)

    def ranks_from_zero(similarities, k):
        """one place too many: the best rank is 1, or 0 with `< k`"""
        return recall_at(similarities, k + 1)

    def first_place_lost(similarities, k):
        """one place too few: rank 1 is found at k = 1"""
        return recall_at(similarities, k - 1)

    def low_to_high(similarities, k):
        """the most similar come first: sort from high to low"""
        return recall_at(-similarities, k)

    def missed(similarities, k):
        """this is the share of those not found"""
        return 1 - recall_at(similarities, k)

    return Exercise(
        "recall-at-k",
        recall_at,
        (ordinary,),
        (counted, columns_ask, ranks_from_zero, first_place_lost, low_to_high, missed),
        (
            "What belongs to row i is in column i, so the diagonal holds what is to be found.",
            "The rank of a row's own column is 1 plus the number of columns that are more similar.",
            "The answer is the share of rows whose rank is at most k.",
        ),
        minutes=8,
        difficulty=2,
    )
