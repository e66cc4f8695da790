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
from ftkit.data.emoji import Ink
from ftkit.data.image_readers import read_folder, read_hub_images
from ftkit.data.pairs import Pairs
from ftkit.data.text import HUB_ID
from ftkit.errors import DataError

PAPERS = ("white", "inverted")

SHARES = {"validation": 0.1, "test": 0.2}  # of the images of a source without published splits


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

    Emoji are shuffled by the seed alone: the first `test` are for the test, the next `validation` for the
    validation, the first `train` of the others for training. No emoji is in two of these. With several inks, each
    training emoji is drawn in all inks but one, and in that one in the split "new_pairs": emoji and ink were both
    seen, never together. An emoji of the test or validation is drawn in one ink, each taking its turn.

    Of a folder, at most 10 % of the images are for validation and 20 % for the test, the others for training; so is
    what a hub data set lacks of these splits cut from its training images. No image is in two splits: where a hub
    data set has it twice, the test keeps it, then the validation. All captions of an image are in one split.

    Args:
        source: "emoji", a folder with images and a .csv of captions, or a hub data set ("owner/name" or
            "owner/name:config").
        train: emoji or images wanted for training; None for all there are.
        validation, test: emoji or images for these splits; of a folder or hub data set, at most so many.
        size: pixels along a side.
        language: of the captions of emoji, one of ``drawings.LANGUAGES``.
        inks: of emoji, names of ``drawings.INKS``; the captions name them.
        weight: of emoji's strokes, from 300 to 700.
        rotation: of emoji, in degrees, counter-clockwise.
        paper: behind emoji: "white", an (r, g, b), or "inverted", which turns every colour c of paper and ink into
            255 - c while the captions stay.
        captions: the file of captions of a folder; None for its one .csv file.
        image, caption: columns of a folder's captions or of a hub data set; None to have them guessed.
        seed: decides which emoji or images go to which split, and their order.

    An option that the source has no use for is refused.

    Returns:
        The splits "train", "validation" and "test", with several inks also "new_pairs". The facts of emoji are the
        columns emoji, name, ink and group (or None), those of a folder the column file.

    Raises:
        DataError: the source cannot be used as asked, or has fewer rows than asked for.
        assets.AssetError: the font of the emoji cannot be fetched.
    """
    for name, wanted in (("train", train), ("validation", validation), ("test", test)):
        if wanted is not None and wanted < 1:
            raise DataError(f"{name}={wanted} is too few: ask for 1 or more")
    if size < 8:
        raise DataError(f"size={size} pixels are too few to see anything: take 8 or more")
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
        elif isinstance(source, str) and HUB_ID.fullmatch(source):
            published, notes = read_hub_images(source, size=size, image=image, caption=caption)
        else:
            raise DataError(f"'{source}' is neither 'emoji' nor a folder nor a hub id (owner/name): check the path")
        splits, repeated = _cut(published, sizes, seed, str(source))
        notes += repeated
    counts = " / ".join(f"{len(pairs):,} {split}" for split, pairs in splits.items())
    print("; ".join([f"{source}: {notes[0]}", *notes[1:], counts] if notes else [f"{source}: {counts}"]))
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
        raise DataError(f"inks={inks} is not usable: take one or several, each once, of {', '.join(emoji.INKS)}")
    names = emoji.emoji_names(language)
    train, num_validation, num_test = sizes["train"], sizes["validation"], sizes["test"]
    there = len(names) - num_test - num_validation
    if there < (train or 1):
        raise DataError(
            f"train={train}, validation={num_validation} and test={num_test} are more than the {len(names):,} emoji "
            "there are: ask for fewer"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(list(names)).tolist()
    held_out = rng.integers(len(inks), size=len(names))  # an ink for each emoji, whatever train is
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
    """The colour of each ink and of the paper."""
    colours = {ink: emoji.INKS[ink] for ink in inks}
    if paper == "white":
        return colours, (255, 255, 255)
    if paper == "inverted":
        return {ink: tuple(255 - value for value in colour) for ink, colour in colours.items()}, (0, 0, 0)
    if isinstance(paper, str) or len(paper) != 3 or not all(0 <= value <= 255 for value in paper):
        raise DataError(f"paper={paper!r} is no colour: take {' or '.join(map(repr, PAPERS))}, or (r, g, b) up to 255")
    if invisible := [ink for ink, colour in colours.items() if colour == tuple(paper)]:
        raise DataError(f"the ink {invisible[0]} does not show on paper={paper}: take another ink or 'inverted'")
    return colours, tuple(paper)


def _cut(
    published: dict[str, Pairs], limits: dict[str, int | None], seed: int, source: str
) -> tuple[dict[str, Pairs], list[str]]:
    """Splits of at most so many images, with all their captions; those not published are cut from train."""
    if "train" not in published:
        raise DataError(f"'{source}' has no split 'train', only {', '.join(published)}: take another data set")
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
        raise DataError(f"{source} has {len(shuffled)} different training images: it needs 3, one for each split")
    chosen, spare = {}, []
    for split in ("test", "validation"):
        if own[split]:
            chosen[split] = rng.permutation(own[split]).tolist()
            if (more := len(chosen[split]) - limits[split]) > 0:
                notes.append(f"{more:,} {split} images left out (beyond the {limits[split]:,} asked for)")
        else:
            count = max(1, round(SHARES[split] * len(own["train"])))
            chosen[split], shuffled = shuffled[:count], shuffled[count:]
            spare += chosen[split][limits[split] :]
    chosen["train"] = shuffled + spare
    if limits["train"] is not None and limits["train"] > len(chosen["train"]):
        raise DataError(f"{source} has {len(chosen['train']):,} training images: train={limits['train']} asks for more")
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
    """Refuse options that this source has no use for, unless they are left at their default."""
    defaults = inspect.signature(load_images).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            raise DataError(f"{name}={value!r} means nothing for the source '{source}': leave it out")


def _keys(pairs: Pairs) -> list[str]:
    """A digest of each image: rows of the same image have the same."""
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in pairs.images]
