"""Classified texts as train, validation and test splits, cleaned and tokenised."""

import re
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ftkit.data import text_readers
from ftkit.data.assets import registry
from ftkit.data.text_readers import SPLITS
from ftkit.errors import DataError, did_you_mean

_SHARES = {"test": 0.2, "validation": 0.1}  # of the rows of each class, if the source has no such split

_MAX_CLASSES = 200

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")

_FILE_SUFFIXES = {*text_readers.FILE_TYPES, ".txt", ".xls", ".xlsx", ".ods", ".zip", ".gz"}


def load_text(
    source: str | Path,
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 0,
    text: str | None = None,
    label: str | None = None,
) -> datasets.DatasetDict:
    """Load classified texts, clean and split them, and print one line on what was read, dropped and repaired.

    Published splits are kept; a validation split published without a test split is used as the test split. A
    missing test split is cut from the training rows (20 % of them), and so is a missing validation split (10 %).
    Cuts are stratified and depend on the seed alone, not on the sizes asked for: the rows of `train=100` are the
    first 100 of `train=1000`, and the first N rows of a split, for every N, have nearly the class shares of the
    whole split. White space around a text is removed. Four kinds of rows are dropped: rows without text or label,
    repeated texts, texts that appear with several labels, and training rows whose text is also in a published
    validation or test split.

    Args:
        source: an asset, a hub data set ("owner/name" or "owner/name:config"), or a CSV, TSV, JSON Lines or
            Parquet file.
        train, validation, test: number of rows of each split; None for all.
        seed: decides which rows go to which split, and their order.
        text, label: names of the columns; None to guess them.

    Returns:
        The splits "train", "validation" and "test", with the columns `text`, `label` (a ClassLabel) and the
        source's other columns. Their `info` holds the description, the citation and the licence.

    Raises:
        DataError: the data cannot be used as asked.
        AssetError: the asset cannot be fetched.
    """
    table, notes, card = _read(source, text, label)
    table, names, incomplete = _clean(table, str(source))
    table, served = _published_splits(table, str(source))
    table, repeated = _deduplicate(table)
    splits, small = _split(table, names, np.random.default_rng(seed), str(source))
    dropped = ", ".join(incomplete + repeated)
    notes += [*served, *([f"dropped {dropped}"] if dropped else []), *small]
    sizes = []
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        there = len(splits[split])
        if rows is not None and not 1 <= rows <= there:
            raise DataError(f"{source} has {there:,} {split} rows: {split}={rows} must be from 1 to {there}.")
        splits[split] = splits[split].head(rows or there)
        sizes.append(f"{rows:,} of {there:,} {split}" if rows else f"{there:,} {split}")
    print(f"{source}: {'; '.join(notes)}; {' / '.join(sizes)}")
    return datasets.DatasetDict({split: _make_dataset(splits[split], names, card, split) for split in SPLITS})


def _read(source: str | Path, text: str | None, label: str | None) -> text_readers.Reading:
    path = Path(source)
    if isinstance(source, Path) or path.is_file() or path.suffix.lower() in _FILE_SUFFIXES:
        return text_readers.read_file(path, text, label)
    if source in registry.names():
        return text_readers.read_asset(source, text, label)
    if HUB_ID.fullmatch(source):
        return text_readers.read_hub(source, text, label)
    raise DataError(
        f"'{source}' is neither a file nor an asset nor a hub id (owner/name): "
        f"{did_you_mean(source, text_readers.ASSET_READERS)} The assets are {', '.join(text_readers.ASSET_READERS)}."
    )


def _clean(table: pd.DataFrame, source: str) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Strip texts, turn labels into codes and drop incomplete rows; also return the class names and notes."""
    for column in ("text", "label"):
        if table[column].map(lambda value: isinstance(value, list | dict | np.ndarray)).any():
            raise DataError(f"The {column}s of {source} are lists or objects: name another column with `{column}=`.")
    texts, labels = _strings(table["text"]), _strings(table["label"])
    no_text = np.array([text == "" for text in texts])
    no_label = np.array([label == "" for label in labels])
    for missing, what in ((no_text, "text"), (no_label, "label")):
        if missing.all():
            raise DataError(
                f"None of the {len(table):,} rows of {source} has a {what}: name another column with `{what}=`."
            )
    if isinstance(table["label"].dtype, pd.CategoricalDtype):  # keep the order of a published model's outputs
        names = _strings(table["label"].cat.categories.to_series())
    else:
        names = _sort_names(set(labels) - {""})
    if len(names) > _MAX_CLASSES or len(names) == (~no_label).sum() > 2:
        raise DataError(
            f"The labels of {source} have {len(names):,} distinct values in {len(table):,} rows, so they look like "
            "quantities or ids, not classes: name another column with `label=`."
        )
    codes = {name: code for code, name in enumerate(names)}
    table = table.assign(text=texts, label=[codes.get(label, -1) for label in labels])
    dropped = _counts({"without text": no_text, "without label": no_label & ~no_text})
    return table[~no_text & ~no_label].reset_index(drop=True), names, dropped


def _strings(column: pd.Series) -> list[str]:
    """Values as stripped strings, "" where missing; 1.0 becomes "1", because a missing value makes integers floats."""
    values = column.astype(object).where(column.notna(), "").tolist()
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in values)
    return [str(value).strip() for value in whole]


def _sort_names(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(names)


def _counts(rows: dict[str, np.ndarray | pd.Series]) -> list[str]:
    return [f"{mask.sum():,} {what}" for what, mask in rows.items() if mask.any()]


def _published_splits(table: pd.DataFrame, source: str) -> tuple[pd.DataFrame, list[str]]:
    """Add a column `split`, all "train", if nothing is published; a lone published validation split becomes "test"."""
    published = set(table["split"]) if "split" in table else {"train"}
    if "train" not in published:
        raise DataError(
            f"{source} has no labelled training rows, only {', '.join(sorted(published))} rows: take other data."
        )
    if published == {"train", "validation"}:
        table = table.assign(split=table["split"].replace("validation", "test"))
        return table, ["the published validation split is used as the test split"]
    return table if "split" in table else table.assign(split="train"), []


def _deduplicate(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Keep no text in two splits, and each text once in train; a published test split stays as it is."""
    order = table["split"].map({"test": 0, "validation": 1, "train": 2})
    leaked = order > order.groupby(table["text"]).transform("min")
    train = table[(table["split"] == "train") & ~leaked]
    several = train.groupby("text")["label"].transform("nunique") > 1
    several = several.reindex(table.index, fill_value=False)
    repeated = train["text"].duplicated().reindex(table.index, fill_value=False) & ~several
    dropped = {
        "whose text is held out": leaked,
        "whose text has several labels": several,
        "duplicates": repeated,
    }
    return table[~(leaked | several | repeated)].reset_index(drop=True), _counts(dropped)


def _split(
    table: pd.DataFrame, names: list[str], rng: np.random.Generator, source: str
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Cut unpublished splits from train and order the rows of each split so that its first N rows are stratified."""
    parts = {
        split: part.iloc[_stratified_order(part["label"].to_numpy(), rng)] for split, part in table.groupby("split")
    }
    pool = parts.get("train", table.head(0))
    counts = pool["label"].value_counts().sort_index()
    if len(counts) < 2:
        only = ", ".join(f"'{names[code]}'" for code in counts.index) or "none"
        raise DataError(
            f"A classifier needs two classes, but the training rows of {source} have only {only}: take other data."
        )
    cut = [split for split in _SHARES if split not in parts]
    few = [f"'{names[code]}' ({count})" for code, count in counts.items() if count < 1 + len(cut)]
    if few and "test" in cut:
        raise DataError(
            f"{source} has classes too small to split, {', '.join(few)}: "
            f"give each at least {1 + len(cut)} different texts or remove it."
        )
    rank = pool.groupby("label").cumcount()
    size = pool.groupby("label")["label"].transform("size")
    for split in cut:
        share = np.maximum(1, np.round(_SHARES[split] * size)).where(size > len(cut), 0)
        parts[split] = pool[(rank >= 0) & (rank < share)]
        rank = rank - share
    parts["train"] = pool[rank >= 0]
    return parts, [f"no validation row for classes with one row: {', '.join(few)}"] if few else []


def _stratified_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of rows in which the rows of each class are spread evenly from first to last."""
    place = np.empty(len(labels))
    for code in np.unique(labels):
        rows = np.flatnonzero(labels == code)
        rows = rows[np.argsort(rng.random(len(rows)), kind="stable")]
        place[rows] = (np.arange(len(rows)) + rng.random(len(rows))) / len(rows)
    return np.argsort(place, kind="stable")


def _make_dataset(part: pd.DataFrame, names: list[str], card: dict, split: str) -> datasets.Dataset:
    part = part.drop(columns="split")
    features = datasets.Dataset.from_pandas(part.head(), preserve_index=False).features
    features = datasets.Features(
        {**features, "text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    info = datasets.DatasetInfo(features=features, **card)
    return datasets.Dataset.from_pandas(part, info=info, split=split, preserve_index=False)


def encode(
    splits: Mapping[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 128,
    text: str = "text",
) -> datasets.DatasetDict:
    """Tokenise each split without padding, and print how many texts were cut, if any.

    Args:
        splits: data sets with a column of texts and the column `label`.
        tokenizer: tokenizer of the model that will read the texts.
        max_length: number of tokens, special tokens included, after which a text is cut.
        text: name of the column of texts.

    Returns:
        The same splits, rows in the same order, with the tokenizer's columns (lists of ints: `input_ids`,
        `attention_mask`, …) and `labels`.

    Raises:
        DataError: a column is missing, or the model cannot read `max_length` tokens.
    """
    most = tokenizer.model_max_length
    if max_length > most:
        raise DataError(f"max_length={max_length} is more than the {most} tokens that the model reads: lower it.")
    encoded, cut = {}, []
    for name, split in splits.items():
        for column in (text, "label"):
            if column not in split.column_names:
                have = ", ".join(split.column_names)
                raise DataError(f"The split '{name}' has no column '{column}', only {have}: name or rename one.")
        texts = list(split[text])
        columns = dict(tokenizer(texts, truncation=True, max_length=max_length))
        full = [t for t, ids in zip(texts, columns["input_ids"], strict=True) if len(ids) == max_length]
        whole = tokenizer(full, verbose=False)["input_ids"] if full else []
        longer = sum(len(ids) > max_length for ids in whole)
        cut += [f"{longer:,} of {len(texts):,} {name}"] if longer else []
        columns = datasets.Dataset.from_dict(columns)
        encoded[name] = columns.add_column("labels", list(split["label"]), feature=split.features["label"])
    if cut:
        print(f"texts cut at {max_length} tokens: {', '.join(cut)}")
    return datasets.DatasetDict(encoded)


def shorten(
    splits: Mapping[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> datasets.DatasetDict:
    """Cut texts for use in a prompt, and print how many were cut, if any.

    Args:
        splits: data sets with the column `text`.
        tokenizer: tokenizer of the model that will read the prompts.
        max_length: number of tokens, without special tokens, after which a text is cut.

    Returns:
        The same splits with shorter texts; the other columns stay as they are.
    """
    shortened, cut = {}, []
    how = {"truncation": True, "max_length": max_length, "add_special_tokens": False}
    for name, split in splits.items():
        texts = list(split["text"])
        spans = tokenizer(texts, return_offsets_mapping=True, **how)["offset_mapping"]
        kept = [text[: span[-1][1]] for text, span in zip(texts, spans, strict=True)]
        longer = sum(len(short) < len(text) for short, text in zip(kept, texts, strict=True))
        cut += [f"{longer:,} of {len(texts):,} {name}"] if longer else []
        columns = split.to_dict() | {"text": kept}
        shortened[name] = datasets.Dataset.from_dict(columns, features=split.features, info=split.info)
    if cut:
        print(f"texts cut after {max_length} tokens: {', '.join(cut)}")
    return datasets.DatasetDict(shortened)
