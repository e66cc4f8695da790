"""Accuracy, F1, calibration, intervals, paired comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 2000


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Share of rows, in [0, 1], whose prediction equals the label. Both arguments: integers of shape (N,)."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Count rows by true class (row) and predicted class (column).

    Args:
        labels, predictions: integers in [0, num_classes), shape (N,).
        num_classes: C.

    Returns:
        Counts, shape (C, C).
    """
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)), 1)
    return counts


def macro_f1(confusion: ArrayLike) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), in [0, 1]; a rare class weighs as much as a common one.

    Classes that are neither in the labels nor predicted are left out, as scikit-learn does.

    Args:
        confusion: counts by true class (row) and predicted class (column), shape (C, C).
    """
    confusion = np.asarray(confusion)
    support = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    return float(np.mean(2 * confusion.diagonal()[support > 0] / support[support > 0]))


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> float:
    """Mean gap, in [0, 1], between how sure a classifier is and how often it is right.

    The rows are put into equal bins of their top-label confidence: sum over bins of
    (n_b / N) |accuracy_b - confidence_b| (Guo et al., 2017).

    Args:
        labels: integers, shape (N,).
        probabilities: rows that sum to 1, shape (N, C).
        num_bins: number of equal bins over [0, 1].
    """
    probabilities = np.asarray(probabilities)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == np.asarray(labels)
    # (lower, upper] bins: a confidence of exactly 1 belongs to the last one
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def majority_accuracy(train_labels: ArrayLike, test_labels: ArrayLike) -> float:
    """Accuracy on the test rows of always answering the commonest class of the training rows."""
    return accuracy(test_labels, np.full(len(np.asarray(test_labels)), np.bincount(train_labels).argmax()))


def bootstrap_interval(correct: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean accuracy, by the bootstrap (Efron, 1979).

    With one model the rows are resampled. With several seeds the seeds are resampled too, independently
    of the rows: the interval then stands for another draw of test rows and another run of the training. It
    covers the truth 95 times in 100, or a little more often, while the seeds differ by no more than chance
    among the rows does; where the spread between seeds dominates it is too narrow: in simulations three
    seeds then cover about 75 times in 100, five about 85.

    Args:
        correct: 1 where the prediction was right, else 0 (or any per-row score); shape (N,) or (seeds, N).
        seed: of the resampling.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: there are no rows.
    """
    scores = np.atleast_2d(np.asarray(correct, dtype=float))
    if scores.size == 0:
        raise ValueError("An interval needs at least one row; there are none: pass the rows of a test split.")
    rng = np.random.default_rng(seed)
    num_seeds, num_rows = scores.shape
    means = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        rows = rng.integers(num_rows, size=num_rows)
        seeds = rng.integers(num_seeds, size=num_seeds)
        means[i] = scores[:, rows].mean(axis=1)[seeds].mean()
    lower, upper = np.quantile(means, [0.025, 0.975])
    return float(lower), float(upper)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows.

    Attributes:
        difference: accuracy of the first minus accuracy of the second.
        ci95: bootstrap interval of that difference.
        p_value: exact McNemar test (McNemar, 1947): could a fair coin have split the rows on which they disagree?
            None for several seeds, whose answers to one row are not independent.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float | None

    @property
    def verdict(self) -> str:
        """What the interval says, to stand between the names of the two."""
        low, high = self.ci95
        return "is better than" if low > 0 else "is worse than" if high < 0 else "can't be told from"


def compare(correct_a: ArrayLike, correct_b: ArrayLike) -> Comparison:
    """Compare two models row by row; a paired comparison sees smaller differences than two intervals do.

    Args:
        correct_a, correct_b: 1 where the model was right on the row, else 0; shape (N,) or (seeds, N), the same
            rows in the same order.

    Raises:
        ValueError: the two are not of the same shape.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(
            f"A paired comparison needs the same rows: got {a.size} and {b.size}; evaluate both on one split."
        )
    p_value = None
    if a.ndim == 1:
        only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
        p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return Comparison(float(np.mean(a - b)), bootstrap_interval(a - b), p_value)


@dataclass(frozen=True)
class Evaluation:
    """What a classifier did on some labelled rows.

    Attributes:
        labels: integers, shape (N,).
        probabilities: rows that sum to 1, shape (N, C).
        loss: mean cross-entropy, in nats.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    loss: float

    @cached_property
    def predictions(self) -> NDArray[np.int64]:
        """The most probable class of each row, shape (N,)."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each row was classified correctly, shape (N,)."""
        return self.predictions == self.labels

    @cached_property
    def accuracy(self) -> float:
        return accuracy(self.labels, self.predictions)

    @property
    def scores(self) -> dict[str, float]:
        """What a study records of it, by name."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "loss": self.loss}

    @cached_property
    def ci95(self) -> tuple[float, float]:
        """Bootstrap interval of the accuracy over another draw of rows."""
        return bootstrap_interval(self.correct)

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        return confusion_matrix(self.labels, self.predictions, self.probabilities.shape[1])

    @cached_property
    def macro_f1(self) -> float:
        return macro_f1(self.confusion)

    @cached_property
    def calibration_error(self) -> float:
        return expected_calibration_error(self.labels, self.probabilities)

    @cached_property
    def majority(self) -> float:
        """Share of the commonest class among these rows: the most that a constant answer can score."""
        return float(np.bincount(self.labels).max() / len(self.labels))

    def __repr__(self) -> str:
        low, high = self.ci95
        return (
            f"accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}] on {len(self.labels):,} rows "
            f"(majority {self.majority:.3f}), macro-F1 {self.macro_f1:.3f}, "
            f"loss {self.loss:.3f}, calibration error {self.calibration_error:.3f}"
        )


def pooled(parts: Sequence[Evaluation]) -> Evaluation:
    """Several groups of rows as one.

    Args:
        parts: of each group, all with the same columns of probabilities.
    """
    labels, probabilities = ([getattr(part, name) for part in parts] for name in ("labels", "probabilities"))
    loss = np.average([part.loss for part in parts], weights=[len(part.labels) for part in parts])
    return Evaluation(np.concatenate(labels), np.concatenate(probabilities), float(loss))


def over_seeds(evaluations: Sequence[Evaluation]) -> tuple[float, tuple[float, float]]:
    """Mean accuracy of the same rows over seeds, and its 95 % interval over rows and seeds.

    Args:
        evaluations: one a seed, on the same rows in the same order.

    Raises:
        ValueError: the evaluations are not of the same rows.
    """
    if any(not np.array_equal(evaluation.labels, evaluations[0].labels) for evaluation in evaluations):
        raise ValueError("An interval over seeds needs the same rows for every seed: evaluate all on one split.")
    correct = np.stack([evaluation.correct for evaluation in evaluations])
    return float(correct.mean()), bootstrap_interval(correct)
