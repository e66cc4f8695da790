"""A table read from a file of any kind that people have.

The content of a file says what kind it is; its name only says what is meant where the content leaves a choice.
"""

import codecs
import csv
import functools
import gzip
import io
import itertools
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from ftkit.errors import DataError, first_line, in_brief

FILE_TYPES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".xlsx")  # each of them also as .gz

_Table = tuple[pd.DataFrame, list[str]]  # the table and notes on it

_ZIP = b"PK\x03\x04"  # every .xlsx file is a ZIP archive

NO_TABLES = {  # the first bytes of files that hold no table that can be read, in lower case: what it is, what to do
    b"\xd0\xcf\x11\xe0": ("an old Excel file (.xls) or one with a password", "save it as .xlsx without a password"),
    b"bzh91ay&sy": ("compressed with bzip2", "unpack it"),
    b"\xfd7zxz": ("compressed with xz", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"rar!": ("a RAR archive", "unpack it"),
    b"%pdf": ("a PDF document", "save its table as .csv"),
    b"<!doctype html": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
    b"version https://git-lfs": ("only a pointer to a file in Git LFS", "fetch the file itself with `git lfs pull`"),
}

_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

SEPARATOR_LINE = re.compile(r'"?sep=(\\t|[^"\r\n])"?\r?\n', re.IGNORECASE)  # Excel writes and reads it

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")

BLANK_QUOTE = re.compile(' +"')

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # what is left of an emoji that was cut in two (a lone surrogate)

JSON_START = re.compile(r'\s*(\[\s*)?\{\s*"')  # no header of a delimited file begins like this


def read_table(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read a CSV, TSV, JSON, JSON Lines, Parquet or Excel file, which may be compressed with gzip.

    Args:
        path: the file.

    Returns:
        The table, and notes on what was guessed or left out. Fields of a CSV or TSV file stay strings (the label "01"
        does not become 1), and empty ones are missing. In columns of other files that hold values of several types,
        each value keeps its own.

    Raises:
        DataError: the file does not exist, or is empty, malformed or of another kind.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path.absolute()}: check the path.")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in FILE_TYPES:
        raise DataError(f"{path} has an unsupported file type: save it as one of {', '.join(FILE_TYPES)}.")
    content, notes = _unpack(path)
    if not content.strip():
        raise DataError(f"{path} is empty: it needs a row for each text.")
    start = content[:600].lstrip().lower()
    for beginning, (what, cure) in NO_TABLES.items():
        if start.startswith(beginning):
            raise DataError(f"{path} is {what}, whatever its name says: {cure}.")
    if content[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive: unpack it and give one of its files.")
    if content.startswith((_ZIP, b"PAR1")):
        kind, read = (".xlsx", _read_excel) if content.startswith(_ZIP) else (".parquet", _read_parquet)
        table, said = read(path, content)
    elif suffix in (".xlsx", ".parquet"):
        what = "an Excel file (.xlsx)" if suffix == ".xlsx" else "a Parquet file"
        raise DataError(f"{path} is not {what}, whatever its name says: check the file.")
    else:
        text, said = _decode(path, content)
        del content  # a second copy of a large file
        if suffix in (".csv", ".tsv"):
            kind, read = (".json", _read_json) if JSON_START.match(text) else (suffix, _read_delimited)
        else:
            kind, read = suffix, _read_json
        table, more = read(path, text)
        said += more
    if table.empty:
        raise DataError(f"{path} is empty: it needs a row for each text.")
    if kind != suffix:
        notes.append(f"read as {kind}, which its content is")
    return table, notes + said


def _unpack(path: Path) -> tuple[bytes, list[str]]:
    content, notes = path.read_bytes(), []
    try:
        while content.startswith(b"\x1f\x8b"):
            content, notes = gzip.decompress(content), ["unpacked with gzip"]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is compressed with gzip, but damaged ({first_line(error)}): copy or download it again."
        ) from None
    return content, notes


def _read_excel(path: Path, content: bytes) -> _Table:
    """Read the first sheet that is not empty."""
    try:
        members = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except zipfile.BadZipFile:
        raise DataError(
            f"{path} is a spreadsheet or another ZIP archive by its first bytes, but damaged: copy or download it "
            "again."
        ) from None
    if "xl/workbook.xml" not in members:
        what = "an OpenDocument file" if "content.xml" in members else "a ZIP archive"
        cure = "save it as .xlsx or .csv" if "content.xml" in members else "unpack it and give one of its files"
        raise DataError(f"{path} is {what} (it holds {in_brief(members)}): {cure}.")
    try:
        with warnings.catch_warnings(action="ignore"), pd.ExcelFile(io.BytesIO(content), engine="openpyxl") as book:
            names = [str(name) for name in book.sheet_names]
            for sheet in names:
                cells = book.parse(sheet, header=None, dtype=object, keep_default_na=False, na_values=[""])
                cells = cells.dropna(how="all").dropna(how="all", axis="columns")
                if not cells.empty:
                    break
    except Exception as error:  # openpyxl fails in many ways on damaged files
        raise DataError(f"{path} cannot be read as an Excel file ({first_line(error)}): save it again.") from None
    others = ", ".join(f"'{name}'" for name in names if name != sheet)
    notes = [f"sheet '{sheet}' read, not {others}"] if others else []
    header, *rows = cells.astype(object).where(cells.notna(), None).to_numpy().tolist() or [[]]
    return _frame(header, rows), notes


def _read_parquet(path: Path, content: bytes) -> _Table:
    try:
        table = pd.read_parquet(pa.BufferReader(content))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a Parquet file ({first_line(error)}): write it again.") from None
    unnamed = None in table.index.names or set(table.index.names) & {*table.columns}  # or kept as a column too
    return table.reset_index(drop=True) if unnamed else table.reset_index(), []


def _decode(path: Path, content: bytes) -> tuple[str, list[str]]:
    """Decode UTF-8, UTF-16 with or without a byte-order mark, or UTF-32 with one."""
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content:  # the byte 0 is half of "," or of the end of a line in UTF-16
        encoding = "utf-16-le" if content[1::2].count(0) > content[::2].count(0) else "utf-16-be"
        with suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            if "\n" in text and "\0" not in text:
                return text, [f"decoded from {encoding.upper()}"]
        encoding = None
    try:
        if encoding is None:
            return content.decode("utf-8").removeprefix("\ufeff"), []
        return content.decode(encoding), [f"decoded from {encoding.upper()}"]
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise DataError(
                f"{path} begins like {encoding.upper()}, but is damaged ({error.reason}): save it again as UTF-8."
            ) from None
        if b"\0" in content:
            raise DataError(f"{path} holds no text that can be read, but other data: check the file.") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8 (line {line}, byte 0x{content[error.start]:02x}): save it as UTF-8 (a spreadsheet "
            f"program calls it 'CSV UTF-8'), or, if it is West European, with `iconv -f cp1252 -t utf-8 {path.name} > "
            f"utf8-{path.name}` (cp1251 if it is Russian, gb18030 if it is Chinese)."
        ) from None


def _read_delimited(path: Path, text: str) -> _Table:
    """Read rows of delimited fields."""
    csv.field_size_limit(2**31 - 1)  # the default limit of 128 KiB is too small for some texts
    first, notes = 1, []
    if said := SEPARATOR_LINE.match(text):
        delimiter = said[1].replace("\\t", "\t")
        text, first = text[said.end() :], 2
        notes.append(f"the first line, {said[0].strip()!r}, left out")
    else:
        delimiter = guess_delimiter(text, usual="\t" if ".tsv" in path.suffixes else ",")
    if delimiter != ",":
        notes.append(f"fields separated by {delimiter!r}")
    parse = functools.partial(_parse, path, text, first, delimiter)
    try:
        table, problem = parse(), None
    except DataError as error:
        table, problem = None, error
    # In `a, "b, c"` a quotation mark behind a blank is meant to quote.
    if re.search(re.escape(delimiter) + ' +"', text) and (table is None or _any_field(table, BLANK_QUOTE.match)):
        with suppress(DataError):
            closer = parse(skipinitialspace=True)
            if table is None or not closer.equals(table):
                notes.append(f"blanks after {delimiter!r} left out")
                table = closer
    # Most tab-separated files do not quote; a stray quotation mark then swallows everything up to the next one.
    if delimiter == "\t" and (table is None or _any_field(table, lambda field: "\t" in field)):
        table = parse(quoting=csv.QUOTE_NONE)
        notes.append("quotation marks read as part of the text")
    if table is None:
        raise problem
    return table.mask(table == ""), notes


def _any_field(table: pd.DataFrame, check: Callable[[str], object]) -> bool:
    return any(check(field) for _, column in table.items() for field in column)


def guess_delimiter(text: str, usual: str) -> str:
    """Return the delimiter that cuts the header into several fields, and most of the first rows into as many.

    Where two do so equally well, the usual one of the kind of file is taken.
    """
    scores, start = {",": (0.0, 1)}, text[:1_000_000]
    for delimiter in ",;\t|":
        rows = csv.reader(io.StringIO(start, newline=""), delimiter=delimiter, skipinitialspace=True)
        sizes = [len(row) for row in itertools.islice(filter(None, rows), 50)]
        if sizes and sizes[0] > 1:
            scores[delimiter] = (sizes.count(sizes[0]) / len(sizes), sizes[0])
    return max(scores, key=lambda delimiter: (scores[delimiter][0], delimiter == usual, scores[delimiter][1]))


def _parse(path: Path, text: str, first: int, delimiter: str, **options: Any) -> pd.DataFrame:
    """Cut the text, which starts at line ``first`` of the file, into rows of as many fields as the header has."""
    lines = csv.reader(_lines(text), delimiter=delimiter, strict=True, **options)
    rows, start = [], first
    try:
        for row in lines:
            if len(row) < 2 and not "".join(row).strip():
                continue  # an empty line
            if rows and len(row) != len(rows[0]):
                fields = f"{len(row)} field{'s' * (len(row) != 1)}"
                raise DataError(
                    f"Line {lines.line_num + first - 1} of {path} has {fields}, but the header has {len(rows[0])}: "
                    f"put quotation marks around a text that contains the delimiter {delimiter!r}."
                )
            rows.append(row)
            start = lines.line_num + first
    except csv.Error as error:
        raise DataError(
            f"{path} cannot be read from line {start} on ({error}): correct the quotation marks there."
        ) from None
    if len(rows) < 2:
        raise DataError(f"{path} is empty: it needs a header line and a row for each text.")
    return _frame(rows[0], rows[1:])


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends, as StringIO gives them, which holds a copy of four bytes for each character."""
    return (line[0] for line in _LINE.finditer(text))


def _frame(header: Iterable[Any], rows: list[list[Any]]) -> pd.DataFrame:
    """Make a table of a header and its rows."""
    return pd.DataFrame(rows, columns=column_names(header), dtype=object)


def column_names(header: Iterable[Any]) -> list[str]:
    """Return the names of a header's columns; one without a name is called by its number."""
    names = ["" if name is None else str(name).strip() for name in header]
    return [name or f"column_{number}" for number, name in enumerate(names, start=1)]


def _read_json(path: Path, text: str) -> _Table:
    """Read JSON in a form that pandas writes, or one object per line."""
    try:
        document, halves = load_json(text)
        table, where = _table_of_json(path, document), f"{halves} place{'s' * (halves != 1)}"
        if table is None and "\n" in text.strip():
            raise DataError(
                f"{path} is one JSON document, but no table ({json.dumps(document)[:60]}): write a list with an object "
                "for each row."
            )
    except json.JSONDecodeError as error:
        table = None
        if re.match(r"\s*(\[|\{\s*\n)", text):  # one document, not a line for each row
            raise DataError(
                f"{path} is no valid JSON ({error.msg} at line {error.lineno}, column {error.colno}): "
                "correct it there, or write one object per line."
            ) from None
    if table is None:
        rows, halves = _read_lines(path, text)
        table, where = pd.DataFrame(rows, dtype=object), f"line {in_brief(halves)}"
    return table, [f"half an emoji replaced by '\ufffd' in {where}"] if halves else []


def load_json(text: str) -> tuple[Any, int]:
    """Parse JSON; replace half characters, which no UTF-8 can hold, and return how many there were."""
    value = json.loads(text)
    if not re.search(r"\\u[dD]", text):
        return value, 0
    mended, count = _HALF_CHARACTER.subn("\ufffd", json.dumps(value, ensure_ascii=False))
    return json.loads(mended) if count else value, count


def _table_of_json(path: Path, value: Any) -> pd.DataFrame | None:
    """Make a table of what ``DataFrame.to_json`` writes with any ``orient``; None if the value is something else."""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        if isinstance(value.get("columns"), list):  # "split"
            try:
                return pd.DataFrame(value["data"], columns=value["columns"], dtype=object)
            except ValueError as error:
                raise DataError(
                    f"In {path}, `columns` and `data` do not fit ({first_line(error)}): write it again."
                ) from None
        value = value["data"]  # "table"
    if isinstance(value, list):  # "records"
        number, other = next(((i, row) for i, row in enumerate(value, 1) if not isinstance(row, dict)), (0, None))
        if number and isinstance(other, list):
            raise DataError(
                f"Row {number} of {path} is a list without names of columns, as pandas writes it with orient='values': "
                "write the table with orient='records'."
            )
        if number:
            raise DataError(
                f"Row {number} of {path} is no JSON object ({json.dumps(other)[:60]}): write an object for each row."
            )
        return pd.DataFrame(value, dtype=object)
    parts = list(value.values()) if isinstance(value, dict) else []
    if parts and all(isinstance(part, dict) for part in parts):  # assume more rows than columns
        orient = "index" if len(parts) > len(parts[0]) else "columns"
        return pd.DataFrame.from_dict(value, orient=orient, dtype=object).reset_index(drop=True)
    if len(parts) > 1 and all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
        return pd.DataFrame(value, dtype=object)  # a list for each column, as `Dataset.to_dict` makes them
    return None


def _read_lines(path: Path, text: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Return one object for each line, and the numbers of the lines in which half characters were replaced."""
    rows, mended = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row, halves = load_json(line)
            mended += [number] if halves else []
        except json.JSONDecodeError as error:
            row = f"{error.msg} at column {error.colno}"
        if not isinstance(row, dict):
            raise DataError(f"Line {number} of {path} is no JSON object ({str(row)[:60]}): write one object per line.")
        rows.append(row)
    return rows, mended
