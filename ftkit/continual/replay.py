"""A replay buffer: a few rows of earlier tasks, kept for training on later ones."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_Row = Mapping[str, Any]


class ReplayBuffer:
    """A buffer of at most M of all rows shown to it; it need not know how many will come.

    Args:
        size: number of rows to keep, M.
        kind: "reservoir" keeps every row with the same probability (Vitter, 1985). "balanced" keeps equally many rows
            of each class, as far as possible (Chrysakis and Moens, 2020): when the buffer is full, a row of a class
            that has never been the largest replaces a random row of the largest class; the rows of any other class
            are a reservoir of their class.
        seed: seed of the random choice.

    Attributes:
        rows: the rows in the buffer.

    Raises:
        ValueError: the size is below 1, or there is no such kind.
    """

    def __init__(self, size: int, kind: Literal["reservoir", "balanced"] = "reservoir", *, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"A replay buffer of {size} rows is empty: give a size of 1 or more.")
        if kind not in ("reservoir", "balanced"):
            raise ValueError(f"There is no replay buffer of kind {kind!r}: choose reservoir or balanced.")
        self.size, self.kind = size, kind
        self.rows: list[dict[str, NDArray[Any]]] = []
        self._rng = np.random.default_rng(seed)
        self._shown: dict[int, int] = defaultdict(int)  # rows shown so far by class; a reservoir has a single class
        self._places: dict[int, list[int]] = defaultdict(list)  # indices in self.rows by class
        self._full: set[int] = set()  # classes that have been the largest one

    def add(self, rows: Iterable[_Row]) -> None:
        """Show rows to the buffer, as made by ``encode``."""
        for row in rows:
            label = int(row["labels"]) if self.kind == "balanced" else 0
            self._shown[label] += 1
            if len(self.rows) < self.size:
                self._places[label].append(len(self.rows))
                self.rows.append(_compact(row))
                continue
            most = max(map(len, self._places.values()))
            largest = [other for other, places in self._places.items() if len(places) == most]
            self._full.update(largest)
            own = self._places[label]
            if label not in self._full:
                places = self._places[largest[self._rng.integers(len(largest))]]
                own.append(places.pop(self._rng.integers(most)))
                self.rows[own[-1]] = _compact(row)
            elif (drawn := self._rng.integers(self._shown[label])) < len(own):
                self.rows[own[drawn]] = _compact(row)

    @property
    def nbytes(self) -> int:
        """Size of the rows' numbers in bytes."""
        return sum(value.nbytes for row in self.rows for value in row.values())


def mix(rows: Sequence[_Row], replayed: Sequence[_Row], *, seed: int = 0) -> list[_Row]:
    """Combine the new rows with as many old ones; each old row is used equally often, or once more than others.

    Train on the result with twice the accumulation: each step then sees, on average, as many old rows as new ones, and
    the number of steps stays the same.

    Args:
        rows: N new rows.
        replayed: M old rows, at least one; if M is larger than N, a random choice of N of them is used.
        seed: seed of the choice of the old rows that are used once more than others.

    Raises:
        ValueError: there are no old rows.
    """
    if not replayed:
        raise ValueError("The replay buffer is empty: show it the rows of a task first, with add().")
    times, rest = divmod(len(rows), len(replayed))
    more = np.random.default_rng(seed).choice(len(replayed), rest, replace=False)
    return [*rows, *list(replayed) * times, *(replayed[i] for i in more)]


def _compact(row: _Row) -> dict[str, NDArray[Any]]:
    """Turn the columns into arrays, integers in the smallest type that fits."""
    arrays = {name: np.asarray(value) for name, value in row.items()}
    return {
        name: array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))
        if array.dtype.kind in "iu" and array.size
        else array
        for name, array in arrays.items()
    }
