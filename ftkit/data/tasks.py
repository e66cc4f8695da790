"""Sequences of tasks: with a head for each task, one head for all tasks, or one head that grows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ftkit.data.text import encode, load_text
from ftkit.errors import DataError

#: The data sets of ``many_tasks``, in the order in which they are learned.
MANY_TASKS = ("movie-sentiment", "bbc-topics", "reuters8", "newsgroups")

#: The data sets of ``many_domains``, in the order in which they are learned.
MANY_DOMAINS = ("movie-sentiment", "product-sentiment", "editorial-sentiment", "tweet-sentiment")

Rows = list[dict[str, Any]]  # encoded rows of one split


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: name of the task.
        splits: "train", "validation" and "test" with the columns ``text`` and ``label`` (a ClassLabel).
        head: name of the head that predicts its classes; tasks that share a head have the same classes.
    """

    name: str
    splits: Mapping[str, datasets.Dataset]
    head: str

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return self.splits["train"].features["label"].names


@dataclass(frozen=True)
class TaskSequence:
    """Tasks in the order in which they are learned. A model has one output column for each class, head after head.

    Attributes:
        tasks: two or more tasks.
        growing: whether a row is scored among the classes of all tasks learned so far, without knowing its task
            (class-incremental learning), and not only among the classes of its own head.

    Raises:
        DataError: there are fewer than two tasks, two have the same name, or tasks that share a head have different
            classes.
    """

    tasks: tuple[Task, ...]
    growing: bool = False

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(names) < 2 or len(set(names)) < len(names):
            raise DataError(f"The tasks are {names}: give two or more, each with its own name.")
        for task in self.tasks:
            first = next(other for other in self.tasks if other.head == task.head)
            if first.classes != task.classes:
                raise DataError(
                    f"{first.name} has the classes {first.classes} and {task.name} has {task.classes}: "
                    "give each a head of its own with `many_tasks`."
                )

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [task.name for task in self.tasks]

    @property
    def heads(self) -> dict[str, int]:
        """Number of classes of each head, by its name, in the order of the output columns."""
        return {task.head: len(task.classes) for task in self.tasks}

    @property
    def class_names(self) -> list[str]:
        """Class names of all output columns, each prefixed with its head's name if there are several heads."""
        classes = {task.head: task.classes for task in self.tasks}
        return [f"{head}: {name}" if len(classes) > 1 else name for head in classes for name in classes[head]]

    def draw(self, *, train: int, validation: int, test: int, seed: int) -> "TaskSequence":
        """Return the same tasks with at most this many rows in each split.

        Args:
            train: training rows of each task, drawn at random.
            validation, test: rows of each task for these splits: always the first ones, for every seed.
            seed: seed of the random draw.
        """
        tasks = []
        for task in self.tasks:
            splits = {**task.splits, "train": task.splits["train"].shuffle(seed=seed)}
            sizes = {"train": train, "validation": validation, "test": test}
            fewer = {split: splits[split].take(min(size, len(splits[split]))) for split, size in sizes.items()}
            tasks.append(replace(task, splits=fewer))
        return replace(self, tasks=tuple(tasks))

    def reversed(self) -> "TaskSequence":
        """Return the same tasks in reverse order."""
        return replace(self, tasks=self.tasks[::-1])

    def encode(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 128) -> list[dict[str, Rows]]:
        """Tokenise the rows of all tasks, as ``fit`` takes them.

        Args:
            tokenizer, max_length: as for ``ftkit.data.encode``.

        Returns:
            The rows of each task by split. A row has the tokenizer's columns, ``labels`` (the output column of its
            class) and ``task`` (the number of its task, from 0).
        """
        starts, start = {}, 0
        for head, size in self.heads.items():
            starts[head], start = start, start + size
        encoded = []
        for number, task in enumerate(self.tasks):
            splits = encode(task.splits, tokenizer, max_length=max_length)
            encoded.append(
                {
                    split: [{**row, "labels": row["labels"] + starts[task.head], "task": number} for row in rows]
                    for split, rows in splits.items()
                }
            )
        return encoded


def many_tasks(sources: Sequence[str | Path] = MANY_TASKS) -> TaskSequence:
    """Load different tasks, each with a head of its own, with all their rows.

    Args:
        sources: assets, files or hub data sets, as for ``load_text``.

    Raises:
        DataError: as for ``load_text`` and ``TaskSequence``.
    """
    return TaskSequence(tuple(Task(_name(source), load_text(source), str(source)) for source in sources))


def many_domains(sources: Sequence[str | Path] = MANY_DOMAINS) -> TaskSequence:
    """Load one task in different domains, with one head for all; arguments and errors as for ``many_tasks``."""
    return TaskSequence(tuple(Task(_name(source), load_text(source), "all") for source in sources))


def growing_classes(source: str | Path = "newsgroups", num_tasks: int = 5) -> TaskSequence:
    """Divide the classes of one data set equally among tasks, with one head that grows.

    Args:
        source: an asset, a file or a hub data set, as for ``load_text``.
        num_tasks: number of tasks; each has consecutive classes.

    Raises:
        DataError: as for ``load_text``; or the classes cannot be divided into equal parts of two or more.
    """
    whole = load_text(source)
    names = whole["train"].features["label"].names
    size, rest = divmod(len(names), num_tasks)
    if rest or size < 2:
        raise DataError(
            f"The {len(names)} classes of {source} cannot be divided into {num_tasks} equal parts of two or more: "
            "choose another number of tasks."
        )
    tasks = []
    for start in range(0, len(names), size):
        part = names[start : start + size]
        name = f"{part[0]} to {part[-1]}"
        tasks.append(Task(name, {split: _part(rows, start, part) for split, rows in whole.items()}, name))
    return TaskSequence(tuple(tasks), growing=True)


def _name(source: str | Path) -> str:
    return Path(source).name


def _part(rows: datasets.Dataset, start: int, names: Sequence[str]) -> datasets.Dataset:
    """Select the rows of consecutive classes, from number ``start`` on, and number their labels from 0."""
    labels = [label - start for label in rows["label"]]
    chosen = [i for i, label in enumerate(labels) if 0 <= label < len(names)]
    columns = {"text": rows.select(chosen)["text"][:], "label": [labels[i] for i in chosen]}
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
