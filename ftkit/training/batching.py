"""Batches of rows of similar length, padded to the longest."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftkit.errors import DataError

IGNORED = -100  # as a label, in PyTorch and transformers: no class or token, it does not count

POOL_BATCHES = 50  # sorted together: enough to waste little padding, few enough to stay random in a large set


def row_lengths(rows: Any) -> NDArray[np.int64]:
    """Tokens of each row, by its ``input_ids`` or else its ``attention_mask``, shape (N,).

    Args:
        rows: a datasets.Dataset or any sequence of dicts. Rows with neither column all have length 1;
            rows that have ``lengths`` themselves, shape (N,), say it.

    Raises:
        ValueError: there are no rows.
    """
    if not len(rows):
        raise ValueError("There are no rows to make batches of: ask for at least one row of this split.")
    if hasattr(rows, "lengths"):
        return rows.lengths
    first = rows[0]
    sequences = [key for key in ("input_ids", "attention_mask") if key in first]
    if not sequences:
        return np.ones(len(rows), dtype=np.int64)
    column = rows[sequences[0]] if hasattr(rows, "column_names") else (row[sequences[0]] for row in rows)
    return np.array([len(sequence) for sequence in column])


def training_batches(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Cut one epoch into shuffled batches of similar length, each row in exactly one.

    The rows are shuffled, sorted by length within pools of ``POOL_BATCHES`` batches, cut, and the batches
    shuffled. The order depends on seed and epoch alone, so that a resumed run meets the same batches.

    Args:
        lengths: tokens of each row, shape (N,).
        batch_size: rows a batch; the last batch of the epoch's rows may be smaller.
        seed, epoch: give the order.

    Returns:
        Row numbers, an array a batch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = batch_size * POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(lengths: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Cut rows into batches, the longest first: what does not fit in memory fails at once."""
    order = np.argsort(-lengths, kind="stable")
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def row_labels(rows: Any) -> list[Any]:
    """The label of each row, its class; or its labels, a list, where each of its tokens has one."""
    column = rows["labels"] if hasattr(rows, "column_names") else (row["labels"] for row in rows)
    return [np.asarray(label).tolist() for label in column]


def has_token_labels(rows: Any) -> bool:
    """Whether a row has a list of labels, one a token, and no class."""
    return len(rows) > 0 and np.ndim(rows[0]["labels"]) > 0


def make_batch(
    model: nn.Module, rows: Any, indices: NDArray[np.int64], device: torch.device
) -> dict[str, torch.Tensor]:
    """The rows of those numbers, padded to the longest of them, on the device.

    Args:
        model: its config names the token that pads.
        rows: a datasets.Dataset or any sequence of dicts.
        indices: row numbers, shape (B,).
        device: where the batch is wanted.
    """
    pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    numbers = indices.tolist()
    # a datasets.Dataset gives many rows in one call, far faster than one by one
    chosen = rows.__getitems__(numbers) if hasattr(rows, "__getitems__") else [rows[i] for i in numbers]
    batch = collate(chosen, {"input_ids": pad_token_id or 0, "labels": IGNORED})
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def collate(rows: Sequence[Mapping[str, Any]], padding: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """One batch of rows: each column stacked, and padded at the end to the longest where the lengths differ.

    Args:
        rows: of the same columns, each value a number, a list of numbers, an array or a CPU tensor; in a
            column the shapes may differ in their first dimension only.
        padding: the value to pad a column with, 0 for columns not named here.

    Returns:
        For each column a tensor [rows, longest, …], int64, float32 or, of truth values, bool.

    Raises:
        DataError: a column that is no number, or whose shapes differ beyond the first dimension.
    """
    return {key: _stack(key, [row[key] for row in rows], padding.get(key, 0)) for key in rows[0]}


def _stack(key: str, values: list[Any], padding: float) -> torch.Tensor:
    arrays = [
        v.detach().float().numpy() if isinstance(v, torch.Tensor) and v.is_floating_point() else np.asarray(v)
        for v in values
    ]
    kinds = {array.dtype.kind for array in arrays if array.size}
    if not kinds <= set("biuf"):
        raise DataError(f"column '{key}' does not hold numbers: leave it out of the rows")
    if len({array.shape[1:] for array in arrays}) > 1 or len({array.ndim for array in arrays}) > 1:
        raise DataError(f"column '{key}' has values of different shapes: only the first dimension may differ")
    dtype = np.float32 if "f" in kinds else np.bool_ if kinds == {"b"} else np.int64
    if arrays[0].ndim == 0:
        return torch.from_numpy(np.array(arrays, dtype=dtype))
    longest = max(len(array) for array in arrays)
    batch = np.full((len(arrays), longest, *arrays[0].shape[1:]), padding, dtype=dtype)
    for row, array in zip(batch, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(batch)
