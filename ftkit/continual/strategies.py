"""Strategies against catastrophic forgetting, each with one strength."""

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
    """What is about to be learned, for a strategy to change.

    Attributes:
        model: the network; all that is to train requires a gradient.
        tasks: the rows of all tasks by split.
        index: number of the task, from 0.
        settings: of the training.
        rows: to train on; none where there is nothing to train.
        validation: rows to choose the best epoch on.
        penalties: for the loss.
        seen: tasks whose classes a growing head has by now.
        old_heads: whether the heads of earlier tasks train too, though no row is theirs.
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
        """Names of the parameters of heads that no earlier task has trained."""
        fresh = {self.model.head_of[self.index]} - self.model.heads_of(range(self.index))
        return {name for name, head in self.model.head_parameters().items() if head in fresh}


class Strategy:
    """Naive fine-tuning on one task after the other; what the others do differently, they override.

    Args:
        strength: the one knob of a strategy; this one has none.
    """

    strength: float | None = None

    def set_up(self, model: MultiHead) -> None:
        """Before the first task."""

    def before(self, stage: Stage) -> None:
        """Before each task, with the weights that the one before left."""
        stage.model.requires_grad_(True)

    def after(self, stage: Stage) -> None:
        """After each task, before anything is measured."""

    def activate(self, model: MultiHead, task: int) -> None:
        """Before a task is measured."""

    def distance(self, model: MultiHead, start: Mapping[str, Tensor]) -> float:
        """How far the weights, heads aside, have come from those before any training."""
        return weight_distance(model, start)


FISHER_ROWS = 256  # of a task's training rows


class Joint(Strategy):
    """All tasks at once, in as many steps: what a sequence can hope for. Nothing is learned after the first stage, so
    that all rows of its matrix are the same, and its learning accuracy is its average accuracy."""

    def before(self, stage: Stage) -> None:
        super().before(stage)
        stage.rows = [row for task in stage.tasks for row in task["train"]] if stage.index == 0 else []
        stage.validation = [row for task in stage.tasks for row in task.get("validation", [])]
        stage.seen = len(stage.tasks)


class Frozen(Strategy):
    """Only the heads train, and the topmost groups of the network.

    Args:
        strength: how many groups of ``layer_groups``; with 0 nothing that tasks share trains, nothing is forgotten.
    """

    def __init__(self, strength: int = 0) -> None:
        self.strength = strength

    def before(self, stage: Stage) -> None:
        """Raises ValueError: the network has not that many groups."""
        model = stage.model.requires_grad_(False)
        groups = layer_groups(model.network)
        if not 0 <= self.strength <= len(groups):
            raise ValueError(f"The network has {len(groups)} groups, and {self.strength} are to train: give 0 or more.")
        shared = [p for group in groups[len(groups) - int(self.strength) :] for p in group.parameters.values()]
        for parameter in [*shared, *map(model.get_parameter, model.head_parameters())]:
            parameter.requires_grad_(True)


class LowRate(Strategy):
    """From the second task on, a lower learning rate.

    Args:
        strength: what the rate is multiplied by, in (0, 1]; with 1 it is naive fine-tuning.
    """

    def __init__(self, strength: float = 0.1) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"A rate multiplied by {strength!r} is not a low one: give a factor in (0, 1].")
        self.strength = strength

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            stage.settings = stage.settings.model_copy(update={"lr": stage.settings.lr * self.strength})


class L2SPStrategy(Strategy):
    """L2-SP: from the second task on, the weights are held to those with which the task starts; a head that is new is
    free, and has the weight decay of the optimiser.

    Args:
        strength: alpha.
    """

    def __init__(self, strength: float = 0.01) -> None:
        self.strength = strength

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            stage.penalties.append(L2SP(stage.model, self.strength, new=stage.new_heads, beta=0))


class EWCStrategy(Strategy):
    """EWC, with the Fisher information of each task, of up to 256 of its rows.

    Args:
        strength: lambda.
        kind: of Fisher information, as for ``diagonal_fisher``.
        decay: of the online variant; None for the other one.
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
            fisher = diagonal_fisher(stage.model, stage.tasks[stage.index]["train"][:FISHER_ROWS], self.kind)
            self.penalty.remember(stage.model, fisher)


class LwF(Strategy):
    """Distillation: on the rows of a new task, the heads of old tasks go on saying what they said before it.

    Args:
        strength: of the distillation.
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
    """Add to all rows what the model says of them before the task, and hold it to that where it has learned a task."""
    columns = {head: stage.model.columns[head] for head in stage.model.head_of[: stage.index]}
    every = [column for part in columns.values() for column in part]
    penalty.heads = [every] if stage.model.growing else list(columns.values())
    stage.rows = add_old_logits(stage.model, stage.rows)
    stage.penalties.append(penalty)
    stage.old_heads = True


class Replay(Strategy):
    """Beside the rows of a new task, as many of a memory of the old ones, in steps of twice the rows.

    Args:
        strength: rows in the memory, M.
        kind: of memory, "reservoir" or "balanced".
        seed: of its choices.
    """

    def __init__(
        self, strength: int = 100, *, kind: Literal["reservoir", "balanced"] = "reservoir", seed: int = 0
    ) -> None:
        self.strength, self.kind, self.seed = strength, kind, seed

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            memory = ReplayBuffer(int(self.strength), self.kind, seed=self.seed)
            for task in stage.tasks[: stage.index]:  # made anew, which gives the same one and needs no file
                memory.add(task["train"])
            stage.rows = mix(stage.rows, memory.rows, seed=self.seed + stage.index)
            twice = {"accumulation": 2 * stage.settings.accumulation}
            stage.settings = stage.settings.model_copy(update=twice)


class ReplayDistillation(Replay):
    """Replay, and on all of these rows distillation from the model before the task, at strength 1."""

    def set_up(self, model: MultiHead) -> None:
        self.penalty = Distillation(model)

    def before(self, stage: Stage) -> None:
        super().before(stage)
        if stage.index:
            distil(stage, self.penalty)


class LoRA(Strategy):
    """One low-rank update (LoRA, alpha twice the rank) that all tasks train in turn, and the heads.

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
        """By the weights with the active update merged in."""
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        with torch.no_grad():
            deltas = [layer.get_delta_weight(layer.active_adapters[0]) for layer in layers]
        return sum(float(delta.square().sum()) for delta in deltas) ** 0.5


class LoRAPerTask(LoRA):
    """A low-rank update and a head for each task, chosen by the task of a row: nothing is shared, nothing forgotten."""

    def set_up(self, model: MultiHead) -> None:
        """Raises ValueError: a growing head, whose rows do not tell their task."""
        if model.growing:
            raise ValueError("LoRA per task needs to know a row's task, and a growing head is not told: use LoRA.")
        for task in range(len(model.head_of)):
            self._add(model, self._name(task))

    def _name(self, task: int) -> str:
        return f"task {task}"

    def activate(self, model: MultiHead, task: int) -> None:
        model.network.set_adapter(self._name(task))


class WiSEFT(Strategy):
    """WiSE-FT: after each task but the first, the weights are averaged with those from before it.

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
    """A strategy by its name in ``STRATEGIES``, at a strength, or at the one it has by default.

    Raises:
        ValueError: no such strategy, or one that has no strength.
    """
    if name not in STRATEGIES:
        raise ValueError(f"There is no strategy {name!r}: choose from {', '.join(STRATEGIES)}.")
    if strength is None:
        return STRATEGIES[name]()
    if name in ("naive", "joint"):
        raise ValueError(f"The strategy {name} has no strength: leave it out.")
    return STRATEGIES[name](strength)
