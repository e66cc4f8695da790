"""Tiny random networks of the families that ftkit reads layer by layer."""

import torch
import transformers as t

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
DEBERTA = {
    "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "position_biased_input": False, "position_buckets": 8, "conv_kernel_size": 3, "type_vocab_size": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2, "num_labels": 3}
DISTIL = {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48, "num_labels": 3}
VIT = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}

CLASSIFIERS = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SIZES)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**SIZES)),
    "electra": lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**SIZES, embedding_size=16)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(**DISTIL)),
    "deberta-v2": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**SIZES, **DEBERTA)),
    "modernbert": lambda: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, classifier_pooling="mean")
    ),
    "albert": lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**SIZES, embedding_size=16)),
    "gpt2": lambda: t.GPT2ForSequenceClassification(t.GPT2Config(**GPT2)),
    "llama": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**SIZES)),
    "qwen2": lambda: t.Qwen2ForSequenceClassification(t.Qwen2Config(**SIZES, num_key_value_heads=2)),
}
OTHERS = {
    "t5": lambda: t.T5ForSequenceClassification(t.T5Config(**T5)),
    "t5 seq2seq": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, tie_word_embeddings=True)),
    "gpt2 lm": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)),
    "bert mlm": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES)),
    "llama lm": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**VIT, image_size=16, patch_size=8)),
}


def make_tiny(name: str, seed: int = 0) -> t.PreTrainedModel:
    torch.manual_seed(seed)
    return (CLASSIFIERS | OTHERS)[name]().eval()
