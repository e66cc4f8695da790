"""Which layer of a transformer does what, told by its name, for the families of the hub.

Read so: BERT, RoBERTa, ELECTRA, DeBERTa-v2, DistilBERT, ModernBERT, ALBERT, GPT-2, Llama, Qwen2, T5 and ViT.
"""

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# a fused layer gives query, key and value in one product
FUSED = ("Wqkv", "c_attn")
QUERIES = ("query", "query_proj", "q_proj", "q_lin", "q", *FUSED)
KEYS = ("key", "key_proj", "k_proj", "k_lin", "k", *FUSED)
VALUES = ("value", "value_proj", "v_proj", "v_lin", "v", *FUSED)
# the projections with which the two halves of a block give back to the hidden size
ATTENTION_OUTPUTS = (
    "attention.output.dense", "attention.out_lin", "attention.dense", "attention.o_proj", "self_attn.o_proj", "attn.Wo",
    "attn.c_proj", "crossattention.c_proj", "SelfAttention.o", "EncDecAttention.o",
)  # fmt: skip
FEED_FORWARD_OUTPUTS = (
    "output.dense", "ffn.lin2", "ffn_output", "mlp.fc2", "mlp.down_proj", "mlp.Wo", "mlp.c_proj", "DenseReluDense.wo",
)  # fmt: skip


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules on top of the pretrained body, which are new with a task; none for a language model.

    A language model's output layer came with the checkpoint, and is often tied to the embeddings.
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
    """The linear layers below the head by name, `Conv1D` (GPT-2's linear layer) among them.

    A layer that peft has wrapped counts as one, and has not lost its name.
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
    """Inputs and outputs of a linear layer."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def layers_called(model: PreTrainedModel, endings: Iterable[str]) -> list[str]:
    """Full names of the linear layers below the head whose name ends with one of these."""
    endings = tuple(f".{ending}" for ending in endings)
    return [name for name in linear_layers(model) if f".{name}".endswith(endings)]


def block_outputs(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the layers that end the attentions, and of those that end the feed-forward halves, in order.

    Raises:
        ValueError: a block lacks one of the two, so this is no architecture that is known here.
    """
    attention = layers_called(model, [*ATTENTION_OUTPUTS, "crossattention.output.dense"])
    feed_forward = [name for name in layers_called(model, FEED_FORWARD_OUTPUTS) if name not in attention]
    feed_forward = [name for name in feed_forward if _block(name)]  # not a dense layer outside of the blocks
    if not attention or {_block(name) for name in attention} != {_block(name) for name in feed_forward}:
        raise ValueError(
            f"The blocks of {type(model).__name__} can't be read (no attention and feed-forward output in each): "
            "use add_lora with targets='all-linear', which needs no blocks."
        )
    return attention, feed_forward


def _block(name: str) -> str:
    """The part of a layer's name that names its block, as in "bert.encoder.layer.3"."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""
