"""Batches of rows of similar length, padded to the longest."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftkit.errors import DataError

IGNORED = -100  # the label that PyTorch and transformers leave out of the loss

_POOL_BATCHES = 50  # sorted together: enough to save padding, few enough to keep the order random


def row_lengths(rows: Any) -> NDArray[np.int64]:
    """Number of tokens of each row, from its ``input_ids`` or else its ``attention_mask``, shape (N,).

    Args:
        rows: a datasets.Dataset or any sequence of dicts. Without these columns every row has length 1; an
            attribute ``lengths`` of the rows, shape (N,), takes precedence.

    Raises:
        ValueError: there are no rows.
    """
    if not len(rows):
        raise ValueError("There are no rows to make batches of: give at least one row in this split.")
    if hasattr(rows, "lengths"):
        return rows.lengths
    first = rows[0]
    sequences = [key for key in ("input_ids", "attention_mask") if key in first]
    if not sequences:
        return np.ones(len(rows), dtype=np.int64)
    column = rows[sequences[0]] if hasattr(rows, "column_names") else (row[sequences[0]] for row in rows)
    return np.array([len(sequence) for sequence in column])


def training_batches(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Divide the rows of one epoch into batches of similar length, in random order.

    The rows are shuffled, sorted by length within pools of 50 batches, and cut into batches, which are shuffled. The
    order depends only on the seed and the epoch, so that a resumed run sees the same batches.

    Args:
        lengths: number of tokens of each row, shape (N,).
        batch_size: rows per batch; one batch may be smaller.
        seed: random seed of the order.
        epoch: number of the epoch; each has its own order.

    Returns:
        The row numbers of each batch; each row is in exactly one.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = batch_size * _POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(lengths: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Divide rows into batches, longest rows first, so that a lack of memory shows at once."""
    order = np.argsort(-lengths, kind="stable")
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def row_labels(rows: Any) -> list[Any]:
    """The class of each row, or the list of its token labels."""
    column = rows["labels"] if hasattr(rows, "column_names") else (row["labels"] for row in rows)
    return [np.asarray(label).tolist() for label in column]


def has_token_labels(rows: Any) -> bool:
    """Whether rows have a label for each token instead of one class."""
    return len(rows) > 0 and np.ndim(rows[0]["labels"]) > 0


def make_batch(
    model: nn.Module, rows: Any, indices: NDArray[np.int64], device: torch.device
) -> dict[str, torch.Tensor]:
    """A batch of the rows with these numbers, padded to the longest of them, on the device.

    Args:
        model: the padding token is taken from its config.
        rows: a datasets.Dataset or any sequence of dicts.
        indices: row numbers, shape (B,).
        device: the device of the batch.
    """
    pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    numbers = indices.tolist()
    # a datasets.Dataset reads many rows in one call much faster than one by one
    chosen = rows.__getitems__(numbers) if hasattr(rows, "__getitems__") else [rows[i] for i in numbers]
    batch = collate(chosen, {"input_ids": pad_token_id or 0, "labels": IGNORED})
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def collate(rows: Sequence[Mapping[str, Any]], padding: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Stack the columns of several rows, padded at the end to the longest where their lengths differ.

    Args:
        rows: dicts with the same keys. A value is a number, a list of numbers, an array or a CPU tensor; within a
            column the shapes may differ only in their first dimension.
        padding: the padding value by column; 0 for the others.

    Returns:
        For each column a tensor of shape (B, longest, …): int64, float32 or bool.

    Raises:
        DataError: a column does not hold numbers, or its shapes differ beyond the first dimension.
    """
    return {key: _stack(key, [row[key] for row in rows], padding.get(key, 0)) for key in rows[0]}


def _stack(key: str, values: list[Any], padding: float) -> torch.Tensor:
    arrays = [
        v.detach().float().numpy() if isinstance(v, torch.Tensor) and v.is_floating_point() else np.asarray(v)
        for v in values
    ]
    kinds = {array.dtype.kind for array in arrays if array.size}
    if not kinds <= set("biuf"):
        raise DataError(f"The column {key!r} does not hold numbers: leave it out of the rows.")
    if len({array.shape[1:] for array in arrays}) > 1 or len({array.ndim for array in arrays}) > 1:
        raise DataError(f"The column {key!r} has shapes that differ: only the first dimension may.")
    dtype = np.float32 if "f" in kinds else np.bool_ if kinds == {"b"} else np.int64
    if arrays[0].ndim == 0:
        return torch.from_numpy(np.array(arrays, dtype=dtype))
    longest = max(len(array) for array in arrays)
    batch = np.full((len(arrays), longest, *arrays[0].shape[1:]), padding, dtype=dtype)
    for row, array in zip(batch, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(batch)
