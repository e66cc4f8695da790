"""Several heads on one network, and rows that name their task."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.data.tasks import TaskSequence
from ftkit.models import architecture


class Heads(nn.Module):
    """The last linear layer of a classifier, cut into one for each head, so that each can be frozen by itself."""

    def __init__(self, parts: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)  # inside, for peft copies no module that is a ModuleDict itself

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores of all heads, side by side, shape (..., C)."""
        return torch.cat([head(hidden) for head in self.parts.values()], dim=-1)


class Scores(NamedTuple):
    """What a MultiHead gives.

    Attributes:
        logits: shape (N, C), -inf for classes that a row is not scored among. So its softmax, and with it the
            cross-entropy, is that of its own classes, in a batch with rows of several tasks too; the others get
            a gradient of zero.
        all_logits: shape (N, C), of all classes.
    """

    logits: Tensor
    all_logits: Tensor


class MultiHead(nn.Module):
    """A network whose last layer is cut into heads, for rows that say which task they are of.

    A row is scored among the classes of its own head, or, where the head grows, among those of the tasks learned so
    far. Label smoothing is not for it, which would spread probability over classes that have none.

    Args:
        network: a classifier of all classes of the sequence together (``load_classifier(name, sequence.class_names)``);
            its last layer is replaced by one that computes the same.
        sequence: the tasks.

    Attributes:
        network: as given.
        task_names, head_of: of each task, its name and that of its head.
        columns: of the scores, those of each head.
        seen: tasks learned so far, which a growing head knows; ``learn_sequence`` sets it. At first all of them.

    Raises:
        ValueError: the network has no head, or not one for these classes.
    """

    def __init__(self, network: PreTrainedModel, sequence: TaskSequence) -> None:
        super().__init__()
        self.task_names, self.head_of = sequence.names, [task.head for task in sequence.tasks]
        self.growing, self.seen = sequence.growing, len(sequence.tasks)
        self.columns: dict[str, range] = {}
        start = 0
        for head, size in sequence.heads.items():
            self.columns[head], start = range(start, start + size), start + size
        _cut_last_layer(network, self.columns)
        self.network = network
        own = torch.zeros(len(self.head_of), start, dtype=torch.bool)  # which classes a task has, (T, C)
        for task, head in enumerate(self.head_of):
            own[task, self.columns[head].start : self.columns[head].stop] = True
        self.register_buffer("own", own, persistent=False)

    @property
    def config(self) -> PreTrainedConfig:
        """The network's."""
        return self.network.config

    def forward(self, task: Tensor, **batch: Tensor) -> Scores:
        """Scores for N rows.

        Args:
            task: the number of each row's task, shape (N,).
            batch: what the network takes, without labels.
        """
        logits = self.network(**batch).logits
        allowed = self.own[: self.seen].any(0).expand_as(logits) if self.growing else self.own[task]
        return Scores(logits.masked_fill(~allowed, -torch.inf), logits)

    def heads_of(self, tasks: Iterable[int]) -> set[str]:
        """The names of the heads that answer these tasks."""
        return {self.head_of[task] for task in tasks}

    def head_parameters(self) -> dict[str, str]:
        """By the full name of each parameter of a head: the name of the head. With adapters a head may have copies."""
        found = {}
        for path, module in self.named_modules():
            if isinstance(module, Heads):
                for name, _ in module.named_parameters():
                    found[f"{path}.{name}"] = list(self.columns)[int(name.split(".")[1])]
        return found


def _cut_last_layer(network: PreTrainedModel, columns: Mapping[str, range]) -> None:
    """Replace the last linear layer of the head by one for each range of its outputs, with the same weights."""
    total = sum(map(len, columns.values()))
    layers = [
        (name, module)
        for top in architecture.head_names(network)
        for name, module in network.named_modules()
        if (name == top or name.startswith(f"{top}.")) and isinstance(module, nn.Linear)
    ]
    if not layers or layers[-1][1].out_features != total:
        sizes = f"a head for {layers[-1][1].out_features}" if layers else "no head"
        raise ValueError(
            f"The tasks have {total} classes in all, and {type(network).__name__} has {sizes}: "
            "load it with load_classifier(name, sequence.class_names)."
        )
    name, last = layers[-1]
    heads = {}
    for number, part in enumerate(columns.values()):  # numbered, for a name may hold a dot
        head = nn.Linear(last.in_features, len(part), bias=last.bias is not None)
        head.weight = nn.Parameter(last.weight.detach()[part.start : part.stop].clone())
        if last.bias is not None:
            head.bias = nn.Parameter(last.bias.detach()[part.start : part.stop].clone())
        heads[str(number)] = head
    network.set_submodule(name, Heads(heads))
