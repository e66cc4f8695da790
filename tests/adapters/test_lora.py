"""LoRA, IA3 and BitFit compared with their equations, the formulas of their sizes, and plain peft."""

import copy
import json
import math
import warnings

import pytest
import torch
from peft import PeftModel
from tiny_bert import make_rows, make_tiny_bert
from tiny_models import (
    CLASSES,
    CONFIGS,
    FAMILIES,
    INNER,
    LAYERS,
    WIDTH,
    assert_seed_sets_initial_weights,
    disturb,
    make_inputs,
    make_tiny,
)
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
)

from ftkit.adapters.lora import add_ia3, add_lora, bitfit, load_adapter, merge, save_adapter
from ftkit.models.modules import count_parameters
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

# some tests load with plain peft, which reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

# number of attention layers, and (in, out) sizes of the linear layers that LoRA changes by default in each
SQUARES, FUSED, GROUPED = [(WIDTH, WIDTH)] * 2, [(WIDTH, 3 * WIDTH)], [(WIDTH, WIDTH), (WIDTH, WIDTH // 2)]
DEFAULTS = {
    **dict.fromkeys(FAMILIES, (LAYERS, SQUARES)),
    "modernbert": (LAYERS, FUSED),
    "gpt2": (LAYERS, FUSED),
    "llama": (LAYERS, GROUPED),
    "qwen2": (LAYERS, GROUPED),
    "albert": (1, SQUARES),  # its layers share their weights
    "t5": (3 * LAYERS, SQUARES),  # self-attention of encoder and decoder, and cross-attention
}
DENSE, LAST = WIDTH * WIDTH + WIDTH, WIDTH * CLASSES + CLASSES
HEADS = {
    **dict.fromkeys(["roberta", "electra", "distilbert", "deberta-v2", "t5"], DENSE + LAST),
    **dict.fromkeys(["bert", "albert", "vit"], LAST),
    **dict.fromkeys(["gpt2", "llama", "qwen2"], WIDTH * CLASSES),
    "modernbert": WIDTH * WIDTH + WIDTH + LAST,  # a dense layer and a norm, both without bias
}


def logits(model, family="bert"):
    with torch.no_grad():
        return model.eval()(**make_inputs(family)).logits


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_query_and_value_and_the_head_and_nothing_else(family):
    model = make_tiny(family)
    before = logits(model, family)
    adapted = add_lora(model, rank=2)
    attentions, sizes = DEFAULTS[family]
    assert count_parameters(adapted)[0] == attentions * sum(2 * (a + b) for a, b in sizes) + HEADS[family]
    torch.testing.assert_close(logits(adapted, family), before, rtol=0, atol=1e-6)

    disturb(adapted)
    adapted(**make_inputs(family)).logits.square().sum().backward()
    for name, parameter in trainable(adapted).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


def test_a_new_lora_leaves_the_logits_bitwise_equal():
    model = make_tiny("bert")
    before = logits(model)
    adapted = add_lora(model, rank=4)
    assert torch.equal(logits(adapted), before)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        if "lora_A" in name:
            assert parameter.all()


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
@pytest.mark.parametrize(("family", "layer"), [("bert", "query"), ("gpt2", "c_attn")])
def test_a_lora_layer_computes_its_equation(family, layer, rslora, scale):
    adapted = add_lora(make_tiny(family), rank=4, alpha=6, rslora=rslora)
    disturb(adapted)
    adapted = adapted.double()
    module = next(module for name, module in adapted.named_modules() if name.endswith(f".{layer}"))
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
    W0 = module.base_layer.weight if family == "bert" else module.base_layer.weight.T
    expected = x @ W0.T + module.base_layer.bias + scale * x @ A.T @ B.T
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_the_seed_sets_the_initial_weights_and_leaves_the_global_random_state_unchanged():
    assert_seed_sets_initial_weights(add_lora, "lora_A")


METHODS = {
    "lora": lambda model: add_lora(model, rank=2),
    "all-linear": lambda model: add_lora(model, rank=2, targets="all-linear"),
    "dora": lambda model: add_lora(model, rank=2, dora=True),
    "ia3": add_ia3,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_reloaded_models_give_the_same_logits(family, method, tmp_path):
    before = logits(make_tiny(family), family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # as lora.py does
        adapted = METHODS[method](make_tiny(family))
    torch.testing.assert_close(logits(adapted, family), before, rtol=0, atol=1e-5)
    disturb(adapted)
    after = logits(adapted, family)
    assert (after - before).abs().max() > 1e-2

    merged = merge(adapted)
    assert type(merged) is type(make_tiny(family))
    assert merged.state_dict().keys() == make_tiny(family).state_dict().keys()
    torch.testing.assert_close(logits(merged, family), after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(adapted, family), after, rtol=0, atol=1e-6)  # merging leaves it unchanged

    folder = save_adapter(adapted, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(make_tiny(family), folder)
    torch.testing.assert_close(logits(plain, family), after, rtol=0, atol=1e-6)
    loaded = load_adapter(make_tiny(family), folder)
    torch.testing.assert_close(logits(loaded, family), after, rtol=0, atol=1e-6)
    assert trainable(loaded).keys() == trainable(adapted).keys()
    for name, parameter in trainable(loaded).items():
        assert torch.equal(parameter, trainable(adapted)[name]), name


def test_a_merged_model_is_saved_and_loaded_by_plain_transformers(tmp_path):
    adapted = add_lora(make_tiny("bert"))
    disturb(adapted)
    merge(adapted).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=1e-5, atol=1e-5)


def test_all_linear_is_every_layer_below_the_head():
    adapted = add_lora(make_tiny("bert"), rank=2, targets="all-linear")
    block = 4 * 2 * 2 * WIDTH + 2 * 2 * (WIDTH + INNER)
    assert count_parameters(adapted)[0] == LAYERS * block + 2 * 2 * WIDTH + HEADS["bert"]  # and the pooler


def test_targets_can_be_full_names_or_the_ends_of_names():
    adapted = add_lora(
        make_tiny("bert"), rank=3, targets=["attention.output.dense", "bert.encoder.layer.1.output.dense"]
    )
    assert count_parameters(adapted)[0] == LAYERS * 3 * 2 * WIDTH + 3 * (INNER + WIDTH) + HEADS["bert"]


@pytest.mark.parametrize(
    ("family", "per_block"),
    [
        ("bert", 2 * WIDTH + INNER),
        ("gpt2", 3 * WIDTH + 4 * WIDTH),
        ("modernbert", 3 * WIDTH + INNER),
        ("llama", WIDTH + INNER),
    ],
)
def test_ia3_has_a_vector_for_keys_values_and_inner_activations(family, per_block):
    adapted = add_ia3(make_tiny(family))
    assert count_parameters(adapted)[0] == LAYERS * per_block + HEADS[family]
    vectors = [p for name, p in trainable(adapted).items() if "ia3_l" in name]
    assert all(torch.equal(vector, torch.ones_like(vector)) for vector in vectors)


def test_adapters_on_one_base_have_their_own_heads_and_are_switched_by_name(tmp_path):
    base = make_tiny("bert")
    before = logits(base)
    model = add_lora(base, name="one")
    disturb(model)
    one = logits(model)
    model = add_lora(model, rank=2, name="two", targets="all-linear")
    assert torch.equal(logits(model), before)  # its head also starts as a copy of the base's
    assert all(".two." in name for name in trainable(model))
    disturb(model)
    two = logits(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    assert all(".one." in name for name in trainable(model))
    assert (one - two).abs().max() > 1e-2
    torch.testing.assert_close(logits(merge(model)), one, rtol=1e-5, atol=1e-5)

    first = save_adapter(model, tmp_path)
    model.set_adapter("two")
    second = save_adapter(model, tmp_path)
    loaded = load_adapter(load_adapter(make_tiny("bert"), first, name="a"), second, name="b")
    torch.testing.assert_close(logits(loaded), two, rtol=0, atol=1e-6)
    loaded.set_adapter("a")
    torch.testing.assert_close(logits(loaded), one, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="already has an adapter 'a'"):
        add_lora(loaded, name="a")


@pytest.mark.parametrize("add", [add_lora, add_ia3])
def test_fit_and_evaluate_accept_an_adapted_model(add, tiny_data):
    base = make_tiny_bert()
    body = {name: p.clone() for name, p in base.bert.named_parameters()}
    adapted = add(base)
    start = {name: p.clone() for name, p in trainable(adapted).items()}
    settings = TrainSettings(lr=0.02, num_epochs=2, keep_best=False, precision="fp32", class_weights="balanced")
    history = fit(adapted, tiny_data, settings)
    assert history.trainable_parameters == sum(p.numel() for p in start.values())
    for name, parameter in trainable(adapted).items():
        assert not torch.equal(parameter, start[name]), name
    weights = dict(adapted.named_parameters())
    for name, parameter in body.items():
        full = [key for key in weights if key.replace(".base_layer", "").endswith(f"model.bert.{name}")]
        assert len(full) == 1 and torch.equal(weights[full[0]], parameter)
    evaluation = evaluate(adapted, tiny_data["validation"])
    assert evaluation.loss == pytest.approx(history.epochs[-1]["validation_loss"])
    assert evaluation.loss == pytest.approx(evaluate(merge(adapted), tiny_data["validation"]).loss, abs=1e-5)


def test_the_saved_folder_is_small_and_names_the_classes(tmp_path):
    model = make_tiny_bert()
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    folder = save_adapter(add_lora(model, rank=2), tmp_path / "new" / "place")
    assert json.loads((folder / "labels.json").read_text()) == ["bad", "good"]
    assert load_adapter(make_tiny_bert(), folder).config.id2label == {0: "bad", 1: "good"}
    numbers = 2 * 2 * 2 * (32 + 32) + 2 * 32 + 2
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * numbers + 3000
    with pytest.raises(ValueError, match=r"2 classes \['bad', 'good'\], the model's head is for 4"):
        load_adapter(make_tiny_bert(num_labels=4), folder)
    with pytest.raises(ValueError, match="no saved adapter"):
        load_adapter(make_tiny_bert(), tmp_path)
    wide = copy.deepcopy(CONFIGS["bert"])
    wide.num_labels = 2
    with pytest.raises(ValueError, match="does not fit BertForSequenceClassification") as caught:
        load_adapter(AutoModelForSequenceClassification.from_config(wide), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "family"), [(GPT2LMHeadModel, "gpt2"), (T5ForConditionalGeneration, "t5"), (BertForMaskedLM, "bert")]
)
def test_the_output_layer_of_a_language_model_stays_frozen(kind, family, tmp_path):
    def make():
        torch.manual_seed(0)
        return kind(copy.deepcopy(CONFIGS[family])).eval()

    inputs = make_inputs(family)
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    adapted = add_lora(make(), rank=2)
    attentions, sizes = DEFAULTS[family]
    assert count_parameters(adapted)[0] == attentions * sum(2 * (a + b) for a, b in sizes)
    disturb(adapted)
    with torch.no_grad():
        after = adapted(**inputs).logits
        folder = save_adapter(adapted, tmp_path)
        loaded = PeftModel.from_pretrained(make(), folder).eval()
        torch.testing.assert_close(loaded(**inputs).logits, after, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merge(adapted)(**inputs).logits, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ["qurey"]}, r"no linear layer 'qurey' .*did you mean 'query'.*dense, key, query, value"),
        ({"targets": ["classifier"]}, "no linear layer 'classifier' below its head"),
        ({"targets": "keys"}, "did you mean 'key'"),
        ({"targets": []}, "targets is empty"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"name": "a.b"}, "without a dot"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(options, said):
    model = make_tiny("bert")
    with pytest.raises(ValueError, match=said) as caught:
        add_lora(model, **options)
    assert "\n" not in str(caught.value)
    assert len(trainable(model)) == len(list(model.parameters()))  # the model is unchanged


BIASES = {"bert": LAYERS * (4 * WIDTH + INNER + 3 * WIDTH) + 2 * WIDTH, "qwen2": LAYERS * 2 * WIDTH,
          "gpt2": LAYERS * (3 + 1 + 4 + 1 + 2) * WIDTH + WIDTH}  # fmt: skip


@pytest.mark.parametrize("family", BIASES)
def test_bitfit_trains_the_biases_and_the_head(family):
    model = bitfit(make_tiny(family))
    assert count_parameters(model)[0] == BIASES[family] + HEADS[family]


def test_bitfit_changes_only_the_weights_that_it_trains():
    model = bitfit(make_tiny_bert())
    start = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, {"train": make_rows(32)}, TrainSettings(lr=0.02, num_epochs=1, precision="fp32"))
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, start[name])
        # a key's bias adds the same value to every score of a row, which does not change the softmax
        assert moved == (name.endswith("bias") or name == "classifier.weight") or name.endswith("key.bias"), name


@pytest.mark.parametrize("family", ["llama", "t5", "modernbert"])
def test_bitfit_refuses_a_model_without_biases(family):
    with pytest.raises(ValueError, match="has no biases below its head"):
        bitfit(make_tiny(family))
