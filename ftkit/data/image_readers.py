"""Captioned images from a folder or from a hub data set."""

import hashlib
import io
import os
import unicodedata
import warnings
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from ftkit.data.pairs import Pairs
from ftkit.data.tables import read_table
from ftkit.data.text_readers import choose_columns, load_hub_splits, usual_column
from ftkit.errors import DataError, in_brief

_FILE_NAMES = ("file", "filename", "file_name", "image", "picture", "path")

_CAPTION_NAMES = ("caption", "captions", "text", "title", "description", "name")

_IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

MAX_PIXELS = 50_000_000


# By EXIF orientation, how an image is turned or mirrored to stand upright.
_UPRIGHT = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)


class _UnusableError(ValueError):
    """An image cannot be used; the text is a key of _PROBLEMS."""


def _upright(opened: Image.Image) -> Image.Image:
    """Apply the EXIF orientation.

    Pillow's ``exif_transpose`` also writes the other EXIF entries anew, and fails if one of them is malformed.
    """
    opened.load()
    try:
        turn = _UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF data fail in many ways; the pixels are whole
        turn = None
    return opened.copy() if turn is None else opened.transpose(turn)


def _decode(source: Path | io.BytesIO, size: int) -> tuple[NDArray[np.uint8], str]:
    """Return the image, fitted into a white square, and a digest of its pixels before resizing."""
    try:
        opened = Image.open(source)
    except Image.DecompressionBombError:
        raise _UnusableError("oversized") from None
    with opened:
        if opened.width * opened.height > MAX_PIXELS:  # read from the header; nothing is decoded yet
            raise _UnusableError("oversized")
        image = _upright(opened)
    if round(min(image.size) / max(image.size) * size) == 0:  # Pillow would return a white square
        raise _UnusableError("too thin")
    if image.mode == "F":  # nothing says which value is white
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # grey of more than 8 bits, which convert() would clip at 255
        grey = np.asarray(image).clip(0, 65535)
        grey = grey if image.mode == "I" and grey.max(initial=0) <= 255 else grey // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    square = ImageOps.pad(image, (size, size), method=Image.Resampling.LANCZOS, color="white")
    return np.asarray(square), digest


def _try_decode(source: Path | io.BytesIO, size: int) -> tuple[NDArray[np.uint8] | None, str]:
    """Return the image and its digest, or None and the problem, a key of _PROBLEMS."""
    with warnings.catch_warnings(action="ignore"):  # what Pillow finds odd in a file, without the name of the file
        try:
            return _decode(source, size)
        except _UnusableError as problem:
            return None, str(problem)
        except Exception:  # Pillow's decoders fail in many ways: OSError, SyntaxError, struct.error, ...
            return None, "unreadable"


_PROBLEMS = {
    "missing": "missing files",
    "unreadable": "unreadable files",
    "oversized": f"files of more than {MAX_PIXELS // 1_000_000} megapixels",
    "too thin": "images too thin to be seen at {size} pixels",
    "duplicate": "duplicate images (same pixels as an earlier file)",
    "uncaptioned": "images of the folder without a caption",
    "empty": "rows without a caption",
    "repeated": "repeated rows",
}


def _note(problems: dict[str, list[str]], size: int) -> list[str]:
    """Describe each problem with its count and up to three names."""
    return [
        f"{len(names):,} {_PROBLEMS[problem].format(size=size)} left out: {in_brief(names)}"
        for problem, names in problems.items()
    ]


class _Files:
    """The files below a folder, found under the names that any system writes.

    A backslash may stand for a slash, accents may be composed or decomposed, and if no file has exactly the name, then
    capital letters do not matter. Links are followed; hidden files (such as the ``._x`` of macOS) are not listed.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        below = ((path.relative_to(self.folder), path) for path in sorted(self.folder.rglob("*")))
        visible = (name for name, path in below if not any(part[0] == "." for part in name.parts) and path.is_file())
        self.names = {name.as_posix(): None for name in visible}
        self._similar: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self._similar[_fold(name)].append(name)

    def find(self, written: str) -> str | None:
        """Return the name, relative to the folder and with slashes, of the file that is meant; None if there is none.

        Args:
            written: a name relative to the folder, or an absolute one inside it.
        """
        names = [name for form in (written, written.replace("\\", "/")) if (name := self._relative(form))]
        for name in names:
            if name in self.names:
                return name
        for name in names:
            if len(similar := self._similar.get(_fold(name), [])) == 1:
                return similar[0]
        return next(filter(self._is_file, names), None)  # hidden, or in a linked folder

    def _relative(self, written: str) -> str | None:
        for folder in (self.folder, self.folder.resolve()):  # an absolute name may lead through links or not
            path = Path(os.path.normpath(folder / written))
            if path.is_relative_to(folder):
                return path.relative_to(folder).as_posix()
        return None

    def _is_file(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except (OSError, ValueError):  # no file can have such a name
            return False


def _fold(name: str) -> str:
    """Equal for names that differ only in capital letters and in how accents are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def read_folder(
    folder: Path,
    captions: str | Path | None = None,
    *,
    size: int = 128,
    image: str | None = None,
    caption: str | None = None,
) -> tuple[Pairs, list[str]]:
    """Read the images of a folder, with captions from a file that has one row for each caption.

    The EXIF orientation is applied, transparency becomes white, and each image is fitted into a white square without
    distortion. Images and rows that cannot be used are left out and reported. File names may be written as on another
    system: with backslashes, other capital letters, or accents composed in another way.

    Args:
        folder: folder of the images; they may be in subfolders.
        captions: file with the captions, in the folder or elsewhere, of any type that ``read_table`` reads; None for
            the only .csv file of the folder.
        size: side of the square, in pixels, that each image is fitted into.
        image, caption: names of the columns with file names (relative to the folder) and captions; None to guess
            them.

    Returns:
        The pairs in the order of the rows, with the column `file` in their facts; and notes on what was guessed or left
        out.

    Raises:
        DataError: the folder does not exist, has no or several files of captions or a malformed one, or has fewer than
            2 usable pairs.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} in {Path.cwd()}: check the path.")
    files = _Files(folder)
    table, notes = _read_captions(_captions_file(folder, captions), image, caption)
    problems: dict[str, list[str]] = defaultdict(list)
    mentioned: set[str] = set()
    decoded: dict[str, NDArray[np.uint8] | None] = {}
    digests: set[str] = set()
    used: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for written, text in zip(table["label"], table["text"], strict=True):
        name = files.find(written)
        if name is None:
            problems["missing"].append(written or "(no name)")
            continue
        mentioned.add(name)
        if not text:
            problems["empty"].append(name)
            continue
        if name not in decoded:
            decoded[name], digest = _try_decode(files.folder / name, size)
            if decoded[name] is None:
                problems[digest].append(name)
            elif digest in digests:
                problems["duplicate"].append(name)
                decoded[name] = None
            digests.add(digest)
        if (name, text) in used:
            problems["repeated"].append(name)
        elif decoded[name] is not None:
            used[name, text] = decoded[name]
    problems["missing"] = list(dict.fromkeys(problems["missing"]))
    images = (name for name in files.names if Path(name).suffix.lower() in _IMAGE_TYPES)
    problems["uncaptioned"] = [name for name in images if name not in mentioned]
    notes += _note({problem: problems[problem] for problem in _PROBLEMS if problems[problem]}, size)
    if len(used) < 2:
        reasons = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"{folder} has {len(used)} usable pairs of image and caption{reasons}: it needs 2 or more.")
    facts = pd.DataFrame({"file": [file for file, _ in used]})
    return Pairs(np.stack(list(used.values())), [text for _, text in used], facts), notes


def read_image_files(folder: Path, *, size: int = 128) -> tuple[NDArray[np.uint8], list[str], list[str]]:
    """Read all images of a folder, whether they have captions or not; each is prepared as in ``read_folder``.

    Args:
        folder: folder of the images; they may be in subfolders.
        size: side of the square, in pixels, that each image is fitted into.

    Returns:
        The images, shape (N, size, size, 3); their names, relative to the folder; and notes on what was left out.

    Raises:
        DataError: the folder has no usable image.
    """
    files = _Files(folder)
    problems: dict[str, list[str]] = defaultdict(list)
    images: dict[str, NDArray[np.uint8]] = {}
    digests: set[str] = set()
    for name in (name for name in files.names if Path(name).suffix.lower() in _IMAGE_TYPES):
        decoded, digest = _try_decode(files.folder / name, size)
        if decoded is None:
            problems[digest].append(name)
        elif digest in digests:
            problems["duplicate"].append(name)
        else:
            images[name] = decoded
        digests.add(digest)
    notes = _note(problems, size)
    if not images:
        reasons = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"{folder} has no image that can be used{reasons}: give a folder of images.")
    return np.stack(list(images.values())), list(images), notes


def _captions_file(folder: Path, captions: str | Path | None) -> Path:
    if captions is not None:
        path = folder / captions if (folder / captions).is_file() else Path(captions)
        if not path.is_file():
            raise DataError(f"There is no file {captions} in {folder} or {Path.cwd()}: check `captions=`.")
        return path
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".csv" and not p.name.startswith("."))
    if len(tables) == 1:
        return tables[0]
    if not tables:
        raise DataError(
            f"{folder} has no .csv file: add one with the columns file and caption and a row for each caption."
        )
    names = ", ".join(path.name for path in tables)
    raise DataError(
        f"{folder} has {len(tables)} .csv files ({names}): keep only the one with the captions there, or name it with "
        "`captions=` (in a run of lesson 06: `-p captions=FILE`)."
    )


def _read_captions(path: Path, image: str | None, caption: str | None) -> tuple[pd.DataFrame, list[str]]:
    """Read the file names as `label` and the captions as `text`, "" where missing; and notes on what was guessed."""
    table, notes = read_table(path)
    columns, named = list(map(str, table.columns)), bool(image and caption)
    image = image or usual_column(_FILE_NAMES, columns)
    caption = caption or usual_column(_CAPTION_NAMES, [column for column in columns if column != image])
    if image is None or caption is None:
        lacking, argument = ("file", "image") if image is None else ("caption", "caption")
        have = ", ".join(f"'{column}'" for column in columns)
        raise DataError(
            f"{path} has no column '{lacking}', only {have}: rename one, or name it with "
            f"`{argument}=` of `load_images`."
        )
    if not named and (image, caption) != (_FILE_NAMES[0], _CAPTION_NAMES[0]):
        notes = [*notes, f"images from column '{image}', captions from column '{caption}' (guessed)"]
    table, _ = choose_columns(table, str(path), text=caption, label=image)
    return table[["text", "label"]].fillna("").map(lambda value: str(value).strip()), notes


def read_hub_images(
    source: str,
    *,
    size: int = 128,
    image: str | None = None,
    caption: str | None = None,
) -> tuple[dict[str, Pairs], list[str]]:
    """Read images with captions from the hub; all images are decoded and kept in memory at the given size.

    Args:
        source: "owner/name" or "owner/name:config".
        size: side of the square, in pixels, that each image is fitted into.
        image: name of the column of images; None for the first.
        caption: name of the column of captions, strings or lists of strings (the first one is taken); None to guess it.

    Returns:
        The pairs of each split named "train", "validation" or "test", and notes on what was left out.

    Raises:
        DataError: FTKIT_OFFLINE is set, the data set cannot be loaded, or it lacks such splits, columns or usable rows.
    """
    loaded, notes = load_hub_splits(source)
    image, caption = _hub_columns(next(iter(loaded.values())).features, source, image, caption)
    notes += [f"images from column '{image}', captions from column '{caption}'"]
    splits = {}
    for split, rows in loaded.items():
        rows = rows.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
        splits[split], dropped = _hub_pairs(rows, image, caption, size)
        notes += [f"{count:,} {what} rows of {split} left out" for what, count in dropped.items()]
        if not len(splits[split]):
            raise DataError(
                f"None of the {len(rows):,} {split} rows of '{source}' has a readable image and a caption: "
                "take another data set or other columns."
            )
    return splits, notes


def _hub_columns(features: datasets.Features, source: str, image: str | None, caption: str | None) -> tuple[str, str]:
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    texts = [column for column, feature in features.items() if _is_text(feature)]
    image = image or next(iter(images), None)
    caption = caption or usual_column(_CAPTION_NAMES, texts)
    for chosen, usable, what in ((image, images, "image"), (caption, texts, "caption")):
        if chosen not in usable:
            wanted = f"column '{chosen}'" if chosen else "usual column"
            raise DataError(
                f"'{source}' has no {wanted} of {'images' if what == 'image' else 'texts'}, only "
                f"{', '.join(features)}: take another data set, or name one with `{what}=` of `load_images`."
            )
    return image, caption


def _is_text(feature: object) -> bool:
    feature = feature.feature if isinstance(feature, datasets.List) else feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _hub_pairs(rows: datasets.Dataset, image: str, caption: str, size: int) -> tuple[Pairs, dict[str, int]]:
    """Return the usable pairs, and how many rows have which problem."""
    images, captions, dropped = [], [], defaultdict(int)
    for row in rows:
        stored, text = row[image] or {}, row[caption]
        text = (text[0] if text else None) if isinstance(text, list) else text
        if not (text or "").strip():
            dropped["captionless"] += 1
            continue
        content = stored.get("bytes")
        pixels, problem = _try_decode(io.BytesIO(content) if content else Path(stored.get("path") or ""), size)
        if pixels is None:
            dropped[problem] += 1
            continue
        images.append(pixels)
        captions.append(text.strip())
    empty = np.empty((0, size, size, 3), dtype=np.uint8)
    facts = pd.DataFrame(index=range(len(captions)))
    return Pairs(np.stack(images) if images else empty, captions, facts), dropped
