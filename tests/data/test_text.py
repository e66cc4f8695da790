"""Loading, cleaning, splitting, encoding and padding of texts: real assets, and a tiny file for each fault."""

import functools
import gc
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from tiny_texts import ROWS, csv_of, write
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftkit.data import text, text_readers
from ftkit.data.assets import registry
from ftkit.errors import DataError

# Assets -----------------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test")
SIZES = {  # train, validation, test
    "movie-sentiment": (7048, 1008, 2014),
    "bbc-topics": (1489, 212, 426),
    "reuters8": (4874, 541, 2189),
    "chinese-reviews": (12155, 1736, 3472),
}
# The first 16 hex digits of the SHA-256 of all texts, in order: the same rows on every machine.
DIGESTS = {
    "movie-sentiment": "5065eadba00ecbc7",
    "bbc-topics": "18d400feaf233efd",
    "reuters8": "ab31e5780d201e5e",
    "chinese-reviews": "8f7a8ca006217377",
}
every_asset = pytest.mark.parametrize("name", SIZES)


@functools.cache
def load(name: str) -> datasets.DatasetDict:
    return text.load_text(name)


def texts(splits: datasets.DatasetDict) -> list[str]:
    return [text for split in SPLITS for text in splits[split]["text"]]


@every_asset
def test_asset_has_the_expected_rows_labels_and_card(name: str) -> None:
    splits = load(name)
    assert tuple(splits[split].num_rows for split in SPLITS) == SIZES[name]
    for split in SPLITS:
        names = splits[split].features["label"].names
        assert names == sorted(names)
        assert set(splits[split]["label"]) == set(range(len(names)))
    assert splits["train"].info.license == registry.get(name).licence != ""
    assert splits["test"].info.citation == registry.get(name).citation != ""
    assert splits["test"].info.description == registry.get(name).description != ""


@every_asset
def test_asset_gives_the_same_rows_on_every_machine(name: str) -> None:
    assert hashlib.sha256("\n".join(texts(load(name))).encode()).hexdigest()[:16] == DIGESTS[name]


@every_asset
def test_no_text_is_in_two_splits(name: str) -> None:
    sets = [set(load(name)[split]["text"]) for split in SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert len(sets[0]) == SIZES[name][0]  # and no text is repeated in train
    assert all(text == text.strip() != "" for text in sets[0])


@every_asset
def test_smaller_splits_are_the_first_rows_of_larger_ones(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = text.load_text(name, train=100, test=50)
    more = text.load_text(name, train=400, validation=20)
    assert few["train"]["text"] == load(name)["train"]["text"][:100]
    assert more["train"]["text"] == load(name)["train"]["text"][:400]
    assert few["validation"]["text"] == load(name)["validation"]["text"]
    assert more["validation"]["text"] == load(name)["validation"]["text"][:20]
    assert few["test"]["text"] == load(name)["test"]["text"][:50]
    assert f"100 of {SIZES[name][0]:,} train" in capsys.readouterr().out


@every_asset
def test_the_first_rows_have_the_class_shares_of_the_split(name: str) -> None:
    for split in SPLITS:
        labels = np.array(load(name)[split]["label"])
        classes = np.unique(labels)
        counts = np.cumsum(labels[:, None] == classes, axis=0)
        expected = np.arange(1, len(labels) + 1)[:, None] * (counts[-1] / len(labels))
        assert np.abs(counts - expected).max() < 4


def test_shares_are_70_10_20_in_each_class() -> None:
    counts = {split: Counter(load("bbc-topics")[split]["label"]) for split in SPLITS}
    for label in range(5):
        total = sum(counts[split][label] for split in SPLITS)
        for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
            assert abs(counts[split][label] - share * total) <= 1


def test_another_seed_splits_the_same_rows_differently() -> None:
    other = text.load_text("bbc-topics", seed=1)
    assert sorted(texts(other)) == sorted(texts(load("bbc-topics")))
    assert set(other["test"]["text"]) != set(load("bbc-topics")["test"]["text"])


def test_a_published_test_split_stays_whole_for_every_seed() -> None:
    published, _, _ = text_readers.read_asset("reuters8")
    published = sorted(published[published["split"] == "test"]["text"].str.strip())
    assert sorted(load("reuters8")["test"]["text"]) == published
    assert sorted(text.load_text("reuters8", seed=1, train=10)["test"]["text"]) == published


@pytest.mark.parametrize(
    ("name", "rows", "positive"),
    [
        ("movie-sentiment", 10_072, 50),
        ("product-sentiment", 2_985, 59),
        ("editorial-sentiment", 2_970, 40),
        ("tweet-sentiment", 3_432, 68),
    ],
)
def test_sentiment_is_the_sign_of_a_clear_rating(name: str, rows: int, positive: int) -> None:
    table, notes, _ = text_readers.read_asset(name)
    assert len(table) == rows
    assert round(100 * (table["label"] == "positive").mean()) == positive
    assert ((table["rating"] > 0) == (table["label"] == "positive")).all()
    assert table["rating"].abs().min() >= 0.5
    assert not table["text"].str.contains(r"&\w+;|&#\d+;").any()
    assert any("mean rating between -0.5 and 0.5" in note for note in notes)


def test_articles_of_either_encoding_are_decoded() -> None:
    table, notes, _ = text_readers.read_asset("bbc-topics")
    assert len(table) == 2225
    assert table["text"].str.contains("£").sum() > 300
    assert not table["text"].str.contains("Â£").any()
    assert "1 of them not UTF-8, decoded as Latin-1" in notes


def test_damaged_tweets_are_repaired_and_keep_the_confidence_of_the_raters() -> None:
    table, notes, _ = text_readers.read_asset("airline-tweets")
    assert Counter(table["label"]) == {"negative": 16_186, "neutral": 15_018, "positive": 6_954}
    assert table["text"].map(str.isascii).all()
    assert table["text"].str.contains("haven't").sum() > 50
    assert any("removed from 4,954 texts" in note for note in notes)
    assert table["confidence"].dropna().between(0, 1).all()
    assert table["confidence"].isna().sum() == 5460


def test_standard_splits_have_the_published_sizes() -> None:
    for name, train, test in (("newsgroups", 11_293, 7_528), ("reuters52", 6_532, 2_568)):
        table, _, _ = text_readers.read_asset(name)
        assert Counter(table["split"]) == {"train": train, "test": test}


def test_a_class_with_one_training_row_is_reported_to_have_no_validation_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    splits = text.load_text("reuters52", train=5000)
    platinum = splits["train"].features["label"].str2int("platinum")
    assert platinum not in splits["validation"]["label"]
    assert "no validation row for classes with one row: 'platinum' (1)" in capsys.readouterr().out


def test_report_counts_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    text.load_text("chinese-reviews", train=1000)
    assert capsys.readouterr().out == (
        "chinese-reviews: 35,124 rows read; dropped 1 without text, 225 whose text has several labels, "
        "17,535 duplicates; 1,000 of 12,155 train / 1,736 validation / 3,472 test\n"
    )
    assert sum(SIZES["chinese-reviews"]) == 35_124 - 1 - 225 - 17_535


def test_assets_of_other_kinds_and_unknown_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"The asset 'emoji' is of kind images.*movie-sentiment"):
        text.load_text("emoji")
    with pytest.raises(DataError, match="did you mean 'movie-sentiment'"):
        text.load_text("movies-sentiment")
    with pytest.raises(DataError, match="2,014 test rows: test=5000 must be from 1 to 2014"):
        text.load_text("movie-sentiment", test=5000)
    with pytest.raises(DataError, match="train=0"):
        text.load_text("movie-sentiment", train=0)


# Local files ------------------------------------------------------------------------------------------------


def test_every_file_type_gives_the_same_rows(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS, columns=["text", "label"])
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    loaded = [text.load_text(path) for path in sorted(tmp_path.iterdir())]
    assert len(loaded) == 4
    assert {split: loaded[0][split].num_rows for split in SPLITS} == {"train": 14, "validation": 2, "test": 4}
    assert loaded[0]["train"].features["label"].names == ["neg", "pos"]
    for other in loaded[1:]:
        assert all(other[split].to_dict() == loaded[0][split].to_dict() for split in SPLITS)


def test_columns_are_guessed_and_reported_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(i, f"{text} and more", i % 7, label, "x") for i, (text, label) in enumerate(ROWS)]
    path = write(tmp_path, csv_of(rows, "id,Review,stars_of_ten,Sentiment,note"))
    guessed = text.load_text(path)
    out = capsys.readouterr().out
    assert "texts from column 'Review' (guessed" in out
    assert "labels from column 'Sentiment' (guessed" in out
    assert guessed["train"].column_names == ["text", "label", "id", "stars_of_ten", "note"]

    path = write(tmp_path, csv_of(rows, "id,words,n,good,note"))  # no usual name
    assert text.load_text(path)["train"].to_dict()["text"] == guessed["train"].to_dict()["text"]
    assert "labels from column 'good'" in capsys.readouterr().out

    text.load_text(path, text="words", label="good")
    assert "(guessed" not in capsys.readouterr().out


def test_a_named_column_replaces_the_one_called_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(text, i % 2, label) for i, (text, label) in enumerate(ROWS)]
    splits = text.load_text(write(tmp_path, csv_of(rows, "text,label,mood")), label="mood")
    assert splits["train"].column_names == ["text", "label"]
    assert splits["train"].features["label"].names == ["neg", "pos"]
    assert "column 'label' left out" in capsys.readouterr().out


def test_delimiters_bom_quotes_newlines_and_scripts_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [('"ein; zwei\ndrei ""vier"" 🙂"', "gut"), *((f"文字 {i}", "坏") for i in range(3))]
    rows += [(f"text {i}", "gut") for i in range(3)]
    path = write(tmp_path, "\ufeff" + csv_of(rows, delimiter=";"))
    splits = text.load_text(path)
    assert 'ein; zwei\ndrei "vier" 🙂' in texts(splits)
    assert "文字 2" in texts(splits)
    assert splits["test"].features["label"].names == ["gut", "坏"]
    out = capsys.readouterr().out
    assert "fields separated by ';'" in out
    assert "(guessed" not in out  # the byte order mark is not part of the first column's name


def test_a_stray_quotation_mark_in_a_tsv_file_swallows_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f'"Wow {i}', "pos") for i in range(4)] + [(f'no" {i}', "neg") for i in range(4)]
    splits = text.load_text(write(tmp_path, csv_of(rows, delimiter="\t"), "reviews.tsv"))
    assert sorted(texts(splits)) == sorted(text for text, _ in rows)
    assert "quotation marks read as part of the text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1], ["0", "1"]),
        ([10, 9], ["9", "10"]),
        ([True, False], ["False", "True"]),
        ([1.0, 0.0], ["0", "1"]),
        ([0.5, -0.5], ["-0.5", "0.5"]),
    ],
)
def test_labels_of_other_types_are_in_their_natural_order(
    tmp_path: Path, labels: list[object], names: list[str]
) -> None:
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(8)], "label": labels * 4})
    frame.to_parquet(tmp_path / "a.parquet")
    assert text.load_text(tmp_path / "a.parquet")["train"].features["label"].names == names


def test_a_missing_label_leaves_the_others_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(8)], "label": [0, 1] * 4})
    frame.loc[0, "label"] = None
    frame.to_parquet(tmp_path / "a.parquet")
    assert text.load_text(tmp_path / "a.parquet")["train"].features["label"].names == ["0", "1"]
    assert "dropped 1 without label" in capsys.readouterr().out


def test_incomplete_repeated_and_contradictory_rows_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = [("", "pos"), ("  ", "neg"), ("lone", ""), (" good film 1 ", "pos"), ("odd", "pos"), ("odd", "neg")]
    splits = text.load_text(write(tmp_path, csv_of(ROWS + extra)))
    out = capsys.readouterr().out
    assert "26 rows read; dropped 2 without text, 1 without label, 2 whose text has several labels, 1 dupl" in out
    assert sorted(texts(splits)) == sorted(text for text, _ in ROWS)


def test_splits_of_a_file_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(*row, "test" if i >= 16 else "train") for i, row in enumerate(ROWS)]
    rows += [("good film 9", "pos", "train")]  # also in test
    splits = text.load_text(write(tmp_path, csv_of(rows, "text,label,split")))
    assert set(splits["test"]["text"]) == {text for text, _ in ROWS[16:]}
    assert splits["train"].num_rows + splits["validation"].num_rows == 16
    assert "dropped 1 whose text is held out" in capsys.readouterr().out
    text.load_text(write(tmp_path, csv_of([(*row, "fold1") for row in ROWS], "text,label,split")))
    assert "column 'split' left out" in capsys.readouterr().out


def test_mixed_values_of_json_become_strings_and_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": t, "label": y, "n": i if i % 2 else "x"}) for i, (t, y) in enumerate(ROWS)]
    splits = text.load_text(write(tmp_path, "\n".join(lines), "a.jsonl"))
    assert "x" in splits["train"]["n"]
    assert "column 'n' holds values of several types" in capsys.readouterr().out


# The type of a column is that of all rows.


@pytest.mark.parametrize("filled", [0, 7, 19])
@pytest.mark.parametrize("columns", [{}, {"text": "text", "label": "label"}])
def test_a_column_that_is_hardly_ever_filled_stops_no_load(tmp_path: Path, filled: int, columns: dict) -> None:
    rows = [(*row, "ask Ann" if i == filled else "") for i, row in enumerate(ROWS)]
    path = write(tmp_path, csv_of(rows, "text,label,remark"))
    for seed in range(6):  # the split that has the remark changes
        splits = text.load_text(path, seed=seed, **columns)
        assert [splits[split].num_rows for split in SPLITS] == [14, 2, 4]
        assert len({str(splits[split].features) for split in SPLITS}) == 1
        assert [row["remark"] for split in SPLITS for row in splits[split] if row["remark"]] == ["ask Ann"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, *[None] * 18, 2.5], "float64"),
        ([1] * 19 + [2.5], "float64"),
        ([None] * 19 + [True], "bool"),
        ([2**60 + 1] + [2.5] * 19, "string"),
        ([{"a": 1}] * 19 + [{"b": "x"}], "{'a': Value('int64'), 'b': Value('string')}"),
        ([{"a": 1}] * 19 + [{"a": "x"}], "string"),
        ([["a"]] * 19 + [[1]], "string"),
    ],
)
def test_a_column_has_one_type_for_all_splits(tmp_path: Path, values: list[object], kind: str) -> None:
    lines = [json.dumps({"text": t, "label": y, "n": n}) for (t, y), n in zip(ROWS, values, strict=True)]
    for seed in range(3):
        splits = text.load_text(write(tmp_path, "\n".join(lines), "a.jsonl"), seed=seed)
        assert len({str(splits[split].features) for split in SPLITS}) == 1
        assert kind in str(splits["train"].features["n"])


def test_an_empty_column_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, csv_of([(*row, "", "x", "", "", "") for row in ROWS], "text,label,a,b,,,c"))
    assert text.load_text(path)["train"].column_names == ["text", "label", "b"]
    assert "columns 'a', 'column_5', 'column_6' and 1 more left out (empty)" in capsys.readouterr().out


def test_columns_of_types_that_data_sets_lack_become_strings(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS, columns=["text", "label"])
    frame = frame.assign(year=pd.period_range("2001", periods=20, freq="Y"), kind=pd.Categorical(["a", "b"] * 10))
    frame.to_parquet(tmp_path / "a.parquet")
    train = text.load_text(tmp_path / "a.parquet")["train"]
    assert all(year.isdecimal() and len(year) == 4 for year in train["year"])
    assert set(train["kind"]) == {"a", "b"}


def test_ids_of_more_than_64_bits_are_kept_as_strings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": t, "label": y, "id": 2**63 + i}) for i, (t, y) in enumerate(ROWS)]
    splits = text.load_text(write(tmp_path, "\n".join(lines), "a.jsonl"))
    assert {i for split in SPLITS for i in splits[split]["id"]} == {str(2**63 + i) for i in range(20)}
    assert "column 'id' holds numbers of more than 64 bits, all read as strings" in capsys.readouterr().out


# Labels are never made equal or kept apart in silence.


def test_the_order_of_classes_does_not_depend_on_the_process(tmp_path: Path) -> None:
    rows = [(f"text {i}", label) for i, label in enumerate(["0", "1", "nan", "2", "10", "x", "-inf"] * 4)]
    names = text.load_text(write(tmp_path, csv_of(rows)))["train"].features["label"].names
    assert names == ["-inf", "0", "1", "2", "10", "nan", "x"]
    # the names come from a set, whose order differs from process to process
    assert all(text.sort_names(order) == names for order in itertools.permutations(names))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["pos", "POS", "neg", "neg"], "'POS' (5) / 'pos' (5) (if they are one class, write them alike"),
        (["1", "1.0", "2", "2"], "'1' (5) / '1.0' (5) (if"),
        (["1", "01", "2", "2"], "'01' (5) / '1' (5) (if"),
        (["caf\u00e9", "cafe\u0301", "bar", "bar"], "/ 'caf\u00e9' (5) (if"),
        (["a  b", "a b", "c", "c"], "'a  b' (5) / 'a b' (5) (if"),
        (["a\u200b", "a", "c", "c"], "'a' (5) / 'a\\u200b' (5) (if"),
        (["a", "A", "b", "B"], "'A' (5) / 'a' (5), 'B' (5) / 'b' (5) (if"),
    ],
)
def test_classes_that_look_alike_are_kept_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: list[str], said: str
) -> None:
    rows = [(f"text {i}", label) for i, label in enumerate(labels * 5)]
    splits = text.load_text(write(tmp_path, csv_of(rows)))
    assert set(splits["train"].features["label"].names) == set(labels)
    out = capsys.readouterr().out
    assert "classes that differ only in case, blanks or the form of a number: " in out
    assert said in out


@pytest.mark.parametrize("name", ["nan", "NaN", "None", "N/A", "null"])
def test_a_class_that_may_be_a_missing_label_is_kept_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    rows = [*ROWS, *((f"text {i}", name) for i in range(5))]
    splits = text.load_text(write(tmp_path, csv_of(rows)))
    assert set(splits["train"].features["label"].names) == {"neg", "pos", name}
    assert f"class '{name}' (5) may mean that there is no label" in capsys.readouterr().out


def test_ordinary_classes_get_no_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text.load_text(write(tmp_path, csv_of(ROWS)))
    assert capsys.readouterr().out == f"{tmp_path / 'reviews.csv'}: 20 rows read; 14 train / 2 validation / 4 test\n"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "category.parquet"])
def test_blanks_around_labels_are_removed_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    frame = pd.DataFrame([(t, f"{y} " if i < 6 else y) for i, (t, y) in enumerate(ROWS)], columns=["text", "label"])
    if name == "a.csv":
        frame.to_csv(tmp_path / name, index=False)
    elif name == "a.jsonl":
        frame.to_json(tmp_path / name, orient="records", lines=True)
    else:
        frame.astype({"label": "category"} if name == "category.parquet" else {}).to_parquet(tmp_path / name)
    splits = text.load_text(tmp_path / name)
    assert splits["train"].features["label"].names == ["neg", "pos"]
    assert "labels changed: 'neg ' into 'neg' (3), 'pos ' into 'pos' (3);" in capsys.readouterr().out


def test_an_empty_category_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame([*ROWS, ("x", " "), ("y", "")], columns=["text", "label"]).astype({"label": "category"})
    frame.to_parquet(tmp_path / "a.parquet")
    assert text.load_text(tmp_path / "a.parquet")["train"].features["label"].names == ["neg", "pos"]
    assert "dropped 2 without label" in capsys.readouterr().out


def test_numbers_that_become_equal_to_strings_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [1, "1", 1.0, 2, "2.0"] * 4
    lines = [json.dumps({"text": t, "label": y}) for (t, _), y in zip(ROWS, labels, strict=True)]
    splits = text.load_text(write(tmp_path, "\n".join(lines), "a.jsonl"))
    assert splits["train"].features["label"].names == ["1", "2", "2.0"]
    out = capsys.readouterr().out
    assert "labels changed: 1 into '1' (8);" in out
    assert "'2' (4) / '2.0' (4)" in out


FAULTS = {
    "empty": ("", "reviews.csv is empty"),
    "header only": ("text,label\n", "is empty: it needs a header line and a row"),
    "no text": (csv_of([("", "a"), ("", "b")]), "None of the 2 rows .* has a text"),
    "no label": (csv_of([("a", ""), ("b", "")]), "None of the 2 rows .* has a label"),
    "one class": (csv_of(ROWS[::2]), "needs two classes, but the training rows of .* have only 'pos'"),
    "small class": (
        csv_of([*ROWS, ("x", "meh"), ("y", "meh")]),
        r"too small to split, 'meh' \(2\): give each at least 3",
    ),
    "regression": (
        csv_of([(f"t{i}", i / 7) for i in range(1, 9)]),
        "8 distinct values in 8 rows, so they look like quantities",
    ),
    "ids": (csv_of([(f"t{i}", i % 300) for i in range(1500)]), "300 distinct values in 1,500 rows"),
    "ragged": (csv_of([*ROWS, ("well, no", "neg")]), "Line 22 of .* has 3 fields, but the header has 2: put quot"),
    "open quote": (
        csv_of([*ROWS[:4], ('"never closed', "neg"), *ROWS[4:]]),
        r"from line 6 on \(unexpected end of data\)",
    ),
    "no header": (
        csv_of(ROWS[1:], ",".join(ROWS[0])),
        "no header line, because 'pos' is both a column name and a label",
    ),
    "twin columns": (csv_of([("a", "b")], "text,text"), "two columns of the same name"),
    "one column": ("text\na\nb\n", "no column of labels besides 'text'"),
    "latin-1": ("text,label\nfine,a\ncafé,b\n".encode("latin-1"), r"not UTF-8 \(line 3, byte 0xe9\).*iconv -f cp1252"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_csv_file_is_refused(tmp_path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    with pytest.raises(DataError, match=message) as caught:
        text.load_text(write(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": \n',
            "Line 2 of .* is no JSON object .Expecting value at column",
        ),
        ("a.jsonl", '["a", 1]\n', r"Row 1 of .* is no JSON object \(.a.\)"),
        ("a.jsonl", "\n", "is empty"),
        ("a.jsonl", '{"a": 1, "b": 2}\n', "has no column of texts: name one with `text=`"),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', "texts of .* are lists or objects"),
        ("a.jsonl", '{"text": "a", "label": [1, 2]}\n', "labels of .* are lists or objects"),
        ("a.parquet", "no parquet", "a.parquet is not a Parquet file"),
        ("a.xlsx", "no spreadsheet", r"a.xlsx is not an Excel file \(.xlsx\), whatever its name says: check the file"),
        ("a.txt", "text,label", "has an unsupported file type: save it as one of .csv"),
        ("a.txt.gz", "text,label", "has an unsupported file type: save it as one of .csv"),
    ],
)
def test_other_faulty_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        text.load_text(str(write(tmp_path, content, name)))
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*reviews\.csv"):
        text.load_text("reviews.csv")
    path = write(tmp_path, csv_of(ROWS))
    with pytest.raises(DataError, match=r"no column 'lable': did you mean 'label'\? It has 'text', 'label'\."):
        text.load_text(path, label="lable")
    with pytest.raises(DataError, match="cannot be both"):
        text.load_text(path, text="text", label="text")


# The hub ----------------------------------------------------------------------------------------------------


def hub_split(rows: list[tuple[str, int]], names: Sequence[str] = ("b", "a")) -> datasets.Dataset:
    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    return datasets.Dataset.from_dict(
        {"sentence": [t for t, _ in rows], "label": [y for _, y in rows]}, features=features
    )


def test_hub_splits_and_label_names_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    rows = [(f"text {i}", i % 2) for i in range(30)]
    hub = datasets.DatasetDict(
        train=hub_split(rows[:20]), validation=hub_split(rows[20:]), test=hub_split([("?", -1)]), extra=hub_split(rows)
    )
    monkeypatch.delenv("FTKIT_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: calls.append((args, options)) or hub)
    splits = text.load_text("owner/name:config")
    assert calls == [(("owner/name", "config"), {})]  # in particular no trust_remote_code
    assert splits["train"].features["label"].names == ["b", "a"]
    assert set(splits["test"]["text"]) == {text for text, _ in rows[20:]}
    assert (splits["train"].num_rows, splits["validation"].num_rows) == (18, 2)
    out = capsys.readouterr().out
    for said in (
        "split 'extra' left out",
        "1 without label",
        "validation split is used as the test split",
        "'sentence'",
    ):
        assert said in out


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("FTKIT_OFFLINE", raising=False)
    with pytest.raises(
        DataError,
        match=r"^The hub data set 'owner/name' could not be loaded \(no route\): check its name and the network",
    ):
        text.load_text("owner/name")
    monkeypatch.setenv("FTKIT_OFFLINE", "1")
    with pytest.raises(DataError, match="unset FTKIT_OFFLINE"):
        text.load_text("owner/name")


# Encoding and batches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(registry.fetch("minilm"))


def test_encode_keeps_the_rows_and_reports_what_it_cuts(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = text.load_text("movie-sentiment", train=200, validation=20, test=20)
    capsys.readouterr()
    encoded = text.encode(splits, tokenizer, max_length=24)
    assert encoded["train"].features["labels"].names == ["negative", "positive"]
    assert encoded["train"]["labels"] == splits["train"]["label"]
    whole = [tokenizer(text)["input_ids"] for text in splits["train"]["text"]]
    for row, ids in zip(encoded["train"], whole, strict=True):
        assert row["input_ids"] == (ids if len(ids) <= 24 else [*ids[:23], tokenizer.sep_token_id])
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    cut = sum(len(ids) > 24 for ids in whole)
    assert 0 < cut < 200
    assert f"texts cut at 24 tokens: {cut} of 200 train, " in capsys.readouterr().out
    text.encode(splits, tokenizer, max_length=512)
    assert capsys.readouterr().out == ""


def rows_of(texts: list[str]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)}, features=features)


def test_unknown_tokens_are_counted_once_for_all_splits(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    # Three different texts of one unknown token each; the first stands in both splits.
    emoji = ["\U0001fae0", "\U0001fae1", "\U0001fae2"]
    splits = {"train": rows_of([*emoji[:2], "good"]), "test": rows_of([emoji[2], emoji[0], "bad"])}
    text.encode(splits, tokenizer)
    assert capsys.readouterr().out == (
        "67% of the tokens are unknown to the model ([UNK]), and 3 different texts became equal to another: "
        "take a model that knows this script\n"
    )
    text.encode({"train": rows_of(["\U0001fae0 is it", "fine"])}, tokenizer)
    assert capsys.readouterr().out == (
        "25% of the tokens are unknown to the model ([UNK]): take a model that knows this script\n"
    )


def test_few_unknown_tokens_get_no_word(tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]) -> None:
    text.encode({"train": rows_of(["\U0001fae0" + " good" * 19, "Good", "good"])}, tokenizer)
    assert capsys.readouterr().out == ""
    text.encode({"train": rows_of(["\U0001fae0" + " good" * 18])}, tokenizer)
    assert "5% of the tokens are unknown" in capsys.readouterr().out


def test_a_tokenizer_that_knows_every_byte_gets_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(registry.fetch("smollm2"))
    text.encode({"train": rows_of(["\U0001fae0", "\u5dee", "\x00"])}, tokenizer)
    assert "unknown" not in capsys.readouterr().out


def test_encode_refuses_what_the_model_cannot_read(tokenizer: PreTrainedTokenizerBase) -> None:
    splits = text.load_text("movie-sentiment", train=2, validation=2, test=2)
    with pytest.raises(DataError, match="max_length=513 is more than the 512 tokens"):
        text.encode(splits, tokenizer, max_length=513)
    with pytest.raises(DataError, match="The split 'train' has no column 'txt', only text, label, rating"):
        text.encode(splits, tokenizer, text="txt")


def test_texts_are_cut_between_tokens_for_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    texts = ["A fine film, and long, too", "短い映画だ。とても良い", "dull"]
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0, 1, 0]}, features=features)
    tokenizer = AutoTokenizer.from_pretrained(registry.fetch("minilm"))
    short = text.shorten({"train": rows, "test": rows.take(1)}, tokenizer, max_length=3)
    assert list(short["train"]["text"]) == ["A fine film", texts[1][:3], "dull"]
    assert short["train"].features == features
    assert list(short["train"]["label"]) == [0, 1, 0]
    assert capsys.readouterr().out == "texts cut after 3 tokens: 2 of 3 train, 1 of 1 test\n"


def test_texts_are_cut_on_the_side_of_the_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(registry.fetch("minilm"), truncation_side="left")
    short = text.shorten({"train": rows_of(["A fine film, and long, too", "dull"])}, tokenizer, max_length=3)
    assert list(short["train"]["text"]) == ["long, too", "dull"]
    assert capsys.readouterr().out == "texts cut after 3 tokens: 1 of 2 train\n"


# Many rows --------------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that keeps what it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.batches = tokenizer, []

    def __call__(self, texts: str | list[str], **options: object) -> object:
        self.batches += [texts] if isinstance(texts, list) else []
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every split counts as large; the folder for its file."""
    monkeypatch.setattr(text, "_MAX_ROWS_IN_MEMORY", 0)
    monkeypatch.setattr(text, "scratch_folder", lambda: tmp_path)
    return tmp_path


def test_rows_in_a_file_are_those_in_memory(
    tokenizer: PreTrainedTokenizerBase, on_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    splits = {split: load("chinese-reviews")[split].take(1200) for split in ("train", "test")}  # many unknown tokens
    capsys.readouterr()  # what was read
    stored = text.encode(splits, tokenizer, max_length=24)
    said = capsys.readouterr().out
    monkeypatch.setattr(text, "_MAX_ROWS_IN_MEMORY", 10**6)
    kept = text.encode(splits, tokenizer, max_length=24)
    assert "texts cut at 24" in said
    assert capsys.readouterr().out == said
    files = sorted(path.name for path in on_disk.iterdir())
    assert sorted(Path(file["filename"]).name for rows in stored.values() for file in rows.cache_files) == files
    assert len(files) == 2
    for split in splits:
        assert stored[split].to_dict() == kept[split].to_dict()
        assert stored[split].features == kept[split].features
        assert not kept[split].cache_files
        # what the tokenizer and datasets make of all rows at once
        whole = datasets.Dataset.from_dict(dict(tokenizer(splits[split]["text"][:], truncation=True, max_length=24)))
        assert stored[split].remove_columns("labels").to_dict() == whole.to_dict()
        assert stored[split].remove_columns("labels").features == whole.features


def test_encode_holds_few_texts_at_once_and_reads_only_the_part_that_is_taken(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    counting = Counting(tokenizer)
    rows = rows_of([f"good film {i}" for i in range(2500)] + [None])  # the last row can't be encoded
    assert text.encode({"train": rows.take(2100)}, counting)["train"].num_rows == 2100
    assert sum(map(len, counting.batches)) == 2100
    assert max(map(len, counting.batches)) == 1000
    with pytest.raises(DataError, match="In row 2500 of the split 'train' the text is None"):
        text.encode({"train": rows}, counting)
    with pytest.raises(DataError, match="In row 1 of the split 'train' the text is None"):
        text.shorten({"train": rows.select([0, 2500])}, counting, max_length=5)


def test_texts_are_counted_as_cut_as_if_they_were_tokenised_whole(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [" ".join(["good"] * n) for n in (5, 6, 7, 6, 8)]  # of 6 words and two special tokens none is cut
    splits = {"train": rows_of(texts)}
    text.encode(splits, tokenizer, max_length=8)
    assert capsys.readouterr().out == "texts cut at 8 tokens: 2 of 5 train\n"
    columns = tokenizer(texts, truncation=True, max_length=8)
    slow = type("Slow", (dict,), {"is_fast": False})(columns)
    assert text._count_longer(texts, slow, tokenizer, 8) == text._count_longer(texts, columns, tokenizer, 8) == 2


def test_a_split_without_rows_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="The split 'test' has no rows: leave it out"):
        text.encode({"train": rows_of(["good"]), "test": rows_of(["good"]).take(0)}, tokenizer)


def test_the_garbage_collector_is_left_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    seen = []

    def watched(texts: str | list[str], **options: object) -> object:
        seen.append(gc.isenabled())
        if texts == ["bad"]:
            raise RuntimeError("broken")
        return tokenizer(texts, **options)

    counting = Counting(watched)
    counting.model_max_length = 512
    counting.unk_token_id = counting.bos_token_id = counting.eos_token_id = None
    text.encode({"train": rows_of(["good"])}, counting)
    with pytest.raises(RuntimeError, match="broken"):
        text.encode({"train": rows_of(["bad"])}, counting)
    assert (seen, gc.isenabled()) == ([False, False], True)
    gc.disable()
    try:
        text.encode({"train": rows_of(["good"])}, counting)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_leaves_no_file(tokenizer: PreTrainedTokenizerBase, on_disk: Path) -> None:
    rows = rows_of(["good"] * 1500 + [None])
    with pytest.raises(DataError, match="In row 1500"):
        text.encode({"train": rows}, tokenizer)
    assert list(on_disk.iterdir()) == []


def test_a_full_disk_is_one_sentence(tokenizer: PreTrainedTokenizerBase, on_disk: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(DataError, match=r"^The 1,500 tokenised rows of 'train' cannot be written to .*FTKIT_CACHE"):
            text.encode({"train": rows_of(["good film"] * 1500)}, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(on_disk.iterdir()) == []


def test_shorten_keeps_columns_in_their_place(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = load("movie-sentiment")["test"].shuffle(seed=0).take(30)
    short = text.shorten({"test": rows}, tokenizer, max_length=4)["test"]
    assert short.features == rows.features
    assert short.info.citation == rows.info.citation
    assert short.remove_columns("text").to_dict() == rows.remove_columns("text").to_dict()
    assert all(whole.startswith(part) for part, whole in zip(short["text"], rows["text"], strict=True))
