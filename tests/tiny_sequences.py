"""Sequences of tiny tasks: texts of the words w3 to w59, whose second word decides the class."""

import datasets
import numpy as np
from tiny_bert import make_tiny_bert
from tiny_models import VOCABULARY, make_word_tokenizer

from ftkit.data.tasks import Task, TaskSequence
from ftkit.models.heads import MultiHead

SIZES = {"train": 24, "validation": 8, "test": 12}


def make_splits(classes: list[str], seed: int) -> dict[str, datasets.Dataset]:
    rng = np.random.default_rng(seed)
    splits = {}
    for split, size in SIZES.items():
        texts = [rng.integers(3, VOCABULARY, size=rng.integers(3, 8)) for _ in range(size)]
        labels = [(int(words[1]) + seed) % len(classes) for words in texts]
        rows = {"text": [" ".join(f"w{word}" for word in words) for words in texts], "label": labels}
        features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=classes)}
        splits[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    return splits


def make_sequence(kind: str = "many_tasks") -> TaskSequence:
    """Make three tasks: with 2, 3 and 2 classes and a head for each, or with the same two classes and one head.

    Args:
        kind: "many_tasks", "many_domains", or "growing", which has the same tasks as "many_tasks" and a growing head.
    """
    classes = [["a", "b"], ["c", "d", "e"], ["f", "g"]]
    if kind == "many_domains":
        tasks = [Task(f"domain {i}", make_splits(["a", "b"], i), "all") for i in range(3)]
    else:
        tasks = [Task(f"task {i}", make_splits(names, i), f"head {i}") for i, names in enumerate(classes)]
    return TaskSequence(tuple(tasks), growing=kind == "growing")


def make_model(sequence: TaskSequence, dropout: float = 0.1) -> MultiHead:
    return MultiHead(make_tiny_bert(dropout=dropout, num_labels=len(sequence.class_names)), sequence).eval()


def encode(sequence: TaskSequence) -> list[dict[str, list[dict[str, object]]]]:
    return sequence.encode(make_word_tokenizer(), max_length=16)
