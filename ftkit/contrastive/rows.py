"""Image-caption pairs as rows of a two-tower model."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ftkit.data.pairs import Augment, Pairs
from ftkit.errors import DataError
from ftkit.models.encoders import ImageEncoder, TextEncoder


class PairModel(Protocol):
    """What ``encode_pairs`` needs of a model: its two encoders."""

    text: TextEncoder
    image: ImageEncoder


class PairRows(Sequence):
    """Pairs as ``fit`` and ``evaluate`` read them: one dict per row.

    A row holds the tokenizer's columns for the caption, ``pixel_values`` (3, S, S) in float32, and ``labels``, the
    group number of the pair. Rows of a batch with the same label are not each other's negatives.

    Args:
        pairs: images and captions.
        tokens: the tokenizer's columns for the caption of each pair.
        mean, std: of the colour channels, for images in [0, 1], as in the training of the image tower.
        augment: function that changes an image each time it is read. It is given a generator of random numbers; the
            seed of that generator is drawn from torch's global one, which ``fit`` seeds.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokens: Sequence[Mapping[str, list[int]]],
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None = None,
    ) -> None:
        self.pairs, self.tokens, self.augment = pairs, tokens, augment
        self.lengths = np.array([len(columns["input_ids"]) for columns in tokens])
        self._scale = (1 / (255 * np.asarray(std))).astype(np.float32)[:, None, None]
        self._shift = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)[:, None, None]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def groups(self) -> NDArray[np.int64]:
        """The group number of each pair, shape (N,)."""
        return self.pairs.groups

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        pixels = self.pairs.images[index]
        if self.augment is not None:
            pixels = self.augment(pixels, np.random.default_rng(int(torch.randint(2**31, ()))))
        pixels = pixels.transpose(2, 0, 1) * self._scale + self._shift
        return {**self.tokens[index], "pixel_values": pixels, "labels": int(self.groups[index])}

    def take(self, indices: ArrayLike) -> "PairRows":
        """Select rows by their indices or by a mask of N booleans; their groups are numbered anew."""
        chosen = np.arange(len(self))[np.asarray(indices)]
        rows = PairRows(self.pairs.take(chosen), [self.tokens[i] for i in chosen], (0,), (1,), self.augment)
        rows._scale, rows._shift = self._scale, self._shift
        return rows


def encode_pairs(
    splits: Mapping[str, Pairs], model: PairModel, *, max_length: int = 32, augment: Augment | None = None
) -> dict[str, PairRows]:
    """Tokenise captions and prepare images for a model; print how many captions were cut, if any.

    Args:
        splits: pairs by split.
        model: the model whose towers will read the rows.
        max_length: tokens kept of a caption, special tokens included.
        augment: function that changes an image of the split "train" each time it is read.

    Returns:
        The rows of each split.

    Raises:
        DataError: the model cannot read that many tokens, or images of that size.
    """
    tokenizer, size = model.text.tokenizer, model.image.size
    if max_length > tokenizer.model_max_length:
        raise DataError(
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens that the text tower reads: "
            "choose a smaller one."
        )
    encoded, cut = {}, []
    for split, pairs in splits.items():
        if size is not None and len(pairs) and pairs.images.shape[1] != size:
            raise DataError(
                f"The images of '{split}' have {pairs.images.shape[1]} pixels a side, and the image tower reads "
                f"{size}: load them with size={size}."
            )
        columns = model.text.tokenize(pairs.captions, max_length) if len(pairs) else {}
        tokens = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        full = [c for c, t in zip(pairs.captions, tokens, strict=True) if len(t["input_ids"]) >= max_length]
        longer = sum(len(ids) > max_length for ids in tokenizer(full, verbose=False)["input_ids"]) if full else 0
        cut += [f"{longer:,} of {len(pairs):,} {split}"] if longer else []
        change = augment if split == "train" else None
        encoded[split] = PairRows(pairs, tokens, model.image.mean, model.image.std, change)
    if cut:
        print(f"captions cut at {max_length} tokens: {', '.join(cut)}")
    return encoded
