"""Captioned images as train, validation and test splits."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ftkit.data import emoji
from ftkit.data.assets import registry
from ftkit.data.emoji import Ink
from ftkit.data.image_readers import read_folder, read_hub_images
from ftkit.data.pairs import Pairs
from ftkit.errors import DataError

_SHARES = {"validation": 0.1, "test": 0.2}  # of the training images, if the source has no such split


def load_images(
    source: str | Path = "emoji",
    *,
    train: int | None = None,
    validation: int = 100,
    test: int = 300,
    size: int = 128,
    language: str = "en",
    inks: Sequence[str] = ("black",),
    weight: int = 400,
    rotation: float = 0.0,
    paper: str | Ink = "white",
    captions: str | Path | None = None,
    image: str | None = None,
    caption: str | None = None,
    seed: int = 0,
) -> dict[str, Pairs]:
    """Load images with captions, split them, and print one line on what was read and left out.

    The seed alone decides the order of the emoji: the first `test` go to the test split, the next `validation` to the
    validation split, and the next `train` to the training split. No emoji is in two of these splits. With several
    inks, each training emoji is drawn in all inks but one, and the split "new_pairs" has it in that one: training shows
    the emoji and the ink, but never together. Each test or validation emoji is drawn in one ink, and the inks take
    turns.

    At most 10 % of the images of a folder go to validation and 20 % to the test, the others to training. If a hub data
    set has no validation or test split, the same share of its training images is taken. No image is in two splits: if
    a hub data set repeats an image, the test split keeps it, or else the validation split. All captions of an image are
    in one split.

    Args:
        source: "emoji", a folder with images and a .csv file of captions, or a hub data set ("owner/name" or
            "owner/name:config").
        train, validation, test: number of emoji or images for these splits; for a folder or a hub data set, the
            maximum. None for all (`train` only).
        size: side of the images in pixels.
        language: language of the captions of emoji, one of ``ftkit.data.emoji.LANGUAGES``.
        inks: names of inks for emoji, from ``ftkit.data.emoji.INKS``; the captions name them.
        weight: stroke weight of emoji, from 300 to 700.
        rotation: rotation of emoji in degrees, counter-clockwise.
        paper: background of emoji: "white", a colour (r, g, b), or "inverted", which turns every colour value c of
            paper and ink into 255 - c but leaves the captions as they are.
        captions: file with the captions of a folder; None for its only .csv file.
        image, caption: column names in a folder's captions or a hub data set; None to guess them.
        seed: decides which emoji or images go to which split, and their order.

    Returns:
        The splits "train", "validation" and "test", and "new_pairs" if there are several inks. The facts are the
        columns emoji, name, ink and group (may be None) for emoji, and the column file for a folder.

    Raises:
        DataError: the source cannot be used as asked, has fewer emoji than asked for, or has no use for an option.
        AssetError: the font of the emoji cannot be fetched.
    """
    for name, wanted in (("train", train), ("validation", validation), ("test", test)):
        if wanted is not None and wanted < 1:
            raise DataError(f"{name}={wanted} is too few: ask for 1 or more.")
    if size < 8:
        raise DataError(f"size={size} pixels are too few to see anything: take 8 or more.")
    sizes = {"train": train, "validation": validation, "test": test}
    if source == "emoji":
        _refuse(source, captions=captions, image=image, caption=caption)
        style = {"size": size, "weight": weight, "rotation": rotation}
        splits, notes = _load_emoji(sizes, language, inks, paper, style, seed)
    else:
        _refuse(source, language=language, inks=inks, weight=weight, rotation=rotation, paper=paper)
        if Path(source).is_dir():
            pairs, notes = read_folder(Path(source), captions, size=size, image=image, caption=caption)
            published = {"train": pairs}
        elif isinstance(source, str) and registry.HUB_ID.fullmatch(source):
            _refuse(source, captions=captions)
            published, notes = read_hub_images(source, size=size, image=image, caption=caption)
        else:
            raise DataError(f"'{source}' is neither 'emoji' nor a folder nor a hub id (owner/name): check the path.")
        splits, repeated = _cut(published, sizes, seed, str(source))
        notes += repeated
    counts = " / ".join(f"{len(pairs):,} {split}" for split, pairs in splits.items())
    print(f"{source}: {'; '.join([*notes, counts])}")
    return splits


def _load_emoji(
    sizes: Mapping[str, int | None],
    language: str,
    inks: Sequence[str],
    paper: str | Ink,
    style: dict[str, float],
    seed: int,
) -> tuple[dict[str, Pairs], list[str]]:
    inks = [inks] if isinstance(inks, str) else list(inks)
    if not inks or len(set(inks)) < len(inks) or not set(inks) <= set(emoji.INKS):
        raise DataError(f"inks={inks} cannot be used: take one or several, each once, of {', '.join(emoji.INKS)}.")
    names = emoji.emoji_names(language)
    train, num_validation, num_test = sizes["train"], sizes["validation"], sizes["test"]
    there = len(names) - num_test - num_validation
    if there < (train or 1):
        raise DataError(
            f"train={train}, validation={num_validation} and test={num_test} are more than all {len(names):,} emoji: "
            "ask for fewer."
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(list(names)).tolist()
    held_out = rng.integers(len(inks), size=len(names))  # drawn for all emoji, so that it does not depend on `train`
    test, validating = shuffled[:num_test], shuffled[num_test : num_test + num_validation]
    training = range(num_test + num_validation, num_test + num_validation + (train or there))
    kept = {i: [ink for k, ink in enumerate(inks) if len(inks) == 1 or k != held_out[i]] for i in training}
    drawn = {
        "train": [(shuffled[i], ink) for i in training for ink in kept[i]],
        "validation": [(character, inks[i % len(inks)]) for i, character in enumerate(validating)],
        "test": [(character, inks[i % len(inks)]) for i, character in enumerate(test)],
    }
    if len(inks) > 1:
        drawn["new_pairs"] = [(shuffled[i], inks[held_out[i]]) for i in training]
    colours, background = _colours(inks, paper)
    splits = {}
    for split, combinations in drawn.items():
        facts = pd.DataFrame(combinations, columns=["emoji", "ink"])
        facts.insert(1, "name", facts["emoji"].map(names))
        facts["group"] = pd.Series([emoji.group_of(character) for character in facts["emoji"]], dtype=object)
        ink = [colours[name] for name in facts["ink"]]
        images = emoji.draw(list(facts["emoji"]), ink=ink, paper=background, **style)
        texts = [emoji.caption(name, ink, language) for name, ink in zip(facts["name"], facts["ink"], strict=True)]
        splits[split] = Pairs(images, texts, facts)
    noted = [f"names in '{language}'", f"inks {', '.join(inks)}"] if len(inks) > 1 else [f"names in '{language}'"]
    return splits, [f"{len(names):,} emoji", *noted]


def _colours(inks: list[str], paper: str | Ink) -> tuple[dict[str, Ink], Ink]:
    """Return the colour of each ink and of the paper."""
    colours = {ink: emoji.INKS[ink] for ink in inks}
    if paper == "white":
        return colours, (255, 255, 255)
    if paper == "inverted":
        return {ink: tuple(255 - value for value in colour) for ink, colour in colours.items()}, (0, 0, 0)
    if isinstance(paper, str) or len(paper) != 3 or not all(0 <= value <= 255 for value in paper):
        raise DataError(f"paper={paper!r} is no colour: take 'white', 'inverted' or (r, g, b) from 0 to 255.")
    if invisible := [ink for ink, colour in colours.items() if colour == tuple(paper)]:
        raise DataError(f"The ink {invisible[0]} is invisible on paper={paper}: take another ink or paper.")
    return colours, tuple(paper)


def _cut(
    published: dict[str, Pairs], limits: dict[str, int | None], seed: int, source: str
) -> tuple[dict[str, Pairs], list[str]]:
    """Cut unpublished splits from train and limit each split to that many images, with all their captions."""
    if "train" not in published:
        raise DataError(f"'{source}' has no split 'train', only {', '.join(published)}: take another data set.")
    rng = np.random.default_rng(seed)
    keys = {split: _keys(pairs) for split, pairs in published.items()}
    own, taken, notes = {}, set(), []
    for split in ("test", "validation", "train"):
        own[split] = [key for key in dict.fromkeys(keys.get(split, ())) if key not in taken]
        if lost := sum(key in taken for key in keys.get(split, ())):
            notes.append(f"{lost:,} {split} rows left out (their images are in another split)")
        taken.update(own[split])
    shuffled = rng.permutation(own["train"]).tolist()
    if len(shuffled) < 3:
        raise DataError(f"{source} has {len(shuffled)} different training images: it needs 3, one for each split.")
    chosen, spare = {}, []
    for split in ("test", "validation"):
        if own[split]:
            chosen[split] = rng.permutation(own[split]).tolist()
            if (more := len(chosen[split]) - limits[split]) > 0:
                notes.append(f"{more:,} {split} images left out (beyond the {limits[split]:,} asked for)")
        else:
            count = max(1, round(_SHARES[split] * len(own["train"])))
            chosen[split], shuffled = shuffled[:count], shuffled[count:]
            spare += chosen[split][limits[split] :]
    chosen["train"] = shuffled + spare
    if limits["train"] is not None and limits["train"] > len(chosen["train"]):
        there = len(chosen["train"])
        notes.append(f"train={limits['train']:,} asked for, but only {there:,} training images are there")
    splits = {}
    for split in ("train", "validation", "test"):
        origin = split if own[split] else "train"
        place = {key: i for i, key in enumerate(chosen[split][: limits[split]])}
        rows = [i for i, key in enumerate(keys[origin]) if key in place]
        rows.sort(key=lambda i: place[keys[origin][i]])
        image_ids = np.array([place[keys[origin][i]] for i in rows], dtype=np.int64)
        splits[split] = replace(published[origin].take(rows), image_ids=image_ids)
    return splits, notes


def _refuse(source: str | Path, **options: Any) -> None:
    """Refuse options that have no effect on this source, unless they have their default value."""
    defaults = inspect.signature(load_images).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            raise DataError(f"{name}={value!r} has no effect on the source '{source}': leave it out.")


def _keys(pairs: Pairs) -> list[str]:
    """Return a digest of each image: equal for equal images."""
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in pairs.images]
