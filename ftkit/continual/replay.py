"""A replay buffer: a few rows of earlier tasks, kept for training."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, Any]


class ReplayBuffer:
    """At most M rows of all that were ever shown to it, in one pass and without knowing how many will come.

    Args:
        size: M, rows.
        kind: "reservoir" keeps each row shown with the same probability (Vitter, 1985). "balanced" keeps as many rows
            of each class as there is room for: a full memory takes a row of a class that never was the commonest in
            it in exchange for one of the commonest, and is a reservoir within the others (Chrysakis and Moens, 2020).
        seed: of the choice.

    Attributes:
        rows: those in the memory.

    Raises:
        ValueError: a size below 1, another kind.
    """

    def __init__(self, size: int, kind: Literal["reservoir", "balanced"] = "reservoir", *, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"A memory of {size} rows holds nothing: give 1 or more.")
        if kind not in ("reservoir", "balanced"):
            raise ValueError(f"There is no memory of kind {kind!r}: choose reservoir or balanced.")
        self.size, self.kind = size, kind
        self.rows: list[dict[str, NDArray[Any]]] = []
        self._rng = np.random.default_rng(seed)
        self._shown: dict[int, int] = defaultdict(int)  # rows of each class so far; one class for all in a reservoir
        self._places: dict[int, list[int]] = defaultdict(list)  # where its rows are
        self._full: set[int] = set()  # classes that were the commonest once

    def add(self, rows: Iterable[Row]) -> None:
        """Show it rows, as ``encode`` makes them."""
        for row in rows:
            label = int(row["labels"]) if self.kind == "balanced" else 0
            self._shown[label] += 1
            if len(self.rows) < self.size:
                self._places[label].append(len(self.rows))
                self.rows.append(_compact(row))
                continue
            most = max(map(len, self._places.values()))
            commonest = [other for other, places in self._places.items() if len(places) == most]
            self._full.update(commonest)
            own = self._places[label]
            if label not in self._full:
                places = self._places[commonest[self._rng.integers(len(commonest))]]
                own.append(places.pop(self._rng.integers(most)))
                self.rows[own[-1]] = _compact(row)
            elif (drawn := self._rng.integers(self._shown[label])) < len(own):
                self.rows[own[drawn]] = _compact(row)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows' numbers take."""
        return sum(value.nbytes for row in self.rows for value in row.values())


def mix(rows: Sequence[Row], memory: Sequence[Row], *, seed: int = 0) -> list[Row]:
    """The new rows and as many from the memory, each of its rows as often as any other, give or take one.

    Train on them with twice the accumulation: a step then has an equal batch of old rows beside its new ones, on
    average, and there are as many steps as without.

    Args:
        rows: N new ones.
        memory: M, one or more; where M exceeds N, only N of them come.
        seed: of which rows come once more than others.
    """
    if not memory:
        raise ValueError("The memory is empty: show it the rows of a task first, with add().")
    times, rest = divmod(len(rows), len(memory))
    more = np.random.default_rng(seed).choice(len(memory), rest, replace=False)
    return [*rows, *list(memory) * times, *(memory[i] for i in more)]


def _compact(row: Row) -> dict[str, NDArray[Any]]:
    """Its numbers as arrays, whole ones in the smallest type that holds them."""
    arrays = {name: np.asarray(value) for name, value in row.items()}
    return {
        name: array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))
        if array.dtype.kind in "iu" and array.size
        else array
        for name, array in arrays.items()
    }
