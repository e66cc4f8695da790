import warnings
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from ftkit import metrics
from ftkit.metrics import (
    Comparison,
    Evaluation,
    bootstrap_interval,
    compare,
    expected_calibration_error,
    over_seeds,
    seeds_interval,
)


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


@pytest.mark.parametrize("num_classes", [2, 3, 6])
@pytest.mark.parametrize("decimals", [1, 8])  # with one there are many ties
def test_the_area_under_the_roc_curve_equals_that_of_scikit_learn(
    rng: np.random.Generator, num_classes: int, decimals: int
) -> None:
    labels = rng.choice(num_classes, p=rng.dirichlet(np.full(num_classes, 3)), size=120)
    probabilities = rng.dirichlet(np.ones(num_classes), size=120) + 0.5 * np.eye(num_classes)[labels]
    probabilities = np.round(probabilities / probabilities.sum(axis=1, keepdims=True), decimals)
    probabilities[:, -1] = 1 - probabilities[:, :-1].sum(axis=1)
    asked = probabilities[:, 1] if num_classes == 2 else probabilities
    expected = sklearn_metrics.roc_auc_score(labels, asked, multi_class="ovr", average="macro")
    evaluation = Evaluation(labels, probabilities, loss=0.5)
    assert evaluation.auc == pytest.approx(expected)
    assert 0.6 < evaluation.auc < 1


def test_the_area_under_the_roc_curve_of_known_cases() -> None:
    ranked = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    assert metrics.area_under_roc([0, 0, 1], ranked) == 1
    assert metrics.area_under_roc([1, 1, 0], ranked) == 0
    assert metrics.area_under_roc([0, 1, 0], np.full((3, 2), 0.5)) == 0.5
    assert np.isnan(metrics.area_under_roc([1, 1, 1], ranked))
    # a class without rows is left out of the mean, although rows get its probability
    by_hand = (1 + 1 / 2) / 2  # of class 0 the one row is above both others, of class 1 one of the two is
    assert metrics.area_under_roc([0, 1, 1], [[0.6, 0.2, 0.2], [0.2, 0.1, 0.7], [0.1, 0.3, 0.6]]) == by_hand


def test_the_shares_of_predicted_classes() -> None:
    evaluation = make_evaluation([0, 0, 1, 1], [0, 2, 0, 0], num_classes=4)
    assert evaluation.shares.tolist() == [0.75, 0, 0.25, 0]
    assert {"auc", "shares"}.isdisjoint(evaluation.scores)


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


def test_two_models_with_the_same_predictions_do_not_differ_but_might_on_other_rows() -> None:
    few, many = compare([True, False, True], [True, False, True]), compare([1, 0] * 100, [1, 0] * 100)
    assert few.difference == many.difference == 0
    assert few.p_value == many.p_value == 1
    assert few.ci95 == (-1, 1)
    assert many.ci95 == pytest.approx((-0.01, 0.01), abs=2e-4)


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


def test_with_one_seed_the_interval_is_that_of_its_rows() -> None:
    one = make_evaluation([0, 1] * 50, [0] * 100)
    assert over_seeds([one]) == (0.5, one.ci95)
    np.testing.assert_allclose(seeds_interval([one.correct]), one.ci95, atol=0.011)  # t instead of the bootstrap


# Verdicts -----------------------------------------------------------------------------------------------------


def make_pair(
    rng: np.random.Generator, num_seeds: int, of_seed: float, of_row: float, noise: float, better: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two models on 150 rows whose expected scores differ by ``better``; the differences depend on all."""
    shape = (num_seeds, 150)
    common = rng.normal(size=shape)
    seeds, rows = rng.normal(0, of_seed, (num_seeds, 1)), rng.normal(0, of_row, 150)
    return common + better + seeds + rows + rng.normal(0, noise, shape), common


def make_correct(
    rng: np.random.Generator, num_seeds: int, of_seed: float, of_row: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which of 150 rows two models with equal expected accuracy classify correctly; rows are difficult for both."""
    difficulty, shape = 1 - rng.normal(size=150), (num_seeds, 150)
    drawn = (
        rng.normal(0, of_seed, (num_seeds, 1)) + rng.normal(0, of_row, 150) + rng.normal(0, noise, shape)
        for _ in range(2)
    )
    a, b = (difficulty + scores > 0 for scores in drawn)
    return a, b


# standard deviations of seeds, rows and the rest: either of the first two dominates, both matter, or neither
REGIMES = {"seeds": (0.3, 0.1, 0.4), "rows": (0.01, 1.0, 0.4), "both": (0.1, 0.8, 0.4), "neither": (0.0, 0.0, 0.7)}


@pytest.mark.parametrize("make", [make_pair, make_correct])
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("regime", REGIMES)
def test_of_comparisons_of_equal_models_no_more_than_5_in_100_find_a_difference(
    regime: str, num_seeds: int, make: Callable
) -> None:
    rng = np.random.default_rng(0)
    told = [compare(*make(rng, num_seeds, *REGIMES[regime])).verdict for _ in range(400)]
    assert told.count("is better than") + told.count("is worse than") <= 28  # 2 standard deviations above 20


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("regime", REGIMES)
def test_the_interval_over_seeds_covers_the_truth_at_least_95_times_in_100(regime: str, num_seeds: int) -> None:
    rng = np.random.default_rng(2)
    truth = stats.norm.cdf(1 / np.hypot(1, np.linalg.norm(REGIMES[regime])))  # see make_correct
    intervals = [seeds_interval(make_correct(rng, num_seeds, *REGIMES[regime])[0]) for _ in range(400)]
    assert sum(low <= truth <= high for low, high in intervals) >= 371  # 2 standard deviations below 380


def test_the_interval_over_seeds_is_the_t_interval_if_rows_do_not_matter_and_stays_within_0_and_1() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((4, 20_000)) < np.array([[0.5], [0.6], [0.7], [0.55]])
    expected = stats.ttest_1samp(scores.mean(axis=1), 0).confidence_interval(0.95)
    assert seeds_interval(scores) == pytest.approx(tuple(expected), abs=1e-4)
    low, high = seeds_interval(np.ones((3, 50)))
    assert 0.9 < low < 1 and high == 1  # of more rows, some might be wrong
    assert seeds_interval([[1] * 50, [0] * 50]) == (0, 1)
    with pytest.raises(ValueError, match="at least one row"):
        seeds_interval([])


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("regime", REGIMES)
def test_the_detectable_difference_is_seen_in_80_of_100_comparisons(regime: str, num_seeds: int) -> None:
    rng = np.random.default_rng(1)
    spread = REGIMES[regime]
    detectable = np.median([compare(*make_pair(rng, num_seeds, *spread)).detectable for _ in range(400)])
    seen = [compare(*make_pair(rng, num_seeds, *spread, better=detectable)).verdict for _ in range(400)]
    assert 0.73 <= seen.count("is better than") / 400 <= 0.87


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
def test_of_scores_by_seed_the_interval_is_that_of_a_paired_t_test(num_seeds: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.8, 0.02, num_seeds), rng.normal(0.7, 0.02, num_seeds)
    comparison = compare(a, b, by="seed")
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert comparison.ci95 == pytest.approx((max(expected.low, -1), min(expected.high, 1)))
    assert (comparison.num_seeds, comparison.num_rows, comparison.p_value) == (num_seeds, None, None)


def test_with_one_seed_the_rows_alone_decide_and_the_sentence_says_so() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(400) < 0.9, rng.random(400) < 0.6
    one = compare(a, b)
    assert one.num_seeds == 1 and one.num_rows == 400
    assert compare(a[None], b[None]).ci95 == one.ci95
    half = 1.96 * (a.astype(float) - b).std() / 20
    assert one.ci95 == pytest.approx((one.difference - half, one.difference + half), abs=0.002)
    assert one.sentence("lora", "bitfit").endswith("] with this one seed")
    assert "can't be told apart with this one seed: " in compare(a, rng.permuted(a)).sentence("x", "y")


def test_a_verdict_in_words() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 400)) < 0.9, rng.random((3, 400)) < 0.6
    comparison = compare(a, b)
    assert comparison.difference == pytest.approx(a.mean() - b.mean())
    assert comparison.p_value is None
    assert comparison.verdict == "is better than"
    assert compare(b, a).verdict == "is worse than"
    assert compare(a[0], rng.permuted(a[0])).verdict == "can't be told from"


def said(difference: float, half: float, *, seen: float = 0.03, seeds: int = 5, rows: int | None = 100) -> str:
    """The sentence of a comparison with this result."""
    ends = (difference - half, difference + half)
    return Comparison(difference, ends, seen, seeds, rows, None).sentence("lora", "prompt_tuning")


def test_sentences() -> None:
    assert said(0.11, 0.03) == "lora is better than prompt tuning by 0.110 [0.080, 0.140]"
    assert said(-0.11, 0.03) == "lora is worse than prompt tuning by 0.110 [0.080, 0.140]"
    assert said(-0.11, 0.03, rows=None) == "lora is worse than prompt tuning by 0.110 [0.080, 0.140] on these rows"
    apart = "lora and prompt tuning can't be told apart"
    assert said(-0.003, 0.018) == f"{apart}: -0.003 [-0.021, +0.015]; a difference of 0.030 would have been seen"
    assert said(-0.0001, 0.2, seen=0.3) == f"{apart}: +0.00 [-0.20, +0.20]; a difference of 0.30 would have been seen"
    assert said(0, 1, seen=np.inf) == f"{apart}: +0.0 [-1.0, +1.0]; this comparison is too small to see any difference"
    assert said(0.1, 0) == f"{apart}: +0.100 each time, and without a spread that can't be judged"
    assert said(84, 65) == "lora is better than prompt tuning by 84 [19, 149]"
    # an end that is not 0 is not written as 0
    assert said(0.0203, 0.02) == "lora is better than prompt tuning by 0.0203 [0.0003, 0.0403]"


def test_seeds_that_all_differ_by_the_same_leave_nothing_to_judge_by() -> None:
    comparison = compare([0.6, 0.2, 0.9], [0.5, 0.1, 0.8], by="seed")
    assert comparison.verdict == "can't be told from"
    assert "+0.100 each time" in comparison.sentence("a", "b")


@pytest.mark.parametrize(("scores", "by"), [([], "row"), ([0.5], "row"), ([0.5], "seed")])
def test_a_comparison_of_one_score_is_refused(scores: list[float], by: str) -> None:
    with pytest.raises(ValueError, match=f"at least two {by}s, but got {len(scores)}: pass more"):
        compare(scores, scores, by=by)


@pytest.mark.parametrize("score", [metrics.macro_f1, metrics.balanced_accuracy])
def test_the_interval_of_counts_is_that_of_resampled_rows(
    rng: np.random.Generator, score: Callable[[np.ndarray], float]
) -> None:
    labels = rng.choice(3, p=[0.6, 0.3, 0.1], size=200)
    predictions = np.where(rng.random(200) < 0.7, labels, rng.choice(3, size=200))
    scores = []
    for _ in range(2000):
        rows = rng.integers(200, size=200)
        scores.append(score(metrics.confusion_matrix(labels[rows], predictions[rows], 3)))
    found = metrics.counts_interval(metrics.confusion_matrix(labels, predictions, 3), score)
    np.testing.assert_allclose(found, np.quantile(scores, [0.025, 0.975]), atol=0.01)
