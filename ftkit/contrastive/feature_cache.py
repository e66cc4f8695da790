"""Features of locked towers, computed once for every pair."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ftkit.contrastive.rows import PairRows
from ftkit.contrastive.towers import FEATURE_COLUMNS, TwoTowers
from ftkit.data.pairs import Pairs
from ftkit.models.modules import eval_mode, seeded
from ftkit.training.batching import evaluation_batches, make_batch


class CachedPairs(Sequence):
    """Pairs with the features of locked towers, as ``fit`` and ``evaluate`` read them.

    Args:
        rows: the rows that the features were computed from.
        features: by tower ("text", "image"), float32 of shape (views, N, width). If an image has several views, each
            reading draws one of them from torch's global generator, which ``fit`` seeds.
    """

    def __init__(self, rows: PairRows, features: Mapping[str, NDArray[np.float32]]) -> None:
        self.rows, self.features = rows, dict(features)
        # only texts that are still read need batches of similar length
        self.lengths = np.ones(len(rows), dtype=np.int64) if "text" in features else rows.lengths

    @property
    def pairs(self) -> Pairs:
        """The images and captions of the rows."""
        return self.rows.pairs

    @property
    def groups(self) -> NDArray[np.int64]:
        """The group number of each pair, shape (N,)."""
        return self.rows.groups

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        row: dict[str, Any] = {"labels": int(self.groups[index])}
        if "text" not in self.features:
            row |= self.rows.tokens[index]
        if "image" not in self.features:
            row["pixel_values"] = self.rows[index]["pixel_values"]
        for tower, views in self.features.items():
            view = int(torch.randint(len(views), ())) if len(views) > 1 else 0
            row[FEATURE_COLUMNS[tower]] = views[view, index]
        return row

    def take(self, indices: ArrayLike) -> "CachedPairs":
        """Select rows by their indices or by a mask of N booleans; their groups are numbered anew."""
        chosen = np.asarray(indices)
        return CachedPairs(self.rows.take(chosen), {tower: views[:, chosen] for tower, views in self.features.items()})


def cache_towers(
    model: TwoTowers, data: Mapping[str, PairRows], *, views: int = 1, batch_size: int = 16, seed: int = 0
) -> dict[str, CachedPairs]:
    """Run each locked tower once over every pair, so that training only runs what it changes.

    Args:
        model: a model with one or both towers locked; see ``TwoTowers.lock``.
        data: rows by split, from ``encode_pairs``.
        views: number of augmented versions kept of each image, in splits with augmentation.
        batch_size: rows in a forward pass.
        seed: of the augmentation.

    Returns:
        The rows of each split, for the same model.

    Raises:
        ValueError: no tower is locked, or several views are requested but no split has augmentation.
    """
    locked = [
        tower for tower in FEATURE_COLUMNS if not any(p.requires_grad for p in getattr(model, tower).parameters())
    ]
    if not locked:
        raise ValueError("Both towers train, so there is nothing to cache: call model.lock('image') or lock('text').")
    if views < 1 or (views > 1 and not any(rows.augment for rows in data.values())):
        raise ValueError(f"views={views} is not possible: pass 1, or more if encode_pairs was given augment.")
    cached = {}
    for split, rows in data.items():
        features = {}
        for tower in locked:
            passes = views if tower == "image" and rows.augment else 1
            with seeded(seed):
                features[tower] = np.stack([_features(model, tower, rows, batch_size) for _ in range(passes)])
        cached[split] = CachedPairs(rows, features)
    return cached


@torch.inference_mode()
def _features(model: TwoTowers, tower: str, rows: PairRows, batch_size: int) -> NDArray[np.float32]:
    """The tower's features of every row, shape (N, width); a repeated caption is encoded only once."""
    encoder: nn.Module = getattr(model, tower)
    if tower == "text":
        _, first, inverse = np.unique(rows.pairs.captions, return_index=True, return_inverse=True)
        inputs: Sequence[Any] = [rows.tokens[i] for i in first]
        lengths = rows.lengths[first]
    else:
        inputs, inverse, lengths = _ImageRows(rows), np.arange(len(rows)), np.ones(len(rows), dtype=np.int64)
    features = np.empty((len(inputs), encoder.width), dtype=np.float32)
    with eval_mode(encoder):
        for indices in evaluation_batches(lengths, batch_size):
            features[indices] = encoder(**make_batch(encoder, inputs, indices, model.device)).float().cpu().numpy()
    return features[inverse]


class _ImageRows(Sequence):
    """The rows without their captions and labels."""

    def __init__(self, rows: PairRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.rows[index]["pixel_values"]}
