"""Accuracy, F1, area under the ROC curve, calibration error, confidence intervals and paired comparison."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 2000

_NO_ROWS = "An interval needs at least one row, but there is none: pass the rows of a test split."


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Share of rows, in [0, 1], whose prediction equals the label.

    Args:
        labels, predictions: integers, shape (N,).
    """
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
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), in [0, 1]; a rare class counts as much as a common one.

    A class that is neither among the labels nor among the predictions is left out, as in scikit-learn.

    Args:
        confusion: counts by true class (row) and predicted class (column), shape (C, C).
    """
    confusion = np.asarray(confusion)
    support = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    return float(np.mean(2 * confusion.diagonal()[support > 0] / support[support > 0]))


def balanced_accuracy(confusion: ArrayLike) -> float:
    """Mean over classes of the share of their rows that were classified correctly, in [0, 1] (Brodersen et al., 2010).

    A class without rows is left out, as in scikit-learn.

    Args:
        confusion: counts by true class (row) and predicted class (column), shape (C, C).
    """
    confusion = np.asarray(confusion)
    rows = confusion.sum(axis=1)
    return float(np.mean(confusion.diagonal()[rows > 0] / rows[rows > 0]))


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> float:
    """Mean gap, in [0, 1], between the confidence and the accuracy of a classifier (Guo et al., 2017).

    The confidence of a row is the probability of its predicted class. The rows are sorted by confidence into bins of
    equal width, and the error is the sum over bins of ``(n_b / N) |accuracy_b - confidence_b|``.

    Args:
        labels: integers, shape (N,).
        probabilities: rows that sum to 1, shape (N, C).
        num_bins: number of bins over [0, 1].
    """
    probabilities = np.asarray(probabilities)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == np.asarray(labels)
    # bins are (lower, upper], so a confidence of exactly 1 belongs to the last one
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def area_under_roc(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Area under the ROC curve, in [0, 1]: how likely a row of a class gets a higher probability than one of another.

    Equal probabilities count half, so that guessing gives 0.5. For two classes it is that of class 1. For more it is
    the mean, over the classes with rows, of one class against the rest, as in scikit-learn (ovr, macro).

    Args:
        labels: integers, shape (N,).
        probabilities: rows that sum to 1, shape (N, C).

    Returns:
        The area; NaN if all rows are of one class.
    """
    from scipy.stats import rankdata

    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    present, counts = np.unique(labels, return_counts=True)
    if len(present) < 2:
        return math.nan
    if probabilities.shape[1] == 2:
        present, counts = present[1:], counts[1:]
    # the ranks of a class's rows, less what they are among themselves, count the rows of others below them
    ranks = rankdata(probabilities[:, present], axis=0)
    sums = np.where(labels[:, None] == present, ranks, 0).sum(axis=0)
    return float(np.mean((sums - counts * (counts + 1) / 2) / (counts * (len(labels) - counts))))


def majority_accuracy(train_labels: ArrayLike, test_labels: ArrayLike) -> float:
    """Accuracy on the test rows of always predicting the most common class of the training rows."""
    return accuracy(test_labels, np.full(len(np.asarray(test_labels)), np.bincount(train_labels).argmax()))


def bootstrap_interval(correct: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean accuracy, by the bootstrap (Efron, 1979).

    For one model the rows are resampled. For several seeds the seeds are resampled too, independently of the rows:
    the interval then stands for other test rows and other training runs. It covers the truth 95 times in 100, or a
    little more often, as long as the spread between seeds is no larger than the spread that the choice of rows
    explains. If the spread between seeds dominates, the interval is too narrow: in simulations it then covers the truth
    about 75 times in 100 with three seeds, and about 85 times with five. ``seeds_interval`` has no such fault.

    Args:
        correct: 1 where the prediction is correct, else 0, or any other score of a row; shape (N,) or (seeds, N).
        seed: of the resampling.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: there are no rows.
    """
    scores = np.atleast_2d(np.asarray(correct, dtype=float))
    if scores.size == 0:
        raise ValueError(_NO_ROWS)
    rng = np.random.default_rng(seed)
    num_seeds, num_rows = scores.shape
    means = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        rows = rng.integers(num_rows, size=num_rows)
        seeds = rng.integers(num_seeds, size=num_seeds)
        means[i] = scores[:, rows].mean(axis=1)[seeds].mean()
    lower, upper = np.quantile(means, [0.025, 0.975])
    return float(lower), float(upper)


def seeds_interval(correct: ArrayLike) -> tuple[float, float]:
    """95 % interval of a mean accuracy over several seeds, for other test rows and other training runs.

    It is made as that of ``compare``: its squared half width is the sum of two. One is that of the t interval of the
    accuracies of the S seeds: what other seeds would change. The other is what other rows would change for all seeds
    alike. In simulations with 2 to 10 seeds it covers the truth 93 to 99 times in 100. It assumes that the accuracies
    of the seeds are normally distributed: where they lie near 1 and yet differ much, it covers the truth less often, in
    simulations down to 85 times in 100.

    Args:
        correct: 1 where the prediction is correct, else 0; shape (S, N), the same rows in the same order.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: there are no rows.
    """
    scores = np.asarray(correct, dtype=float)
    if scores.size == 0:
        raise ValueError(_NO_ROWS)
    mean = float(scores.mean())
    arm = math.hypot(_seed_part(scores)[0], _row_part(scores, right_or_wrong=True)[0])
    return max(mean - arm, 0.0), min(mean + arm, 1.0)


def counts_interval(
    confusion: ArrayLike, score: Callable[[NDArray[np.int64]], float], *, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval, over rows, of a score that depends on the confusion matrix alone.

    To resample N rows is to draw the counts of the cells from a multinomial distribution, so that a million rows cost
    no more than a hundred.

    Args:
        confusion: counts by true class (row) and predicted class (column), shape (C, C); at least one row.
        score: ``macro_f1``, ``balanced_accuracy`` or another function of such counts.
        seed: of the resampling.

    Returns:
        Lower and upper end.
    """
    confusion = np.asarray(confusion)
    filled, rng = confusion.nonzero(), np.random.default_rng(seed)
    cells, resampled = confusion[filled], np.zeros_like(confusion)
    scores = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        resampled[filled] = rng.multinomial(cells.sum(), cells / cells.sum())
        scores[i] = score(resampled)
    lower, upper = np.quantile(scores, [0.025, 0.975])
    return float(lower), float(upper)


@dataclass(frozen=True)
class Comparison:
    """Two models compared on the same rows, with the same seeds.

    Attributes:
        difference: mean score of the first minus mean score of the second.
        ci95: 95 % interval of that difference.
        detectable: the true difference that such a comparison tells from 0 in 80 of 100 repetitions. It is estimated,
            like the interval.
        num_seeds: S; with one, the interval stands for other rows, but not for other training runs.
        num_rows: N; None if only one score per seed is known, and the interval stands for other training runs on the
            same rows.
        p_value: of the exact test of McNemar (1947): how likely is a split at least as uneven, if a coin decides which
            model is correct on each row where only one is? None for several seeds, whose predictions for one row are
            not independent.
    """

    difference: float
    ci95: tuple[float, float]
    detectable: float
    num_seeds: int
    num_rows: int | None
    p_value: float | None

    @property
    def verdict(self) -> str:
        """What the interval says, worded to stand between the names of the two models."""
        low, high = self.ci95
        if low == high:  # without any spread, there is nothing to judge the difference by
            return "can't be told from"
        return "is better than" if low > 0 else "is worse than" if high < 0 else "can't be told from"

    def sentence(self, first: str, second: str) -> str:
        """The verdict with its numbers, without a full stop, for a text or a table.

        "lora is better than bitfit by 0.114 [0.082, 0.146]", or "lora and adapter can't be told apart: -0.003 [-0.020,
        +0.014]; a difference of 0.025 would have been seen". Where the interval leaves other rows or other seeds out,
        it says so. The half width of the interval has two digits.

        Args:
            first, second: names of the two models; an underscore is written as a space.
        """
        first, second = first.replace("_", " "), second.replace("_", " ")
        low, high = self.ci95
        digits = self._digits()
        scope = " with this one seed" if self.num_seeds == 1 else " on these rows" if self.num_rows is None else ""
        if "told" not in self.verdict:
            size, *ends = (f"{abs(value):.{digits}f}" for value in (self.difference, *sorted((low, high), key=abs)))
            return f"{first} {self.verdict} {second} by {size} [{', '.join(ends)}]{scope}"
        said = f"{first} and {second} can't be told apart{scope}: {self.difference:+z.{digits}f}"
        if low == high:
            return f"{said} each time, and without a spread that can't be judged"
        said += f" [{low:+z.{digits}f}, {high:+z.{digits}f}]"
        if not np.isfinite(self.detectable):
            return f"{said}; this comparison is too small to see any difference"
        return f"{said}; a difference of {self.detectable:.{digits}f} would have been seen"

    def _digits(self) -> int:
        """Decimal places for two digits of the half width, and for one of an end that must not be rounded to 0."""
        low, high = self.ci95
        smallest = (high - low) / 20
        if "told" not in self.verdict:
            smallest = min(smallest, abs(low), abs(high))
        return max(0, -math.floor(math.log10(smallest))) if smallest else 3


def compare(scores_a: ArrayLike, scores_b: ArrayLike, *, by: Literal["row", "seed"] = "row") -> Comparison:
    """Compare two models row by row and seed by seed; this detects smaller differences than two separate intervals.

    The squared half width of the interval is the sum of two. One is that of the t interval of the differences of the S
    seeds: what other seeds would change. The other is what other rows would change for all seeds alike. In simulations
    with equal models, of 100 comparisons with 2 to 10 seeds about 5 find a difference, or fewer. With one seed there is
    only the second part.

    Args:
        scores_a, scores_b: score of each row, such as 1 where the model is correct, else 0; shape (N,) or (S, N), the
            same rows and seeds in the same order. More is better: of a loss, pass the negative. Or, if no more is on
            record, the score of each seed over all rows, shape (S,).
        by: what scores of shape (N,) belong to: a row each, or a seed each.

    Raises:
        ValueError: the shapes differ, there are no rows, or there is one score only.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(scores_a, dtype=float), np.asarray(scores_b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(
            f"A paired comparison needs the same {by}s, but got {a.size} and {b.size}: evaluate both on one split."
        )
    p_value = None
    if a.ndim == 1 and by == "row":
        only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
        p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    of_rows = by == "row" or a.ndim > 1
    differences = np.atleast_2d(a - b) if of_rows else (a - b)[:, None]
    num_seeds, num_rows = differences.shape
    if differences.size < 2:
        raise ValueError(f"A comparison needs at least two {by}s, but got {differences.size}: pass more.")

    difference = float(differences.mean())
    arms, reaches = zip(_seed_part(differences), _row_part(differences, np.isin([a, b], [0, 1]).all()), strict=True)
    arm, reach = math.hypot(*arms), math.hypot(*reaches)
    if arm < 1e-12:  # 0.6 - 0.5 is not quite 0.2 - 0.1, but that is no spread
        arm = 0.0
    low, high = difference - arm, difference + arm
    if np.min([a, b]) >= 0 and np.max([a, b]) <= 1:  # shares: they differ by 1 at most
        low, high, reach = max(low, -1.0), min(high, 1.0), reach if reach <= 1 else math.inf
    return Comparison(difference, (low, high), reach, num_seeds, num_rows if of_rows else None, p_value)


def _seed_part(differences: NDArray[np.float64]) -> tuple[float, float]:
    """What the choice of seeds adds to half the interval and to the detectable difference; of shape (S, N).

    Also of the scores of one model, whose interval is made in the same way.
    """
    num_seeds = len(differences)
    if num_seeds == 1:
        return 0.0, 0.0
    return _arm_and_reach(differences.mean(axis=1).std(ddof=1) / math.sqrt(num_seeds), num_seeds - 1)


def _row_part(differences: NDArray[np.float64], right_or_wrong: bool) -> tuple[float, float]:
    """The same of the choice of rows: the variance that the seeds share, as in a two-way analysis of variance."""
    num_seeds, num_rows = differences.shape
    if num_rows == 1:
        return 0.0, 0.0
    variance = differences.mean(axis=0).var(ddof=1)
    if num_seeds > 1:
        rest = differences - differences.mean(axis=0) - differences.mean(axis=1, keepdims=True) + differences.mean()
        noise = (rest**2).sum() / ((num_seeds - 1) * (num_rows - 1))
        variance = max(variance - noise / num_seeds, 0.0)
    squared = variance / num_rows
    if right_or_wrong:  # models that agree on all of few rows need not agree on the next (Agresti and Min, 2005)
        squared += 1 / num_rows**2
    return _arm_and_reach(math.sqrt(squared), num_rows - 1)


def _arm_and_reach(error: float, freedom: int) -> tuple[float, float]:
    """Half the 95 % interval, and the difference seen with a power of 80 %, for a standard error of a mean."""
    from scipy.stats import chi2, t

    # half of all estimates of the error are smaller than the median, which is below the true one
    typical = error / math.sqrt(chi2.median(freedom) / freedom)
    return error * t.ppf(0.975, freedom), typical * _noncentrality(freedom)


@cache
def _noncentrality(freedom: int) -> float:
    """True difference, in true standard errors, that a t test at 5 % finds with a power of 80 %."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    bound = t.ppf(0.975, freedom)
    return brentq(lambda shift: nct.sf(bound, freedom, shift) - 0.8, 0, 3 * bound)


@dataclass(frozen=True)
class Evaluation:
    """Result of a classifier on labelled rows.

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
        """Most probable class of each row, shape (N,)."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each row was classified correctly, shape (N,)."""
        return self.predictions == self.labels

    @cached_property
    def accuracy(self) -> float:
        """Share of rows that were classified correctly, in [0, 1]."""
        return accuracy(self.labels, self.predictions)

    @property
    def scores(self) -> dict[str, float]:
        """The scores that a study records, by name."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "loss": self.loss}

    @cached_property
    def ci95(self) -> tuple[float, float]:
        """95 % bootstrap interval of the accuracy, over rows."""
        return bootstrap_interval(self.correct)

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """Counts by true class (row) and predicted class (column), shape (C, C)."""
        return confusion_matrix(self.labels, self.predictions, self.probabilities.shape[1])

    @cached_property
    def macro_f1(self) -> float:
        """Mean F1 over classes, see ``macro_f1``."""
        return macro_f1(self.confusion)

    @cached_property
    def balanced_accuracy(self) -> float:
        """Mean share of correct rows over classes, see ``balanced_accuracy``."""
        return balanced_accuracy(self.confusion)

    @cached_property
    def auc(self) -> float:
        """Area under the ROC curve, see ``area_under_roc``; NaN if all rows are of one class."""
        return area_under_roc(self.labels, self.probabilities)

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """Share of the rows that each class is predicted for, shape (C,)."""
        return self.confusion.sum(axis=0) / len(self.labels)

    @cached_property
    def calibration_error(self) -> float:
        """Gap between confidence and accuracy, see ``expected_calibration_error``."""
        return expected_calibration_error(self.labels, self.probabilities)

    @cached_property
    def majority(self) -> float:
        """Share of the most common class among these rows: the best accuracy of a constant prediction."""
        return float(np.bincount(self.labels).max() / len(self.labels))

    def __repr__(self) -> str:
        low, high = self.ci95
        return (
            f"accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}] on {len(self.labels):,} rows "
            f"(majority {self.majority:.3f}), macro-F1 {self.macro_f1:.3f}, "
            f"loss {self.loss:.3f}, calibration error {self.calibration_error:.3f}"
        )


def pooled(parts: Sequence[Evaluation]) -> Evaluation:
    """Join evaluations of different rows into one.

    Args:
        parts: evaluations with the same classes.
    """
    labels, probabilities = ([getattr(part, name) for part in parts] for name in ("labels", "probabilities"))
    loss = np.average([part.loss for part in parts], weights=[len(part.labels) for part in parts])
    return Evaluation(np.concatenate(labels), np.concatenate(probabilities), float(loss))


def over_seeds(evaluations: Sequence[Evaluation]) -> tuple[float, tuple[float, float]]:
    """Mean accuracy over seeds, and its 95 % interval over rows and seeds (see ``seeds_interval``).

    With one seed the interval is that of its evaluation, over rows alone.

    Args:
        evaluations: one per seed, on the same rows in the same order.

    Raises:
        ValueError: the labels of the evaluations differ.
    """
    if any(not np.array_equal(evaluation.labels, evaluations[0].labels) for evaluation in evaluations):
        raise ValueError("An interval over seeds needs the same rows for every seed: evaluate all on one split.")
    if len(evaluations) == 1:
        return evaluations[0].accuracy, evaluations[0].ci95
    correct = np.stack([evaluation.correct for evaluation in evaluations])
    return float(correct.mean()), seeds_interval(correct)
