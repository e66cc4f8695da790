"""The metrics of an accuracy matrix, compared with values computed by hand."""

import numpy as np
import pytest

from ftkit.continual.accuracy_matrix import AccuracyMatrix

R = [[0.9, 0.2, 0.5], [0.6, 0.8, 0.4], [0.7, 0.5, 0.9]]
B = [0.5, 0.25, 0.3]


def test_metrics_of_three_tasks_are_those_computed_by_hand():
    matrix = AccuracyMatrix(R, B, ["a", "b", "c"])
    assert matrix.average_accuracy == pytest.approx((0.7 + 0.5 + 0.9) / 3)
    assert matrix.learning_accuracy == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert matrix.backward_transfer == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert matrix.forward_transfer == pytest.approx(((0.2 - 0.25) + (0.4 - 0.3)) / 2)
    assert matrix.forgetting_by_task == pytest.approx([0.9 - 0.7, 0.8 - 0.5])
    assert matrix.forgetting == pytest.approx(0.25)
    assert matrix.seen_accuracy == pytest.approx([0.9, 0.7, 0.7])
    assert (matrix.new_accuracy, matrix.old_accuracy) == pytest.approx((0.9, 0.6))
    assert matrix.metrics()["forgetting"] == matrix.forgetting


def test_forgetting_is_measured_from_the_best_accuracy_and_may_be_negative():
    improved = AccuracyMatrix([[0.5, 0.1], [0.7, 0.8]], [0, 0], ["a", "b"])
    assert improved.forgetting == pytest.approx(-0.2)  # the best accuracy is taken before the last training
    assert improved.backward_transfer == pytest.approx(0.2)
    # task a is best after task b is learned, and task b before it is learned
    better = AccuracyMatrix([[0.6, 0.9, 0.1], [0.8, 0.7, 0.1], [0.5, 0.5, 0.5]], [0, 0, 0], ["a", "b", "c"])
    assert better.forgetting_by_task == pytest.approx([0.3, 0.4])
    assert better.backward_transfer == pytest.approx((-0.1 - 0.2) / 2)


def test_the_matrix_keeps_a_copy():
    values = np.array(R)
    matrix = AccuracyMatrix(values, B, ["a", "b", "c"])
    values[:] = 0
    assert matrix.average_accuracy > 0.5
    assert "forgetting 0.250" in repr(matrix)


@pytest.mark.parametrize(
    ("values", "baseline", "names", "message"),
    [
        ([[0.5]], [0.5], ["a"], "T at least 2"),
        (R, [0.5, 0.5], ["a", "b", "c"], "b has shape \\(2,\\)"),
        (R, B, ["a", "b"], "There are 2 names"),
        ([[0.5, 81.0], [0.1, 0.1]], [0, 0], ["a", "b"], "R contains 81"),
        ([[0.5, 0.5], [0.1, 0.1]], [0, float("nan")], ["a", "b"], "b contains nan"),
    ],
)
def test_an_invalid_accuracy_matrix_is_refused(values, baseline, names, message):
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix(values, baseline, names)
