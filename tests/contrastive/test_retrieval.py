import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from tiny_towers import make_pairs, make_towers

from ftkit.contrastive.retrieval import Retrieval, alignment, modality_gap, uniformity
from ftkit.contrastive.zero_shot_classifier import class_embeddings, linear_probe, zero_shot
from ftkit.metrics import Evaluation, bootstrap_interval

SIMILARITIES = np.array(
    [
        [0.9, 0.1, 0.2, 0.3],  # correct image first
        [0.5, 0.4, 0.3, 0.6],  # two images before it
        [0.7, 0.0, 0.7, 0.1],  # a tie
        [0.4, 0.3, 0.2, 0.1],  # last
    ],
    dtype=np.float32,
)


def test_ranks_equal_those_counted_by_hand() -> None:
    found = Retrieval(SIMILARITIES, np.arange(4), 1.5)
    assert found.ranks.tolist() == [1, 3, 2, 4]
    assert found.found(2).tolist() == [True, False, True, False]
    assert found.correct.tolist() == [True, False, False, False]
    assert [found.recall(k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert found.accuracy == 0.25
    assert found.ci95 == bootstrap_interval([1, 0, 0, 0])


def test_turned_ranks_the_texts_for_each_image() -> None:
    found = Retrieval(SIMILARITIES, np.arange(4), 1.5)
    assert found.turned.ranks.tolist() == [1, 1, 1, 4]  # the text of the last image is the least similar one
    assert found.turned.loss == 1.5
    assert found.turned.turned.ranks.tolist() == found.ranks.tolist()


def test_any_image_of_the_group_is_correct() -> None:
    found = Retrieval(SIMILARITIES, np.array([0, 1, 2, 1]), 0.0)
    assert found.ranks.tolist() == [1, 1, 2, 2]
    assert Retrieval(SIMILARITIES, np.zeros(4, dtype=int), 0.0).ranks.tolist() == [1, 1, 1, 1]


def test_scores_have_names_and_are_shown() -> None:
    found = Retrieval(SIMILARITIES, np.arange(4), 1.5)
    assert found.scores == {
        "recall_at_1": 0.25, "recall_at_5": 1.0, "recall_at_10": 1.0, "median_rank": 2.5, "loss": 1.5,
    }  # fmt: skip
    assert repr(found) == (
        "text to image, recall at 1, 5, 10: 0.250, 1.000, 1.000; median rank 2.5; "
        "image to text, recall at 1, 5, 10: 0.750, 1.000, 1.000; median rank 1 (4 images)"
    )


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
def test_a_model_that_cannot_tell_images_apart_ranks_the_correct_one_last(value: float) -> None:
    found = Retrieval(np.full((20, 20), value, dtype=np.float32), np.arange(20), 0.0)
    assert found.ranks.tolist() == [20] * 20
    assert found.accuracy == 0


def test_scores_of_a_classifier() -> None:
    evaluation = Evaluation(np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), 0.7)
    assert list(evaluation.scores) == ["accuracy", "macro_f1", "loss"]
    assert evaluation.scores["accuracy"] == pytest.approx(2 / 3)
    assert evaluation.scores["macro_f1"] == pytest.approx(2 / 3)  # 2/3 of either class
    assert evaluation.scores["loss"] == 0.7


# Classification ---------------------------------------------------------------------------------------------


class FixedTexts:
    """A model with fixed embeddings and a fixed temperature."""

    temperature = 0.5
    table = {"a": [3.0, 0.0], "the a": [0.0, 1.0], "b": [0.0, -2.0], "the b": [0.0, -1.0]}  # noqa: RUF012

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([self.table[text] for text in texts])


def test_class_embeddings_equal_those_by_hand() -> None:
    one = class_embeddings(FixedTexts(), ["a", "b"])
    torch.testing.assert_close(one, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    # normalised before the mean, so a longer embedding has no more weight
    several = class_embeddings(FixedTexts(), ["a", "b"], ["{}", "the {}"])
    half = math.sqrt(0.5)
    torch.testing.assert_close(several, torch.tensor([[half, half], [0.0, -1.0]]))
    with pytest.raises(ValueError, match="'the name' has no place"):
        class_embeddings(FixedTexts(), ["a"], ["{}", "the name"])


def test_class_embeddings_do_not_depend_on_the_other_classes() -> None:
    model = make_towers()
    both = class_embeddings(model, ["w5", "w6 w7 w8"], ["w3 {}"])
    expected = torch.nn.functional.normalize(model.encode_texts(["w3 w6 w7 w8"]), dim=-1)
    torch.testing.assert_close(both[1:], expected)
    assert both.shape == (2, 8)


def test_zero_shot_equals_the_result_by_hand() -> None:
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = zero_shot(FixedTexts(), torch.tensor([[5.0, 0.0], [3.0, 4.0], [0.0, 0.1]]), [0, 0, 1], classes)
    odds = np.exp(np.array([1.0, -0.2, -1.0]) / 0.5)  # difference of the cosines, over the temperature
    expected = odds / (1 + odds)
    np.testing.assert_allclose(found.probabilities[:, 0], expected, rtol=1e-6)
    assert found.predictions.tolist() == [0, 1, 1]
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == pytest.approx(-np.log([expected[0], expected[1], 1 - expected[2]]).mean(), rel=1e-6)


def make_features(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(60) % 3
    return rng.normal(size=(60, 4)) * [1, 10, 0.1, 1] + labels[:, None] * [0.5, 5, 0.1, 0], labels


def test_linear_probe_equals_scikit_learn() -> None:
    (train, labels), (test, test_labels) = make_features(0), make_features(1)
    found = linear_probe(torch.from_numpy(train), labels, torch.from_numpy(test), test_labels, 3)
    mean, deviation = train.mean(0), train.std(0)
    reference = LogisticRegression(max_iter=1000).fit((train - mean) / deviation, labels)
    expected = reference.predict_proba((test - mean) / deviation)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    assert found.loss == pytest.approx(log_loss(test_labels, expected), abs=1e-6)
    assert 0.5 < found.accuracy == reference.score((test - mean) / deviation, test_labels)


def test_linear_probe_accepts_test_rows_that_lack_a_class() -> None:
    (train, labels), (test, test_labels) = make_features(0), make_features(1)
    found = linear_probe(train, labels, test[test_labels == 1], test_labels[test_labels == 1], 3)
    assert found.probabilities.shape == (20, 3)
    assert found.loss == pytest.approx(-np.log(found.probabilities[:, 1]).mean())


def test_linear_probe_refuses_a_class_without_training_rows() -> None:
    train, labels = make_features(0)
    with pytest.raises(ValueError, match=r"no training row of the classes \[1, 3\]"):
        linear_probe(train[labels != 1], labels[labels != 1], train, labels, 4)


# Geometry ---------------------------------------------------------------------------------------------------


def test_measures_of_the_space_for_known_points() -> None:
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])  # normalised by the functions
    poles = torch.tensor([[0.0, 5.0], [0.0, -1.0]])
    assert modality_gap(east, -east) == pytest.approx(2)
    assert modality_gap(east, north) == pytest.approx(math.sqrt(2))
    assert modality_gap(poles, torch.cat([east, -east])) == pytest.approx(0, abs=1e-6)
    assert modality_gap(poles, torch.cat([east, east])) == pytest.approx(1)
    assert alignment(east, 7 * east) == pytest.approx(0)
    assert alignment(east, -east) == pytest.approx(4)
    assert alignment(torch.cat([east, east]), torch.cat([north, east])) == pytest.approx(1)
    assert uniformity(poles) == pytest.approx(-8)  # exp(-2 · 2²)
    assert uniformity(torch.cat([east, 2 * east])) == pytest.approx(0)
    square = torch.cat([east, north, -east, -north])  # four sides of √2, two diagonals of 2
    assert uniformity(square) == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6))


def test_zero_shot_and_retrieval_agree_on_a_model() -> None:
    """With each caption as a class of its own, the predicted class of an image is the text that it ranks first."""
    model, pairs = make_towers(), make_pairs(12)
    image = model.encode_images(pairs.images)
    classes = class_embeddings(model, pairs.captions)
    found = zero_shot(model, image, np.arange(12), classes)
    turned = Retrieval((classes @ image.T).numpy(), np.arange(12), 0.0).turned
    assert found.correct.tolist() == turned.correct.tolist()
