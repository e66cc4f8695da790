"""Sequences of tasks: a head for each task, one head for all, or one head that grows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ftkit.data import text
from ftkit.errors import DataError

MANY_TASKS = ("movie-sentiment", "bbc-topics", "reuters8", "newsgroups")

MANY_DOMAINS = ("movie-sentiment", "product-sentiment", "editorial-sentiment", "tweet-sentiment")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the task.
        splits: "train", "validation" and "test" with the columns ``text`` and ``label`` (a ClassLabel).
        head: name of the head that answers it; tasks of one head have the same classes.
    """

    name: str
    splits: Mapping[str, datasets.Dataset]
    head: str

    @property
    def classes(self) -> list[str]:
        return self.splits["train"].features["label"].names


@dataclass(frozen=True)
class TaskSequence:
    """Tasks in the order they are learned. All their classes are columns of one row of scores, head after head.

    Attributes:
        tasks: two or more.
        growing: a row is scored among the classes of all tasks learned so far and is not told its task
            (class-incremental learning); else among those of its own head.

    Raises:
        DataError: fewer than two tasks, two of one name, tasks of one head whose classes differ.
    """

    tasks: tuple[Task, ...]
    growing: bool = False

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(names) < 2 or len(set(names)) < len(names):
            raise DataError(f"the tasks are {names}: give two or more, no two of one name")
        for task in self.tasks:
            first = next(other for other in self.tasks if other.head == task.head)
            if first.classes != task.classes:
                raise DataError(
                    f"{first.name} has the classes {first.classes} and {task.name} has {task.classes}: "
                    "give each a head of its own, with many_tasks"
                )

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [task.name for task in self.tasks]

    @property
    def heads(self) -> dict[str, int]:
        """The number of classes of each head, by its name, in the order of the columns."""
        return {task.head: len(task.classes) for task in self.tasks}

    @property
    def class_names(self) -> list[str]:
        """Of all columns; with several heads after the name of theirs."""
        classes = {task.head: task.classes for task in self.tasks}
        return [f"{head}: {name}" if len(classes) > 1 else name for head in classes for name in classes[head]]

    def draw(self, *, train: int, validation: int, test: int, seed: int) -> "TaskSequence":
        """The same tasks with at most so many rows of each split.

        Args:
            train: rows of each task to learn from, drawn by the seed.
            validation, test: rows of each task, the first ones: the same for every seed.
            seed: of the draw.
        """
        tasks = []
        for task in self.tasks:
            splits = {**task.splits, "train": task.splits["train"].shuffle(seed=seed)}
            sizes = {"train": train, "validation": validation, "test": test}
            fewer = {split: splits[split].take(min(size, len(splits[split]))) for split, size in sizes.items()}
            tasks.append(replace(task, splits=fewer))
        return replace(self, tasks=tuple(tasks))

    def reversed(self) -> "TaskSequence":
        """The same tasks, the last one first."""
        return replace(self, tasks=self.tasks[::-1])

    def encode(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 128) -> list[dict[str, Rows]]:
        """The rows of each task by split, as ``fit`` takes them.

        Args:
            tokenizer, max_length: as for ``data.encode``.

        Returns:
            A dict of splits a task. A row has what the tokenizer gives, ``labels``, its class as a column of all
            scores, and ``task``, the number of its task.
        """
        starts, start = {}, 0
        for head, size in self.heads.items():
            starts[head], start = start, start + size
        encoded = []
        for number, task in enumerate(self.tasks):
            splits = text.encode(task.splits, tokenizer, max_length=max_length)
            encoded.append(
                {
                    split: [{**row, "labels": row["labels"] + starts[task.head], "task": number} for row in rows]
                    for split, rows in splits.items()
                }
            )
        return encoded


def many_tasks(sources: Sequence[str | Path] = MANY_TASKS) -> TaskSequence:
    """Different tasks, with a head each, and all their rows.

    Args:
        sources: what ``load_text`` reads: assets, files of the reader's, hub data sets.

    Raises:
        DataError: as ``load_text``, and as TaskSequence.
    """
    return TaskSequence(tuple(Task(_name(source), text.load_text(source), str(source)) for source in sources))


def many_domains(sources: Sequence[str | Path] = MANY_DOMAINS) -> TaskSequence:
    """One task in different domains, with one head for all; arguments and errors as of ``many_tasks``."""
    return TaskSequence(tuple(Task(_name(source), text.load_text(source), "all") for source in sources))


def growing_classes(source: str | Path = "newsgroups", num_tasks: int = 5) -> TaskSequence:
    """The classes of one data set in equal parts, one part a task, with one head that grows.

    Args:
        source: what ``load_text`` reads.
        num_tasks: parts, of consecutive classes.

    Raises:
        DataError: as ``load_text``; the classes do not divide into parts of two or more.
    """
    whole = text.load_text(source)
    names = whole["train"].features["label"].names
    size, rest = divmod(len(names), num_tasks)
    if rest or size < 2:
        raise DataError(f"the {len(names)} classes of {source} do not make {num_tasks} equal parts of two or more")
    tasks = []
    for start in range(0, len(names), size):
        part = names[start : start + size]
        name = f"{part[0]} to {part[-1]}"
        tasks.append(Task(name, {split: _part(rows, start, part) for split, rows in whole.items()}, name))
    return TaskSequence(tuple(tasks), growing=True)


def _name(source: str | Path) -> str:
    return Path(source).name


def _part(rows: datasets.Dataset, start: int, names: Sequence[str]) -> datasets.Dataset:
    """The rows of these consecutive classes, the first of which is number ``start``, with labels from 0."""
    labels = [label - start for label in rows["label"]]
    chosen = [i for i, label in enumerate(labels) if 0 <= label < len(names)]
    columns = {"text": rows.select(chosen)["text"][:], "label": [labels[i] for i in chosen]}
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
