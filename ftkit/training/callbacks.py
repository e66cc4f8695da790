"""Callbacks of the training loop: early stopping and checkpoints."""

import hashlib
import os
import pickle
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftkit.training.batching import as_array, random_state_kept, row_lengths
from ftkit.training.state import TrainingRun


class Callback:
    """Base class: the loop calls these methods; override those that you need.

    Attributes:
        steers: whether it may change the weights of any step, as all do that do not set it to False. A checkpoint
            belongs to runs with the same callbacks that steer. One that only watches, or ends the run, does not.
    """

    steers = True

    def on_start(self, run: TrainingRun) -> None:
        """Before the first step."""

    def on_step(self, run: TrainingRun) -> None:
        """After each optimiser step."""

    def on_epoch(self, run: TrainingRun) -> None:
        """After each epoch, when its validation is done."""


class EarlyStopping(Callback):
    """Stop when validation has not improved for ``patience`` epochs (Prechelt, 1998)."""

    steers = False

    def __init__(self, patience: int = 2) -> None:
        self.patience = patience

    def on_start(self, run: TrainingRun) -> None:
        """Raises ValueError: there is no validation split."""
        if "validation" not in run.data:
            raise ValueError("EarlyStopping watches the validation rows, and there are none: add data['validation'].")
        self.on_epoch(run)  # a resumed run may already be at its end

    def on_epoch(self, run: TrainingRun) -> None:
        best, epochs = run.history.best_epoch, len(run.history.epochs)
        run.stop = run.stop or (best is not None and epochs - best >= self.patience)


class Checkpoint(Callback):
    """Write the whole state of the run to a file, and resume from it.

    A run that is killed at any moment and started again with the same settings ends with bit-identical weights on the
    CPU. Put it first in ``callbacks``, so that the others see the resumed run. It is one file, replaced in one move;
    accelerate's ``save_state`` writes a folder of several, which a crash can leave half-written.

    The file knows its run: the settings, the rows, the model, its weights at the start, which of them train, the
    penalties, and the callbacks that steer (``Callback.steers``) by their order, names and public numbers and strings.
    A model that this run has begun to train is accepted, too, so that a cell can be run again after Ctrl-C.

    Args:
        path: the file; its folder is created.
        every: optimiser steps between two writes; it is also written at the end of each epoch.
    """

    steers = False

    def __init__(self, path: str | Path, every: int = 100) -> None:
        self.path, self.every = Path(path), every
        self._identity: dict[str, Any] = {}

    def on_start(self, run: TrainingRun) -> None:
        """Resume if the file exists.

        Raises:
            ValueError: it belongs to another run, or is not a checkpoint.
        """
        self._identity = _identity(run)
        if not self.path.exists():
            _starts[run.model] = self._identity["starting weights"]
            return
        state = self._read()
        if state["identity"].get("starting weights") == (begun_with := _starts.get(run.model)):
            self._identity["starting weights"] = begun_with
        for name, value in self._identity.items():
            if state["identity"].get(name) != value:
                raise ValueError(
                    f"The checkpoint {self.path.name} is of a run with {name}={state['identity'].get(name)}, "
                    f"but this run has {value}: use another file, or delete it to start again."
                )
        _starts[run.model] = self._identity["starting weights"]
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.best_weights = state["step"], state["best_weights"]
        vars(run.history).update(state["history"])
        _set_random_state(state["random state"])
        print(f"Resumed at step {run.step} of {run.total_steps}.")

    def on_step(self, run: TrainingRun) -> None:
        if run.step % self.every == 0:
            self._write(run)

    def on_epoch(self, run: TrainingRun) -> None:
        self._write(run)

    def _write(self, run: TrainingRun) -> None:
        state = {
            "identity": self._identity,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "step": run.step,
            "best_weights": run.best_weights,
            "history": asdict(run.history),
            "random state": _random_state(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            state = torch.load(self.path, weights_only=True)
            if "identity" in state:
                return state
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError):
            pass
        raise ValueError(f"The file {self.path} is not a checkpoint, or is damaged: use another file, or delete it.")


# digest of the weights with which a checkpointed run has begun to train a model
_starts: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _identity(run: TrainingRun) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    names = [name for name, p in run.model.named_parameters() if id(p) in trained]
    weights = hashlib.sha256()
    for name, p in run.model.named_parameters():
        weights.update(f"{name} {tuple(p.shape)}".encode())
        weights.update(p.detach().cpu().flatten().view(torch.uint8).numpy())
    return {
        **run.settings.model_dump(),
        "total_steps": run.total_steps,
        "model": type(run.model).__name__,
        "trainable weights": f"{len(names)} ({hashlib.sha256(repr(names).encode()).hexdigest()[:12]})",
        "starting weights": weights.hexdigest()[:12],
        "penalties": ", ".join(map(_describe, run.penalties)) or "none",
        "callbacks": ", ".join(_describe(callback) for callback in run.callbacks if getattr(callback, "steers", True))
        or "none",
        "training rows": _digest(run.data["train"], run.lengths),
        "validation rows": _digest(rows, row_lengths(rows)) if (rows := run.data.get("validation")) else "none",
    }


def _describe(part: Any) -> str:
    """A penalty or a callback by its name and its public numbers and strings, such as its strength."""
    values = {
        name: value
        for name, value in getattr(part, "__dict__", {}).items()
        if isinstance(value, int | float | str) and not name.startswith("_")
    }
    name = getattr(part, "__qualname__", type(part).__name__)
    return f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})"


def _digest(rows: Any, lengths: NDArray[np.int64]) -> str:
    """A digest of the rows: of their whole numbers, and of a few numbers of each array of floats, which may be large.

    A column that changes from one reading to the next (augmentation) does not count.
    """
    digest = hashlib.sha256(lengths.tobytes())
    with random_state_kept():
        first, *again = ({name: as_array(value) for name, value in rows[0].items()} for _ in range(8))
        fixed = [name for name in first if all(np.array_equal(first[name], other[name]) for other in again)]
        for row in rows:
            for name in fixed:
                array = as_array(row[name])
                few = array.ravel()[:: max(1, array.size // 16)] if array.dtype.kind == "f" else array
                digest.update(few.tobytes())
    return digest.hexdigest()[:12]


def _random_state() -> dict[str, Any]:
    """The state of every random generator that training uses, in types that torch.load accepts with weights_only."""
    kind, keys, *position = np.random.get_state()  # noqa: NPY002, the global generator that libraries use
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, keys.tolist(), *position],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])
