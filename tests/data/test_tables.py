"""Files of every kind that people have, judged by content: read where it is plain, else refused for the true reason."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from openpyxl import Workbook
from tiny_texts import ROWS, csv_of, write

from ftkit.data import text
from ftkit.data.tables import read_table
from ftkit.errors import DataError

FRAME = pd.DataFrame(ROWS, columns=["text", "label"])


def load(path: Path, capsys: pytest.CaptureFixture[str], **columns: str) -> tuple[list[tuple[str, str]], str]:
    """The rows of all splits, sorted, and the line that was printed."""
    capsys.readouterr()
    splits = text.load_text(path, **columns)
    names = splits["train"].features["label"].names
    rows = [(row["text"], names[row["label"]]) for split in splits.values() for row in split]
    return sorted(rows), capsys.readouterr().out


def zip_of(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


def excel(frame: pd.DataFrame = FRAME) -> bytes:
    buffer = io.BytesIO()
    frame.to_excel(buffer, index=False)
    return buffer.getvalue()


# Spreadsheets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "said"), [("a.xlsx", ""), ("a.csv", "read as .xlsx, which its content is")])
def test_a_spreadsheet_is_read_whatever_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    rows, out = load(write(tmp_path, excel(), name), capsys)
    assert rows == sorted(ROWS)
    assert said in out
    assert "guessed" not in out


def test_a_spreadsheet_as_people_make_them_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Workbook()
    book.active.title = "empty"
    sheet = book.create_sheet("reviews")
    sheet.append([])  # an empty line above the header, an empty column, a remark, numbers as labels
    sheet.append([None, "text", "label", None, None, "date"])
    for i, (content, label) in enumerate(ROWS):
        remark = "ask Ann" if i == 7 else None
        sheet.append([None, content, int(label == "pos"), None, remark, pd.Timestamp(2026, 1, 1 + i)])
    sheet.append([None, None, None, None, None, "end"])
    book.create_sheet("notes").append(["nothing"])
    book.save(tmp_path / "a.xlsx")
    rows, out = load(tmp_path / "a.xlsx", capsys)
    assert rows == sorted((content, str(int(label == "pos"))) for content, label in ROWS)
    assert "sheet 'reviews' read, not 'empty', 'notes'" in out
    assert "column 'date' holds values of several types" in out
    assert "dropped 1 without text" in out


def test_cells_of_a_spreadsheet_keep_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = FRAME.assign(label=FRAME["label"].map({"pos": "01", "neg": "None"}))
    rows, _ = load(write(tmp_path, excel(frame), "a.xlsx"), capsys)
    assert {label for _, label in rows} == {"01", "None"}  # neither 1 nor missing


# Compressed and mistaken files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv.gz", "A.TSV.GZ", "a.jsonl.gz", "a.xlsx.gz", "a.parquet.gz", "a.csv"])
def test_a_file_compressed_with_gzip_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    content = {
        ".csv": csv_of(ROWS).encode(),
        ".tsv": csv_of(ROWS, delimiter="\t").encode(),
        ".jsonl": FRAME.to_json(orient="records", lines=True).encode(),
        ".xlsx": excel(),
        ".parquet": FRAME.to_parquet(),
    }[Path(name.lower().removesuffix(".gz")).suffix]
    rows, out = load(write(tmp_path, gzip.compress(content), name), capsys)
    assert rows == sorted(ROWS)
    assert "unpacked with gzip" in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(FRAME.to_parquet(), "read as .parquet", id="parquet"),
        (FRAME.to_json(orient="records", lines=True), "read as .json"),
        (FRAME.to_json(orient="records", indent=2), "read as .json"),
    ],
)
def test_another_kind_of_table_named_csv_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, said: str
) -> None:
    rows, out = load(write(tmp_path, content), capsys)
    assert rows == sorted(ROWS)
    assert f"{said}, which its content is" in out


def test_the_named_index_of_a_parquet_file_is_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(write(tmp_path, FRAME.set_index("text").to_parquet(), "a.parquet"), capsys)[0] == sorted(ROWS)


def tar_of_nothing() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("reviews"))
    return buffer.getvalue()


NO_TABLES = {
    "truncated": (b"PK\x03\x04\x14\x00\x06", "a spreadsheet or another ZIP archive by its first bytes, but damaged"),
    "zip": (zip_of(a_csv="text,label"), r"is a ZIP archive \(it holds a\.csv\): unpack it"),
    "ods": (zip_of(mimetype="x", content_xml="x"), r"is an OpenDocument file .*: save it as \.xlsx or \.csv"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 rest", r"an old Excel file \(\.xls\) or one with a password"),
    "xz": (b"\xfd7zXZ\x00 rest", "compressed with xz, whatever its name says: unpack it"),
    "bzip2": (b"BZh91AY&SY rest", "compressed with bzip2"),
    "gzip": (gzip.compress(b"text,label\n" * 99)[:-20], r"compressed with gzip, but damaged \(Compressed file ended"),
    "tar": (tar_of_nothing(), "is a tar archive: unpack it"),
    "picture": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\xff",
        "holds no text that can be read, but other data: check the file",
    ),
    "parquet": (b"PAR1 rest", r"cannot be read as a Parquet file \(.*\): write it again"),
    "pdf": (b"%PDF-1.7 rest", "is a PDF document"),
    "html": (b"\n<!DOCTYPE html>\n<html>", "is a web page, whatever its name says: download the file itself"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "only a pointer to a file in Git LFS"),
}


@pytest.mark.parametrize("kind", NO_TABLES)
def test_what_is_no_table_is_refused_for_the_true_reason(tmp_path: Path, kind: str) -> None:
    content, message = NO_TABLES[kind]
    with pytest.raises(DataError, match=message) as caught:
        text.load_text(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_damaged_spreadsheet_is_refused_in_a_sentence(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook>")
    with pytest.raises(DataError, match=r"a\.xlsx cannot be read as an Excel file \(.*\): save it again\.$"):
        text.load_text(write(tmp_path, buffer.getvalue(), "a.xlsx"))


# Encodings --------------------------------------------------------------------------------------------------

FOREIGN = [(f"{word} é文字🙂 {i}", label) for i in range(4) for word, label in (("bon", "好"), ("mal", "坏"))]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-8"])
def test_encodings_that_are_plain_from_the_content_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    rows, out = load(write(tmp_path, csv_of(FOREIGN).encode(encoding)), capsys)
    assert rows == sorted(FOREIGN)
    assert (f"decoded from {encoding.upper()}" in out) == (encoding[:5] != "utf-8")
    assert "guessed" not in out  # the mark is no part of the first column's name


def test_text_with_few_latin_letters_is_recognised_as_utf_16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("文" * (i + 1), "好坏"[i % 2]) for i in range(12)]
    content = csv_of(rows, "文字,标签").encode("utf-16-le")
    assert load(write(tmp_path, content), capsys, text="文字", label="标签")[0] == sorted(rows)


def test_a_null_character_does_not_make_a_file_utf_16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = load(write(tmp_path, csv_of([("a \0 b", "pos"), *ROWS])), capsys)
    assert ("a \0 b", "pos") in rows
    assert "decoded" not in out


def test_a_damaged_utf_16_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"begins like UTF-16, but is damaged \(truncated data\): save it again"):
        text.load_text(write(tmp_path, csv_of(ROWS).encode("utf-16")[:-1]))


# Delimiters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["sep=;\n", "sep=;\r\n", '"sep=;"\n', "SEP=;\n", "\ufeffsep=;\n"])
def test_the_first_line_of_excel_names_the_separator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: str
) -> None:
    rows, out = load(write(tmp_path, mark + csv_of([("a, b, c", "pos"), *ROWS], delimiter=";")), capsys)
    assert rows == sorted([("a, b, c", "pos"), *ROWS])
    assert "the first line, " in out
    assert "left out; fields separated by ';'" in out


def test_a_tab_in_the_first_line_of_excel_is_written_in_two_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mark in ("sep=\t\n", "sep=\\t\n"):
        assert load(write(tmp_path, mark + csv_of(ROWS, delimiter="\t")), capsys)[0] == sorted(ROWS)


def test_lines_are_counted_from_the_top_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Line 23 of .* has 3 fields"):
        text.load_text(write(tmp_path, "sep=;\n" + csv_of([*ROWS, ("a", "b", "c")], delimiter=";")))
    with pytest.raises(DataError, match="from line 23 on"):
        text.load_text(write(tmp_path, "sep=;\n" + csv_of([*ROWS, ('"a', "b")], delimiter=";")))


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [
        ('"Which of these? a; b; c",Again?', ","),  # quoted
        ("Which of these? a; b; c,Again?", ","),  # not quoted, but no row has three fields with ";"
        ('"a\tb\tc","d|e|f"', ","),
        ("film, book or play;class", ";"),
        ("film, book, play or song\tclass", "\t"),
        ("film|class; or type", "|"),
    ],
)
def test_a_header_may_contain_other_delimiters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], header: str, delimiter: str
) -> None:
    body = csv_of(ROWS, "", delimiter)
    assert load(write(tmp_path, header + body), capsys)[0] == sorted(ROWS)


def test_the_content_says_how_a_tsv_file_is_delimited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(write(tmp_path, csv_of(ROWS), "a.tsv"), capsys)[0] == sorted(ROWS)


def test_blanks_after_commas_do_not_keep_quotation_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quoted = [(f'"{content}, ""really"""', f' "{label}"') for content, label in ROWS]
    rows, out = load(write(tmp_path, csv_of(quoted, 'text, "label"')), capsys)
    assert rows == sorted((f'{content}, "really"', label) for content, label in ROWS)
    assert "blanks after ',' left out" in out
    assert "guessed" not in out


def test_quotation_marks_that_quote_no_whole_field_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(label, f' "{content}" he said') for content, label in ROWS]
    loaded, out = load(write(tmp_path, csv_of(rows, "label,text")), capsys)
    assert loaded == sorted((content.strip(), label) for label, content in rows)
    assert "blanks" not in out


def test_quotation_marks_after_blanks_inside_a_text_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [('"He said, ""no"", again"', "neg"), *ROWS]
    rows, out = load(write(tmp_path, csv_of(said)), capsys)
    assert ('He said, "no", again', "neg") in rows
    assert "blanks" not in out


def test_empty_lines_and_lines_of_blanks_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(write(tmp_path, csv_of(ROWS).replace("\n", "\n\n  \n")), capsys)[0] == sorted(ROWS)


# JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_as_pandas_writes_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], orient: str, indent: int | None, name: str
) -> None:
    frame = FRAME.assign(n=range(20))
    plain, _ = load(write(tmp_path, frame.to_json(orient="records", lines=True), "lines.json"), capsys)
    path = write(tmp_path, frame.to_json(orient=orient, indent=indent), name)
    assert load(path, capsys)[0] == plain == sorted(ROWS)
    in_order = text.load_text(tmp_path / "lines.json")
    assert all(text.load_text(path)[split]["text"] == in_order[split]["text"] for split in in_order)


def test_json_of_a_list_for_each_column_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, json.dumps(FRAME.to_dict(orient="list")), "a.json")
    assert load(path, capsys)[0] == sorted(ROWS)


def test_blanks_and_empty_lines_in_json_lines_do_not_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = "\n\n".join(f'{{ "text": "{content}", "label": "{label}" }} ' for content, label in ROWS)
    for name in ("a.jsonl", "a.json"):
        assert load(write(tmp_path, content, name), capsys)[0] == sorted(ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": }]', r"is no valid JSON \(Expecting value at line 2, column 11\): correct it"),
        ('{\n "text": {"0": "a",}\n}', r"is no valid JSON \(.* at line 2, column \d+\)"),
        ("[]", "is empty"),
        ("[1, 2]", r"Row 1 of .* is no JSON object \(1\): write an object for each row"),
        (
            '[{"text": "a", "label": "b"}, null]',
            r"Row 2 of .* is no JSON object \(null\): write an object for each row",
        ),
        (FRAME.to_json(orient="values"), r"Row 1 of .* is a list without names of columns, as pandas writes it with o"),
        (
            FRAME.to_json(orient="values", indent=2),
            "Row 1 of .* is a list without names .*: write the table with orient",
        ),
        (FRAME["text"].to_json(indent=2), r"is one JSON document, but no table \(.*: write a list with an object for"),
        ('{\n "text": "a",\n "label": "b"\n}', "is one JSON document, but no table"),
        ('{ "text": "a" }\n{ "text": \n', "Line 2 of .* is no JSON object"),
        ("text,label\na,b\n", r"Line 1 of .* is no JSON object \(Expecting value"),
        ('{"columns": ["a", "b"], "data": [[1]]}', "`columns` and `data` do not fit .*: write it again"),
    ],
)
def test_faulty_json_is_refused_in_a_sentence(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        text.load_text(write(tmp_path, content, "a.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lines", [True, False])
def test_half_an_emoji_is_repaired_wherever_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: bool
) -> None:
    rows = [{"text": f"{t} \U0001f642", "label": y, "note": "x", "tags": ["y"], "n\ud83d": 1} for t, y in ROWS[2:]]
    rows = [{"text": t, "label": y} for t, y in ROWS[:2]] + rows
    for row in rows[::2]:
        row["label"] += "\ud83d"
    rows[1]["text"] = "\ude42 x"
    rows[3]["note"], rows[5]["tags"] = "x\ud83d y", ["\ud83d"]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), "a.json")
    loaded, out = load(path, capsys)
    assert {label for _, label in loaded} == {"neg", "pos\ufffd"}
    assert ("\ufffd x", "neg") in loaded
    assert ("bad film 1 \U0001f642", "neg") in loaded  # a whole one stays
    assert f"half an emoji replaced by '\ufffd' in {'line 1, 2, 3 and 17 more' if lines else '31 places'};" in out
    train = text.load_text(path)["train"]
    assert train.column_names == ["text", "label", "note", "tags", "n\ufffd"]


def test_tabs_cut_a_tsv_file_though_commas_would_do_it_as_well(tmp_path: Path) -> None:
    path = tmp_path / "quotes.tsv"
    path.write_text("text, long\tlabel\nno, he said\tneg\nyes, she said\tpos\n", encoding="utf-8")
    table, _ = read_table(path)
    assert table.columns.tolist() == ["text, long", "label"]
    assert table["label"].tolist() == ["neg", "pos"]


def test_an_index_that_is_a_column_too_is_left_out(tmp_path: Path) -> None:
    pd.DataFrame({"id": [3, 4], "text": ["a", "b"]}).set_index("id", drop=False).to_parquet(tmp_path / "a.parquet")
    table, _ = read_table(tmp_path / "a.parquet")
    assert table["id"].tolist() == [3, 4]
