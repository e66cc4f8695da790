"""Settings, state and history of a training run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftkit.errors import SettingsError, bad_value, unknown_setting

if TYPE_CHECKING:  # without torch, the settings of the notebooks can be checked in no time
    import numpy as np
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ftkit.training.losses import Penalty
    from ftkit.training.monitor import ProgressBar

MAX_EPOCHS = 1000  # of one run


class TrainSettings(BaseModel):
    """The settings of one training run.

    Raises:
        SettingsError: a name is unknown, or a value is not allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate of AdamW")
    num_epochs: int = Field(3, ge=1, le=MAX_EPOCHS, description="passes over the training rows")
    batch_size: int = Field(16, ge=1, le=4096, description="rows per forward pass")
    accumulation: int = Field(1, ge=1, le=1024, description="batches whose gradients are added up for one step")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="learning rate after warm-up")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, le=1, description="weight decay of AdamW; biases and norms do not decay")
    max_grad_norm: float = Field(1.0, gt=0, description="larger gradients are scaled down to this norm")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    class_weights: Literal["balanced"] | tuple[float, ...] | None = Field(
        None, description="weight of each class in the loss; balanced: inverse to its frequency"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: the best for the device")
    keep_best: bool = Field(True, description="end with the weights of the epoch that is best on validation")
    best_by: Literal["accuracy", "macro_f1", "balanced_accuracy"] | None = Field(
        None, description="score of the best epoch; None: accuracy, or balanced accuracy if class_weights are set"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of the order of the rows and of dropout")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            raise SettingsError(_sentence(name, values[name])) from None


def _sentence(name: str, value: Any) -> str:
    """What is wrong with a setting, and what to do."""
    fields = TrainSettings.model_fields
    if name not in fields:
        return unknown_setting("TrainSettings", name, list(fields))
    info = fields[name]
    if name == "class_weights":
        return bad_value(name, value, info.description, kind="'balanced', a number for each class, or None")
    for part in (info.annotation, *get_args(info.annotation)):  # the second where None is allowed too
        if get_origin(part) is Literal:
            return bad_value(name, value, info.description, kind="", choices=get_args(part))
    bounds = {type(bound).__name__: bound for bound in info.metadata}
    low = f"above {bounds['Gt'].gt}" if "Gt" in bounds else f"from {bounds['Ge'].ge}" if "Ge" in bounds else ""
    up_to = " to" if "Ge" in bounds else ", up to"
    high = f"{up_to} {bounds['Le'].le:,}" if "Le" in bounds else f", below {bounds['Lt'].lt}" if "Lt" in bounds else ""
    return bad_value(name, value, info.description, kind=info.annotation.__name__, allowed=low + high)


@dataclass
class History:
    """What happened in a run.

    Attributes:
        steps: one dict per step: step (from 1), loss, lr, grad_norm (before clipping).
        epochs: one dict per epoch: epoch (from 1) and train_loss, the mean over its rows; with a validation split also
            validation_loss and, where each row has one class, validation_accuracy and the score of ``best_by``, for
            example validation_macro_f1.
        best_epoch: the epoch that is best on validation, by the score of ``best_by`` or, without classes, by loss; None
            without a validation split.
        ended: "finished", "stopped" (by a callback) or "interrupted" (Ctrl-C).
        trainable_parameters: number of parameters that were trained.
        seconds: wall-clock time of the run.
        peak_rss_mib: highest resident memory of the process during the run, in MiB.
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
        return f"{self.ended} after {len(self.steps)} steps{best}; last epoch: {scores or 'not completed'}"


@dataclass
class TrainingRun:
    """A run in progress, as the loop and its callbacks see it; what a callback changes here takes effect.

    Attributes:
        model: the network, as the caller knows it.
        data: the splits that ``fit`` was given.
        settings: the settings that ``fit`` was given.
        penalties: the terms that are added to the loss.
        callbacks: the callbacks that ``fit`` was given, in its order.
        optimizer: each of its parameter groups has an ``initial_lr``, its own peak rate.
        accelerator: device, precision and processes.
        prepared: the model as accelerate wraps it for them.
        class_weights: the weight of each class in the loss, shape (C,), or None.
        lengths: number of tokens of each training row, shape (N,).
        steps_per_epoch: optimiser steps per epoch.
        step: steps done.
        history: what has happened so far.
        best_weights: trainable weights and buffers of the best epoch so far.
        stop: set it to end the run after this step.
        progress: the progress bar.
    """

    model: "nn.Module"
    data: Mapping[str, Any]
    settings: TrainSettings
    penalties: "Sequence[Penalty]"
    callbacks: Sequence[Any]
    optimizer: "AcceleratedOptimizer"
    accelerator: "Accelerator"
    prepared: "nn.Module"
    class_weights: "Tensor | None"
    lengths: "NDArray[np.int64]"
    steps_per_epoch: int
    step: int = 0
    history: History = field(default_factory=History)
    best_weights: "dict[str, Tensor] | None" = None
    stop: bool = False
    progress: "ProgressBar" = field(init=False)

    def __post_init__(self) -> None:
        from ftkit.training.monitor import ProgressBar  # imports psutil and tqdm

        self.progress = ProgressBar(self.total_steps, "training")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.settings.num_epochs
