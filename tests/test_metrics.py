import warnings

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from ftkit import metrics
from ftkit.metrics import Evaluation, bootstrap_interval, compare, expected_calibration_error, over_seeds


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def make_evaluation(labels: list[int], predictions: list[int], num_classes: int = 2, sure: float = 0.9) -> Evaluation:
    probabilities = np.full((len(labels), num_classes), (1 - sure) / (num_classes - 1))
    probabilities[np.arange(len(labels)), predictions] = sure
    return Evaluation(np.array(labels), probabilities, loss=0.25)


# Scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes_seen", [[0, 1, 2, 3, 4], [0, 3], [2]])
@pytest.mark.parametrize("classes_predicted", [[0, 1, 2, 3, 4], [1, 3], [4]])
def test_scores_equal_those_of_scikit_learn(
    rng: np.random.Generator, classes_seen: list[int], classes_predicted: list[int]
) -> None:
    labels, predictions = rng.choice(classes_seen, size=83), rng.choice(classes_predicted, size=83)
    confusion = metrics.confusion_matrix(labels, predictions, 5)
    np.testing.assert_array_equal(confusion, sklearn_metrics.confusion_matrix(labels, predictions, labels=np.arange(5)))
    assert metrics.accuracy(labels, predictions) == pytest.approx(sklearn_metrics.accuracy_score(labels, predictions))
    expected = sklearn_metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    assert metrics.macro_f1(confusion) == pytest.approx(expected)
    with warnings.catch_warnings(action="ignore"):  # of classes that are predicted and have no rows
        expected = sklearn_metrics.balanced_accuracy_score(labels, predictions)
    assert metrics.balanced_accuracy(confusion) == pytest.approx(expected)
    evaluation = Evaluation(labels, np.eye(5)[predictions], loss=0.5)
    assert evaluation.balanced_accuracy == metrics.balanced_accuracy(confusion)


def test_the_confusion_matrix_accepts_narrow_integers_and_refuses_an_unknown_class() -> None:
    labels, predictions = np.array([19, 0], dtype=np.uint8), np.array([18, 1], dtype=np.uint8)
    confusion = metrics.confusion_matrix(labels, predictions, 20)
    assert confusion[19, 18] == confusion[0, 1] == 1
    assert confusion.sum() == 2
    with pytest.raises(IndexError):
        metrics.confusion_matrix([0], [2], 2)


def test_the_majority_class_is_that_of_the_training_rows() -> None:
    assert metrics.majority_accuracy([0, 1, 1, 2], [0, 0, 1, 0]) == 0.25


# Calibration --------------------------------------------------------------------------------------------------


def calibration_error_by_loop(labels: np.ndarray, probabilities: np.ndarray, num_bins: int) -> float:
    total = 0.0
    for k in range(1, num_bins + 1):
        rows = [i for i, p in enumerate(probabilities) if (k - 1) / num_bins < max(p) <= k / num_bins]
        if rows:
            accuracy = sum(int(probabilities[i].argmax() == labels[i]) for i in rows) / len(rows)
            confidence = sum(max(probabilities[i]) for i in rows) / len(rows)
            total += len(rows) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize(("num_classes", "num_bins"), [(2, 15), (7, 15), (3, 4)])
def test_calibration_error_equals_a_plain_loop(rng: np.random.Generator, num_classes: int, num_bins: int) -> None:
    probabilities = rng.dirichlet(np.full(num_classes, 0.7), size=400)
    labels = rng.integers(num_classes, size=400)
    expected = calibration_error_by_loop(labels, probabilities, num_bins)
    assert expected_calibration_error(labels, probabilities, num_bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_known_cases() -> None:
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert expected_calibration_error([0, 1], certain) == 0
    assert expected_calibration_error([1, 0], certain) == 1
    three_quarters_sure = np.tile([0.75, 0.25], (4, 1))
    assert expected_calibration_error([0, 0, 0, 1], three_quarters_sure) == pytest.approx(0)
    assert expected_calibration_error([1, 1, 1, 0], three_quarters_sure) == pytest.approx(0.5)


def test_a_confidence_on_the_edge_of_a_bin_belongs_to_the_lower_bin() -> None:
    """A wrong row at 12/15 shares a bin with a correct one at 11.5/15; in the bin above it would be alone."""
    probabilities = np.array([[12 / 15, 3 / 15], [11.5 / 15, 3.5 / 15]])
    together = abs((0 - 12 / 15) + (1 - 11.5 / 15)) / 2
    assert expected_calibration_error([1, 0], probabilities) == pytest.approx(together)
    every_edge = np.array([[k / 15, 1 - k / 15] for k in range(8, 16)])
    labels = np.zeros(8, dtype=int)
    expected = calibration_error_by_loop(labels, every_edge, 15)
    assert expected_calibration_error(labels, every_edge) == pytest.approx(expected, abs=1e-12)


# Intervals ----------------------------------------------------------------------------------------------------


def test_the_interval_covers_the_truth_about_95_times_in_100(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 400)
    covered = 0
    for repetition in range(400):
        lower, upper = bootstrap_interval(rng.random(200) < 0.8, seed=repetition)
        covered += lower <= 0.8 <= upper
    assert 0.91 <= covered / 400 <= 0.98


def test_the_interval_is_close_to_the_binomial_one_and_reproducible(rng: np.random.Generator) -> None:
    correct = rng.random(4000) < 0.7
    half = 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / 4000)
    interval = bootstrap_interval(correct)
    np.testing.assert_allclose(interval, [correct.mean() - half, correct.mean() + half], atol=half / 10)
    assert bootstrap_interval(correct) == interval
    assert bootstrap_interval(correct, seed=1) != interval


def test_seeds_that_disagree_widen_the_interval(rng: np.random.Generator) -> None:
    def width(scores: np.ndarray) -> float:
        lower, upper = bootstrap_interval(scores)
        return upper - lower

    one = rng.random(500) < 0.8
    same = np.stack([one, one, one])
    apart = np.stack([rng.random(500) < p for p in (0.7, 0.8, 0.9)])
    assert width(same) == pytest.approx(width(one), rel=0.1)
    assert width(apart) > 2 * width(same)


def test_an_interval_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap_interval([])


# Comparison ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("only_a", "only_b"), [(9, 2), (2, 9), (5, 5), (30, 12), (1, 0)])
def test_the_p_value_is_that_of_a_binomial_test_on_the_rows_that_differ(only_a: int, only_b: int) -> None:
    a = np.array([1] * 40 + [1] * only_a + [0] * only_b + [0] * 20)
    b = np.array([1] * 40 + [0] * only_a + [1] * only_b + [0] * 20)
    comparison = compare(a, b)
    assert comparison.p_value == pytest.approx(binomtest(only_a, only_a + only_b, 0.5).pvalue)
    assert comparison.difference == pytest.approx((only_a - only_b) / len(a))
    assert comparison.ci95[0] <= comparison.difference <= comparison.ci95[1]


def test_two_models_with_the_same_predictions_do_not_differ() -> None:
    comparison = compare([True, False, True], [True, False, True])
    assert (comparison.difference, comparison.ci95, comparison.p_value) == (0, (0, 0), 1)


def test_a_paired_interval_is_narrower_than_an_unpaired_one(rng: np.random.Generator) -> None:
    a = rng.random(1000) < 0.7
    b = np.where(rng.random(1000) < 0.05, ~a, a)  # they differ on one row in twenty
    low, high = compare(a, b).ci95
    unpaired = np.hypot(*(np.diff(bootstrap_interval(scores))[0] for scores in (a, b)))
    assert high - low < unpaired / 2


def test_a_comparison_of_different_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="same rows, but got 3 and 2"):
        compare([1, 0, 1], [1, 0])


# Evaluation ---------------------------------------------------------------------------------------------------


def test_an_evaluation_has_every_score() -> None:
    evaluation = make_evaluation([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], num_classes=3)
    assert evaluation.predictions.tolist() == [0, 0, 1, 1, 1]
    assert evaluation.correct.tolist() == [True, True, False, True, False]
    assert evaluation.accuracy == pytest.approx(0.6)
    assert evaluation.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert evaluation.macro_f1 == pytest.approx((0.8 + 0.5 + 0) / 3)
    assert evaluation.calibration_error == pytest.approx(0.3)
    assert evaluation.majority == pytest.approx(0.6)
    assert evaluation.ci95 == bootstrap_interval(evaluation.correct)
    low, high = evaluation.ci95
    assert repr(evaluation) == (
        f"accuracy 0.600 [{low:.3f}, {high:.3f}] on 5 rows (majority 0.600), macro-F1 0.433, loss 0.250, "
        "calibration error 0.300"
    )


def test_over_seeds_returns_the_mean_and_its_interval() -> None:
    labels = [0, 1] * 50
    seeds = [make_evaluation(labels, [0] * n + labels[n:]) for n in (10, 40, 70)]
    mean, (low, high) = over_seeds(seeds)
    assert mean == pytest.approx(np.mean([seed.accuracy for seed in seeds])) == pytest.approx(0.8)
    assert low < mean < high
    with pytest.raises(ValueError, match="same rows"):
        over_seeds([seeds[0], make_evaluation(labels[::-1], labels)])


def test_compare_over_seeds_resamples_rows_and_seeds_and_gives_a_verdict() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 400)) < 0.9, rng.random((3, 400)) < 0.6
    comparison = compare(a, b)
    assert comparison.difference == pytest.approx(a.mean() - b.mean())
    assert comparison.ci95 == bootstrap_interval(a.astype(float) - b)
    assert comparison.p_value is None
    assert comparison.verdict == "is better than"
    assert compare(b, a).verdict == "is worse than"
    assert compare(a[0], rng.permuted(a[0])).verdict == "can't be told from"
