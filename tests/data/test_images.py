"""Splits of images: disjoint, the same for every size and style, and refused if there are too few images."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ftkit.data import images
from ftkit.data.emoji import GROUPS, INKS, draw, emoji_names, group_of
from ftkit.data.images import load_images
from ftkit.data.pairs import Pairs
from ftkit.errors import DataError

SMALL = {"size": 16, "train": 40, "validation": 10, "test": 20}


def emoji_of(pairs: Pairs) -> list[str]:
    return list(pairs.facts["emoji"])


def test_all_emoji_are_split_without_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    splits = load_images(size=16)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 977, "validation": 100, "test": 300}
    assert sorted(itertools.chain.from_iterable(map(emoji_of, splits.values()))) == list(emoji_names())
    assert capsys.readouterr().out == "emoji: 1,377 emoji; names in 'en'; 977 train / 100 validation / 300 test\n"
    captions = [caption for pairs in splits.values() for caption in pairs.captions]
    assert len(set(captions)) == 1377
    assert set(splits["test"].facts["group"].dropna()) == set(GROUPS)


def test_facts_describe_what_is_drawn() -> None:
    test = load_images(**SMALL, language="de", inks=("red",))["test"]
    assert list(test.facts.columns) == ["emoji", "name", "ink", "group"]
    names = emoji_names("de")
    for image, caption, fact in zip(test.images, test.captions, test.facts.itertuples(), strict=True):
        assert fact.name == names[fact.emoji] and fact.ink == "red"
        assert caption == f"{fact.name}, rot"
        assert fact.group == group_of(fact.emoji)
        np.testing.assert_array_equal(image, draw([fact.emoji], size=16, ink=INKS["red"])[0])


def test_splits_depend_on_the_seed_alone() -> None:
    first = load_images(**SMALL)
    more = load_images(**{**SMALL, "train": 60}, inks=("red", "blue"), weight=700, rotation=20, paper="inverted")
    for split in ("validation", "test"):
        assert emoji_of(first[split]) == emoji_of(more[split])
    assert list(dict.fromkeys(emoji_of(more["train"])))[:40] == emoji_of(first["train"])
    assert emoji_of(load_images(**SMALL)["train"]) == emoji_of(first["train"])
    assert emoji_of(load_images(**SMALL, seed=1)["test"]) != emoji_of(first["test"])


def test_with_several_inks_one_combination_of_each_emoji_is_held_out() -> None:
    inks = ("red", "blue", "green")
    splits = load_images(**SMALL, inks=inks)
    assert {split: len(pairs) for split, pairs in splits.items()} == {
        "train": 80, "validation": 10, "test": 20, "new_pairs": 40
    }  # fmt: skip
    combinations = {split: set(zip(emoji_of(p), p.facts["ink"], strict=True)) for split, p in splits.items()}
    seen = set(emoji_of(splits["train"]))
    assert not combinations["train"] & combinations["new_pairs"]
    assert combinations["train"] | combinations["new_pairs"] == {(e, ink) for e in seen for ink in inks}
    assert set(splits["new_pairs"].facts["ink"]) == set(inks)
    assert not seen & {*emoji_of(splits["test"]), *emoji_of(splits["validation"])}
    assert list(splits["test"].facts["ink"])[:4] == ["red", "blue", "green", "red"]
    fewer = load_images(**{**SMALL, "train": 10}, inks=inks)["new_pairs"]
    pd.testing.assert_frame_equal(fewer.facts, splits["new_pairs"].facts.head(10))


def test_paper_and_inversion_change_the_images_only() -> None:
    white, inverted, yellow = (
        load_images(**SMALL, inks=("red",), paper=paper)["test"] for paper in ("white", "inverted", (255, 255, 0))
    )
    assert (white.images[:, 0, 0] == 255).all()
    assert np.abs(255 - white.images.astype(int) - inverted.images).max() <= 1  # 1 from rounding
    assert (yellow.images[:, 0, 0] == (255, 255, 0)).all()
    assert white.captions == inverted.captions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 978}, "train=978, validation=100 and test=300 are more than all 1,377 emoji"),
        ({"test": 1377}, "are more than all 1,377 emoji"),
        ({"train": 0}, "train=0 is too few"),
        ({"validation": 0}, "validation=0 is too few"),
        ({"test": -1}, "test=-1 is too few"),
        ({"size": 4}, "size=4 pixels"),
        ({"inks": ("red", "mauve")}, "inks=.*mauve.* take one or several"),
        ({"inks": ()}, "inks="),
        ({"inks": ("red", "red")}, "each once"),
        ({"paper": "blue"}, "paper='blue' is no colour"),
        ({"paper": (0, 0, 256)}, "is no colour"),
        ({"paper": (0, 0, 0)}, "The ink black is invisible on paper="),
        ({"language": "xx"}, "language 'xx'"),
        ({"weight": 900}, "weight=900"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(**options)


@pytest.mark.parametrize("source", ["emojis", "no/such/folder", "images.zip"])
def test_unknown_source_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=f"'{source}' is neither 'emoji' nor a folder nor a hub id"):
        load_images(source)


# Folders and the hub ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 30 images with two captions each."""
    lines = ["file,caption"]
    for i in range(30):
        Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines += [f"{i}.png,image {i}", f"{i}.png,number {i}"]
    (tmp_path / "captions.csv").write_text("\n".join([*lines, "gone.png,gone"]))
    return tmp_path


def files(pairs: Pairs) -> list[str]:
    return list(pairs.facts["file"])


def test_a_folder_is_split_by_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = load_images(folder, size=16)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 42, "validation": 6, "test": 12}
    assert capsys.readouterr().out == (
        f"{folder}: 1 missing files left out: gone.png; 42 train / 6 validation / 12 test\n"
    )
    found = [set(files(pairs)) for pairs in splits.values()]
    assert [len(names) for names in found] == [21, 3, 6] and len(set.union(*found)) == 30
    for pairs in splits.values():
        for image, caption, file in zip(pairs.images, pairs.captions, files(pairs), strict=True):
            number = int(file.removesuffix(".png"))
            assert caption in (f"image {number}", f"number {number}") and image[0, 0, 0] == 8 * number
    assert files(load_images(str(folder), size=16, seed=1)["test"]) != files(splits["test"])


def test_a_folder_gives_as_many_images_as_asked_for(folder: Path) -> None:
    whole, part = load_images(folder, size=16), load_images(folder, size=16, train=5, validation=2, test=4)
    assert {split: len(pairs) for split, pairs in part.items()} == {"train": 10, "validation": 4, "test": 8}
    for split, pairs in part.items():
        assert files(pairs) == files(whole[split])[: len(pairs)]


def test_a_small_folder_gives_what_it_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{i}.png,image {i}" for i in range(12)]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *lines]))
    for path in folder.glob("[12]?.png"):
        if int(path.stem) >= 12:
            path.unlink()
    splits = load_images(folder, size=16, train=96, validation=64, test=64)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 9, "validation": 1, "test": 2}
    assert capsys.readouterr().out == (
        f"{folder}: train=96 asked for, but only 9 training images are there; 9 train / 1 validation / 2 test\n"
    )


def test_a_limit_loses_no_image_of_a_folder(folder: Path) -> None:
    splits = load_images(folder, size=16, validation=2, test=4)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 48, "validation": 4, "test": 8}
    assert len({file for pairs in splits.values() for file in files(pairs)}) == 30


def test_captions_of_one_image_are_one_group(folder: Path) -> None:
    for pairs in load_images(folder, size=16).values():
        assert len(pairs.own_captions) == len(pairs) == 2 * len(pairs.own_images)
        by_file = pd.Series(pairs.groups).groupby(files(pairs)).nunique()
        assert (by_file == 1).all() and len(set(pairs.groups)) == len(by_file)


def test_options_without_effect_are_refused(folder: Path) -> None:
    for options in ({"inks": ("red",)}, {"weight": 500}, {"language": "zh"}, {"paper": "inverted"}):
        with pytest.raises(DataError, match="has no effect on the source"):
            load_images(folder, size=16, **options)
    with pytest.raises(DataError, match=r"captions='a\.csv' has no effect on the source 'emoji'"):
        load_images("emoji", captions="a.csv")


def test_a_folder_of_two_images_is_too_small(folder: Path) -> None:
    (folder / "captions.csv").write_text("file,caption\n1.png,one\n2.png,two\n")
    with pytest.raises(DataError, match="2 different training images: it needs 3"):
        load_images(folder, size=16)


def pairs_of(numbers: Sequence[int]) -> Pairs:
    images = np.zeros((len(numbers), 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = numbers
    return Pairs(images, [f"{number}" for number in numbers], pd.DataFrame(index=range(len(numbers))))


def test_hub_splits_are_kept_and_missing_ones_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    published = {"train": pairs_of(range(20)), "test": pairs_of([18, 19, 30, 31])}

    def read(source: str, **options: object) -> tuple[dict[str, Pairs], list[str]]:
        asked.append((source, options))
        return dict(published), ["a note"]

    monkeypatch.setattr(images, "read_hub_images", read)
    splits = load_images("owner/name", size=8, image="photo", caption="satz")
    assert asked == [("owner/name", {"size": 8, "image": "photo", "caption": "satz"})]
    assert sorted(splits["test"].captions) == ["18", "19", "30", "31"]
    assert len(splits["validation"]) == 2 and len(splits["train"]) == 16
    assert {*splits["train"].captions, *splits["validation"].captions} == {str(i) for i in range(18)}
    assert "a note; 2 train rows left out (their images are in another split); 16 train" in capsys.readouterr().out
    published["validation"] = pairs_of([40, 41, 42])
    splits = load_images("owner/name", size=8, validation=2, test=1)
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [18, 2, 1]
    assert "2 test rows left out" not in capsys.readouterr().out
    published["validation"] = pairs_of([30, 30, 40, 41, 42])
    splits = load_images("owner/name", size=8, validation=2, test=4)
    assert sorted(splits["test"].captions) == ["18", "19", "30", "31"] and "30" not in splits["validation"].captions
    out = capsys.readouterr().out
    assert "2 validation rows left out (their images are in another split)" in out
    assert "1 validation images left out (beyond the 2 asked for)" in out
    published["validation"] = pairs_of([30, 31])  # all are in the test split: cut from train instead
    splits = load_images("owner/name", size=8)
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [16, 2, 4]
    del published["train"]
    with pytest.raises(DataError, match="no split 'train', only test, validation"):
        load_images("owner/name", size=8)
