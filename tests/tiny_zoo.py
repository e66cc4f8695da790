"""A tiny random network of nearly every classifier class of transformers, and a batch for it."""

import copy
import functools
import inspect
from typing import Any

import torch
import transformers as t
from tiny_models import disturb
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

CLASSES, VOCABULARY, WIDTH, IMAGE = 3, 60, 16, 32

# tiny values of the fields that many configs have
_FIELDS = {
    **dict.fromkeys(("vocab_size", "entity_vocab_size", "pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embed_dim", "kv_lora_rank",
         "q_lora_rank", "v_head_dim", "qk_nope_head_dim", "decoder_hidden_size", "neck_hidden_size", "d_latents",
         "kv_channels", "linear_key_head_dim", "linear_value_head_dim", "xpath_unit_hidden_size", "entity_emb_size",
         "pronunciation_embed_dim", "shape_embed_dim", "true_hidden_size", "intra_bottleneck_size", "projection_dim"),
        WIDTH,
    ),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "d_inner", "dff", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim",
         "feed_forward_size"),
        24,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts",
         "linear_num_key_heads", "linear_num_value_heads", "num_self_attends_per_block", "num_self_attention_heads",
         "num_cross_attention_heads", "index_n_heads"),
        2,
    ),
    **dict.fromkeys(("num_experts_per_tok", "n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(
        ("head_dim", "d_kv", "d_head", "attention_head_size", "qk_rope_head_dim", "moe_intermediate_size",
         "shared_expert_intermediate_size", "index_head_dim", "num_latents", "mamba_dt_rank"),
        8,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "num_hash_buckets", "max_xpath_tag_unit_embeddings",
         "max_xpath_subs_unit_embeddings"),
        64,
    ),
    "image_size": IMAGE, "input_size": IMAGE,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_DERIVED = ("hidden_size", "num_layers", "num_hidden_layers", "num_attention_heads")  # from other fields
_STAGES = {"hidden_sizes": [16, 16], "depths": [1, 2], "num_stages": 2}
_PYRAMID = {
    "num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [16, 16], "num_attention_heads": [1, 2],
    "patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2],
}  # fmt: skip
_SWIN = {"depths": [1, 2], "num_heads": [1, 2], "window_size": 4, **dict.fromkeys(_DERIVED)}
_HYBRID = {
    "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "n_mamba_heads": 2,
}  # fmt: skip
_LINEAR_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 1.0}

# what a config needs besides, by model type
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
    }},
    "esmc": {"num_key_value_heads": 2}, "falcon": {"head_dim": None},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 2], "block_repeats": [1, 1]},
    "gptj": {"rotary_dim": 4}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lilt": {"hidden_size": 24}, "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 8], "attn_layers": ["local", "lsh"],
        "num_hidden_layers": None, **dict.fromkeys(
            ("hidden_dropout_prob", "local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob"), 0.0
        ),
    },
    "xlnet": {"max_position_embeddings": None}, "zamba": _HYBRID, "zamba2": _HYBRID,
    "bit": {**_STAGES, "num_groups": 2}, "convnext": _STAGES, "convnextv2": _STAGES,
    "cvt": {
        "embed_dim": [16, 16], "num_heads": [1, 2], "depth": [1, 2],
        **{name: [value] * 2 for name, value in {
            "patch_sizes": 3, "patch_stride": 4, "patch_padding": 1, "mlp_ratio": 2.0, "attention_drop_rate": 0.0,
            "drop_rate": 0.0, "drop_path_rate": 0.0, "qkv_bias": True, "qkv_projection_method": "dw_bn",
            "kernel_qkv": 3, "padding_kv": 1, "stride_kv": 2, "padding_q": 1, "stride_q": 1,
        }.items()},
        "cls_token": [False, True],
    },
    "dinat": _SWIN, "donut-swin": _SWIN, "swin": _SWIN, "swinv2": _SWIN,
    "efficientnet": {
        "kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 16], "strides": [1, 2],
        "num_block_repeats": [1, 2], "expand_ratios": [1, 2], "hidden_dim": 1280, "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    },
    "focalnet": {
        "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "focal_levels": [2, 2], "focal_windows": [3, 3],
    },
    "hgnet_v2": {
        "hidden_sizes": [16, 16], "depths": [1, 2], "stem_channels": [3, 8, 16], "stage_in_channels": [16, 16],
        "stage_mid_channels": [8, 8], "stage_out_channels": [16, 16], "stage_num_blocks": [1, 1],
        "stage_downsample": [False, True], "stage_downsample_strides": [2, 2], "stage_light_block": [False, True],
        "stage_kernel_size": [3, 3], "stage_numb_of_layers": [2, 2],
    },
    "hiera": {
        "image_size": [IMAGE, IMAGE], "patch_size": [7, 7], "depths": [1, 2], "num_heads": [1, 2], "num_query_pool": 1,
        "masked_unit_size": [4, 4], "masked_unit_attention": [True, False],
    },
    "levit": {
        "hidden_sizes": [16, 16], "num_attention_heads": [2, 2], "depths": [1, 1], "key_dim": [8, 8],
        "mlp_ratio": [2, 2], "attention_ratio": [2, 2], "down_ops": [["Subsample", 8, 2, 2, 2, 2], [""]],
    },
    "mobilenet_v1": {"depth_multiplier": 0.05}, "mobilenet_v2": {"depth_multiplier": 0.05},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 7},
    "mobilevitv2": {
        "n_attn_blocks": [1, 1, 1], "base_attn_unit_dims": [16, 16, 16], "width_multiplier": 0.1, "image_size": 64,
    },
    "poolformer": {**_PYRAMID, "padding": [2, 1], "patch_sizes": [7, 3], "mlp_ratios": [2, 2]},
    "pp_lcnet": {
        "block_configs": [[[3, 16, 16, 1, False]]] * 4 + [[[3, 16, 16, 2, True]]],
        "class_expand": 16, "stem_channels": 16,
    },
    "pvt": {**_PYRAMID, "patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]},
    "pvt_v2": {**_PYRAMID, "image_size": IMAGE}, "segformer": _PYRAMID,
    "regnet": {**_STAGES, "groups_width": 8}, "resnet": _STAGES,
    "swiftformer": {"embed_dims": [16, 16], "depths": [1, 2], "downsamples": [True, True], "mlp_ratio": 2},
    "textnet": {
        "image_size": IMAGE, "conv_layer_kernel_sizes": [[[3, 3]], [[1, 3], [3, 1]]],
        "conv_layer_strides": [[2], [2, 1]], "hidden_sizes": [16, 16, 16], "stem_out_channels": 16,
    },
    "qwen3_next": _LINEAR_HYBRID, "qwen3_5_text": _LINEAR_HYBRID,
    "markuplm": {"max_depth": 4, "tag_pad_id": 0, "subs_pad_id": 0},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4},
    "perceiver": {"num_self_attention_heads": 1, "num_cross_attention_heads": 1},
    "diffllama": {"num_key_value_heads": 2},
}  # fmt: skip


def class_names() -> list[str]:
    """Every class for texts, then those for images."""
    names = []
    for mapping in (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES):
        for entry in mapping.values():
            names += [entry] if isinstance(entry, str) else entry
    return list(dict.fromkeys(names))


def _tiny_config(kind: type[t.PreTrainedConfig]) -> t.PreTrainedConfig:
    default = kind()
    known = default.to_dict()
    values = {key: value for key, value in _FIELDS.items() if key in known or key in kind.attribute_map}
    for name, part in kind.sub_configs.items():
        if part is not t.AutoConfig or isinstance(getattr(default, name, None), t.PreTrainedConfig):
            values[name] = _tiny_config(type(getattr(default, name)) if part is t.AutoConfig else part)
    values |= _EXCEPTIONS.get(kind.model_type, {})
    return kind(**{key: value for key, value in values.items() if value is not None})


@functools.cache
def _make(name: str) -> t.PreTrainedModel:
    kind = getattr(t, name)
    config = _tiny_config(kind.config_class)
    config.num_labels, config.decoder_start_token_id = CLASSES, 1
    torch.manual_seed(0)
    return disturb(kind(config).eval())


def make_any(name: str) -> t.PreTrainedModel:
    """A random classifier of a class, in eval mode.

    Raises:
        ImportError: it needs a library that is not installed.
    """
    return copy.deepcopy(_make(name))


def make_any_batch(model: t.PreTrainedModel) -> dict[str, Tensor]:
    """Rows of 7 tokens, or of images, and their classes."""
    generator = torch.Generator().manual_seed(1)
    labels = {"labels": torch.tensor([0, 1, 2, 1])}
    if "input_ids" in inspect.signature(model.forward).parameters or "Sequence" in type(model).__name__:
        length = 64 if model.config.model_type == "reformer" else 7  # all that its positions allow
        ids = torch.randint(5, VOCABULARY, (4, length), generator=generator)
        ids[:, -1] = 2  # BART and T5 classify from the end token
        return {model.main_input_name: ids, "attention_mask": torch.ones_like(ids), **labels}
    size = 64 if "MobileViTV2" in type(model).__name__ else IMAGE
    return {"pixel_values": torch.randn(4, 3, size, size, generator=generator), **labels}
