"""Image-caption pairs, and which of them share an image or a caption."""

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
        facts: table of N rows with other facts about each pair.
        image_ids: number of each pair's image, shape (N,): equal for pairs of the same image. None if each pair has
            an image of its own.
    """

    images: NDArray[np.uint8]
    captions: list[str]
    facts: pd.DataFrame
    image_ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """Number of each pair's group, shape (N,).

        Pairs that share a caption or an image are in one group, and so are pairs linked through other pairs.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        captions = np.unique(self.captions, return_inverse=True)[1].astype(np.int64)
        if self.image_ids is None:
            return captions
        _, images = np.unique(self.image_ids, return_inverse=True)
        count = len(self)  # no more than N captions are distinct, so image numbers can start at N
        links = coo_array((np.ones(count), (captions, count + images)), shape=(2 * count, 2 * count))
        return connected_components(links, directed=False)[1][captions].astype(np.int64)

    @cached_property
    def own_images(self) -> NDArray[np.int64]:
        """Indices of the first pair of each image, in ascending order: a search compares each image once."""
        if self.image_ids is None:
            return np.arange(len(self))
        return np.sort(np.unique(self.image_ids, return_index=True)[1])

    @cached_property
    def own_captions(self) -> NDArray[np.int64]:
        """Indices of the first pair of each caption, in ascending order."""
        return np.sort(np.unique(self.captions, return_index=True)[1])

    @property
    def captions_of_images(self) -> list[list[str]]:
        """All captions of each image, in the order of ``own_images``."""
        if self.image_ids is None:
            return [[caption] for caption in self.captions]
        captions = pd.Series(self.captions).groupby(self.image_ids)
        return [list(captions.get_group(number)) for number in self.image_ids[self.own_images]]

    def take(self, indices: ArrayLike) -> "Pairs":
        """Return the pairs at these indices, or those where a mask of N booleans is true."""
        chosen = np.arange(len(self))[np.asarray(indices)]
        captions, ids = [self.captions[i] for i in chosen], self.image_ids
        facts = self.facts.iloc[chosen].reset_index(drop=True)
        return Pairs(self.images[chosen], captions, facts, None if ids is None else ids[chosen])


def join(parts: Sequence[Pairs]) -> Pairs:
    """Concatenate pairs of one image size; an image in two parts counts as two images."""
    images = np.concatenate([part.images for part in parts])
    captions = [caption for part in parts for caption in part.captions]
    facts, ids = pd.concat([part.facts for part in parts], ignore_index=True), None
    if any(part.image_ids is not None for part in parts):
        part_ids = [np.arange(len(part)) if part.image_ids is None else part.image_ids for part in parts]
        part_ids = [np.unique(numbers, return_inverse=True)[1] for numbers in part_ids]  # below the part's length
        starts = np.cumsum([0, *map(len, parts)])
        ids = np.concatenate([start + numbers for start, numbers in zip(starts, part_ids, strict=False)])
    return Pairs(images, captions, facts, ids)
