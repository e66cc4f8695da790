"""Columns of texts and labels, guessed or named, and the types in which they come."""

from pathlib import Path

import pandas as pd
import pytest
from patience import run_to_the_end
from tiny_texts import ROWS, csv_of, write

from ftkit.data import text
from ftkit.errors import DataError

# Guesses ----------------------------------------------------------------------------------------------------

INTENTS = ("greeting_and_small_talk", "show_balance_of_account", "transfer_money_to_account")
UUID = "0f8fad5b-d9cb-469f-a165-708677289{:03d}"
GUESSES = {  # header, row of number i and class k, the column of texts, the column of labels
    "date": ("id,date,headline,topic", lambda i, k: (i, f"2020-01-{i + 1:02d}T00:00:00+00:00", f"news {i}", k), 2, 3),
    "intent": ("utterance,intent", lambda i, k: (f"hi {i}", INTENTS[k]), 0, 1),
    "intent of no usual name": ("utterance,action", lambda i, k: (f"hi {i}", INTENTS[k]), 0, 1),
    "label before the text": ("Category,words", lambda i, k: (f"the category of number {k}", f"hi {i}"), 1, 0),
    "long names of classes": ("words,kind", lambda i, k: (f"hi {i}", f"people who like the number {k}"), 0, 1),
    "uuid": ("key,words,kind", lambda i, k: (UUID.format(i), f"hi {i}", k), 1, 2),
    "address": ("link,words,kind", lambda i, k: (f"https://example.org/reviews/film/{i}", f"hi {i}", k), 1, 2),
    "e-mail": ("from,words,kind", lambda i, k: (f"somebody.number{i}@example.org", f"hi {i}", k), 1, 2),
    "time": ("at,words,kind", lambda i, k: (f"2020-01-01 10:{i:02d}:00 +0000", f"hi {i}", k), 1, 2),
    "chinese": ("作者,内容,类", lambda i, k: (f"王{i}", f"这个酒店非常好{i}", "好坏差"[k]), 1, 2),
}


@pytest.mark.parametrize("guess", GUESSES)
def test_texts_are_told_from_names_dates_and_addresses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], guess: str
) -> None:
    header, row, text_place, label_place = GUESSES[guess]
    rows = [row(i, i % 3) for i in range(24)]
    splits = text.load_text(write(tmp_path, csv_of(rows, header)))
    assert {t for split in splits.values() for t in split["text"]} == {row[text_place] for row in rows}
    assert set(splits["train"].features["label"].names) == {str(row[label_place]) for row in rows}
    assert f"texts from column '{header.split(',')[text_place]}' (guessed: name another" in capsys.readouterr().out


def test_a_column_named_like_a_label_is_texts_only_if_named(tmp_path: Path) -> None:
    path = write(tmp_path, csv_of([(f"{words} really", label) for words, label in ROWS], "topic,kind"))
    with pytest.raises(DataError, match="has no column of texts: name one with `text=`, out of 'topic', 'kind'"):
        text.load_text(path, label="kind")
    assert text.load_text(path, text="topic", label="kind")["train"].num_rows == 14


@pytest.mark.parametrize(
    ("rows", "columns", "guesses"),
    [
        ([(f"t {i}", i) for i in range(300)], {}, "texts from column 'words' and labels from column 'n'"),
        ([(f"t {i}", i) for i in range(300)], {"text": "words"}, "were labels from column 'n'"),
        ([("same", i % 2) for i in range(20)], {"label": "n"}, "were texts from column 'words'"),
    ],
)
def test_a_failed_load_names_what_was_guessed(
    tmp_path: Path, rows: list[tuple], columns: dict[str, str], guesses: str
) -> None:
    with pytest.raises(DataError) as caught:
        text.load_text(write(tmp_path, csv_of(rows, "words,n")), **columns)
    assert guesses in str(caught.value)
    assert str(caught.value).endswith("(`-p text=NAME -p label=NAME` on the command line).")


def test_a_failed_load_of_named_columns_speaks_of_no_guess(tmp_path: Path) -> None:
    path = write(tmp_path, csv_of([(f"t {i}", i) for i in range(300)], "words,n"))
    with pytest.raises(DataError, match=r"not classes: name another column with `label=`\.$"):
        text.load_text(path, text="words", label="n")


@pytest.mark.parametrize("columns", [{"label": "toxic"}, {"text": "words"}])
def test_a_class_may_be_called_like_its_column(tmp_path: Path, columns: dict[str, str]) -> None:
    rows = [(content, "toxic" if label == "neg" else "fine") for content, label in ROWS]
    splits = text.load_text(write(tmp_path, csv_of(rows, "words,toxic")), **columns)
    assert splits["train"].features["label"].names == ["fine", "toxic"]


def test_twin_columns_are_left_out_unless_they_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, csv_of([(*row, "x", "y") for row in ROWS], "text,label,note,note"))
    assert text.load_text(path)["train"].column_names == ["text", "label"]
    assert "columns 'note' left out (several have this name)" in capsys.readouterr().out
    with pytest.raises(DataError, match="two columns of the same name in 'text', 'label', 'note', 'note': rename one"):
        text.load_text(path, label="note")


def test_a_cell_of_a_million_characters_is_guessed_in_time_that_grows_with_it() -> None:
    """One word, such as a picture in base64 or a number, with a character at its end that makes it no such word."""
    code = """
import pandas as pd
from ftkit.data.text_readers import choose_columns
for word in ("1", "a", "_", "/a", "@", " "):
    cells = [word * (1_000_000 // len(word)) + "\\N{SNOWMAN}" + str(i) for i in range(2)]
    table = pd.DataFrame({"words": ["a good film", "a bad film"], "blob": cells, "kind": ["x", "y"]})
    print(choose_columns(table, "a table", None, "kind")[1])
"""
    assert len(run_to_the_end(code).splitlines()) == 6


# Bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["object", "category"])
def test_bytes_are_decoded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    frame = pd.DataFrame([(f"{t} é".encode(), y.encode(), b"train") for t, y in ROWS])
    frame.columns = ["words", "kind", "split"]
    frame.astype({"kind": kind}).to_parquet(tmp_path / "a.parquet")
    splits = text.load_text(tmp_path / "a.parquet")
    assert {t for split in splits.values() for t in split["text"]} == {f"{t} é" for t, _ in ROWS}
    assert splits["train"].features["label"].names == ["neg", "pos"]
    out = capsys.readouterr().out
    assert "column 'words' decoded from bytes; column 'kind' decoded from bytes" in out


def test_bytes_that_are_no_text_stay_bytes_or_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS, columns=["text", "label"]).assign(picture=b"\x89PNG\xff")
    frame.to_parquet(tmp_path / "a.parquet")
    assert set(text.load_text(tmp_path / "a.parquet")["train"]["picture"]) == {b"\x89PNG\xff"}
    with pytest.raises(DataError, match=r"The texts of .* are bytes that are not all UTF-8: save them as strings"):
        text.load_text(tmp_path / "a.parquet", text="picture")
