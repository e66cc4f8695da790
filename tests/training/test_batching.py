"""Batches: padding, types, and what cannot be stacked."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from ftkit.errors import DataError
from ftkit.training.batching import collate


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
