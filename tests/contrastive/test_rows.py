"""Image-caption pairs as rows of a two-tower model."""

import numpy as np
import pytest
import torch
from tiny_towers import MEAN, STD, brighten, make_pairs, make_towers

from ftkit.contrastive.rows import PairRows, encode_pairs
from ftkit.data.pairs import Pairs
from ftkit.errors import DataError

# PairRows ---------------------------------------------------------------------------------------------------


def test_a_row_has_tokens_normalised_pixels_and_its_group() -> None:
    pairs = make_pairs(6)
    rows = encode_pairs({"test": pairs}, make_towers())["test"]
    assert len(rows) == 6
    assert rows.lengths.tolist() == [len(caption.split()) for caption in pairs.captions]
    for index in (0, 5, -1):
        row = rows[index]
        assert row["input_ids"] == [int(word[1:]) for word in pairs.captions[index].split()]
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        assert row["labels"] == pairs.groups[index]
        expected = ((pairs.images[index] / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)
        assert row["pixel_values"].dtype == np.float32
        np.testing.assert_allclose(row["pixel_values"], expected, atol=1e-6)
    with pytest.raises(IndexError):
        rows[6]


def test_take_returns_the_same_rows() -> None:
    rows = encode_pairs({"train": make_pairs(6)}, make_towers(), augment=brighten)["train"]
    for chosen in ([4, 2], np.isin(np.arange(6), [2, 4])):
        taken = rows.take(chosen)
        numbers = [4, 2] if isinstance(chosen, list) else [2, 4]
        assert taken.lengths.tolist() == rows.lengths[numbers].tolist()
        assert sorted(taken.groups) == [0, 1]
        for i, number in enumerate(numbers):
            torch.manual_seed(3)
            one = taken[i]
            torch.manual_seed(3)
            other = rows[number]
            assert one["input_ids"] == other["input_ids"]
            assert np.array_equal(one["pixel_values"], other["pixel_values"])


def test_only_training_images_are_augmented_and_the_seed_decides_how() -> None:
    data = encode_pairs({"train": make_pairs(4), "test": make_pairs(4)}, make_towers(), augment=brighten)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert np.array_equal(data["test"][0]["pixel_values"], data["test"][0]["pixel_values"])
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    first, second = (data["train"][0]["pixel_values"] for _ in range(2))
    assert not np.array_equal(first, second)
    torch.manual_seed(1)
    assert np.array_equal(data["train"][0]["pixel_values"], first)
    assert np.array_equal(data["train"][0]["pixel_values"], second)
    assert data["test"].augment is None
    plain = encode_pairs({"train": make_pairs(4)}, make_towers())["train"]
    assert np.array_equal(plain[0]["pixel_values"], data["test"][0]["pixel_values"])


def test_augmentation_does_not_change_the_original_images() -> None:
    pairs = make_pairs(3)
    before = pairs.images.copy()
    rows = encode_pairs({"train": pairs}, make_towers(), augment=brighten)["train"]
    _ = [rows[i] for i in range(3)]
    assert np.array_equal(pairs.images, before)


# encode_pairs -----------------------------------------------------------------------------------------------


def test_images_of_another_size_are_refused() -> None:
    pairs = make_pairs(2)
    larger = Pairs(np.zeros((2, 16, 16, 3), dtype=np.uint8), pairs.captions, pairs.facts)
    with pytest.raises(DataError, match=r"'test' have 16 pixels a side, and the image tower reads 8.*size=8"):
        encode_pairs({"train": pairs, "test": larger}, make_towers())
    model = make_towers()
    model.image.size = None
    assert encode_pairs({"test": larger}, model)["test"][0]["pixel_values"].shape == (3, 16, 16)


def test_more_tokens_than_the_model_reads_are_refused() -> None:
    model = make_towers()
    model.text.tokenizer.model_max_length = 16
    with pytest.raises(DataError, match="max_length=17 is more than the 16 tokens"):
        encode_pairs({"train": make_pairs(2)}, model, max_length=17)
    encode_pairs({"train": make_pairs(2)}, model, max_length=16)


def test_the_number_of_cut_captions_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model, pairs = make_towers(), make_pairs(3)
    captions = Pairs(pairs.images, ["w3 w4 w5", "w3 w4", "w3 w4 w5 w6"], pairs.facts)
    rows = encode_pairs({"train": captions, "test": captions.take([1])}, model, max_length=2)
    assert capsys.readouterr().out == "captions cut at 2 tokens: 2 of 3 train\n"
    assert rows["train"].lengths.tolist() == [2, 2, 2]
    encode_pairs({"train": captions, "test": captions}, model, max_length=3)
    assert capsys.readouterr().out == "captions cut at 3 tokens: 1 of 3 train, 1 of 3 test\n"
    encode_pairs({"train": captions}, model, max_length=4)
    assert capsys.readouterr().out == ""


def test_a_split_without_pairs_gives_no_rows() -> None:
    rows = encode_pairs({"test": make_pairs(2).take(np.zeros(2, dtype=bool))}, make_towers())["test"]
    assert isinstance(rows, PairRows)
    assert len(rows) == 0
