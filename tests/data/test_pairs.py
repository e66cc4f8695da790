"""Image-caption pairs, and which of them are one group."""

import numpy as np
import pandas as pd
from tiny_towers import make_pairs

from ftkit.data.pairs import Pairs, join

# Pairs ------------------------------------------------------------------------------------------------------


def test_take_selects_by_indices_and_by_mask() -> None:
    pairs = make_pairs(5)
    for chosen in ([3, 1], np.array([3, 1]), np.array([-2, 1])):
        taken = pairs.take(chosen)
        assert len(taken) == 2
        assert taken.captions == [pairs.captions[3], pairs.captions[1]]
        assert np.array_equal(taken.images, pairs.images[[3, 1]])
        assert taken.facts["colour"].tolist() == pairs.facts["colour"].iloc[[3, 1]].tolist()
        assert taken.facts.index.tolist() == [0, 1]
    mask = np.array([False, True, False, False, True])
    assert pairs.take(mask).captions == [pairs.captions[1], pairs.captions[4]]
    assert len(pairs.take(np.zeros(5, dtype=bool))) == 0


def test_groups_are_equal_if_captions_are() -> None:
    images = np.zeros((4, 2, 2, 3), dtype=np.uint8)
    pairs = Pairs(images, ["b", "a", "b", "c"], pd.DataFrame(index=range(4)))
    assert pairs.groups.tolist() == [1, 0, 1, 2]
    assert pairs.groups.dtype == np.int64
    assert pairs.take([0, 2]).groups.tolist() == [0, 0]


def test_pairs_that_share_an_image_or_a_caption_are_one_group() -> None:
    images = np.zeros((6, 2, 2, 3), dtype=np.uint8)
    facts = pd.DataFrame(index=range(6))
    pairs = Pairs(images, ["a", "b", "c", "b", "d", "e"], facts, image_ids=np.array([7, 7, 3, 4, 4, 9]))
    first, second, third = pairs.groups[0], pairs.groups[2], pairs.groups[5]
    assert pairs.groups.tolist() == [first, first, second, first, first, third]
    assert len({first, second, third}) == 3
    assert pairs.own_images.tolist() == [0, 2, 3, 5]
    assert pairs.own_captions.tolist() == [0, 1, 2, 4, 5]
    taken = pairs.take([4, 0, 2])  # the link between the first two is gone
    assert taken.image_ids.tolist() == [4, 7, 3]
    assert len(set(taken.groups)) == 3
    both = join([pairs, Pairs(images[:2], ["f", "g"], facts[:2]), pairs.take([4, 3])])
    assert len(both) == 10
    assert [len(np.unique(both.image_ids[part])) for part in (slice(6), slice(6, 8), slice(8, 10))] == [4, 2, 1]
    assert len(np.unique(both.image_ids)) == 7
