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
    """What ``encode_pairs`` asks of a model: its two encoders."""

    text: TextEncoder
    image: ImageEncoder


class PairRows(Sequence):
    """Pairs as ``fit`` and ``evaluate`` read them: a dict a row.

    A row has what the tokenizer gives of the caption, ``pixel_values`` (3, S, S) in float32, and ``labels``, the number
    of the pair's group: within a batch, equal labels say the same.

    Args:
        pairs: of images and captions.
        tokens: for each pair, the columns of its caption.
        mean, std: of the images' colours in [0, 1], which the image tower was trained with.
        augment: changes an image each time it is read, drawing from the generator that it is given; that is seeded
            from torch's global one, which ``fit`` seeds.
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
        """As of the pairs."""
        return self.pairs.groups

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        image = self.pairs.images[index]
        if self.augment is not None:
            image = self.augment(image, np.random.default_rng(int(torch.randint(2**31, ()))))
        pixels = image.transpose(2, 0, 1) * self._scale + self._shift
        return {**self.tokens[index], "pixel_values": pixels, "labels": int(self.groups[index])}

    def take(self, indices: ArrayLike) -> "PairRows":
        """The rows of these numbers, or of a mask; their groups are numbered anew."""
        chosen = np.arange(len(self))[np.asarray(indices)]
        rows = PairRows(self.pairs.take(chosen), [self.tokens[i] for i in chosen], (0,), (1,), self.augment)
        rows._scale, rows._shift = self._scale, self._shift
        return rows


def encode_pairs(
    splits: Mapping[str, Pairs], model: PairModel, *, max_length: int = 32, augment: Augment | None = None
) -> dict[str, PairRows]:
    """Tokenise the captions, and make images ready, for a model; print how many captions were cut, if any.

    Args:
        splits: pairs by split.
        model: whose towers are to read them.
        max_length: tokens kept of a caption, special tokens included.
        augment: for the images of the split "train", changed anew each time they are read.

    Returns:
        The rows of each split.

    Raises:
        DataError: the model does not read so many tokens, or images of that size.
    """
    tokenizer, size = model.text.tokenizer, model.image.size
    if max_length > tokenizer.model_max_length:
        raise DataError(f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens it reads")
    encoded, cut = {}, []
    for split, pairs in splits.items():
        if size is not None and len(pairs) and pairs.images.shape[1] != size:
            raise DataError(
                f"the images of '{split}' have {pairs.images.shape[1]} pixels a side, and the image tower reads "
                f"{size}: load them with size={size}"
            )
        columns = model.text.tokenize(pairs.captions, max_length) if len(pairs) else {}
        tokens = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        full = [c for c, t in zip(pairs.captions, tokens, strict=True) if len(t["input_ids"]) >= max_length]
        longer = sum(len(ids) > max_length for ids in tokenizer(full, verbose=False)["input_ids"]) if full else 0
        cut += [f"{longer:,} of {len(pairs):,} {split}"] if longer else []
        image, change = model.image, augment if split == "train" else None
        encoded[split] = PairRows(pairs, tokens, image.mean, image.std, change)
    if cut:
        print(f"captions cut at {max_length} tokens: {', '.join(cut)}")
    return encoded
