"""Sequences of tasks, loaded from files, and their encoded rows."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from tiny_sequences import SIZES, encode, make_sequence, make_splits

from ftkit.data.tasks import Task, TaskSequence, growing_classes, many_domains, many_tasks
from ftkit.errors import DataError


def write(folder: Path, name: str, classes: list[str], rows_per_class: int = 20) -> Path:
    texts = [(f"{name} text {c} {i}", c) for c in classes for i in range(rows_per_class)]
    path = folder / f"{name}.csv"
    pd.DataFrame(texts, columns=["text", "label"]).to_csv(path, index=False)
    return path


def test_files_become_tasks_with_their_own_heads(tmp_path: Path) -> None:
    paths = [write(tmp_path, "films", ["bad", "good"]), write(tmp_path, "news", ["art", "bad", "sport"])]
    sequence = many_tasks(paths).draw(train=10, validation=4, test=5, seed=0)
    assert sequence.names == ["films.csv", "news.csv"]
    assert list(sequence.heads.values()) == [2, 3]
    assert len(set(sequence.class_names)) == 5
    assert sequence.class_names[0].endswith("films.csv: bad")
    assert [len(task.splits["train"]) for task in sequence.tasks] == [10, 10]
    assert not sequence.growing


def test_domains_share_a_head_and_must_share_their_classes(tmp_path: Path) -> None:
    paths = [write(tmp_path, name, ["bad", "good"]) for name in ("films", "books")]
    sequence = many_domains(paths)
    assert sequence.heads == {"all": 2}
    assert sequence.class_names == ["bad", "good"]
    with pytest.raises(DataError, match="give each a head of its own with `many_tasks`"):
        many_domains([paths[0], write(tmp_path, "news", ["art", "sport"])])


def test_classes_are_divided_into_equal_parts(tmp_path: Path) -> None:
    path = write(tmp_path, "news", list("abcdef"))
    sequence = growing_classes(path, 3)
    assert sequence.names == ["a to b", "c to d", "e to f"]
    assert sequence.growing
    assert sequence.class_names == ["a to b: a", "a to b: b", "c to d: c", "c to d: d", "e to f: e", "e to f: f"]
    for task, names in zip(sequence.tasks, ("ab", "cd", "ef"), strict=True):
        assert task.classes == list(names)
        for row in task.splits["train"]:
            assert row["text"].split()[2] == task.classes[row["label"]]
        assert set(task.splits["train"]["label"]) == {0, 1}
        assert [len(task.splits[split]) for split in ("train", "validation", "test")] == [28, 4, 8]
    with pytest.raises(DataError, match="cannot be divided into 4 equal parts"):
        growing_classes(path, 4)


def test_the_seed_decides_the_training_rows_only() -> None:
    sequence = make_sequence()
    sizes = {"train": 10, "validation": 4, "test": 100}
    first, again, other = (sequence.draw(**sizes, seed=seed) for seed in (0, 0, 1))
    for given, a, b, c in zip(sequence.tasks, first.tasks, again.tasks, other.tasks, strict=True):
        assert [len(a.splits[split]) for split in SIZES] == [10, 4, 12]  # there are no more
        drawn, same, different = (task.splits["train"]["text"][:] for task in (a, b, c))
        assert drawn == same != different
        assert set(drawn) <= set(given.splits["train"]["text"])
        for split in ("validation", "test"):
            texts = a.splits[split]["text"][:]
            assert texts == c.splits[split]["text"][:] == given.splits[split]["text"][: len(texts)]


def test_the_order_can_be_reversed() -> None:
    sequence = make_sequence("growing")
    assert sequence.reversed().names == sequence.names[::-1]
    assert sequence.reversed().growing
    assert sequence.reversed().class_names == [
        name for head in ("head 2", "head 1", "head 0") for name in sequence.class_names if name.startswith(head)
    ]


def test_rows_have_their_task_and_output_column() -> None:
    sequence = make_sequence()
    assert sequence.class_names == [f"head {h}: {c}" for h, c in [(0, "a"), (0, "b"), (1, "c"), (1, "d"), (1, "e"),
                                                                  (2, "f"), (2, "g")]]  # fmt: skip
    for number, (task, start) in enumerate(zip(encode(sequence), (0, 2, 5), strict=True)):
        for split, size in SIZES.items():
            rows, texts = task[split], sequence.tasks[number].splits[split]
            assert len(rows) == size
            assert {row["task"] for row in rows} == {number}
            assert [row["labels"] for row in rows] == [start + label for label in texts["label"]]
            assert rows[0]["input_ids"][0] == int(texts["text"][0].split()[0][1:])
    shared = encode(make_sequence("many_domains"))
    assert Counter(row["labels"] for task in shared for row in task["train"]).keys() == {0, 1}


def test_an_invalid_sequence_is_refused() -> None:
    task = Task("a", make_splits(["x", "y"], 0), "a")
    with pytest.raises(DataError, match=r"\['a'\]: give two or more"):
        TaskSequence((task,))
    with pytest.raises(DataError, match="each with its own name"):
        TaskSequence((task, task))
