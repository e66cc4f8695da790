"""Batches of rows of similar length, padded to the longest."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
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
    first = peek(rows)
    sequences = [key for key in ("input_ids", "attention_mask") if key in first]
    if not sequences:
        return np.ones(len(rows), dtype=np.int64)
    if (lengths := _arrow_lengths(_arrow_column(rows, sequences[0]))) is not None:
        return lengths
    return np.array([len(sequence) for sequence in read_column(rows, sequences[0])])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global generators of random numbers as they are: some rows draw from them when they are read."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def peek(rows: Any) -> Mapping[str, Any]:
    """The first row, read without a side effect."""
    with random_state_kept():
        return rows[0]


def read_column(rows: Any, name: str) -> list[Any]:
    """One column of the rows, read without a side effect."""
    if (column := _arrow_column(rows, name)) is not None:
        return column.to_pylist()
    with random_state_kept():
        return [row[name] for row in rows]


def flat_column(rows: Any, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """One column of sequences of numbers, read without a side effect: all numbers in a row, and each sequence's length.

    Args:
        rows: N rows, at least one.
        name: the column.

    Returns:
        The numbers of all sequences, one after the other, and the lengths of the sequences, shape (N,).
    """
    column = _arrow_column(rows, name)
    if (lengths := _arrow_lengths(column)) is not None:
        return pc.list_flatten(column).to_numpy(), lengths
    sequences = [np.asarray(sequence) for sequence in read_column(rows, name)]
    filled = [sequence for sequence in sequences if len(sequence)] or [np.empty(0, dtype=np.int64)]
    return np.concatenate(filled), np.array([len(sequence) for sequence in sequences])


def _arrow_lengths(column: Any) -> NDArray[np.int64] | None:
    """The lengths of the lists in a column of Arrow; None if it is None or lacks a list."""
    if column is None or column.null_count:
        return None
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def _arrow_column(rows: Any, name: str) -> Any:
    """The column of a datasets.Dataset as Arrow holds it, far faster than as Python lists; None for other rows."""
    if name not in getattr(rows, "column_names", ()) or rows.format["type"] == "custom":  # custom: changed when read
        return None
    return rows.select_columns([name]).with_format("arrow")[:][name]


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
    if (column := _arrow_column(rows, "labels")) is not None:
        return column.to_pylist()  # numbers and lists already
    return [np.asarray(label).tolist() for label in read_column(rows, "labels")]


def has_token_labels(rows: Any) -> bool:
    """Whether rows have a label for each token instead of one class."""
    return len(rows) > 0 and np.ndim(peek(rows).get("labels", 0)) > 0


def make_batch(
    model: nn.Module, rows: Any, indices: NDArray[np.int64], device: torch.device
) -> dict[str, torch.Tensor]:
    """A batch of the rows with these numbers, padded to the longest of them, on the device.

    Args:
        model: its config names the padding token, and its head decides on which side of a row the padding stands.
        rows: a datasets.Dataset or any sequence of dicts.
        indices: row numbers, shape (B,).
        device: the device of the batch.
    """
    config = getattr(model, "config", None)
    # A summary of type "last" (XLNet) reads the last position, padding or not. All other heads find the last token of a
    # row, or don't need it, and many networks count positions from the left end of the batch: padded on the right, a
    # row gets the result that it has alone, also where the tokenizer pads on the left, which is for generating text
    side = "left" if getattr(config, "summary_type", None) == "last" else "right"
    numbers = indices.tolist()
    # a datasets.Dataset reads many rows in one call much faster than one by one
    chosen = rows.__getitems__(numbers) if hasattr(rows, "__getitems__") else [rows[i] for i in numbers]
    batch = collate(chosen, {"input_ids": getattr(config, "pad_token_id", None) or 0, "labels": IGNORED}, side)
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def collate(
    rows: Sequence[Mapping[str, Any]], padding: Mapping[str, float], side: Literal["left", "right"] = "right"
) -> dict[str, torch.Tensor]:
    """Stack the columns of several rows, padded to the longest where their lengths differ.

    Args:
        rows: dicts with the same keys. A value is a number, a list of numbers, an array or a CPU tensor; within a
            column the shapes may differ only in their first dimension.
        padding: the padding value by column; 0 for the others.
        side: where the padding stands: "left" before a row, "right" after it.

    Returns:
        For each column a tensor of shape (B, longest, …): int64, float32 or bool.

    Raises:
        DataError: a column does not hold numbers, or its shapes differ beyond the first dimension.
    """
    return {key: _stack(key, [row[key] for row in rows], padding.get(key, 0), side) for key in rows[0]}


def as_array(value: Any) -> NDArray[Any]:
    """A number, a list of numbers, an array or a CPU tensor as an array; floats of a tensor as float32."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().float().numpy()
    return np.asarray(value)


def _stack(key: str, values: list[Any], padding: float, side: str) -> torch.Tensor:
    arrays = [as_array(value) for value in values]
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
        start = longest - len(array) if side == "left" else 0
        row[start : start + len(array)] = array
    return torch.from_numpy(batch)
