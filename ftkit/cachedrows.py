"""Rows that carry the activations of a frozen prefix, in memory or mapped from disk."""

import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STATES = "prefix_states"  # the column of the cached activations


class PrefixError(ValueError):
    """A prefix can't be cached; the message says why and what to do."""


class CachedRows(Sequence):
    """Rows with the activations (T, H) of the frozen prefix, as ``fit`` and ``evaluate`` read them.

    Attributes:
        lengths: tokens of each row before it was cached: batches are made by it, the same as without a cache.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        states: NDArray[np.float32],
        ends: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> None:
        self.lengths = lengths
        self._rows, self._states, self._ends = rows, np.asarray(states), ends
        if isinstance(states, np.memmap):
            weakref.finalize(self, shutil.rmtree, Path(states.filename).parent, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return {**self._rows[index], STATES: self._states[start : self._ends[index]]}


def make_storage(shape: tuple[int, int], on_disk: bool, folder: str | Path | None) -> NDArray[np.float32]:
    """Room for activations; on disk in a folder of its own, which CachedRows removes in the end.

    Raises:
        PrefixError: the disk has not that much room.
    """
    if not on_disk:
        return np.empty(shape, dtype=np.float32)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    own = tempfile.mkdtemp(prefix="prefix-", dir=folder)
    need, free = math.prod(shape) * 4, shutil.disk_usage(own).free
    if need > free:  # writing to the map of a full disk would end the process
        shutil.rmtree(own)
        raise PrefixError(
            f"The activations need {need / 2**20:.0f} MiB and {free / 2**20:.0f} are free: give another folder=."
        )
    return np.memmap(Path(own) / "states", dtype=np.float32, mode="w+", shape=shape)
