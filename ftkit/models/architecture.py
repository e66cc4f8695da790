"""Which layer of a transformer does what, and the order of the layers.

Covers BERT, RoBERTa, ELECTRA, DeBERTa-v2, DistilBERT, ModernBERT, ALBERT, GPT-2, Llama, Qwen2, T5 and ViT.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.errors import FreezingError

# one layer computes query, key and value together
_FUSED = ("Wqkv", "c_attn")

QUERIES = ("query", "query_proj", "q_proj", "q_lin", "q", *_FUSED)

KEYS = ("key", "key_proj", "k_proj", "k_lin", "k", *_FUSED)

VALUES = ("value", "value_proj", "v_proj", "v_lin", "v", *_FUSED)

# output projections of the attention and feed-forward sub-layers
_ATTENTION_OUTPUTS = (
    "attention.output.dense", "attention.out_lin", "attention.dense", "attention.o_proj", "self_attn.o_proj", "attn.Wo",
    "attn.c_proj", "crossattention.c_proj", "SelfAttention.o", "EncDecAttention.o",
)  # fmt: skip

_FEED_FORWARD_OUTPUTS = (
    "output.dense", "ffn.lin2", "ffn_output", "mlp.fc2", "mlp.down_proj", "mlp.Wo", "mlp.c_proj", "DenseReluDense.wo",
)  # fmt: skip


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules on top of the pretrained body, such as a classifier; empty for a language model.

    A language model's output layer is not a head: it comes with the checkpoint, and is often tied to the embeddings.
    """
    if model.base_model is model:
        return []
    output_layer = model.get_output_embeddings()
    return [
        name
        for name, child in model.named_children()
        if child is not model.base_model
        and next(child.parameters(), None) is not None
        and not (output_layer is not None and any(module is output_layer for module in child.modules()))
    ]


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers below the head by name, including ``Conv1D``, GPT-2's linear layer.

    A layer that peft has wrapped counts as one layer and keeps its name.
    """
    top, output_layer = head_names(model), model.get_output_embeddings()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        inside = any(name.startswith(f"{wrapped}.") for wrapped in found)
        below = name.split(".")[0] not in top and layer is not output_layer
        if isinstance(layer, nn.Linear | Conv1D) and below and not inside:
            found[name] = module
    return found


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and outputs of a linear layer."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def layers_called(model: PreTrainedModel, endings: Iterable[str]) -> list[str]:
    """Full names of the linear layers below the head whose names end with one of ``endings``."""
    endings = tuple(f".{ending}" for ending in endings)
    return [name for name in linear_layers(model) if f".{name}".endswith(endings)]


def block_outputs(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the output layers of the attention sub-layers, and of the feed-forward sub-layers, each in order.

    Raises:
        ValueError: a block lacks one of the two, so the architecture is not known here.
    """
    attention = layers_called(model, [*_ATTENTION_OUTPUTS, "crossattention.output.dense"])
    feed_forward = [name for name in layers_called(model, _FEED_FORWARD_OUTPUTS) if name not in attention]
    feed_forward = [name for name in feed_forward if _block(name)]  # no dense layer outside the blocks
    if not attention or {_block(name) for name in attention} != {_block(name) for name in feed_forward}:
        raise ValueError(
            f"The blocks of {type(model).__name__} can't be read (some have no attention or feed-forward output): "
            "use add_lora with targets='all-linear', which does not need them."
        )
    return attention, feed_forward


def _block(name: str) -> str:
    """Path of the block that contains a layer, for example "bert.encoder.layer.3"; empty outside the blocks."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""


@dataclass
class Group:
    """Parameters of one layer, which are frozen, or get a learning rate, together.

    Attributes:
        name: "embeddings", "layer 0", … or "head"; with an encoder and a decoder "encoder layer 0", ….
        parameters: the parameters by full name; each is in one group only.
        block: path of the block's module; None for embeddings and head.
        tied: second names of parameters that the network uses twice, with their names in ``parameters`` (a language
            model's output layer is often its word embeddings). They train and freeze with this group.
        uses: how often a forward pass runs the block; more than 1 if layers share it, as in ALBERT.
    """

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    block: str | None = None
    tied: dict[str, str] = field(default_factory=dict)
    uses: int = 1

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.parameters.values())
        tied = f", tied: {', '.join(f'{other} is {name}' for other, name in self.tied.items())}" if self.tied else ""
        uses = f", run {self.uses} times" if self.uses > 1 else ""
        return f"Group({self.name}: {size:,} parameters{uses}{tied})"


def layer_groups(model: nn.Module) -> list[Group]:
    """Sort a transformer's parameters into embeddings, blocks and head, from input to output.

    The blocks are the members of the outermost ``ModuleList``. What is registered before it belongs to the embeddings,
    what is registered after it (final norm, pooler, classifier) to the head. Tables of relative positions belong to
    the embeddings, or to the block that holds them. If a decoder follows an encoder, the encoder's final norm belongs
    to the encoder's last block.

    Returns:
        The groups; every parameter is in exactly one.

    Raises:
        FreezingError: there is no such list of blocks, or there are several that are not an encoder and a decoder.
    """
    stacks = _stacks(model)
    several = len(stacks) > 1
    groups = [Group("embeddings")]
    ends = {}  # index of the last block's group, by path of the list of blocks
    for path, blocks in stacks.items():
        side = path.rpartition(".")[0].rpartition(".")[2] + " " if several else ""
        groups += [Group(f"{side}layer {i}", block=f"{path}.{i}") for i in range(len(blocks))]
        ends[path] = len(groups) - 1
    groups.append(Group("head"))
    if not several:  # if layers share blocks, there are more layers than blocks
        depth = getattr(getattr(model, "config", None), "num_hidden_layers", len(groups) - 2)
        for group in groups[1:-1]:
            group.uses = max(1, depth // (len(groups) - 2))

    of_block = {group.block: index for index, group in enumerate(groups) if group.block}
    order = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    displaced = _displaced(model, stacks)
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            first = names[parameter]
            next(group for group in groups if first in group.parameters).tied[name] = first
            continue
        names[parameter] = name
        index = next((index for path, index in of_block.items() if name.startswith(f"{path}.")), displaced.get(name))
        if index is None:
            passed = max((end for path, end in ends.items() if order[path] < order[name.rpartition(".")[0]]), default=0)
            index = len(groups) - 1 if passed == len(groups) - 2 else passed
        groups[index].parameters[name] = parameter
    return groups


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Outermost lists of blocks, by path."""
    stacks: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inner:
            stacks[path] = module
    sides = [path.rpartition(".")[0].rpartition(".")[2] for path in stacks]
    if len(stacks) == 1 or sides == ["encoder", "decoder"]:
        return stacks
    found = f"several lists of blocks ({', '.join(stacks)})" if stacks else "no ModuleList of blocks"
    raise FreezingError(
        f"{type(model).__name__} can't be read layer by layer, because it has {found}: "
        "give names or patterns of the parameters to train, as in freeze(model, train=['*.bias', 'classifier.*'])."
    )


def _displaced(model: nn.Module, stacks: Mapping[str, nn.ModuleList]) -> dict[str, int]:
    """Index of the group of each parameter that is not registered in the order of computation."""
    indices = {}
    table, output = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    outputs = {id(p) for p in output.parameters()} if output is not None else set()
    if table is not None:  # tied weights belong to the embeddings
        outputs -= {id(p) for p in table.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in outputs:
            indices[name] = 1 + sum(len(blocks) for blocks in stacks.values())
        elif "embed" in name.lower():
            indices[name] = 0
    # DeBERTa has a norm for its relative positions, and a convolution beside its first block
    parent = next(iter(stacks)).rpartition(".")[0]
    if hasattr(model.get_submodule(parent), "rel_embeddings"):
        for name, _ in model.named_parameters():
            if name.startswith(f"{parent}.LayerNorm."):
                indices[name] = 0
            elif name.startswith(f"{parent}.conv."):
                indices[name] = 1
    return indices
