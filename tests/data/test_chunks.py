"""Rows read piece by piece are those that read_table reads, whatever the file looks like."""

import gzip
from pathlib import Path

import pandas as pd
import pytest
from tiny_texts import ROWS, csv_of, write

from ftkit.data import chunks
from ftkit.data.chunks import cell_text, in_chunks, open_rows, text_lines
from ftkit.data.tables import read_table
from ftkit.errors import DataError

PLAIN = {
    "a.csv": csv_of(ROWS).encode(),
    "mark.csv": b"\xef\xbb\xbf" + csv_of(ROWS).encode(),
    "gaps.csv": b'text,label,\n\n"a, b",x,1\n\n"two\r\nlines ""q""",,2\n,y,3\n',
    "crlf.csv": csv_of(ROWS).replace("\n", "\r\n").encode(),
    "semicolon.csv": csv_of(ROWS, delimiter=";").encode(),
    "a.tsv": csv_of(ROWS, delimiter="\t").encode(),
    "quotes.tsv": b'text\tlabel\nan "open quote\tx\nb" c\ty\n',
    "packed.csv.gz": gzip.compress(csv_of(ROWS).encode()),
    "a.jsonl": b'{"text": "a \\ud83d\\ude00", "label": 1}\n\n{"text": null, "more": [1]}\n{"label": "x"}\n',
    "packed.ndjson.gz": gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'),
}
CAREFUL = {
    "sep.csv": b"sep=;\ntext;label\na;x\nb;y\n",
    "blanks.csv": b'text,label\na, "x, y"\nb, "z"\n',
    "lone.tsv": b'text\tlabel\n"a b\tx\nc\ty\n',
    "wide.csv": csv_of(ROWS).encode("utf-16"),
    "json.csv": b'[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]',
    "one.jsonl": b'{"text": "a", "label": "x"}\n',
    "half.jsonl": b'{"text": "a \\ud83d", "label": 1}\n{"text": "b", "label": 2}\n',
    "a.json": b'[{"text": "a", "label": 1.0}, {"text": "b"}]',
}


def rows_of(path: Path) -> list[list[object]]:
    rows = open_rows(path)
    found = [list(row) for row in rows.read(*rows.columns)]
    assert len(found) == rows.count
    return [rows.columns, *found]


def expected(path: Path) -> list[list[object]]:
    table, _ = read_table(path)
    return [list(table.columns), *table.astype(object).where(table.notna(), None).to_numpy().tolist()]


@pytest.mark.parametrize("name", [*PLAIN, *CAREFUL])
def test_rows_are_those_of_read_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, (PLAIN | CAREFUL)[name], name)
    wanted = expected(path)
    whole = []
    monkeypatch.setattr(chunks, "read_table", lambda path: whole.append(path) or read_table(path))
    assert rows_of(path) == wanted
    assert bool(whole) == (name in CAREFUL)  # only what needs care is held in memory


def test_parquet_is_read_in_batches_with_or_without_an_index(tmp_path: Path) -> None:
    table = pd.DataFrame({"text": ["a", None, "c"], "label": pd.Categorical(["x", "y", "x"])}, index=[5, 6, 9])
    for index in (None, "number"):
        path = tmp_path / f"{index}.parquet"
        table.rename_axis(index).to_parquet(path)
        rows = open_rows(path)
        assert list(rows.read("label", "text")) == [("x", "a"), ("y", None), ("x", "c")]
        assert ("number" in rows.columns) == (index is not None)
        assert len(rows.columns) == 2 + (index is not None)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "There is no file"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"text,label\n", "is empty"),
        ("late.csv", b"text,label\n" + b"a,x\n" * 5000 + b"a,x,y\n", "Line 5002 .* has 3 fields"),
        ("latin.csv", b"text,label\n" + b"a,x\n" * 5000 + b"\xe9,x\n", "is not UTF-8 .line 5002"),
        ("late.jsonl", b'{"text": "a"}\n' * 4 + b"[1]\n", "Line 5 of"),
        ("cut.csv.gz", gzip.compress(csv_of(ROWS).encode(), mtime=0)[:-9], "damaged"),
        ("page.csv", b"<html>,a\n1,2\n", "web page"),
        ("a.parquet", b"text", "is not a Parquet file"),
        ("a.txt", b"text", "unsupported file type"),
    ],
)
def test_a_damaged_file_is_refused_before_the_first_row(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        write(tmp_path, content, name)
    with pytest.raises(DataError, match=said):
        open_rows(tmp_path / name)


def test_columns_are_named_in_the_refusal_of_one_that_is_missing_or_twice_there(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path, "text,label,label\na,x,y\nb,y,x\n"))
    with pytest.raises(
        DataError, match=r"has no column 'texts': did you mean 'text'\? It has 'text', 'label', 'label'"
    ):
        rows.read("texts")
    with pytest.raises(DataError, match="two columns called 'label'"):
        rows.read("label")
    assert list(rows.head(1)) == ["text"]


def test_a_cell_as_text() -> None:
    cells = [" a\n", None, float("nan"), 2.0, 2.5, 7, True, "é".encode()]
    assert [cell_text(cell, 1, "text", "f") for cell in cells] == ["a", "", "", "2", "2.5", "7", "True", "é"]
    for cell, said in (([1], "lists or objects .row 3"), ({"a": 1}, "lists or objects"), (b"\xff", "not all UTF-8")):
        with pytest.raises(DataError, match=said):
            cell_text(cell, 3, "text", "f")


def test_lines_and_chunks() -> None:
    lines = ["\ufeffa\r\n".encode(), b"\n", b"b"]
    assert list(in_chunks(text_lines(lines, "stdin"), 2)) == [["a", ""], ["b"]]
    with pytest.raises(DataError, match="Line 2 of stdin is not UTF-8"):
        list(text_lines([b"a\n", b"\xff"], "stdin"))
