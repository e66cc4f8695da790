"""Image-caption pairs, and which of them say the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Augment = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Pairs:
    """N images, each with a caption.

    Attributes:
        images: RGB, uint8 of shape (N, S, S, 3).
        captions: N texts.
        facts: what else is known of each pair, N rows.
        image_ids: a number for each pair, shape (N,): pairs of one image, with several captions, have the same.
            None where each pair has an image of its own.
    """

    images: NDArray[np.uint8]
    captions: list[str]
    facts: pd.DataFrame
    image_ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """A number for each pair, shape (N,): pairs that share a caption or an image have the same, also through
        others."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        captions = np.unique(self.captions, return_inverse=True)[1].astype(np.int64)
        if self.image_ids is None:
            return captions
        _, images = np.unique(self.image_ids, return_inverse=True)
        count = len(self)  # more than there are captions: images are numbered after them
        links = coo_array((np.ones(count), (captions, count + images)), shape=(2 * count, 2 * count))
        return connected_components(links, directed=False)[1][captions].astype(np.int64)

    @cached_property
    def own_images(self) -> NDArray[np.int64]:
        """The first pair of each image, in their order: what is to be searched among, once each."""
        if self.image_ids is None:
            return np.arange(len(self))
        return np.sort(np.unique(self.image_ids, return_index=True)[1])

    @cached_property
    def own_captions(self) -> NDArray[np.int64]:
        """The first pair of each caption, in their order."""
        return np.sort(np.unique(self.captions, return_index=True)[1])

    @property
    def captions_of_images(self) -> list[list[str]]:
        """All captions of each of ``own_images``."""
        if self.image_ids is None:
            return [[caption] for caption in self.captions]
        captions = pd.Series(self.captions).groupby(self.image_ids)
        return [list(captions.get_group(number)) for number in self.image_ids[self.own_images]]

    def take(self, indices: ArrayLike) -> "Pairs":
        """The pairs of these numbers, or of a mask of N truth values."""
        chosen = np.arange(len(self))[np.asarray(indices)]
        captions, ids = [self.captions[i] for i in chosen], self.image_ids
        facts = self.facts.iloc[chosen].reset_index(drop=True)
        return Pairs(self.images[chosen], captions, facts, None if ids is None else ids[chosen])


def join(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several parts, of one image size, one after the other; no image is in two of them."""
    images = np.concatenate([part.images for part in parts])
    captions = [caption for part in parts for caption in part.captions]
    facts, ids = pd.concat([part.facts for part in parts], ignore_index=True), None
    if any(part.image_ids is not None for part in parts):
        of_part = [np.arange(len(part)) if part.image_ids is None else part.image_ids for part in parts]
        of_part = [np.unique(numbers, return_inverse=True)[1] for numbers in of_part]
        starts = np.cumsum([0, *map(len, parts)])
        ids = np.concatenate([start + numbers for start, numbers in zip(starts, of_part, strict=False)])
    return Pairs(images, captions, facts, ids)
