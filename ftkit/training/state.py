"""Settings, state and history of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class TrainSettings(BaseModel):
    """What a reader can turn about one training run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate of AdamW")
    num_epochs: int = Field(3, ge=1, le=1000, description="passes over the training rows")
    batch_size: int = Field(16, ge=1, le=4096, description="rows a forward pass")
    accumulation: int = Field(1, ge=1, le=1024, description="batches whose gradients make one step")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="learning rate after warm-up")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps over which the rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's; biases and norms are left out")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability spread over all classes")
    class_weights: Literal["balanced"] | tuple[float, ...] | None = Field(
        None, description="weight of each class in the loss; balanced: inverse to its frequency"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: what pays on the device")
    keep_best: bool = Field(True, description="end with the weights of the epoch best on validation")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the order of rows and of dropout")


@dataclass
class History:
    """What happened in a run.

    Attributes:
        steps: a dict a step: step (from 1), loss, lr, grad_norm (before clipping).
        epochs: a dict an epoch: epoch (from 1), train_loss, and with a validation split validation_loss and, where
            rows have a class and not a label a token, validation_accuracy.
        best_epoch: the epoch best on validation, by its accuracy or else its loss; None where there is no such split.
        ended: "finished", "stopped" (by a callback) or "interrupted" (Ctrl-C).
        trainable_parameters: number of parameters that training changed.
        seconds: wall-clock time of the run.
        peak_rss_mib: highest resident memory of the process meanwhile, in MiB.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    ended: str = "finished"
    trainable_parameters: int = 0
    seconds: float = 0.0
    peak_rss_mib: float = 0.0

    def __repr__(self) -> str:
        last = self.epochs[-1] if self.epochs else {}
        scores = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in last.items() if name != "epoch")
        best = f", best epoch {self.best_epoch}" if self.best_epoch else ""
        return f"{self.ended} after {len(self.steps)} steps{best}; last epoch: {scores or 'not reached its end'}"


@dataclass
class TrainingRun:
    """A run in progress, as callbacks see it; what they change in it takes effect.

    Attributes:
        model: the network, not wrapped.
        data: the splits that ``fit`` was given.
        settings: likewise.
        optimizer: each parameter group has an ``initial_lr``, its own peak rate.
        total_steps: optimiser steps the run will take.
        step: steps taken.
        history: what happened so far.
        best_weights: trainable weights and buffers of the best epoch so far.
        stop: set it to end after this step.
    """

    model: nn.Module
    data: Mapping[str, Any]
    settings: TrainSettings
    optimizer: torch.optim.Optimizer
    total_steps: int
    step: int = 0
    history: History = field(default_factory=History)
    best_weights: dict[str, Tensor] | None = None
    stop: bool = False
