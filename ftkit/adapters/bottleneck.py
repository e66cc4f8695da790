"""Bottleneck adapters (Houlsby et al., 2019; Pfeiffer et al., 2021)."""

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.models import architecture
from ftkit.models.loading import (
    BOTTLENECK_FILE,
    add_new_weights,
    class_names,
    name_classes,
    new_weights,
    report_random_weights,
)
from ftkit.models.modules import seeded

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Bottleneck(nn.Module):
    """x + up(act(down(x))): two linear layers with a narrow middle, and a residual connection around them.

    ``up`` starts at zero, so that the module starts as the identity. It has 2 * size * width + size + width parameters.

    Args:
        size: size of x, which has the shape (..., size).
        width: size of the middle.
        activation: "relu" or "gelu".
    """

    def __init__(self, size: int, width: int, activation: str = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(size, width)
        self.act = _ACTIVATIONS[activation]()
        self.up = nn.Linear(width, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.act(self.down(x)))


def adapted_layers(model: PreTrainedModel, kind: str) -> list[str]:
    """Names of the layers whose output an adapter changes; see ``add_adapters`` for the kinds.

    Raises:
        ValueError: the blocks cannot be read, or such a layer is not as wide as the model.
    """
    attention, feed_forward = architecture.block_outputs(model)
    names = attention + feed_forward if kind == "houlsby" else feed_forward
    width = getattr(model.config, "hidden_size", None)
    for name in names:
        layer = model.get_submodule(name)
        outputs = architecture.linear_shape(getattr(layer, "base_layer", layer))[1]
        if outputs != width:
            raise ValueError(
                f"The layer {name} of {type(model).__name__} has {outputs} outputs, but the hidden size of its config "
                f"is {width}, so an adapter does not fit: use add_lora."
            )
    return names


def make_adapters(model: PreTrainedModel, number: int, width: int, activation: str, seed: int) -> nn.ModuleList:
    """Make adapters of the model's hidden size, on its device and in its precision.

    Raises:
        ValueError: the width is not an integer of 1 or more, or the activation is unknown.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"The width of an adapter is {width!r}: give an integer of 1 or more, for example 16.")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}: choose from {', '.join(_ACTIVATIONS)}.")
    with seeded(seed):
        adapters = nn.ModuleList(Bottleneck(model.config.hidden_size, width, activation) for _ in range(number))
    return adapters.to(model.device, model.dtype).train(model.training)


_WEIGHTS_FILE = "bottleneck.safetensors"


def add_adapters(
    model: PreTrainedModel,
    width: int,
    *,
    kind: Literal["pfeiffer", "houlsby"] = "pfeiffer",
    activation: Literal["relu", "gelu"] = "relu",
    seed: int = 0,
) -> PreTrainedModel:
    """Put a ``Bottleneck`` adapter into every block, and freeze all other weights except the head.

    The adapter changes the output of a sub-layer, before the residual is added. With "pfeiffer" there is one after
    each feed-forward sub-layer; with "houlsby" also one after each attention sub-layer, and all layer norms train, as
    in that paper. The adapter is a submodule, named ``adapter``, of the layer whose output it changes, so that it is
    saved, moved and copied with the model. ALBERT, whose layers share their weights, also shares its adapters.

    Args:
        model: a transformer of an architecture in ``ftkit.models.architecture``; changed in place. At first its
            outputs stay the same.
        width: size of the adapters' middle.
        kind: where the adapters are.
        activation: the activation in their middle.
        seed: seed of the weights of ``down``; the global random state is left unchanged.

    Returns:
        The same model.

    Raises:
        ValueError: a value is out of range, the architecture is unknown, or the model already has adapters.
    """
    if kind not in ("pfeiffer", "houlsby"):
        raise ValueError(f"There is no kind of adapter {kind!r}: choose 'pfeiffer' or 'houlsby'.")
    if adapter_names(model):
        raise ValueError("The model already has bottleneck adapters: load it again to add others.")
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
    """Save only what the base's checkpoint lacks: the adapters, the head and, for "houlsby", the layer norms.

    Weights of the base that were not in its checkpoint, such as a pooler that started at random, are saved too.

    Args:
        model: a model from ``add_adapters``.
        folder: created if it does not exist; files of an earlier save are replaced.

    Returns:
        The folder, with a small safetensors file, and a JSON file with the settings and the class names.

    Raises:
        ValueError: the model has no adapters.
        OSError: the folder cannot be created or written.
    """
    names = adapter_names(model)
    if not names:
        raise ValueError("The model has no bottleneck adapters to save: add them with add_adapters().")
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
    # cloned, since a safetensors file refuses weights that share their memory
    names = _changed_weights(model, kind) | new_weights(model)
    state = model.state_dict()
    tensors = {name: state[name].contiguous().clone() for name in sorted(names & state.keys())}
    save_file(tensors, folder / _WEIGHTS_FILE)
    (folder / BOTTLENECK_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return folder


def load_bottleneck(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put saved adapters and their head into the base model they were trained with; training can go on.

    Args:
        model: the base model without adapters, with a head for the same number of classes; changed in place.
        folder: the folder that ``save_bottleneck`` wrote.

    Returns:
        The same model, with the logits it had when the adapters were saved.

    Raises:
        ValueError: the folder has no adapters, or they are for another architecture, size or number of classes. The
            model is then left unchanged.
    """
    folder = Path(folder)
    if not (folder / BOTTLENECK_FILE).is_file():
        raise ValueError(
            f"There are no saved adapters in {str(folder)!r}: give the folder that save_bottleneck() returned."
        )
    settings: dict[str, Any] = json.loads((folder / BOTTLENECK_FILE).read_text("utf-8"))
    labels = settings["labels"]
    if settings["architecture"] != type(model).__name__:
        raise ValueError(
            f"The adapters in {str(folder)!r} are for a {settings['architecture']}, this is a {type(model).__name__}: "
            "load the model they were trained with."
        )
    if len(labels) != model.config.num_labels:
        raise ValueError(
            f"The adapters in {str(folder)!r} are for the {len(labels)} classes {labels}, the model's head is for "
            f"{model.config.num_labels}: load the model with these classes."
        )
    weights = load_file(folder / _WEIGHTS_FILE)
    kind, end = settings["kind"], ".adapter.up.bias"
    sizes = {name.removesuffix(end): len(weight) for name, weight in weights.items() if name.endswith(end)}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    base_weights = {name for name in weights if ".adapter." not in name}
    changed = _changed_weights(model, kind)
    fits = base_weights >= changed and all(shapes.get(name) == weights[name].shape for name in base_weights)
    if sizes != dict.fromkeys(adapted_layers(model, kind), model.config.hidden_size) or not fits:
        raise ValueError(
            f"The adapters in {str(folder)!r} are for a model with other layers: load the model they were trained with."
        )
    add_adapters(model, settings["width"], kind=kind, activation=settings["activation"])
    model.load_state_dict(weights, strict=False)
    report_random_weights(model, base_weights, folder)
    add_new_weights(model, base_weights - changed)
    name_classes(model.config, labels)
    return model


def _adapt(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """Forward hook of an adapted layer; the adapter is looked up on the layer, so that a copied layer uses its own."""
    return layer.adapter(output)


def _norm_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))]


def _changed_weights(model: PreTrainedModel, kind: str) -> set[str]:
    """Names of the weights that training changes: adapters, head and, for "houlsby", layer norms."""
    parts = adapter_names(model) + architecture.head_names(model) + (_norm_names(model) if kind == "houlsby" else [])
    prefixes = tuple(f"{part}." for part in parts)
    return {name for name in model.state_dict() if name.startswith(prefixes)}
