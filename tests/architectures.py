"""A tiny random classifier of each family that the adapters know, and a batch for it."""

import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

VOCABULARY, WIDTH, LAYERS, CLASSES = 60, 16, 2, 3
FAMILIES = [
    "bert", "roberta", "electra", "distilbert", "deberta-v2", "modernbert", "albert", "gpt2", "llama", "qwen2", "t5",
    "vit",
]  # fmt: skip
_BODY = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {**_BODY, "vocab_size": VOCABULARY, "max_position_embeddings": 32}


def make_config(family: str) -> PreTrainedConfig:
    shared = {"num_labels": CLASSES, "initializer_range": 0.3}  # wide enough for each weight to show in the logits
    if family != "vit":
        shared |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "bert": lambda: BertConfig(**_TEXT, **shared),
        "roberta": lambda: RobertaConfig(**_TEXT, **shared),
        "electra": lambda: ElectraConfig(**_TEXT, embedding_size=8, **shared),
        "distilbert": lambda: DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=24, **shared
        ),
        "deberta-v2": lambda: DebertaV2Config(
            **_TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, **shared
        ),
        "modernbert": lambda: ModernBertConfig(**_TEXT, cls_token_id=1, sep_token_id=2, **shared),
        "albert": lambda: AlbertConfig(**_TEXT, embedding_size=8, **shared),
        "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=2, **shared),
        "llama": lambda: LlamaConfig(**_TEXT, num_key_value_heads=1, **shared),
        "qwen2": lambda: Qwen2Config(**_TEXT, num_key_value_heads=1, **shared),
        "t5": lambda: T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=LAYERS, num_heads=2,
            decoder_start_token_id=0, num_labels=CLASSES, pad_token_id=0, eos_token_id=2,
        ),
        "vit": lambda: ViTConfig(**_BODY, image_size=8, patch_size=4, **shared),
    }[family]()  # fmt: skip


def make_classifier(family: str, seed: int = 0) -> PreTrainedModel:
    kind = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    return kind.from_config(make_config(family)).eval()


def make_inputs(family: str) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=chance)}
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=chance)
    ids[:, -1] = 2  # T5 classifies from the token that ends a sequence
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Move every weight that trains, as training would."""
    chance = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=chance))
