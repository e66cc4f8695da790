"""Callbacks of the training loop: early stopping and checkpoints."""

import hashlib
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftkit.training.batching import row_labels, row_lengths
from ftkit.training.state import TrainingRun


class Callback:
    """Base class: the loop calls these methods; override those that you need."""

    def on_start(self, run: TrainingRun) -> None:
        """Before the first step."""

    def on_step(self, run: TrainingRun) -> None:
        """After each optimiser step."""

    def on_epoch(self, run: TrainingRun) -> None:
        """After each epoch, when its validation is done."""


class EarlyStopping(Callback):
    """Stop when validation has not improved for ``patience`` epochs (Prechelt, 1998)."""

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

    Args:
        path: the file; its folder is created.
        every: optimiser steps between two writes; it is also written at the end of each epoch.
    """

    def __init__(self, path: str | Path, every: int = 100) -> None:
        self.path, self.every = Path(path), every

    def on_start(self, run: TrainingRun) -> None:
        """Resume if the file exists.

        Raises:
            ValueError: it belongs to a run with other settings or rows.
        """
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        for name, value in self._identity(run).items():
            if state["identity"].get(name) != value:
                raise ValueError(
                    f"The checkpoint {self.path.name} is of a run with {name}={state['identity'].get(name)}, "
                    f"but this run has {value}: use another file, or delete it to start again."
                )
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
            "identity": self._identity(run),
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

    @staticmethod
    def _identity(run: TrainingRun) -> dict[str, Any]:
        rows = run.data["train"]
        digest = hashlib.sha256(row_lengths(rows).tobytes() + np.hstack(row_labels(rows)).tobytes()).hexdigest()
        return {**run.settings.model_dump(), "total_steps": run.total_steps, "training rows": digest[:12]}


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
