"""The rows of a file of any size, read in order without holding all of them in memory, where its kind allows."""

import csv
import gzip
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ftkit.data.tables import (
    BLANK_QUOTE,
    JSON_START,
    NO_TABLES,
    SEPARATOR_LINE,
    column_names,
    guess_delimiter,
    load_json,
    read_table,
)
from ftkit.errors import DataError, did_you_mean

_START = 1_000_000  # characters that show what a file is


@dataclass(frozen=True)
class RowsOfFile:
    """The rows of a file, which can be read several times.

    Attributes:
        name: the file, for messages.
        columns: names of its columns, in order.
        count: number of its rows.
        notes: what was guessed or left out.
    """

    name: str
    columns: list[str]
    count: int
    notes: list[str]
    _read: Callable[[list[str]], Iterable[tuple[Any, ...]]]

    def read(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """The values of these columns, row by row; None where a value is missing.

        Raises:
            DataError: there is no such column, or several of this name.
        """
        for name in columns:
            if name not in self.columns:
                have = ", ".join(f"'{column}'" for column in self.columns)
                raise DataError(
                    f"{self.name} has no column '{name}': {did_you_mean(name, self.columns)} It has {have}."
                )
            if self.columns.count(name) > 1:
                raise DataError(f"{self.name} has two columns called '{name}': rename one.")
        return iter(self._read(list(columns)))

    def head(self, count: int) -> pd.DataFrame:
        """The first rows as a table, without columns that share their name."""
        single = [name for name in self.columns if self.columns.count(name) == 1]
        return pd.DataFrame(itertools.islice(self.read(*single), count), columns=single, dtype=object)


class _NotPlainError(ValueError):
    """A file is damaged, or needs the care that ``read_table`` takes."""


def open_rows(path: Path) -> RowsOfFile:
    """Open a file of any kind that ``read_table`` reads, and check that all of it can be read.

    CSV, TSV and JSON Lines in UTF-8 (also compressed with gzip) and Parquet are read piece by piece. A file of another
    kind, or one with flaws that ``read_table`` mends, is held in memory. The rows are the same.

    Args:
        path: the file.

    Raises:
        DataError: as for ``read_table``.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in _PIECEWISE and path.is_file():
        try:
            return _PIECEWISE[suffix](path)
        except (_NotPlainError, csv.Error, UnicodeError, ValueError, OSError, EOFError, pa.ArrowException):
            pass  # read_table knows what to do, or says what is wrong
    table, notes = read_table(path)

    def read(columns: list[str]) -> Iterator[tuple[Any, ...]]:
        cells = [table[name].astype(object) for name in columns]
        return zip(*(column.where(column.notna(), None).tolist() for column in cells), strict=True)

    return RowsOfFile(str(path), [str(name) for name in table.columns], len(table), notes, read)


def _open_text(path: Path, newline: str) -> TextIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    file = gzip.open(path) if packed else path.open("rb")  # noqa: SIM115 - the caller closes it
    return io.TextIOWrapper(io.BufferedReader(file, 2**20), encoding="utf-8-sig", newline=newline)


def _start(path: Path) -> str:
    """The first characters of a file, if it is plain text."""
    with _open_text(path, "") as file:
        start = file.read(_START)
    head = start[:600].lstrip().lower()
    if "\0" in start or any(head.startswith(mark.decode("latin-1")) for mark in NO_TABLES):
        raise _NotPlainError
    return start


def _delimited(path: Path) -> RowsOfFile:
    start = _start(path)
    if JSON_START.match(start) or SEPARATOR_LINE.match(start):
        raise _NotPlainError
    csv.field_size_limit(2**31 - 1)  # the default limit of 128 KiB is too small for some texts
    delimiter = guess_delimiter(start, usual="\t" if ".tsv" in path.suffixes else ",")

    def rows() -> Iterator[list[str]]:
        with _open_text(path, "") as file:
            for row in csv.reader(file, delimiter=delimiter, strict=True):
                if len(row) > 1 or "".join(row).strip():  # not an empty line
                    yield row

    lines, count = rows(), 0
    names = column_names(next(lines, []))
    for row in lines:
        count += 1
        if len(row) != len(names) or any(_needs_care(field, delimiter) for field in row):
            raise _NotPlainError
    if not count:
        raise _NotPlainError

    def read(columns: list[str]) -> Iterator[tuple[Any, ...]]:
        places = [names.index(name) for name in columns]
        return (tuple(row[place] or None for place in places) for row in itertools.islice(rows(), 1, None))

    notes = [] if delimiter == "," else [f"fields separated by {delimiter!r}"]
    return RowsOfFile(str(path), names, count, notes, read)


def _needs_care(field: str, delimiter: str) -> bool:
    """Whether ``read_table`` would read the file in another way because of this field."""
    return (field.startswith(" ") and BLANK_QUOTE.match(field) is not None) or (delimiter == "\t" and "\t" in field)


def _json_lines(path: Path) -> RowsOfFile:
    _start(path)

    def rows() -> Iterator[dict[str, Any]]:
        with _open_text(path, "\n") as file:
            for line in file:
                if line.strip():
                    row, halves = load_json(line)
                    if halves or not isinstance(row, dict):
                        raise _NotPlainError
                    yield row

    names, count = {}, 0
    for count, row in enumerate(rows(), start=1):  # noqa: B007
        names.update(dict.fromkeys(row))
    if count < 2:  # perhaps one document
        raise _NotPlainError

    def read(columns: list[str]) -> Iterator[tuple[Any, ...]]:
        return (tuple(map(row.get, columns)) for row in rows())

    return RowsOfFile(str(path), list(names), count, [], read)


def _parquet(path: Path) -> RowsOfFile:
    with pq.ParquetFile(path) as file:
        names, count = file.schema_arrow.names, file.metadata.num_rows
    if not count or len(set(names)) < len(names):
        raise _NotPlainError

    def read(columns: list[str]) -> Iterator[tuple[Any, ...]]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)

    shown = [name for name in names if not name.startswith("__index_level_")]  # of a table of pandas
    return RowsOfFile(str(path), shown, count, [], read)


_PIECEWISE: dict[str, Callable[[Path], RowsOfFile]] = {
    ".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet,
}  # fmt: skip


def text_lines(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode one text a line.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"Line {number} of {name} is not UTF-8 ({error.reason}): convert it first.") from None


def in_chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` rows; the last may be shorter."""
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def cell_text(value: Any, row: int, what: str, name: str) -> str:
    """A cell as text, without blanks around it; "" if it is missing.

    Args:
        value: the cell.
        row: number of its row, from 1, for a message.
        what: "text" or "label".
        name: the file.

    Raises:
        DataError: the cell holds a list, an object, or bytes that are not UTF-8.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise DataError(
                f"The {what}s of {name} are bytes that are not all UTF-8 (row {row}): name another column with "
                f"--{what}."
            ) from None
    if isinstance(value, list | tuple | dict | np.ndarray):
        raise DataError(f"The {what}s of {name} are lists or objects (row {row}): name another column with --{what}.")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
