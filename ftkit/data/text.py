"""Classified texts as train, validation and test splits, cleaned and tokenised."""

import gc
import hashlib
import math
import os
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ftkit.data import text_readers
from ftkit.data.assets import registry
from ftkit.data.scratch import scratch_folder
from ftkit.data.tables import FILE_TYPES
from ftkit.data.text_readers import SPLITS
from ftkit.errors import DataError, did_you_mean, first_line, in_brief

_SHARES = {"test": 0.2, "validation": 0.1}  # of the rows of each class, if the source has no such split

_MAX_CLASSES = 200

_FILE_SUFFIXES = {*FILE_TYPES, ".txt", ".xls", ".ods", ".zip", ".gz"}

_MISSING = {"nan", "na", "n/a", "#n/a", "<na>", "nat", "null", "none"}  # how programs write a missing value

_MAX_UNKNOWN = 0.05  # share of unknown tokens that is worth a word

_BATCH = 1000  # texts tokenised at a time

_MAX_ROWS_IN_MEMORY = 50_000  # of a tokenised split; a larger one is kept in a file


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
    whole split. White space around a text is removed. Dropped are rows without text or label, training rows with a
    repeated text (one stays) or with several labels, and rows whose text is also in a published split that takes
    precedence (test before validation before training). The type of a column is that of all rows together: a
    column that is empty is left out, and one whose values have no common type becomes strings.

    Args:
        source: an asset, a hub data set ("owner/name" or "owner/name:config"), or a CSV, TSV, JSON, JSON Lines,
            Parquet or Excel file, which may be compressed with gzip.
        train, validation, test: number of rows of each split; None for all.
        seed: decides which rows go to which split, and their order.
        text, label: names of the columns; None to guess them.

    Returns:
        The splits "train", "validation" and "test", with the columns `text`, `label` (a ClassLabel) and the
        source's other columns. Their `info` holds the description, the citation and the licence.

    Raises:
        DataError: the data cannot be used as asked.
        AssetError: the asset cannot be fetched or read.
    """
    table, notes, card = _read(source, text, label)
    try:
        table, repaired = _settle_types(table)
        table, names, said, incomplete = _clean(table, str(source))
        table, served = _published_splits(table, str(source))
        table, repeated = _deduplicate(table)
        splits, small = _split(table[["label", "split"]], names, np.random.default_rng(seed), str(source))
    except DataError as error:
        if source in registry.names() and not (
            Path(source).is_file() or text or label
        ):  # its files are known to be good
            raise registry.unreadable(source, error) from None
        raise _with_guesses(error, notes) from None
    dropped = ", ".join(incomplete + repeated)
    notes += [*repaired, *said, *served, *([f"dropped {dropped}"] if dropped else []), *small]
    sizes = []
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        there = len(splits[split])
        if rows is not None and not 1 <= rows <= there:
            raise DataError(f"{source} has {there:,} {split} rows: {split}={rows} must be from 1 to {there}.")
        splits[split] = splits[split].head(rows or there)
        sizes.append(f"{rows:,} of {there:,} {split}" if rows else f"{there:,} {split}")
    print(f"{source}: {'; '.join(notes)}; {' / '.join(sizes)}")
    whole = _make_dataset(table, names, card)
    return datasets.DatasetDict({split: _take(whole, splits[split].index, split) for split in SPLITS})


def _read(source: str | Path, text: str | None, label: str | None) -> text_readers.Reading:
    path = Path(source)
    if isinstance(source, Path) or path.is_file() or path.suffix.lower() in _FILE_SUFFIXES:
        return text_readers.read_file(path, text, label)
    if source in registry.names():
        return text_readers.read_asset(source, text, label)
    if registry.HUB_ID.fullmatch(source):
        return text_readers.read_hub(source, text, label)
    raise DataError(
        f"'{source}' is neither a file nor an asset nor a hub id (owner/name): "
        f"{did_you_mean(source, text_readers.ASSET_READERS)} The assets are {', '.join(text_readers.ASSET_READERS)}."
    )


def _with_guesses(error: DataError, notes: list[str]) -> DataError:
    """Say in the message of a failed load which columns were guessed."""
    guesses = [note.partition(f" {text_readers.GUESSED}")[0] for note in notes if text_readers.GUESSED in note]
    if not guesses:
        return error
    return DataError(
        f"{str(error).removesuffix('.')}; guessed were {' and '.join(guesses)}, so name others if they are wrong, "
        "with `text=NAME` and `label=NAME` (`-p text=NAME -p label=NAME` on the command line)."
    )


def _settle_types(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Give each column one type that holds the values of all rows; leave out empty columns besides text and label."""
    columns, notes, empty = {}, [], []
    for name, column in table.items():
        if name not in ("text", "label") and column.isna().all():
            empty.append(f"'{name}'")
            continue
        columns[name] = column
        if pd.api.types.infer_dtype(column) == "string":
            continue
        try:
            datasets.Dataset.from_pandas(column.to_frame(), preserve_index=False)
        except Exception as error:  # pandas, pyarrow and datasets refuse values in many ways
            if name == "label":  # becomes strings in any case, with notes of its own
                continue
            columns[name] = column.astype(object).map(str, na_action="ignore")
            what = "numbers of more than 64 bits" if isinstance(error, OverflowError) else "values of several types"
            notes.append(f"column '{name}' holds {what}, all read as strings")
    if empty:
        notes.append(f"{'columns' if len(empty) > 1 else 'column'} {in_brief(empty)} left out (empty)")
    return pd.DataFrame(columns, index=table.index), notes


def _clean(table: pd.DataFrame, source: str) -> tuple[pd.DataFrame, list[str], list[str], list[str]]:
    """Strip texts, turn labels into codes and drop incomplete rows.

    Returns:
        The table, the class names, notes on the labels, and notes on the rows that were dropped.
    """
    for column in ("text", "label"):
        for row, value in enumerate(table[column].tolist(), start=1):
            if isinstance(value, list | dict | np.ndarray):
                raise DataError(
                    f"The {column}s of {source} are lists or objects (row {row}): name another column with `{column}=`."
                )
            if isinstance(value, bytes):
                raise DataError(
                    f"The {column}s of {source} are bytes that are not all UTF-8: save them as strings, or name "
                    f"another column with `{column}=`."
                )
    texts, labels = _strings(table["text"]), _strings(table["label"])
    no_text = np.array([text == "" for text in texts])
    no_label = np.array([label == "" for label in labels])
    for missing, what in ((no_text, "text"), (no_label, "label")):
        if missing.all():
            raise DataError(
                f"None of the {len(table):,} rows of {source} has a {what}: name another column with `{what}=`."
            )
    if isinstance(table["label"].dtype, pd.CategoricalDtype):  # keep the order of a published model's outputs
        names = [name for name in dict.fromkeys(_strings(table["label"].cat.categories.to_series())) if name]
    else:
        names = sort_names(set(labels) - {""})
    if len(names) > _MAX_CLASSES or len(names) == (~no_label).sum() > 2:
        raise DataError(
            f"The labels of {source} have {len(names):,} distinct values in {len(table):,} rows, so they look like "
            "quantities or ids, not classes: name another column with `label=`."
        )
    said = [*_changed_labels(table["label"].astype(object).tolist(), labels), *_doubtful_classes(labels, names)]
    codes = {name: code for code, name in enumerate(names)}
    table = table.assign(text=texts, label=[codes.get(label, -1) for label in labels])
    dropped = _counts({"without text": no_text, "without label": no_label & ~no_text})
    return table[~no_text & ~no_label].reset_index(drop=True), names, said, dropped


def _strings(column: pd.Series) -> list[str]:
    """Values as stripped strings, "" where missing; 1.0 becomes "1", because a missing value makes integers floats."""
    values = column.astype(object).where(column.notna(), "").tolist()
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in values)
    return [str(value).strip() for value in whole]


def sort_names(names: set[str]) -> list[str]:
    """Numbers in their order, then the others in theirs; "nan" is one of these, as it has no place among numbers."""

    def key(name: str) -> tuple[bool, float, str]:
        with suppress(ValueError):
            if not math.isnan(float(name)):
                return False, float(name), name
        return True, 0.0, name

    return sorted(names, key=key)


def _changed_labels(values: list[object], labels: list[str]) -> list[str]:
    """Say which labels lost blanks, or became equal to others of another type (the number 1 and the string "1")."""
    forms = defaultdict(Counter)
    for value, label in zip(values, labels, strict=True):
        if label:
            forms[label][value] += 1
    changed = [
        f"{value!r} into '{label}' ({count:,})"
        for label, counts in forms.items()
        for value, count in counts.items()
        if value != label and (isinstance(value, str) or len(counts) > 1)
    ]
    return [f"labels changed: {in_brief(sorted(changed))}"] if changed else []


def _doubtful_classes(labels: list[str], names: list[str]) -> list[str]:
    """Name and count classes that may be one class, or none."""
    counts, alike = Counter(labels), defaultdict(dict)
    for name in names:
        alike[folded(name)][name] = counts[name]
    variants = [" / ".join(_counted(group)) for group in alike.values() if len(group) > 1]
    missing = {name: counts[name] for name in names if name.casefold() in _MISSING}
    notes = []
    if variants:
        notes.append(
            f"classes that differ only in case, blanks or the form of a number: {in_brief(variants)} "
            "(if they are one class, write them alike in the file)"
        )
    if missing:
        notes.append(
            f"class {in_brief(_counted(missing))} may mean that there is no label (if so, leave its cells empty in the "
            "file)"
        )
    return notes


def folded(name: str) -> str:
    """The same string for names that a person may take for one."""
    name = unicodedata.normalize("NFKC", name).casefold()
    name = "".join(character for character in name if character.isprintable() and not character.isspace())
    try:
        return str(float(name))
    except ValueError:
        return name


def _counted(counts: Mapping[str, int]) -> list[str]:
    return [f"{value!r} ({count:,})" for value, count in counts.items()]


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


def _make_dataset(table: pd.DataFrame, names: list[str], card: dict) -> datasets.Dataset:
    table = table.drop(columns="split")
    others = datasets.Dataset.from_pandas(table.drop(columns=["text", "label"]), preserve_index=False).features
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names), **others}
    info = datasets.DatasetInfo(features=datasets.Features(features), **card)
    return datasets.Dataset.from_pandas(table, info=info, preserve_index=False)


def _take(whole: datasets.Dataset, rows: pd.Index, split: str) -> datasets.Dataset:
    taken = datasets.table.InMemoryTable(whole.data.table.take(rows.to_numpy()))
    return datasets.Dataset(taken, info=whole.info.copy(), split=split)


def encode(
    splits: Mapping[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 128,
    text: str = "text",
) -> datasets.DatasetDict:
    """Tokenise each split without padding, and print how many texts were cut, if any.

    If more than 5 % of the tokens are unknown to the model, print that share too, and how many different texts became
    equal because of it.

    Splits of more than 50,000 rows are kept in files, which are read as they are needed and removed when this process
    ends: in the folder ``scratch`` of the cache (``FTKIT_CACHE``), or, if the cache is read-only, in the folder for
    temporary files. Smaller ones are kept in memory. Of a part of a split (``take``) only that part is read.

    Args:
        splits: data sets with a column of texts and the column `label`.
        tokenizer: tokenizer of the model that will read the texts.
        max_length: number of tokens, special tokens included, after which a text is cut.
        text: name of the column of texts.

    Returns:
        The same splits, rows in the same order, with the tokenizer's columns (lists of ints: `input_ids`,
        `attention_mask`, …) and `labels`.

    Raises:
        DataError: a column or a text is missing, a split has no rows, the model cannot read `max_length` tokens, or
            the disk is full.
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
        if not len(split):
            raise DataError(f"The split '{name}' has no rows: leave it out.")
        rows, longer = _tokenize(split, tokenizer, max_length, text, name)
        cut += [f"{longer:,} of {len(split):,} {name}"] if longer else []
        labels = split["label"][:]
        numbers = np.asarray(labels)  # of which datasets takes a fingerprint much faster than of a list
        labels = numbers if numbers.dtype.kind == "i" else labels
        encoded[name] = rows.add_column("labels", labels, feature=split.features["label"])
    if cut:
        print(f"texts cut at {max_length} tokens: {', '.join(cut)}")
    _report_unknown(splits, encoded, tokenizer, text)
    return datasets.DatasetDict(encoded)


def _tokenize(
    split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, column: str, name: str
) -> tuple[datasets.Dataset, int]:
    """Tokenise one split, batch by batch, into memory or a file; also return how many of its texts were cut."""
    longer, path = 0, None
    try:
        if len(split) > _MAX_ROWS_IN_MEMORY:
            handle, path = tempfile.mkstemp(".arrow", dir=scratch_folder())
            os.close(handle)
        with pa.BufferOutputStream() if path is None else pa.OSFile(path, "wb") as sink:
            writer = ArrowWriter(stream=sink)
            for texts in _texts(split, column, name):
                with _no_search_for_cycles():
                    columns = tokenizer(texts, truncation=True, max_length=max_length)
                    longer += _count_longer(texts, columns, tokenizer, max_length)
                    writer.write_batch(dict(columns))
                    del columns
            writer.finalize(close_stream=False)
            if path is None:
                return datasets.Dataset.from_buffer(sink.getvalue()), longer
        return datasets.Dataset.from_file(path), longer
    except BaseException as error:
        if path is not None:
            Path(path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(
                f"The {len(split):,} tokenised rows of '{name}' cannot be written to {registry.cache_dir()} "
                f"({first_line(error)}): free space there, or set FTKIT_CACHE to a folder on another disk."
            ) from None
        raise


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Pause Python's garbage collector: to go through many new lists in vain takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _count_longer(
    texts: Sequence[str], columns: BatchEncoding, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> int:
    """Count the texts that were cut to ``max_length`` tokens, among those that have as many."""
    full = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) == max_length]
    if columns.is_fast:
        return sum(bool(columns.encodings[i].overflowing) for i in full)
    whole = tokenizer([texts[i] for i in full], verbose=False)["input_ids"] if full else []
    return sum(len(ids) > max_length for ids in whole)


def _report_unknown(
    splits: Mapping[str, datasets.Dataset],
    encoded: Mapping[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
    column: str,
) -> None:
    """Print the share of tokens that are unknown, without the special ones around a text, if it is above 5 %."""
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):  # a tokenizer of bytes knows everything
        return
    chunks = [chunk for rows in encoded.values() for chunk in rows.data["input_ids"].chunks]
    count = sum(np.count_nonzero(chunk.flatten().to_numpy() == unknown) for chunk in chunks)
    tokens = sum(len(chunk.flatten()) for chunk in chunks)
    tokens -= len(tokenizer("")["input_ids"]) * sum(map(len, encoded.values()))
    if count <= _MAX_UNKNOWN * tokens:
        return
    different = defaultdict(set)  # digests, because a million rows would not fit into memory
    for name, split in splits.items():
        sequences = (ids for chunk in encoded[name].data["input_ids"].chunks for ids in _arrays(chunk))
        texts = (text for batch in _texts(split, column, name) for text in batch)
        for text, ids in zip(texts, sequences, strict=True):
            if (ids == unknown).any():
                different[_digest(ids.tobytes())].add(_digest(text.encode()))
    equal = sum(len(same) for same in different.values() if len(same) > 1)
    merged = f", and {equal:,} different texts became equal to another" if equal else ""
    print(
        f"{count / tokens:.0%} of the tokens are unknown to the model ({tokenizer.unk_token}){merged}: "
        "take a model that knows this script"
    )


def _arrays(chunk: pa.ListArray) -> list[NDArray[np.integer]]:
    return np.split(chunk.flatten().to_numpy(), np.cumsum(chunk.value_lengths().to_numpy())[:-1])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def shorten(
    splits: Mapping[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> datasets.DatasetDict:
    """Cut texts for use in a prompt, on the tokenizer's `truncation_side`, and print how many were cut, if any.

    Args:
        splits: data sets with the column `text`.
        tokenizer: tokenizer of the model that will read the prompts.
        max_length: number of tokens, without special tokens, after which a text is cut.

    Returns:
        The same splits with shorter texts; the other columns stay as they are.

    Raises:
        DataError: a text is missing.
    """
    shortened, cut = {}, []
    for name, split in splits.items():
        longer, kept = 0, []
        table = split.with_format("arrow")[:]
        column = table.schema.get_field_index("text")
        for texts in _texts(split, "text", name):
            short = cut_texts(texts, tokenizer, max_length)
            longer += sum(len(after) < len(before) for after, before in zip(short, texts, strict=True))
            kept.append(pa.array(short, table.schema.field(column).type))
        cut += [f"{longer:,} of {len(split):,} {name}"] if longer else []
        table = table.set_column(column, table.schema.field(column), kept)
        shortened[name] = datasets.Dataset(datasets.table.InMemoryTable(table), info=split.info.copy())
    if cut:
        print(f"texts cut after {max_length} tokens: {', '.join(cut)}")
    return datasets.DatasetDict(shortened)


def cut_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Cut each text after ``max_length`` tokens, without special tokens, on the tokenizer's ``truncation_side``."""
    how = {"truncation": True, "max_length": max_length, "add_special_tokens": False}
    spans = tokenizer(list(texts), return_offsets_mapping=True, **how)["offset_mapping"]
    if tokenizer.truncation_side == "left":
        return [text[span[0][0] :] if span else text for text, span in zip(texts, spans, strict=True)]
    return [text[: span[-1][1]] if span else text for text, span in zip(texts, spans, strict=True)]


def _texts(split: datasets.Dataset, column: str, name: str) -> Iterator[list[str]]:
    """A column of texts in batches, after a check that it holds nothing else."""
    for start in range(0, len(split), _BATCH):
        texts = list(split[column][start : start + _BATCH])
        wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise DataError(
                f"In row {start + wrong} of the split '{name}' the text is {texts[wrong]!r}: leave out rows without "
                "text, and turn other values into text."
            )
        yield texts
