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
    """Is called by the loop; override what you need."""

    def on_start(self, run: TrainingRun) -> None:
        """Before the first step."""

    def on_step(self, run: TrainingRun) -> None:
        """After each optimiser step."""

    def on_epoch(self, run: TrainingRun) -> None:
        """After each epoch and its validation."""


class EarlyStopping(Callback):
    """End a run whose validation has not improved for ``patience`` epochs (Prechelt, 1998)."""

    def __init__(self, patience: int = 2) -> None:
        self.patience = patience

    def on_start(self, run: TrainingRun) -> None:
        """Raises ValueError: there is no validation split to watch."""
        if "validation" not in run.data:
            raise ValueError("EarlyStopping watches the validation rows, and there are none: add data['validation'].")
        self.on_epoch(run)  # a resumed run may have come to its end already

    def on_epoch(self, run: TrainingRun) -> None:
        best, epochs = run.history.best_epoch, len(run.history.epochs)
        run.stop = run.stop or (best is not None and epochs - best >= self.patience)


class Checkpoint(Callback):
    """Write the whole state of the run to a file, and resume from it.

    A run that is killed, at whatever moment, and started again with the same settings ends on the CPU with
    bit-identical weights. Give it first, so that other callbacks meet the resumed run.

    Args:
        path: the file; its folder is made. It is replaced in one move, so that a crash leaves the old one whole.
        every: optimiser steps between two writes; the end of an epoch is always written.
    """

    def __init__(self, path: str | Path, every: int = 100) -> None:
        self.path, self.every = Path(path), every

    def on_start(self, run: TrainingRun) -> None:
        """Resume, if the file is there.

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
                    f"this one has {value}: use another file, or delete it to start anew."
                )
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.best_weights = state["step"], state["best_weights"]
        vars(run.history).update(state["history"])
        _set_chance(state["chance"])
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
            "chance": _chance(),
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


def _chance() -> dict[str, Any]:
    """The state of every random generator that training draws from, in types that a safe load accepts."""
    kind, keys, *position = np.random.get_state()  # noqa: NPY002, the global generator that libraries use
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, keys.tolist(), *position],
        "python": random.getstate(),
    }


def _set_chance(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])
