"""Which layer of a network of transformers does what, and the order of the layers.

It is read off the tree of modules and off one forward pass of a few tokens or of one image, which shows when each layer
runs. What such a pass does not confirm is refused.
"""

import copy
import inspect
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.errors import FreezingError, first_line
from ftkit.models.modules import seeded

# one layer computes query, key and value together
_FUSED = ("Wqkv", "c_attn")

#: Names of the layers that compute the queries of an attention, in the usual families of transformers.
QUERIES = ("query", "query_proj", "q_proj", "q_lin", "q", *_FUSED)

KEYS = ("key", "key_proj", "k_proj", "k_lin", "k", *_FUSED)

#: Names of the layers that compute the values of an attention, in the usual families of transformers.
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

    Raises:
        FreezingError: a forward pass does not show which modules come after the body.
    """
    trace, body = _trace(model), model.base_model
    if body is model and not trace.gives_logits:
        return []
    # where the body is not a module of its own, as in an image classifier of CLIP, it ends with the last block
    inside = [path for blocks in _stacks(model).values() for path in blocks] if body is model else [_path(model, body)]
    parts = tuple(f"{path}." for path in inside)
    end = max((end for path, runs in trace.runs.items() for _, end in runs if f"{path}.".startswith(parts)), default=0)
    output_layer = model.get_output_embeddings()
    names = []
    for name, child in model.named_children():
        uses = [trace.used[parameter] for parameter in trace.learns if parameter.startswith(f"{name}.")]
        is_output = output_layer is not None and any(module is output_layer for module in child.modules())
        if uses and min(uses) > end and not is_output:
            names.append(name)
    if not names and trace.gives_logits and output_layer is None:
        raise _refusal(model, "no module of its own follows the body, as a head does")
    return names


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers below the head by name, including ``Conv1D``, GPT-2's linear layer.

    A layer that peft has wrapped counts as one layer and keeps its name. A layer that the output does not depend on
    cannot learn, and is left out.
    """
    top, output_layer, trace = head_names(model), model.get_output_embeddings(), _trace(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        inside = any(name.startswith(f"{wrapped}.") for wrapped in found)
        below = name.split(".")[0] not in top and layer is not output_layer
        weight = name if layer is module else f"{name}.base_layer"
        learns = f"{weight}.weight" in trace.learns and name in trace.give_tensors
        if isinstance(layer, nn.Linear | Conv1D) and learns and below and not inside:
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
        ValueError: a block has no attention output, or not exactly one feed-forward output.
    """
    attention = layers_called(model, [*_ATTENTION_OUTPUTS, "crossattention.output.dense"])
    feed_forward = [name for name in layers_called(model, _FEED_FORWARD_OUTPUTS) if name not in attention]
    blocks = block_paths(model)
    feed_forward = [name for name in feed_forward if any(name.startswith(f"{path}.") for path in blocks)]
    for path in blocks:  # T5 attends twice in a block
        ends = [[name for name in names if name.startswith(f"{path}.")] for names in (attention, feed_forward)]
        if not ends[0] or len(ends[1]) != 1 or _mixes_experts(model.get_submodule(path)):
            raise ValueError(
                f"The blocks of {type(model).__name__} can't be read, because not all of them have an attention output "
                "and one feed-forward output: use add_lora with targets='all-linear', which does not need them."
            )
    return attention, feed_forward


def block_paths(model: nn.Module) -> list[str]:
    """Full names of the blocks, in order."""
    return [group.block for group in layer_groups(model) if group.block is not None]


def _mixes_experts(block: nn.Module) -> bool:
    """Whether the block has the weights of several feed-forward layers in one tensor."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(p.ndim > 2 for m in block.modules() if not isinstance(m, convolutions) for p in m.parameters(False))


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
    """Sort a network's parameters into embeddings, blocks and head, from input to output.

    The blocks are the members of the outermost ``ModuleList``. A parameter outside of them belongs to the embeddings if
    it is used before the first block runs, to the head if it is not used until the last one has run, and otherwise to
    the block that has just run. What a decoder reads before its first block belongs to the embeddings.

    Args:
        model: a model of transformers, or a module around one. An attribute ``own_groups`` takes precedence.

    Returns:
        The groups; every parameter is in exactly one.

    Raises:
        FreezingError: there is no such list of blocks, or there are several that are not an encoder and a decoder; or a
            forward pass does not run them in order, as in a network that is not from transformers.
    """
    if hasattr(model, "own_groups"):
        return model.own_groups
    stacks, trace = _stacks(model), _trace(model)
    blocks = [path for paths in stacks.values() for path in paths]
    runs = sorted((*run, index) for index, path in enumerate(blocks) for run in trace.runs.get(path, []))
    order = [index for *_, index in runs]
    if order != sorted(order) or len(set(order)) < len(blocks):
        raise _refusal(model, "its blocks are not called one after the other")

    groups = [Group("embeddings")]
    for path, paths in stacks.items():
        side = f"{_parent(path).rpartition('.')[2]} " if len(stacks) > 1 else ""
        groups += [Group(f"{side}layer {i}", block=block) for i, block in enumerate(paths)]
    for index, group in enumerate(groups[1:]):
        group.uses = order.count(index)
    groups.append(Group("head"))
    decoder = (len(blocks) - len([*stacks.values()][-1]), f"{_parent([*stacks][-1])}.")

    def place(name: str, time: float) -> int:
        """Index of the group of a parameter outside the blocks that is used first at this time."""
        begun = bisect_left(runs, (time,))
        _, end, index = runs[begun - 1] if begun else (0, 0, -1)
        if begun == len(runs) and time > end:
            return len(groups) - 1
        before_decoder = index == decoder[0] - 1 and time > end and name.startswith(decoder[1])
        return 0 if before_decoder else index + 1

    indices: dict[str, int] = {}
    for name, _ in model.named_parameters():
        index = next((index for index, path in enumerate(blocks) if name.startswith(f"{path}.")), None)
        time = trace.used.get(name)
        if index is not None:
            indices[name] = index + 1
            if time is not None and not any(start < time < end for start, end in trace.runs[blocks[index]]):
                raise _refusal(model, f"{name} is used outside of its block")
        elif time is not None:
            indices[name] = place(name, time)
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(parameter, name)
        group = groups[indices[first] if first in indices else _group_beside(first, indices)]
        if first == name:
            group.parameters[name] = parameter
        else:
            group.tied[name] = first
    has_head = not trace.learns.isdisjoint(groups[-1].parameters)
    if trace.gives_logits and not has_head and _network(model).get_output_embeddings() is None:
        raise _refusal(model, "nothing that can learn follows the last block, as a head does")
    return groups


def _group_beside(name: str, indices: Mapping[str, int]) -> int:
    """Index of the group of a parameter that is not used: that of the smallest module around it with used ones."""
    path = _parent(name)
    while path:
        found = {index for other, index in indices.items() if other.startswith(f"{path}.")}
        if found:
            return found.pop() if len(found) == 1 else 0
        path = _parent(path)
    return 0


def _stacks(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the blocks in each of the outermost lists of blocks, by path of the list."""
    stacks: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None and not inner:
            stacks[path] = list(_members(path, module))
    sides = [_parent(path).rpartition(".")[2] for path in stacks]
    if len(stacks) == 1 or sides == ["encoder", "decoder"]:
        return stacks
    raise _refusal(
        model, f"it has several lists of blocks ({', '.join(stacks)})" if stacks else "it has no ModuleList of blocks"
    )


def _members(path: str, modules: nn.ModuleList) -> Iterator[str]:
    for name, module in modules.named_children():
        if isinstance(module, nn.ModuleList):
            yield from _members(f"{path}.{name}", module)
        else:
            yield f"{path}.{name}"


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _path(model: nn.Module, part: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is part)


def _refusal(model: nn.Module, reason: str) -> FreezingError:
    return FreezingError(
        f"{type(model).__name__} can't be read layer by layer, because {reason}: "
        "use another architecture or, to freeze it, name parameters: freeze(model, train=['*.bias', 'classifier.*'])."
    )


@dataclass(frozen=True)
class _Trace:
    """What happened in a forward pass. Time is a counter that rises by one whenever a module starts or ends.

    Attributes:
        runs: start and end of each run of a module, by its path.
        used: when a parameter was used first, by its name.
        learns: names of the parameters that the output depends on, so that a gradient reaches them.
        give_tensors: paths of the modules that returned a tensor.
        gives_logits: whether the pass returned logits.
    """

    runs: dict[str, list[tuple[int, int]]]
    used: dict[str, float]
    learns: set[str]
    give_tensors: set[str]
    gives_logits: bool


_TRACES: dict[tuple, _Trace] = {}  # by class, config and names, so that each network is run once


def _network(model: nn.Module) -> PreTrainedModel:
    """The model of transformers in a module."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise _refusal(model, "it is not a model of transformers")


def _trace(model: nn.Module) -> _Trace:
    """Run a copy of the model, which shares its weights, on a few tokens or on one image.

    Raises:
        FreezingError: the pass fails, or a classifier returns no logits.
    """
    network, runner, prefix = _network(model), model, ""
    while runner is not network:  # a module around it may need further inputs, and is run only if it has weights
        parts = [(name, part) for name, part in runner.named_children() if next(part.parameters(), None) is not None]
        if len(parts) != 1:
            break
        prefix, runner = f"{prefix}{parts[0][0]}.", parts[0][1]
    names = tuple(f"{prefix}{name}" for name, _ in runner.named_parameters(remove_duplicate=False))
    key = (type(runner), type(network), repr(network.config), names)
    if key not in _TRACES:
        try:
            _TRACES[key] = _run(runner, _make_batch(network), prefix)
        except Exception as error:
            raise _refusal(model, f"a short forward pass fails ({first_line(error)})") from error
    if "Classification" in type(network).__name__ and not _TRACES[key].gives_logits:
        raise _refusal(model, "it returns no logits to train a classifier on")
    return _TRACES[key]


def _run(model: nn.Module, batch: Mapping[str, Tensor], prefix: str) -> _Trace:
    """Trace one forward pass; ``prefix`` stands before the names."""
    # a copy, since some models change in a pass (BigBird drops its sparse attention if the text is short); it has new
    # Parameter objects, which share the weights and all require a gradient
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    names: dict[int, str] = {}
    quantised: set[str] = set()  # these have no gradient, but what is added to their layers has one
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            shared[id(parameter)] = nn.Parameter(parameter.detach())
        else:
            shared[id(parameter)] = parameter
            quantised.add(f"{prefix}{name}")
        names[id(shared[id(parameter)])] = f"{prefix}{name}"
    copied = copy.deepcopy(model, dict(shared)).eval()

    runs: dict[str, list[tuple[int, int]]] = {}
    used: dict[str, float] = {}
    give_tensors: set[str] = set()
    time, starts = 0, []

    def start(*_: Any) -> None:
        nonlocal time
        starts.append(time := time + 1)

    def make_end(path: str) -> Any:
        def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal time
            time += 1
            runs.setdefault(path, []).append((starts.pop(), time))
            if isinstance(output, Tensor):
                give_tensors.add(path)

        return end

    class Uses(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in names:
                    used.setdefault(names[id(leaf)], time + 0.5)
            return function(*args, **(kwargs or {}))

    for path, module in copied.named_modules():
        module.register_forward_pre_hook(start, prepend=True)
        module.register_forward_hook(make_end(f"{prefix}{path}"))
    with seeded(0), torch.inference_mode(False), torch.enable_grad(), Uses():
        output = copied(**batch)
    logits = getattr(output, "logits", None)
    leaves = [logits] if logits is not None else tree_leaves(output)
    learns = {names[key] for key in _dependencies(leaf for leaf in leaves if isinstance(leaf, Tensor)) if key in names}
    return _Trace(runs, used, learns | (quantised & used.keys()), give_tensors, logits is not None)


def _dependencies(outputs: Iterable[Tensor]) -> set[int]:
    """Ids of the leaves in the graph of the outputs, found without the cost of a backward pass."""
    open_nodes, seen, leaves = [output.grad_fn for output in outputs], set(), set()
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            open_nodes += [child for child, _ in node.next_functions]
    return leaves


def _make_batch(network: PreTrainedModel) -> dict[str, Tensor]:
    """A row of eight ordinary tokens, or an image."""
    inputs, config = inspect.signature(network.forward).parameters, network.config
    if "input_ids" in inputs:
        special = {*tree_leaves([value for key, value in _fields(config) if key.endswith(("token_id", "token_index"))])}
        ids = torch.full((1, 8), next(token for token in range(len(special) + 1) if token not in special))
        if config.is_encoder_decoder:
            ids[:, -1] = tree_leaves(config.eos_token_id)[0]  # BART and T5 classify from it
        masks = {"attention_mask"} if network.device.type != "meta" else set()  # a model of shapes alone reads no mask
        names = ({"input_ids", "decoder_input_ids"} | masks).intersection(inputs)
        return {name: (torch.ones_like(ids) if "mask" in name else ids).to(network.device) for name in names}
    fields = dict(_fields(config))
    size, channels = fields.get("image_size", 64), fields.get("num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, channels, height, width, dtype=network.dtype, device=network.device)}


def _fields(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Names and values of a config and of the configs in it."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _fields(value)
        else:
            yield key, value
