"""Many tasks on one frozen base network, each with its own adapters and head, chosen by name."""

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
    """Many tasks on one frozen base: a batch names its task, and goes through that task's adapters and head alone.

    The adapters stand after the feed-forward layers (Pfeiffer et al., 2021). Call it as
    ``router("topic", **batch)``, or train and evaluate one task with ``router.for_task("topic")``.

    Args:
        base: a transformer with a head, whose last layer is replaced for each task; it is frozen.
        tasks: by name, the adapters' width and the number of classes:
            ``{"sentiment": {"width": 16, "num_labels": 2}, "topic": {"width": 8, "num_labels": 4}}``.
        seed: of the new weights; the global chance stays as it was.

    Attributes:
        base: as given.
        adapters: an nn.ModuleDict, by task, of a Bottleneck a layer. In a plain dict they would not be registered:
            no parameters of this module, and never trained.
        heads: an nn.ModuleDict, by task, of the modules on top.

    Raises:
        ValueError: no tasks, a name or number that won't do, a base without a head or that can't be read.
    """

    def __init__(self, base: PreTrainedModel, tasks: Mapping[str, Mapping[str, int]], *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(base, PreTrainedModel) or any(isinstance(module, Bottleneck) for module in base.modules()):
            raise ValueError("The base of a router is a plain transformer: load it anew, without adapters.")
        if not architecture.head_names(base):
            raise ValueError(f"{type(base).__name__} has no classification head: load it with load_classifier.")
        if not tasks:
            raise ValueError("A router needs a task: give its name, and the width and num_labels it is to have.")
        self.base = base.requires_grad_(False)
        self.layers = adapted_layers(base, "pfeiffer")
        self.adapters, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, options in tasks.items():
            if not name or "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(f"A task can't be called {name!r}, which PyTorch can't use: give another name.")
            if set(options) != {"width", "num_labels"} or options["num_labels"] < 2:
                raise ValueError(f"The task {name!r} has {dict(options)}: give width, and num_labels of 2 or more.")
            self.adapters[name] = make_adapters(base, len(self.layers), options["width"], "relu", seed)
            self.heads[name] = _make_head(base, options["num_labels"], seed)

    def for_task(self, task: str) -> "RoutedTask":
        """One task as a model that ``fit`` and ``evaluate`` take; it shares all its weights with the router.

        Raises:
            ValueError: there is no such task.
        """
        if task not in self.adapters:
            raise ValueError(f"There is no task {task!r}: choose from {', '.join(self.adapters)}.")
        return RoutedTask(self.base, self.layers, self.adapters[task], self.heads[task])

    def forward(self, task: str, **batch: Tensor) -> Any:
        """The base's output, with that task's logits of shape (B, C), for a batch without labels."""
        return self.for_task(task)(**batch)


class RoutedTask(nn.Module):
    """The base with the adapters and the head of one task, which alone train.

    Attributes:
        config: the base's, with the task's number of classes.
    """

    def __init__(self, base: PreTrainedModel, layers: list[str], adapters: nn.ModuleList, head: nn.ModuleDict) -> None:
        super().__init__()
        self.base, self.layers, self.adapters, self.head = base, layers, adapters, head
        self.training = base.training

    @property
    def config(self) -> PreTrainedConfig:
        config = copy.deepcopy(self.base.config)
        config.num_labels = _last_linear(self.head)[1].out_features
        return config

    def forward(self, **batch: Tensor) -> Any:
        """As ``TaskRouter.forward``."""
        if "labels" in batch:  # the base would reckon the loss with its own number of classes
            raise ValueError("A routed task takes no labels: take the loss of its logits, as fit does.")
        layers = [self.base.get_submodule(name) for name in self.layers]
        with _adapted(layers, self.adapters), _headed(self.base, self.head):
            return self.base(**batch)


@contextmanager
def _adapted(layers: Sequence[nn.Module], adapters: Sequence[nn.Module]) -> Iterator[None]:
    """Send the layers' outputs through the adapters, for one forward pass."""
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
    """A copy of the base's head with a new last layer, of normal weights and zero bias."""
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
