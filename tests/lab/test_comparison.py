"""Compare the runs of a ledger: pooling over distinct seeds, intervals computed by hand, and the written files."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from ftkit import cli
from ftkit.lab.results import LEDGER, append_to_ledger
from ftkit.lab.runs.comparison import compare_runs, format_comparisons, write_comparisons


def enter(folder: Path, id: str, settings: dict[str, Any], by_seed: dict[int, float], /, **other: Any) -> None:
    """Add a run with one method to the ledger."""
    accuracy = sum(by_seed.values()) / len(by_seed)
    score = {"accuracy": accuracy, "ci95": [accuracy - 0.25, accuracy + 0.125], "seeds": list(by_seed)}
    score |= {"by_seed": list(by_seed.values()), "trainable_parameters": 12770, "seconds": 2.0, "peak_rss_mib": 300}
    entry = {"id": id, "notebook": "tiny", "settings": settings, "metrics": {"linear_probe": score}, "error": None}
    append_to_ledger(folder / LEDGER, entry | {"parameters": {}, "identity": f"identity of {id}"} | other)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs at lr=0.1 that share seed 1, one at 0.01 that was repeated, and two without results."""
    enter(tmp_path, "a", {"lr": 0.1, "test_rows": 100, "seed": 0, "num_seeds": 2}, {0: 0.8, 1: 0.9})
    enter(tmp_path, "b", {"lr": 0.1, "test_rows": 100, "seed": 1, "num_seeds": 2}, {1: 0.7, 2: 0.6})
    enter(tmp_path, "c", {"lr": 0.01, "test_rows": 100, "seed": 0, "num_seeds": 2}, {0: 0.1, 1: 0.2})
    enter(tmp_path, "c", {"lr": 0.01, "test_rows": 100, "seed": 0, "num_seeds": 2}, {0: 0.5, 1: 0.75})  # repeated
    enter(tmp_path, "d", {"lr": 0.3, "test_rows": 100, "seed": 0, "num_seeds": 2}, {0: 0.5, 1: 0.5}, error="ValueError")
    enter(tmp_path, "e", {"lr": 0.4, "test_rows": 100}, {0: 0.5}, metrics=None, settings=None)
    return tmp_path


def test_runs_that_differ_only_in_seeds_are_pooled(folder: Path) -> None:
    (comparison,) = compare_runs(folder)
    numbers = comparison.numbers()
    assert list(numbers["lr"]) == [0.01, 0.1]
    assert list(numbers["seeds"]) == [2, 3]
    alone, pooled = (numbers.iloc[i] for i in range(2))
    assert (alone["accuracy"], alone["low"], alone["high"]) == (0.625, 0.375, 0.75)  # the interval of the run itself
    # seed 1 counts once, with its last value: 0.8, 0.7, 0.6; mean 0.7, variance 0.01
    # 1.96 * sqrt(0.01 / 3 + 0.7 * 0.3 / 100) = 1.96 * sqrt(0.0054333) = 0.144474
    assert pooled["accuracy"] == pytest.approx(0.7)
    assert (pooled["low"], pooled["high"]) == pytest.approx((0.555526, 0.844474), abs=1e-6)
    assert (pooled["trainable_parameters"], pooled["seconds"], pooled["peak_rss_mib"]) == (12770, 2, 300)
    table = comparison.table()
    assert list(table.columns[:4]) == ["lr", "method", "accuracy", "95 % interval"]
    assert list(table.iloc[1, :5]) == ["0.1", "linear probe", "0.700", "0.556 to 0.844", "3"]


def test_runs_that_differ_only_in_what_they_keep_are_pooled(tmp_path: Path) -> None:
    enter(tmp_path, "before there was keep", {"lr": 0.1, "test_rows": 100}, {0: 0.8})
    enter(tmp_path, "kept", {"lr": 0.1, "test_rows": 100, "keep": True}, {1: 0.7})
    enter(tmp_path, "not kept", {"lr": 0.1, "test_rows": 100, "keep": False}, {2: 0.6})
    (row,) = compare_runs(tmp_path)[0].rows
    assert (row.settings, row.entry["seeds"]) == ({}, [0, 1, 2])


def test_an_interval_stays_within_0_and_1_and_needs_the_number_of_rows(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((1.0, 0.9)):
        enter(tmp_path, f"a{seed}", {"test_rows": 20, "seed": seed}, {seed: accuracy})
    assert compare_runs(tmp_path)[0].rows[0].entry["ci95"][1] == 1
    for seed, accuracy in enumerate((1.0, 0.9)):
        enter(tmp_path, f"b{seed}", {"seed": seed}, {seed: accuracy}, notebook="other")
    (row,) = compare_runs(tmp_path)[1].rows
    assert (row.entry["accuracy"], row.entry["ci95"], row.entry["seeds"]) == (0.95, None, [0, 1])
    assert "–" in format_comparisons(compare_runs(tmp_path))


def test_runs_without_accuracies_by_seed_are_not_pooled(tmp_path: Path) -> None:
    for accuracy in (0.5, 0.625):
        metrics = {"double": {"accuracy": accuracy}}
        enter(tmp_path, str(accuracy), {"x": 1, "seed": accuracy}, {0: 0}, metrics=metrics)
    (row,) = compare_runs(tmp_path)[0].rows
    assert row.entry == {"accuracy": 0.625}


def test_some_runs_may_lack_a_setting(tmp_path: Path) -> None:
    enter(tmp_path, "a", {"rows": 1000, "data": None, "rates": [0.1]}, {0: 0.5})
    enter(tmp_path, "b", {"rows": 50, "data": "my.csv", "schedule": "linear", "rates": [0.1]}, {0: 0.5})
    enter(
        tmp_path, "c", {"rows": 50, "data": "my.csv", "schedule": "linear", "rates": [0.1]}, {0: 0.5}, ended="stopped"
    )
    table = compare_runs(tmp_path)[0].table()
    assert list(table.columns[:4]) == ["rows", "data", "stopped", "schedule"]
    assert [list(row[:4]) for _, row in table.iterrows()] == [
        ["50", "my.csv", "False", "linear"],
        ["50", "my.csv", "True", "linear"],
        ["1,000", "–", "False", "–"],
    ]


def test_runs_of_an_earlier_version_are_left_out(tmp_path: Path) -> None:
    given = {"data": "my.csv"}
    other = {"data": "other.csv"}
    enter(tmp_path, "old", {"lr": 1}, {0: 0.5}, digests={"notebook": "1"})
    enter(tmp_path, "old data", {"lr": 2, **given}, {0: 0.5}, digests={"notebook": "2", "data": "1"}, parameters=given)
    enter(tmp_path, "other", {"lr": 2, **other}, {0: 0.5}, digests={"notebook": "2", "data": "3"}, parameters=other)
    enter(tmp_path, "new", {"lr": 2, **given}, {0: 0.75}, digests={"notebook": "2", "data": "2"}, parameters=given)
    (comparison,) = compare_runs(tmp_path)
    assert [(row.settings, row.entry["accuracy"]) for row in comparison.rows] == [(given, 0.75), (other, 0.5)]
    assert comparison.notes[1] == "Left out: 2 runs of an earlier version of the notebook or its data."


def test_the_version_of_the_notebook_that_ran_last_counts(tmp_path: Path) -> None:
    for notebook, accuracy in (("1", 0.25), ("2", 0.5), ("1", 0.75)):
        enter(tmp_path, f"of {notebook}", {"lr": 1}, {0: accuracy}, digests={"notebook": notebook})
    (comparison,) = compare_runs(tmp_path)
    assert [row.entry["accuracy"] for row in comparison.rows] == [0.75]


def test_a_score_on_another_split_than_test_names_the_split(tmp_path: Path) -> None:
    score = {"accuracy": 0.75, "ci95": [0.5, 1.0], "seeds": [0], "by_seed": [0.75], "split": "validation"}
    enter(tmp_path, "panel", {"lr": 1}, {0: 0.75}, metrics={"panel": score})
    assert "panel (validation)" in format_comparisons(compare_runs(tmp_path))


def test_only_the_named_runs_are_compared(folder: Path) -> None:
    (comparison,) = compare_runs(folder, {"identity of a"})
    assert [(row.name, row.entry["accuracy"]) for row in comparison.rows] == [("linear_probe", pytest.approx(0.85))]
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_runs(folder, {"identity of d"})


def test_the_command_prints_and_writes_all_notebooks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enter(folder, "f", {"model": "a <b>", "data": "/home/somebody/my.csv"}, {0: 0.5}, notebook="other")
    enter(folder, "g", {"model": "long" * 30, "data": "/home/somebody/my.csv"}, {0: 0.5}, notebook="other")
    assert cli.main(["compare", str(folder)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^tiny\n +lr +method.*\n *0\.01 +linear probe +0\.625 +0\.375 to 0\.750 +2", out, re.MULTILINE)
    assert re.search(r"^other\n +model +method", out, re.MULTILINE)
    assert out.count("95 % interval: for one run") == 2
    assert out.splitlines()[-2:] == [str(folder / "compare.csv"), str(folder / "compare.html")]
    numbers = pd.read_csv(folder / "compare.csv")
    assert list(numbers["notebook"]) == ["tiny", "tiny", "other", "other"]
    assert list(numbers["low"]) == pytest.approx([0.375, 0.555526, 0.25, 0.25], abs=1e-6)
    assert {path.name for path in folder.iterdir()} == {LEDGER, f".{LEDGER}.lock", "compare.csv", "compare.html"}


def test_a_folder_that_can_only_be_read_is_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert cli.main(["compare", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "linear probe" in out
    assert re.fullmatch(r"ftkit: \S+compare\.html cannot be written \(Permission denied\): give a folder .*\.\n", err)
    assert not list(folder.glob("compare*"))


def test_the_page_needs_no_network(folder: Path) -> None:
    enter(folder, "f", {"model": "a <b>", "data": "/home/somebody/my.csv"}, {0: 0.5}, notebook="other")
    enter(folder, "g", {"model": "a <b>", "data": "/home/somebody-else/my.csv"}, {0: 0.5}, notebook="other")
    enter(folder, "h", {"model": "long" * 30, "data": "/home/somebody/my.csv"}, {0: 0.5}, notebook="other")
    _, path = write_comparisons(compare_runs(folder), folder)
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    assert not page.select("script, link, iframe, b")
    assert not re.search(r"@import|url\(", path.read_text(encoding="utf-8"))
    assert [heading.get_text() for heading in page.select("h2")] == ["tiny", "other"]
    figures = page.select("img")
    assert len(figures) == 2
    assert all(figure["src"].startswith("data:image/png;base64,") for figure in figures)
    drawn = "lr=0.01, linear probe 0.62 (seeds 0.50, 0.75), lr=0.1, linear probe 0.70."
    assert figures[0]["alt"] == f"Accuracy, with 95 % interval: {drawn}"
    text = page.get_text(" ", strip=True)
    assert "0.1 linear probe 0.700 0.556 to 0.844 3 12,770 2.0" in text
    assert "a <b>" in text and "long" * 30 in text
    assert "somebody" not in path.read_text(encoding="utf-8")
    assert figures[1]["alt"].count("data=…/my.csv") == 3  # the same name in two folders: both are drawn
    assert text.count("95 % interval: for one run") == 2


def test_values_that_are_nearly_the_same_look_different(tmp_path: Path) -> None:
    for lr in (0.1234567, 0.12345678):
        enter(tmp_path, str(lr), {"lr": lr}, {0: 0.5})
    assert [row.name for row in compare_runs(tmp_path)[0].rows] == [
        "lr=0.1234567, linear_probe",
        "lr=0.12345678, linear_probe",
    ]


def test_nothing_to_compare_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(tmp_path)]) == 1
    assert re.fullmatch(r"ftkit: There is nothing to compare: .*ledger\.jsonl has no .*\n", capsys.readouterr().err)
    enter(tmp_path, "a", {}, {0: 0.5}, error="ValueError")
    assert cli.main(["compare", str(tmp_path)]) == 1
    assert not list(tmp_path.glob("compare*"))
