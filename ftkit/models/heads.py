"""Several heads on one network, for rows that name their task."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.data.tasks import TaskSequence
from ftkit.models import architecture


class Heads(nn.Module):
    """The last linear layer of a classifier, split into one layer for each head, so that each can be frozen alone."""

    def __init__(self, parts: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)  # as an attribute, since peft does not copy a module that is a ModuleDict

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores of all heads, concatenated, shape (..., C)."""
        return torch.cat([head(hidden) for head in self.parts.values()], dim=-1)


class Scores(NamedTuple):
    """Output of a ``MultiHead``.

    Attributes:
        logits: shape (N, C), -inf for classes that are not among a row's own. The softmax and the cross-entropy of a
            row are therefore those of its own classes, even if the batch has rows of several tasks, and the other
            classes get a gradient of zero.
        all_logits: shape (N, C), the logits of all classes.
    """

    logits: Tensor
    all_logits: Tensor


class MultiHead(nn.Module):
    """A network whose last layer is split into heads, for rows that name their task.

    A row is scored among the classes of its own head; with a growing head, among the classes of the tasks learned so
    far. Do not use it with label smoothing, which would give probability to classes that have none.

    Args:
        network: a classifier for all classes of the sequence (``load_classifier(name, sequence.class_names)``); its
            last layer is replaced by one that computes the same.
        sequence: the tasks.

    Attributes:
        network: the network given.
        task_names, head_of: name of each task, and name of its head.
        columns: range of the output columns of each head, by name.
        seen: number of tasks learned so far, which a growing head scores; at first all of them. ``learn_sequence``
            sets it.

    Raises:
        ValueError: the network has no head, or its head is not for these classes.
    """

    def __init__(self, network: PreTrainedModel, sequence: TaskSequence) -> None:
        super().__init__()
        self.task_names, self.head_of = sequence.names, [task.head for task in sequence.tasks]
        self.growing, self.seen = sequence.growing, len(sequence.tasks)
        self.columns: dict[str, range] = {}
        start = 0
        for head, size in sequence.heads.items():
            self.columns[head], start = range(start, start + size), start + size
        _split_last_layer(network, self.columns)
        self.network = network
        own = torch.zeros(len(self.head_of), start, dtype=torch.bool)  # whether a class belongs to a task, (T, C)
        for task, head in enumerate(self.head_of):
            own[task, self.columns[head].start : self.columns[head].stop] = True
        self.register_buffer("own", own, persistent=False)

    @property
    def config(self) -> PreTrainedConfig:
        """The network's config."""
        return self.network.config

    def forward(self, task: Tensor, **batch: Tensor) -> Scores:
        """Score N rows.

        Args:
            task: index of each row's task, int64 of shape (N,).
            batch: the network's inputs, without labels.
        """
        logits = self.network(**batch).logits
        allowed = self.own[: self.seen].any(0).expand_as(logits) if self.growing else self.own[task]
        return Scores(logits.masked_fill(~allowed, -torch.inf), logits)

    def heads_of(self, tasks: Iterable[int]) -> set[str]:
        """Names of the heads of these tasks."""
        return {self.head_of[task] for task in tasks}

    def head_parameters(self) -> dict[str, str]:
        """Map the full name of each head parameter to the name of its head; with adapters, a head may have copies."""
        found = {}
        for path, module in self.named_modules():
            if isinstance(module, Heads):
                for name, _ in module.named_parameters():
                    found[f"{path}.{name}"] = list(self.columns)[int(name.split(".")[1])]
        return found


def _split_last_layer(network: PreTrainedModel, columns: Mapping[str, range]) -> None:
    """Split the last linear layer of the head into one layer for each range of its outputs, with the same weights."""
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
            f"The tasks have {total} classes in all, but {type(network).__name__} has {sizes}: "
            "load it with load_classifier(name, sequence.class_names)."
        )
    name, last = layers[-1]
    heads = {}
    for number, part in enumerate(columns.values()):  # by number, since a name may contain a dot
        head = nn.Linear(last.in_features, len(part), bias=last.bias is not None)
        head.weight = nn.Parameter(last.weight.detach()[part.start : part.stop].clone())
        if last.bias is not None:
            head.bias = nn.Parameter(last.bias.detach()[part.start : part.stop].clone())
        heads[str(number)] = head
    network.set_submodule(name, Heads(heads))
