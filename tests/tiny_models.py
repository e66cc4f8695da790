"""Tiny random networks of the families that ftkit can read layer by layer, and a batch for each."""

import copy
from collections.abc import Callable

import tokenizers
import torch
import transformers as t
from torch import Tensor

VOCABULARY, WIDTH, INNER, LAYERS, CLASSES = 60, 16, 24, 3, 3

_SHARED = {"num_labels": CLASSES, "initializer_range": 0.3}  # large enough for every weight to change the logits
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BODY = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": INNER, **_SHARED,
}  # fmt: skip
_TEXT = {**_BODY, "vocab_size": VOCABULARY, "max_position_embeddings": 64, **_TOKENS}
_DEBERTA = {
    "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "position_biased_input": False, "position_buckets": 8, "conv_kernel_size": 3, "type_vocab_size": 0,
}  # fmt: skip
_DISTIL = {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": INNER, **_SHARED}
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64, **_SHARED, **_TOKENS,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "num_labels": CLASSES,
}  # fmt: skip

CONFIGS = {
    "bert": t.BertConfig(**_TEXT),
    "roberta": t.RobertaConfig(**_TEXT),
    "electra": t.ElectraConfig(**_TEXT, embedding_size=8),
    "distilbert": t.DistilBertConfig(**_DISTIL),
    "deberta-v2": t.DebertaV2Config(**_TEXT, **_DEBERTA),
    "modernbert": t.ModernBertConfig(**_TEXT, cls_token_id=1, sep_token_id=2, classifier_pooling="mean"),
    "albert": t.AlbertConfig(**_TEXT, embedding_size=8),
    "gpt2": t.GPT2Config(**_GPT2),
    "llama": t.LlamaConfig(**_TEXT, num_key_value_heads=1),
    "qwen2": t.Qwen2Config(**_TEXT, num_key_value_heads=1),
    "t5": t.T5Config(**_T5),
    "vit": t.ViTConfig(**_BODY, image_size=8, patch_size=4),
}
FAMILIES = list(CONFIGS)
TEXT_CLASSIFIERS = [name for name in FAMILIES if name not in ("t5", "vit")]  # with one stack of layers
LANGUAGE_MODELS = {
    "t5 seq2seq": lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5, tie_word_embeddings=True)),
    "gpt2 lm": lambda: t.GPT2LMHeadModel(copy.deepcopy(CONFIGS["gpt2"])),
    "bert mlm": lambda: t.BertForMaskedLM(copy.deepcopy(CONFIGS["bert"])),
    "llama lm": lambda: t.LlamaForCausalLM(copy.deepcopy(CONFIGS["llama"])),
}


def make_tiny(name: str, seed: int = 0) -> t.PreTrainedModel:
    """A random classifier of a family, or one of the language models, in eval mode."""
    torch.manual_seed(seed)
    if name in LANGUAGE_MODELS:
        return LANGUAGE_MODELS[name]().eval()
    kind = t.AutoModelForImageClassification if name == "vit" else t.AutoModelForSequenceClassification
    return kind.from_config(copy.deepcopy(CONFIGS[name])).eval()


def make_inputs(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    ids[:, -1] = 2  # T5 classifies from the end token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def disturb(model: torch.nn.Module) -> torch.nn.Module:
    """Change every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_seed_sets_initial_weights(add: Callable[..., torch.nn.Module], part: str) -> None:
    """The new weights with ``part`` in their names depend on the seed alone; the global random state is unchanged."""
    models = [add(make_tiny("bert"), seed=seed) for seed in (1, 1, 2)]
    name = next(name for name, parameter in models[0].named_parameters() if parameter.requires_grad and part in name)
    one, same, other = (model.get_parameter(name) for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    model = make_tiny("bert")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    add(model)
    assert torch.equal(torch.rand(1), expected)


def make_word_tokenizer() -> t.PreTrainedTokenizerFast:
    """A tokenizer for the words w3 to w59, whose ids are their numbers."""
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )
