"""Bottleneck adapters after Houlsby et al. (2019) and Pfeiffer et al. (2020)."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.models import architecture
from ftkit.models.loading import class_names, name_classes
from ftkit.models.modules import seeded

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Bottleneck(nn.Module):
    """x + up(act(down(x))): two layers with a narrow middle and a way around them.

    ``up`` starts at zero, so that the module starts as the identity. It has 2 size width + size + width parameters.

    Args:
        size: of x, of shape (..., size).
        width: of the middle.
        activation: "relu" or "gelu".
    """

    def __init__(self, size: int, width: int, activation: str = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(size, width)
        self.act = ACTIVATIONS[activation]()
        self.up = nn.Linear(width, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.act(self.down(x)))


def adapted_layers(model: PreTrainedModel, kind: str) -> list[str]:
    """Names of the layers whose output an adapter changes: see ``add_adapters``."""
    attention, feed_forward = architecture.block_outputs(model)
    return attention + feed_forward if kind == "houlsby" else feed_forward


def make_adapters(model: PreTrainedModel, number: int, width: int, activation: str, seed: int) -> nn.ModuleList:
    """New adapters of the model's hidden size, on its device and in its precision.

    Raises:
        ValueError: a width that is no whole number from 1, an activation that is not known.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"The width of an adapter is {width!r}: give a whole number from 1, for instance 16.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}: choose from {', '.join(ACTIVATIONS)}.")
    with seeded(seed):
        adapters = nn.ModuleList(Bottleneck(model.config.hidden_size, width, activation) for _ in range(number))
    return adapters.to(model.device, model.dtype).train(model.training)


SETTINGS_FILE, WEIGHTS_FILE = "bottleneck.json", "bottleneck.safetensors"


def add_adapters(
    model: PreTrainedModel,
    width: int,
    *,
    kind: Literal["pfeiffer", "houlsby"] = "pfeiffer",
    activation: Literal["relu", "gelu"] = "relu",
    seed: int = 0,
) -> PreTrainedModel:
    """Put a ``Bottleneck`` into every block and freeze what was there, but for the head.

    It is applied to the output of a block's half, projected back to the hidden size, before the residual is added:
    after the attentions and after the feed-forward layers ("houlsby", where all layer norms train too, as in that
    paper) or after the feed-forward layers alone ("pfeiffer", layer norms frozen). It is a submodule of the layer
    whose output it changes, under the name ``adapter``, so that it is saved, moved and copied with the model. ALBERT,
    whose layers share their weights, shares its adapters.

    Args:
        model: a transformer of a family that ``anatomy`` can read; changed in place. It starts as it was.
        width: of the adapters.
        kind: where they are.
        activation: in their middle.
        seed: of ``down``; the global chance stays as it was.

    Returns:
        The same model.

    Raises:
        ValueError: a value out of range, an architecture that can't be read, a model that has adapters already.
    """
    if kind not in ("pfeiffer", "houlsby"):
        raise ValueError(f"There is no kind of adapter {kind!r}: choose 'pfeiffer' or 'houlsby'.")
    if adapter_names(model):
        raise ValueError("The model has bottleneck adapters already: load it anew to add others.")
    layers = adapted_layers(model, kind)
    adapters = make_adapters(model, len(layers), width, activation, seed)
    model.requires_grad_(False)
    for name in architecture.head_names(model):
        model.get_submodule(name).requires_grad_(True)
    if kind == "houlsby":
        for name in _norm_names(model):
            model.get_submodule(name).requires_grad_(True)
    for name, adapter in zip(layers, adapters, strict=True):
        layer = model.get_submodule(name)
        layer.adapter = adapter
        layer.register_forward_hook(_adapt)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """Full names of the model's bottleneck adapters, in the order of its layers."""
    return [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]


def save_bottleneck(model: PreTrainedModel, folder: str | Path) -> Path:
    """Save the adapters, the head and, after Houlsby, the layer norms: all that training changed, and no more.

    Args:
        folder: made if need be; what it holds of an earlier save is replaced.

    Returns:
        The folder, with a small safetensors file and a JSON file of the settings and the classes' names.

    Raises:
        ValueError: the model has no adapters.
        OSError: the folder can't be made or written.
    """
    names = adapter_names(model)
    if not names:
        raise ValueError("The model has no bottleneck adapters to save: add_adapters() puts them in.")
    attention = architecture.block_outputs(model)[0]
    kind = "houlsby" if any(name.removesuffix(".adapter") in attention for name in names) else "pfeiffer"
    first = model.get_submodule(names[0])
    settings = {
        "architecture": type(model).__name__,
        "kind": kind,
        "width": first.down.out_features,
        "activation": first.activation,
        "labels": class_names(model.config),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in _own(model, kind).items()}, folder / WEIGHTS_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return folder


def load_bottleneck(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put saved adapters, with their head, into the base they were trained in; they can train on.

    Args:
        model: the base without adapters, with a head for as many classes; changed in place.
        folder: what ``save_bottleneck`` wrote.

    Returns:
        The same model, with the logits it had when it was saved.

    Raises:
        ValueError: no adapters there, or of another architecture, size or number of classes; the model is as it was.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(
            f"There are no saved adapters in {str(folder)!r}: give the folder that save_bottleneck() returned."
        )
    settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    labels = settings["labels"]
    if settings["architecture"] != type(model).__name__:
        raise ValueError(
            f"The adapters in {str(folder)!r} are of a {settings['architecture']}, this is a {type(model).__name__}: "
            "load the model they were trained in."
        )
    if len(labels) != model.config.num_labels:
        raise ValueError(
            f"The adapters in {str(folder)!r} are for the {len(labels)} classes {labels}, the model's head for "
            f"{model.config.num_labels}: load the model with these classes."
        )
    weights = load_file(folder / WEIGHTS_FILE)
    kind, end = settings["kind"], ".adapter.up.bias"
    sizes = {name.removesuffix(end): len(weight) for name, weight in weights.items() if name.endswith(end)}
    if sizes != dict.fromkeys(adapted_layers(model, kind), model.config.hidden_size):
        raise ValueError(
            f"The adapters in {str(folder)!r} are of a model with other layers: load the model they were trained in."
        )
    add_adapters(model, settings["width"], kind=kind, activation=settings["activation"])
    own = _own(model, kind)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    name_classes(model.config, labels)
    return model


def _adapt(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """The hook of an adapted layer; it finds the adapter on the layer, so that a copied layer uses its own."""
    return layer.adapter(output)


def _norm_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))]


def _own(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """What is saved with the adapters, by name."""
    parts = adapter_names(model) + architecture.head_names(model) + (_norm_names(model) if kind == "houlsby" else [])
    prefixes = tuple(f"{part}." for part in parts)
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
