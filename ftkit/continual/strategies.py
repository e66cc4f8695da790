"""Strategies against catastrophic forgetting. Each has one main setting, its strength."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ftkit.adapters.lora import add_lora
from ftkit.continual.fisher import diagonal_fisher
from ftkit.continual.penalties import EWC, L2SP, Distillation, add_old_logits
from ftkit.continual.replay import ReplayBuffer, mix
from ftkit.data.tasks import Rows
from ftkit.models.architecture import layer_groups
from ftkit.models.heads import MultiHead
from ftkit.models.modules import average_weights, snapshot, weight_distance
from ftkit.training.losses import Penalty
from ftkit.training.state import TrainSettings


@dataclass
class Stage:
    """The training on one task, which a strategy may change before it starts.

    Attributes:
        model: the network; parameters that require a gradient train.
        tasks: rows of all tasks by split.
        index: number of the task, from 0.
        settings: training settings.
        rows: training rows; if empty, nothing is trained.
        validation: rows for choosing the best epoch.
        penalties: penalties added to the loss.
        seen: number of tasks whose classes a growing head has by now.
        old_heads: whether to train the heads of earlier tasks too, although no training row belongs to them.
    """

    model: MultiHead
    tasks: Sequence[Mapping[str, Rows]]
    index: int
    settings: TrainSettings
    rows: Rows
    validation: Rows
    penalties: list[Penalty]
    seen: int
    old_heads: bool = False

    @property
    def new_heads(self) -> set[str]:
        """Parameter names of the heads that no earlier task has trained."""
        new = {self.model.head_of[self.index]} - self.model.heads_of(range(self.index))
        return {name for name, head in self.model.head_parameters().items() if head in new}


class Strategy:
    """Naive fine-tuning on one task after the other, and the base class of all other strategies.

    Attributes:
        strength: the main setting of a strategy; None here, because naive fine-tuning has none.
    """

    strength: float | None = None

    def set_up(self, model: MultiHead) -> None:
        """Hook before the first task."""

    def before(self, stage: Stage) -> None:
        """Hook before each task, when the model has the weights from the previous one."""
        stage.model.requires_grad_(True)

    def after(self, stage: Stage) -> None:
        """Hook after each task, before the evaluation."""

    def activate(self, model: MultiHead, task: int) -> None:
        """Hook before the evaluation on a task."""

    def distance(self, model: MultiHead, start: Mapping[str, Tensor]) -> float:
        """Return the distance of the weights, without the heads, from the weights before any training."""
        return weight_distance(model, start)


_FISHER_ROWS = 256  # training rows per task for the Fisher information


class Joint(Strategy):
    """Training on all tasks at once, with the same total number of steps: an upper reference for a sequence.

    Nothing is learned after the first stage. Therefore all rows of the accuracy matrix are the same, and the learning
    accuracy equals the average accuracy.
    """

    def before(self, stage: Stage) -> None:
        super().before(stage)
        stage.rows = [row for task in stage.tasks for row in task["train"]] if stage.index == 0 else []
        stage.validation = [row for task in stage.tasks for row in task.get("validation", [])]
        stage.seen = len(stage.tasks)


class Frozen(Strategy):
    """Training of the heads and the topmost layer groups only.

    Args:
        strength: number of groups from ``layer_groups`` to train; with 0, no shared weight trains, so nothing is
            forgotten.
    """

    def __init__(self, strength: int = 0) -> None:
        self.strength = strength

    def before(self, stage: Stage) -> None:
        """Raises ValueError: the network has fewer groups, or the number is negative."""
        model = stage.model.requires_grad_(False)
        groups = layer_groups(model.network)
        if not 0 <= self.strength <= len(groups):
            raise ValueError(
                f"The network has {len(groups)} layer groups, and {self.strength} of them cannot be trained: give a "
                f"number from 0 to {len(groups)}."
            )
        shared = [p for group in groups[len(groups) - int(self.strength) :] for p in group.parameters.values()]
        for parameter in [*shared, *map(model.get_parameter, model.head_parameters())]:
            parameter.requires_grad_(True)


class LowRate(Strategy):
    """A lower learning rate from the second task on.

    Args:
        strength: factor on the learning rate, in (0, 1]; 1 is naive fine-tuning.

    Raises:
        ValueError: the factor is outside (0, 1].
    """

    def __init__(self, strength: float = 0.1) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"The factor on the learning rate is {strength!r}: give a number in (0, 1].")
        self.strength = strength

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            stage.settings = stage.settings.model_copy(update={"lr": stage.settings.lr * self.strength})


class L2SPStrategy(Strategy):
    """L2-SP (Li et al., 2018): from the second task on, the weights are pulled towards those that the task starts with.

    A new head is not pulled towards its start; only the optimiser's weight decay applies to it.

    Args:
        strength: alpha, 0 or more.
    """

    def __init__(self, strength: float = 0.01) -> None:
        self.strength = strength

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            stage.penalties.append(L2SP(stage.model, self.strength, new=stage.new_heads, beta=0))


class EWCStrategy(Strategy):
    """EWC (Kirkpatrick et al., 2017), with each task's Fisher information from at most 256 of its training rows.

    Args:
        strength: lambda, 0 or more.
        kind: kind of Fisher information, as for ``diagonal_fisher``.
        decay: decay of online EWC, as for ``EWC``; None is plain EWC.
    """

    def __init__(
        self,
        strength: float = 100.0,
        *,
        kind: Literal["exact", "sampled", "empirical"] = "exact",
        decay: float | None = None,
    ) -> None:
        self.strength, self.kind, self.decay = strength, kind, decay
        self.penalty = EWC(strength, decay=decay)

    def before(self, stage: Stage) -> None:
        super().before(stage)
        stage.penalties.append(self.penalty)

    def after(self, stage: Stage) -> None:
        if stage.index < len(stage.tasks) - 1:
            fisher = diagonal_fisher(stage.model, stage.tasks[stage.index]["train"][:_FISHER_ROWS], self.kind)
            self.penalty.remember(stage.model, fisher)


class LwF(Strategy):
    """Learning without forgetting (Li and Hoiem, 2016): on new rows, the heads of old tasks keep their predictions.

    Args:
        strength: strength of the distillation, 0 or more.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def set_up(self, model: MultiHead) -> None:
        self.penalty = Distillation(model, self.strength)

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            distil(stage, self.penalty)


def distil(stage: Stage, penalty: Distillation) -> None:
    """Add distillation from the model before the task, on all rows of the stage and for the heads of old tasks."""
    columns = {head: stage.model.columns[head] for head in stage.model.head_of[: stage.index]}
    all_columns = [column for head_columns in columns.values() for column in head_columns]
    penalty.heads = [all_columns] if stage.model.growing else list(columns.values())
    stage.rows = add_old_logits(stage.model, stage.rows)
    stage.penalties.append(penalty)
    stage.old_heads = True


class Replay(Strategy):
    """Replay: the rows of a new task, mixed with as many old ones from a replay buffer, in steps of twice the rows.

    Args:
        strength: number of rows in the replay buffer, M.
        kind: kind of replay buffer, "reservoir" or "balanced".
        seed: seed of the random choices.
    """

    def __init__(
        self, strength: int = 100, *, kind: Literal["reservoir", "balanced"] = "reservoir", seed: int = 0
    ) -> None:
        self.strength, self.kind, self.seed = strength, kind, seed

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            buffer = ReplayBuffer(int(self.strength), self.kind, seed=self.seed)
            for task in stage.tasks[: stage.index]:  # filling it again each time gives the same rows
                buffer.add(task["train"])
            stage.rows = mix(stage.rows, buffer.rows, seed=self.seed + stage.index)
            twice = {"accumulation": 2 * stage.settings.accumulation}
            stage.settings = stage.settings.model_copy(update=twice)


class ReplayDistillation(Replay):
    """Replay, with distillation of strength 1 from the model before the task on both old and new rows."""

    def set_up(self, model: MultiHead) -> None:
        self.penalty = Distillation(model)

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            distil(stage, self.penalty)


class LoRA(Strategy):
    """One LoRA adapter (Hu et al., 2022), with alpha twice the rank, that all tasks train in turn, and the heads.

    Args:
        strength: the rank.
    """

    def __init__(self, strength: int = 8) -> None:
        self.strength = strength

    def set_up(self, model: MultiHead) -> None:
        self._add(model, "shared")

    def _add(self, model: MultiHead, name: str) -> None:
        model.network = add_lora(model.network, rank=int(self.strength), alpha=2 * self.strength, name=name)

    def before(self, stage: Stage) -> None:
        stage.model.network.set_adapter(self._name(stage.index))

    def _name(self, task: int) -> str:
        return "shared"

    def distance(self, model: MultiHead, start: Mapping[str, Tensor]) -> float:
        """Return the distance for the weights with the active adapter merged in."""
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        with torch.no_grad():
            deltas = [layer.get_delta_weight(layer.active_adapters[0]) for layer in layers]
        return sum(float(delta.square().sum()) for delta in deltas) ** 0.5


class LoRAPerTask(LoRA):
    """A LoRA adapter and a head for each task, chosen by the task of a row: nothing is shared, nothing is forgotten."""

    def set_up(self, model: MultiHead) -> None:
        """Raises ValueError: the model has a growing head, for which the task of a row is unknown."""
        if model.growing:
            raise ValueError("LoRA per task needs the task of each row, and a growing head does not know it: use LoRA.")
        for task in range(len(model.head_of)):
            self._add(model, self._name(task))

    def _name(self, task: int) -> str:
        return f"task {task}"

    def activate(self, model: MultiHead, task: int) -> None:
        model.network.set_adapter(self._name(task))


class WiSEFT(Strategy):
    """WiSE-FT (Wortsman et al., 2022): after each task but the first, weights are averaged with those from before it.

    Args:
        strength: share of the old weights, in [0, 1].
    """

    def __init__(self, strength: float = 0.5) -> None:
        self.strength = strength

    def before(self, stage: Stage) -> None:
        super().before(stage)
        self._old = snapshot(stage.model)

    def after(self, stage: Stage) -> None:
        if stage.index:
            average_weights(stage.model, self._old, self.strength, skip=stage.new_heads)


#: The strategies against forgetting, by the name that ``make_strategy`` takes.
STRATEGIES: dict[str, type[Strategy]] = {
    "naive": Strategy,
    "joint": Joint,
    "frozen": Frozen,
    "low_rate": LowRate,
    "l2sp": L2SPStrategy,
    "ewc": EWCStrategy,
    "lwf": LwF,
    "replay": Replay,
    "replay_distillation": ReplayDistillation,
    "lora": LoRA,
    "lora_per_task": LoRAPerTask,
    "wise_ft": WiSEFT,
}


def make_strategy(name: str, strength: float | None = None) -> Strategy:
    """Make a strategy.

    Args:
        name: a key of ``STRATEGIES``.
        strength: its strength; None takes the default.

    Raises:
        ValueError: there is no such strategy, or it has no strength.
    """
    if name not in STRATEGIES:
        raise ValueError(f"There is no strategy {name!r}: choose from {', '.join(STRATEGIES)}.")
    if strength is None:
        return STRATEGIES[name]()
    if name in ("naive", "joint"):
        raise ValueError(f"The strategy {name} has no strength: leave it out.")
    return STRATEGIES[name](strength)
