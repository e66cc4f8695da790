"""Zero-shot classification from class names, and a linear probe to compare it with."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from ftkit.contrastive.towers import TwoTowers
from ftkit.metrics import Evaluation


def class_embeddings(model: TwoTowers, names: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
    """Embed each class from its name alone (Radford et al., 2021).

    Args:
        model: a two-tower model.
        names: names of the C classes.
        templates: sentences with {} in place of the name. With several, a class is the mean of its normalised
            embeddings, normalised again.

    Returns:
        Normalised embeddings, shape (C, D), on the CPU.

    Raises:
        ValueError: a template has no {}.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"The template {template!r} has no place for the name: put {{}} there.")
    means = [
        F.normalize(model.encode_texts([template.format(name) for template in templates]), dim=-1).mean(0)
        for name in names
    ]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot(model: TwoTowers, image: Tensor, labels: ArrayLike, classes: Tensor) -> Evaluation:
    """Classify each image by the nearest class embedding; this needs no image with a label.

    Args:
        model: its temperature turns similarities into probabilities.
        image: embeddings of N images, shape (N, D).
        labels: true class of each image, shape (N,).
        classes: class embeddings from ``class_embeddings``, shape (C, D).
    """
    logits = (F.normalize(image, dim=-1) @ classes.T / model.temperature).double()
    targets = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    return Evaluation(targets.numpy(), logits.softmax(-1).numpy(), float(F.cross_entropy(logits, targets)))


def linear_probe(
    train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, num_classes: int
) -> Evaluation:
    """Classify with a logistic regression on standardised features, to see what labels gain over zero-shot.

    Args:
        train, test: features of the N training rows and the M test rows, shapes (N, width) and (M, width).
        train_labels, test_labels: integers in [0, num_classes), shapes (N,) and (M,).
        num_classes: number of classes.

    Returns:
        The evaluation on the test rows.

    Raises:
        ValueError: a class has no training row.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    missing = sorted(set(range(num_classes)) - {int(label) for label in np.asarray(train_labels)})
    if missing:
        raise ValueError(f"The probe has no training row of the classes {missing}: add some, or leave them out.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(np.asarray(train), np.asarray(train_labels))
    probabilities, labels = probe.predict_proba(np.asarray(test)), np.asarray(test_labels, dtype=np.int64)
    loss = log_loss(labels, probabilities, labels=range(num_classes))
    return Evaluation(labels, probabilities, float(loss))
