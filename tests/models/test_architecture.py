"""The layers of every classifier of transformers: read right, or refused in a sentence."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, TaskType, get_peft_model
from tiny_zoo import CLASSES, class_names, make_any, make_any_batch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
)

from ftkit.adapters.bottleneck import add_adapters
from ftkit.adapters.lora import add_ia3, add_lora, bitfit
from ftkit.errors import FeatureCacheError, FreezingError
from ftkit.models import architecture
from ftkit.models.architecture import head_names, layer_groups
from ftkit.models.modules import snapshot
from ftkit.training.batching import make_batch
from ftkit.training.feature_cache import cache_frozen_layers
from ftkit.training.freezing import freeze

# no network can be built without a library that the kit does not use
NOT_BUILT = {
    "LayoutLMv2ForSequenceClassification": "detectron2",
    "DinatForImageClassification": "natten",
    "TimmWrapperForImageClassification": "timm",
}

# refused by layer_groups, and why
REFUSED = {
    **dict.fromkeys(
        [
            "CanineForSequenceClassification",
            "FlaubertForSequenceClassification",
            "Gemma3ForSequenceClassification",
            "MarkupLMForSequenceClassification",
            "ModernVBertForSequenceClassification",
            "PoolFormerForImageClassification",
            "PvtForImageClassification",
            "Qwen3_5ForSequenceClassification",
            "ShieldGemma2ForImageClassification",
            "T5Gemma2ForSequenceClassification",
            "UltraVBertForSequenceClassification",
            "XLMForSequenceClassification",
        ],
        "it has several lists of blocks",
    ),
    "PPLCNetForImageClassification": "it returns no logits",
    "Siglip2ForImageClassification": "a short forward pass fails",  # it takes patches
    "SqueezeBertForSequenceClassification": "its blocks are not called one after the other",
    "Zamba2ForSequenceClassification": "is used outside of its block",
}
# refused by head_names only, since the head is a part of the decoder within the body
HEAD_INSIDE = [name for name in class_names() if name.startswith("Perceiver")]

READ = [name for name in class_names() if name not in {*NOT_BUILT, *REFUSED}]


def forward(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits and classes of four rows."""
    batch = make_any_batch(model.get_base_model() if isinstance(model, PeftModel) else model)
    labels = batch.pop("labels")
    return model(**batch).logits, labels


def assert_sentence(error: BaseException) -> None:
    text = str(error)
    assert text.endswith(".") and "\n" not in text and not re.search(r"\. [A-Z]", text)


@pytest.mark.parametrize("name", NOT_BUILT)
def test_a_class_is_left_out_only_for_want_of_a_library(name: str) -> None:
    with pytest.raises(ImportError, match=NOT_BUILT[name]):
        make_any(name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_sentence(name: str) -> None:
    model = make_any(name)
    with pytest.raises(FreezingError, match=f"{name} can't be read layer by .*{REFUSED[name]}") as caught:
        freeze(model, 1)
    assert_sentence(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def names_after(model: nn.Module, block: str, runs: int) -> set[str]:
    """Parameters with a gradient if nothing that runs before the end of this run of the block is recorded."""
    left = runs

    def end(*_: Any) -> None:
        nonlocal left
        left -= 1

    def record(*_: Any) -> None:
        if not left:
            torch.set_grad_enabled(True)

    hooks = [model.get_submodule(block).register_forward_hook(end)]
    for module in model.modules():
        hooks += [module.register_forward_pre_hook(record), module.register_forward_hook(record)]
    with torch.no_grad():
        logits, labels = forward(model)
    for hook in hooks:
        hook.remove()
    return names_that_learn(model, logits, labels)


def names_that_learn(model: nn.Module, logits: Tensor, labels: Tensor) -> set[str]:
    F.cross_entropy(logits, labels).backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", READ)
def test_every_class_is_read_right(name: str) -> None:
    model = make_any(name)
    model.train(name.startswith("Reformer"))  # it learns in no other mode
    groups = layer_groups(model)
    head = groups[-1]
    assert groups[0].name == "embeddings" and head.name == "head"
    names = [parameter for group in groups for parameter in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())

    # blocks in order
    ran: list[str] = []
    blocks = [group for group in groups if group.block is not None]
    hooks = [
        model.get_submodule(group.block).register_forward_pre_hook(lambda *_, path=group.block: ran.append(path))
        for group in blocks
    ]
    logits, labels = forward(model)
    for hook in hooks:
        hook.remove()
    assert logits.shape == (len(labels), CLASSES)
    assert ran == [group.block for group in blocks for _ in range(group.uses)]

    # the head is what runs after the last block
    learns = names_that_learn(model, logits, labels)
    after = names_after(model, blocks[-1].block, blocks[-1].uses)
    assert after == learns & head.parameters.keys()
    assert any(len(head.parameters[name]) == CLASSES for name in after)
    if name in HEAD_INSIDE:
        with pytest.raises(FreezingError, match="no module of its own follows the body, as a head does") as caught:
            head_names(model)
        assert_sentence(caught.value)
    else:
        tops = head_names(model)
        assert any(len(p) == CLASSES for top in tops for p in model.get_submodule(top).parameters())
        assert {name for name in learns if name.split(".")[0] in tops} <= after

    # the head learns, the rest does not
    model.train().eval()  # Levit keeps a part of its last graph until then
    model.train(name.startswith("Reformer"))
    freeze(model, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(*forward(model))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= after


# Cached layers ------------------------------------------------------------------------------------------------

ROWS = [
    {"input_ids": [*(5 + (i * n) % 55 for i in range(1, n)), 2], "attention_mask": [1] * n, "labels": 0}
    for n in (4, 6, 11, 7, 9, 8, 5)
]

# not even with all blocks frozen, besides those with an encoder and a decoder
NOT_CACHED = {
    "BigBirdForSequenceClassification": "its body pools, and its head reads what is not pooled",
    "ConvBertForSequenceClassification": "its convolutions read the padding",
    "FNetForSequenceClassification": "its Fourier transforms read the padding",
    "FunnelForSequenceClassification": "its blocks shorten the text",
    "MobileBertForSequenceClassification": "its embeddings are those of three tokens, padding included",
    "NystromformerForSequenceClassification": "its convolutions read the padding",
    "ReformerForSequenceClassification": "its blocks return two states",
    "XLNetForSequenceClassification": "it reads the last token, padding included",
    "YosoForSequenceClassification": "its attention is random",
}


@pytest.mark.parametrize("train", [0, 1, 2])
@pytest.mark.parametrize("name", [name for name in READ if "Sequence" in name and name not in HEAD_INSIDE])
def test_cached_layers_give_the_logits_of_the_whole_model_or_are_refused(name: str, train: int) -> None:
    model = make_any(name)
    freeze(model, train or [f"{top}.*" for top in head_names(model)])
    try:
        upper, cached = cache_frozen_layers(model, {"train": ROWS}, batch_size=3)
    except FeatureCacheError as error:
        assert_sentence(error)
        assert train == 2 or model.config.is_encoder_decoder or name in NOT_CACHED
        return
    for indices in (np.array([0, 1]), np.array([5, 2, 3, 6])):
        whole, ours = (make_batch(model, rows, indices, model.device) for rows in (ROWS, cached["train"]))
        del whole["labels"], ours["labels"]
        with torch.no_grad():
            torch.testing.assert_close(upper(**ours).logits, model(**whole).logits, atol=1e-4, rtol=1e-4)
    assert [group.name for group in layer_groups(upper)] == [group.name for group in layer_groups(model)]


# Adapters -----------------------------------------------------------------------------------------------------

METHODS = {
    "lora": add_lora,
    "lora on all": lambda model: add_lora(model, targets="all-linear"),
    "ia3": add_ia3,
    "adapters": lambda model: add_adapters(model, 4, kind="houlsby"),
    "bitfit": bitfit,
}
NEW = ("lora_", "ia3_", ".adapter.")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in class_names() if name not in NOT_BUILT])
def test_added_weights_and_the_head_learn_or_the_method_is_refused(name: str, method: str) -> None:
    model = make_any(name)
    model.train(name.startswith("Reformer"))
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    try:
        adapted = METHODS[method](model)
    except ValueError as error:
        assert_sentence(error)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == before
        return
    learns = names_that_learn(adapted, *forward(adapted))
    added = {part for part, _ in adapted.named_parameters() if any(new in part for new in NEW)}
    assert added <= learns
    assert any(len(adapted.get_parameter(part)) == CLASSES for part in learns - added)


@pytest.mark.parametrize(
    "name", ["XLMRobertaForSequenceClassification", "OPTForSequenceClassification", "BartForSequenceClassification",
             "CLIPForImageClassification", "SiglipForImageClassification", "BeitForImageClassification"],
)  # fmt: skip
def test_the_usual_methods_are_not_refused(name: str) -> None:
    assert any("lora_" in part for part, _ in add_lora(make_any(name)).named_parameters())
    assert any(not p.requires_grad for p in bitfit(make_any(name)).parameters())


def test_keys_and_values_must_be_known_in_every_block() -> None:
    with pytest.raises(ValueError, match="The query and value layers of DeepseekV2ForSequenceClassification are not"):
        add_lora(make_any("DeepseekV2ForSequenceClassification"))
    with pytest.raises(ValueError, match="The blocks of Qwen2MoeForSequenceClassification can't be read"):
        add_ia3(make_any("Qwen2MoeForSequenceClassification"))  # its experts are one tensor
    with pytest.raises(ValueError, match="an adapter does not fit"):
        add_adapters(make_any("T5GemmaForSequenceClassification"), 4)


# Details ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameter", "group"),
    [
        ("XLMRobertaForSequenceClassification", "classifier.dense.weight", "head"),
        ("MPNetForSequenceClassification", "mpnet.encoder.relative_attention_bias.weight", "embeddings"),
        ("MBartForSequenceClassification", "model.encoder.layer_norm.weight", "encoder layer 1"),
        ("MBartForSequenceClassification", "model.decoder.layer_norm.weight", "head"),
        ("BartForSequenceClassification", "model.decoder.embed_positions.weight", "embeddings"),
        ("CLIPForImageClassification", "vision_model.pre_layrnorm.weight", "embeddings"),
        ("SiglipForImageClassification", "classifier.weight", "head"),
        ("ResNetForImageClassification", "resnet.embedder.embedder.convolution.weight", "embeddings"),
    ],
)
def test_a_parameter_belongs_where_it_is_used_first(name: str, parameter: str, group: str) -> None:
    assert next(found.name for found in layer_groups(make_any(name)) if parameter in found.parameters) == group


def test_the_projections_of_opt_are_on_both_sides_of_its_blocks() -> None:
    config = OPTConfig(
        vocab_size=60, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8,
        do_layer_norm_before=False,
    )  # fmt: skip
    groups = layer_groups(OPTForSequenceClassification(config))
    assert "model.decoder.project_in.weight" in groups[0].parameters
    assert {*groups[-1].parameters} == {"model.decoder.project_out.weight", "score.weight"}


def test_the_network_of_a_soft_prompt_runs_before_the_blocks() -> None:
    config = PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=2, encoder_hidden_size=8)
    groups = layer_groups(get_peft_model(make_any("BertForSequenceClassification"), config))
    assert "prompt_encoder.default.mlp_head.0.weight" in groups[0].parameters
    assert "base_model.classifier.modules_to_save.default.weight" in groups[-1].parameters


def test_reading_leaves_the_model_and_the_random_state_as_they_are() -> None:
    model = freeze(make_any("BigBirdForSequenceClassification"), ["classifier.*"]).train()
    modules, weights, state = [*model.modules()], snapshot(model), torch.random.get_rng_state()
    architecture._TRACES.clear()
    layer_groups(model)
    assert architecture._TRACES
    assert [*model.modules()] == modules and all(module.training for module in modules)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert model.bert.attention_type == "block_sparse"
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"classifier"}
    assert all(torch.equal(weights[name], p) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_config_and_its_names_are_run_once() -> None:
    architecture._TRACES.clear()
    first, second = (make_any("OPTForSequenceClassification") for _ in range(2))
    assert [*map(repr, layer_groups(first))] == [*map(repr, layer_groups(second))]
    head_names(second)
    assert len(architecture._TRACES) == 1
    second.config.scale_embedding = True  # the same names may compute something else
    layer_groups(second)
    assert len(architecture._TRACES) == 2


def test_a_model_may_have_several_end_tokens_and_a_body_that_is_not_called() -> None:
    sizes = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**sizes, hidden_size=16, eos_token_id=[0, 1])
    assert head_names(LlamaForSequenceClassification(config)) == ["score"]
    assert head_names(LlamaForCausalLM(config)) == []
    bart = make_any("BartForSequenceClassification").config
    assert head_names(BartForCausalLM(bart)) == []  # it calls the decoder in the body


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_model_without_weights_is_read_as_one_with_weights(kind: str) -> None:
    """On the device "meta" there are shapes only, as for counting the weights of a large network."""
    real = make_any(kind)
    expected = [(group.name, list(group.parameters)) for group in layer_groups(real)]
    architecture._TRACES.clear()
    with torch.device("meta"):
        shapes = type(real)(real.config)
    assert [(group.name, list(group.parameters)) for group in layer_groups(shapes)] == expected
