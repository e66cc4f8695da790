"""Batches: padding, types, and what cannot be stacked."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from ftkit.errors import DataError
from ftkit.training.batching import collate, flat_column, row_labels, row_lengths


def test_collate_pads_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 9, size=rng.integers(1, 6))
        ids = [rng.integers(0, 100, n).tolist() for n in lengths]
        hidden = [rng.normal(size=(n, 3)) for n in lengths]
        rows = [
            {"input_ids": i, "hidden": h, "tensor": torch.tensor(h).bfloat16(), "labels": int(n), "weight": 0.5}
            for i, h, n in zip(ids, hidden, lengths, strict=True)
        ]
        batch = collate(rows, {"input_ids": 7, "labels": -100})
        expected = pad_sequence([torch.tensor(i) for i in ids], batch_first=True, padding_value=7)
        assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].equal(expected)
        padded = pad_sequence([torch.tensor(h).float() for h in hidden], batch_first=True)
        assert batch["hidden"].dtype == torch.float32 and batch["hidden"].equal(padded)
        assert batch["tensor"].dtype == torch.float32 and batch["tensor"].equal(padded.bfloat16().float())
        assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == lengths.tolist()
        assert batch["weight"].dtype == torch.float32 and batch["weight"].tolist() == [0.5] * len(lengths)


def test_collate_pads_in_front_of_a_row() -> None:
    rows = [{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3], "labels": 1}, {"input_ids": [], "labels": 2}]
    batch = collate(rows, {"input_ids": 7}, "left")
    assert batch["input_ids"].tolist() == [[1, 2], [7, 3], [7, 7]]
    assert batch["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_columns_are_those_of_the_rows(kind: Any) -> None:
    rows = [{"input_ids": ids, "labels": label} for ids, label in (([5, 6], 1), ([], 0), ([7], 1), ([8, 9], 0))]
    for chosen in ([0, 1, 2, 3], [3, 1, 2], [1]):
        part = kind(rows).select(chosen) if kind is not list else [rows[i] for i in chosen]
        numbers, lengths = flat_column(part, "input_ids")
        assert numbers.tolist() == [token for i in chosen for token in rows[i]["input_ids"]]
        assert lengths.tolist() == row_lengths(part).tolist() == [len(rows[i]["input_ids"]) for i in chosen]
        assert row_labels(part) == [rows[i]["labels"] for i in chosen]


def test_columns_of_transformed_rows_are_those_that_the_transform_gives() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[5], [6]], "labels": [0, 1]})
    rows = rows.with_transform(lambda batch: {**batch, "input_ids": [[*ids, 9] for ids in batch["input_ids"]]})
    assert flat_column(rows, "input_ids")[0].tolist() == [5, 9, 6, 9]
    assert row_lengths(rows).tolist() == [2, 2]


def test_collate_pads_token_labels_with_their_own_value() -> None:
    batch = collate([{"labels": [1, 2]}, {"labels": []}], {"labels": -100})
    assert batch["labels"].tolist() == [[1, 2], [-100, -100]]
    assert batch["labels"].dtype == torch.int64


def test_collate_refuses_strings_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="column 'text' does not hold numbers"):
        collate([{"text": "a"}], {})
    with pytest.raises(DataError, match="The column 'x' has shapes that differ"):
        collate([{"x": np.zeros((2, 1))}, {"x": np.zeros((2, 3))}], {})
    with pytest.raises(DataError, match="shapes that differ"):
        collate([{"x": 1}, {"x": [1]}], {})
