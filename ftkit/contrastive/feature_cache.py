"""Features of locked towers, computed once for every pair."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ftkit.contrastive.rows import PairRows
from ftkit.contrastive.towers import FEATURES, TwoTowers
from ftkit.data.pairs import Pairs
from ftkit.models.modules import eval_mode, seeded
from ftkit.training.batching import evaluation_batches, make_batch


class CachedPairs(Sequence):
    """Pairs with what locked towers gave, as ``fit`` and ``evaluate`` read them.

    Args:
        rows: the pairs as they were.
        features: by tower ("text", "image"), float32 of shape (views, N, width). Of several views of an image one is
            drawn at each reading, from torch's global generator, that ``fit`` seeds.
    """

    def __init__(self, rows: PairRows, features: Mapping[str, NDArray[np.float32]]) -> None:
        self.rows, self.features = rows, dict(features)
        # batches by length are for texts that are read
        self.lengths = np.ones(len(rows), dtype=np.int64) if "text" in features else rows.lengths

    @property
    def pairs(self) -> Pairs:
        """Of the rows."""
        return self.rows.pairs

    @property
    def groups(self) -> NDArray[np.int64]:
        """A number for each pair, as of the rows."""
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
            row[FEATURES[tower]] = views[view, index]
        return row

    def take(self, indices: ArrayLike) -> "CachedPairs":
        """The rows of these numbers, or of a mask."""
        chosen = np.asarray(indices)
        return CachedPairs(self.rows.take(chosen), {tower: views[:, chosen] for tower, views in self.features.items()})


def cache_towers(
    model: TwoTowers, data: Mapping[str, PairRows], *, views: int = 1, batch_size: int = 16, seed: int = 0
) -> dict[str, CachedPairs]:
    """Run each locked tower once over every pair, so that training repeats only what trains.

    Args:
        model: with one tower locked, or both; see ``TwoTowers.lock``.
        data: rows by split, from ``encode_pairs``.
        views: versions of each image that are kept where rows are augmented.
        batch_size: rows a forward pass.
        seed: of how images are augmented.

    Returns:
        The rows of each split for the same model.

    Raises:
        ValueError: no tower is locked, or several views are asked for and no image is augmented.
    """
    locked = [tower for tower in FEATURES if not any(p.requires_grad for p in getattr(model, tower).parameters())]
    if not locked:
        raise ValueError("Both towers train, so that nothing is fixed: call model.lock('image') or lock('text') first.")
    if views < 1 or (views > 1 and not any(rows.augment for rows in data.values())):
        raise ValueError(f"views={views} can't be: it is 1, or more where encode_pairs was given augment=.")
    cached = {}
    for split, rows in data.items():
        features = {}
        for tower in locked:
            times = views if tower == "image" and rows.augment else 1
            with seeded(seed):
                features[tower] = np.stack([_features(model, tower, rows, batch_size) for _ in range(times)])
        cached[split] = CachedPairs(rows, features)
    return cached


@torch.inference_mode()
def _features(model: TwoTowers, tower: str, rows: PairRows, batch_size: int) -> NDArray[np.float32]:
    """What a tower gives for every row, (N, width); each caption is read once."""
    encoder: nn.Module = getattr(model, tower)
    if tower == "text":
        _, first, place = np.unique(rows.pairs.captions, return_index=True, return_inverse=True)
        source: Sequence[Any] = [rows.tokens[i] for i in first]
        lengths = rows.lengths[first]
    else:
        source, place, lengths = _Images(rows), np.arange(len(rows)), np.ones(len(rows), dtype=np.int64)
    found = np.empty((len(source), encoder.width), dtype=np.float32)
    with eval_mode(encoder):
        for indices in evaluation_batches(lengths, batch_size):
            found[indices] = encoder(**make_batch(encoder, source, indices, model.device)).float().cpu().numpy()
    return found[place]


class _Images(Sequence):
    """Rows with nothing but the image."""

    def __init__(self, rows: PairRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.rows[index]["pixel_values"]}
