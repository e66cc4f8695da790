"""The cheap rivals of fine-tuning: the most common class, and logistic regression on features that are not trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedModel

from ftkit.metrics import Evaluation
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths

STRENGTHS = (0.01, 0.1, 1, 10, 100)

_ABSENT = 1e-12  # probability of a class that the training rows do not have: its logarithm must be finite


def majority_class(train_labels: ArrayLike, test_labels: ArrayLike, num_classes: int) -> Evaluation:
    """Evaluate the classifier that gives every row the shares of the classes among the training rows.

    Args:
        train_labels, test_labels: integers in [0, num_classes), shapes (N,) and (M,).
        num_classes: C.
    """
    counts = np.bincount(np.asarray(train_labels), minlength=num_classes)
    shares = np.maximum(counts / counts.sum(), _ABSENT)
    return _evaluation(np.tile(shares, (len(np.asarray(test_labels)), 1)), test_labels)


@torch.inference_mode()
def mean_embeddings(model: PreTrainedModel, rows: Any, *, batch_size: int = 64) -> NDArray[np.float32]:
    """Mean, over the tokens of each row, of the output of a network below its head; padding does not count.

    Args:
        model: a network of transformers, with or without a head; it is in eval mode afterwards.
        rows: encoded rows, as for ``fit``.
        batch_size: rows that are read at a time.

    Returns:
        Shape (N, hidden size).
    """
    body = model.base_model.eval()
    means: NDArray[np.float32] | None = None
    for indices in evaluation_batches(row_lengths(rows), batch_size):
        batch = make_batch(model, rows, indices, model.device)
        batch.pop("labels", None)
        hidden = body(**batch).last_hidden_state.float()
        counted = batch["attention_mask"].unsqueeze(-1)
        mean = ((hidden * counted).sum(dim=1) / counted.sum(dim=1)).cpu().numpy()
        if means is None:
            means = np.zeros((len(rows), mean.shape[1]), dtype=np.float32)
        means[indices] = mean
    assert means is not None  # row_lengths refuses an empty split
    return means


def logistic_regression(
    features: Sequence[Any], labels: Sequence[ArrayLike], num_classes: int
) -> tuple[Evaluation, int]:
    """Train logistic regressions of several strengths, and evaluate the one that is best on the validation rows.

    Args:
        features: of the training, validation and test rows: arrays or sparse matrices, shapes (N, D).
        labels: of the same rows: integers in [0, num_classes), shapes (N,).
        num_classes: C.

    Returns:
        The evaluation on the test rows, and the number of weights. If the training rows have one class only, every
        row is given that class, with no weights.
    """
    from sklearn.linear_model import LogisticRegression

    (y, y_validation, y_test), (X, X_validation, X_test) = (list(map(np.asarray, labels)), features)
    if len(np.unique(y)) == 1:
        return majority_class(y, y_test, num_classes), 0
    models = [LogisticRegression(C=strength, max_iter=1000).fit(X, y) for strength in STRENGTHS]
    best = max(models, key=lambda model: model.score(X_validation, y_validation))
    probabilities = np.full((len(y_test), num_classes), _ABSENT)
    probabilities[:, best.classes_] = best.predict_proba(X_test)
    return _evaluation(probabilities, y_test), best.coef_.size + best.intercept_.size


def _evaluation(probabilities: NDArray[np.float64], labels: ArrayLike) -> Evaluation:
    labels = np.asarray(labels)
    loss = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _ABSENT)).mean()
    return Evaluation(labels, probabilities, float(loss))
