"""Many tasks on one frozen base model, each with its own adapters and head."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.adapters.bottleneck import Bottleneck, adapted_layers, make_adapters
from ftkit.models import architecture


class TaskRouter(nn.Module):
    """Many tasks on one frozen base model; a batch runs through the adapters and the head of its task only.

    The adapters stand after the feed-forward sub-layers (Pfeiffer et al., 2021). Call
    ``router("topic", **batch)``, or train and evaluate one task with ``router.for_task("topic")``.

    Args:
        base: a transformer with a head; it is frozen. Each task gets a copy of the head with a new last layer.
        tasks: the adapters' width and the number of classes, by name of the task:
            ``{"sentiment": {"width": 16, "num_labels": 2}, "topic": {"width": 8, "num_labels": 4}}``.
        seed: seed of the new weights; the global random state is left unchanged.

    Attributes:
        base: the base model given.
        adapters: an ``nn.ModuleDict`` with the adapters of each task, one ``Bottleneck`` for each layer. In a plain
            dict they would not be registered as parameters of this module, and never train.
        heads: an ``nn.ModuleDict`` with the head of each task.

    Raises:
        ValueError: there are no tasks, a name or number cannot be used, or the base has no head or an unknown
            architecture.
    """

    def __init__(self, base: PreTrainedModel, tasks: Mapping[str, Mapping[str, int]], *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(base, PreTrainedModel) or any(isinstance(module, Bottleneck) for module in base.modules()):
            raise ValueError("The base of a router must be a plain transformer: load it again, without adapters.")
        if not architecture.head_names(base):
            raise ValueError(f"{type(base).__name__} has no classification head: load it with load_classifier.")
        if not tasks:
            raise ValueError("A router needs at least one task: give its name with a width and num_labels.")
        self.base = base.requires_grad_(False)
        self.layers = adapted_layers(base, "pfeiffer")
        self.adapters, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, options in tasks.items():
            if not name or "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(f"A task can't be named {name!r}, which PyTorch does not allow: give another name.")
            if set(options) != {"width", "num_labels"} or options["num_labels"] < 2:
                raise ValueError(f"The task {name!r} has {dict(options)}: give a width, and num_labels of 2 or more.")
            self.adapters[name] = make_adapters(base, len(self.layers), options["width"], "relu", seed)
            self.heads[name] = _make_head(base, options["num_labels"], seed)

    def for_task(self, task: str) -> "RoutedTask":
        """One task as a model for ``fit`` and ``evaluate``; it shares all weights with the router.

        Raises:
            ValueError: there is no such task.
        """
        if task not in self.adapters:
            raise ValueError(f"There is no task {task!r}: choose from {', '.join(self.adapters)}.")
        return RoutedTask(self.base, self.layers, self.adapters[task], self.heads[task])

    def forward(self, task: str, **batch: Tensor) -> Any:
        """Run a batch without labels; returns the base model's output with the task's logits, shape (B, C)."""
        return self.for_task(task)(**batch)


class RoutedTask(nn.Module):
    """The frozen base model with the adapters and the head of one task.

    Attributes:
        config: the base model's config with the task's number of classes.
    """

    def __init__(self, base: PreTrainedModel, layers: list[str], adapters: nn.ModuleList, head: nn.ModuleDict) -> None:
        super().__init__()
        self.base, self.layers, self.adapters, self.head = base, layers, adapters, head
        self.training = base.training

    @property
    def config(self) -> PreTrainedConfig:
        config = copy.deepcopy(self.base.config)
        num_labels = _last_linear(self.head)[1].out_features
        config.id2label = {i: f"LABEL_{i}" for i in range(num_labels)}  # the names of the base are of its own task
        return config

    def forward(self, **batch: Tensor) -> Any:
        """Run a batch without labels, as ``TaskRouter.forward`` does."""
        if "labels" in batch:  # the base would compute the loss with its own number of classes
            raise ValueError("A routed task takes no labels: compute the loss from its logits, as fit does.")
        layers = [self.base.get_submodule(name) for name in self.layers]
        with _adapted(layers, self.adapters), _headed(self.base, self.head):
            return self.base(**batch)


@contextmanager
def _adapted(layers: Sequence[nn.Module], adapters: Sequence[nn.Module]) -> Iterator[None]:
    """Apply the adapters to the outputs of the layers, for one forward pass."""
    hooks = [
        layer.register_forward_hook(partial(_adapt, adapter)) for layer, adapter in zip(layers, adapters, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adapt(adapter: nn.Module, _layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return adapter(output)


@contextmanager
def _headed(base: PreTrainedModel, head: nn.ModuleDict) -> Iterator[None]:
    """Put another head on the base, for one forward pass."""
    own = {name: getattr(base, name) for name in head}
    try:
        for name, module in head.items():
            setattr(base, name, module)
        yield
    finally:
        for name, module in own.items():
            setattr(base, name, module)


def _make_head(base: PreTrainedModel, num_labels: int, seed: int) -> nn.ModuleDict:
    """Copy the base model's head with a new last layer: weights from a normal distribution, bias zero."""
    head = nn.ModuleDict({name: copy.deepcopy(getattr(base, name)) for name in architecture.head_names(base)})
    name, old = _last_linear(head)
    new = nn.Linear(old.in_features, num_labels, bias=old.bias is not None)
    std = getattr(base.config, "initializer_range", 0.02)
    nn.init.normal_(new.weight, std=std, generator=torch.Generator().manual_seed(seed))
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    head.set_submodule(name, new.to(old.weight.device, old.weight.dtype))
    return head.requires_grad_(True)


def _last_linear(head: nn.ModuleDict) -> tuple[str, nn.Linear]:
    return [(name, module) for name, module in head.named_modules() if isinstance(module, nn.Linear)][-1]
