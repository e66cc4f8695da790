"""Bottleneck adapters: their place, their size, what trains, saving and loading."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_bert import make_tiny_bert
from tiny_models import (
    CLASSES,
    FAMILIES,
    INNER,
    LAYERS,
    WIDTH,
    assert_seed_sets_initial_weights,
    disturb,
    make_inputs,
    make_tiny,
)
from torch.nn import functional as F
from transformers import BloomConfig, BloomForSequenceClassification

from ftkit.adapters.bottleneck import Bottleneck, adapter_names, add_adapters, load_bottleneck, save_bottleneck
from ftkit.models import architecture
from ftkit.models.modules import count_parameters
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

# number of adapters of each kind
NUMBERS = {
    **{family: {"pfeiffer": LAYERS, "houlsby": 2 * LAYERS} for family in FAMILIES},
    "albert": {"pfeiffer": 1, "houlsby": 2},  # its layers share their weights
    "t5": {"pfeiffer": 2 * LAYERS, "houlsby": 5 * LAYERS},  # the decoder attends twice
}
KINDS = ["pfeiffer", "houlsby"]


def logits(model, family="bert"):
    with torch.no_grad():
        return model.eval()(**make_inputs(family)).logits


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def norms(model):
    return sum(p.numel() for name, p in model.named_parameters() if "norm" in name.lower() or ".ln_" in name)


def head(model):
    return sum(p.numel() for name in architecture.head_names(model) for p in model.get_submodule(name).parameters())


def head_norms(model):
    return sum(norms(model.get_submodule(name)) for name in architecture.head_names(model))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_bottleneck_computes_its_equation_and_starts_as_the_identity(activation):
    adapter = Bottleneck(6, 2, activation).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    assert torch.equal(adapter(x), x)
    disturb(adapter)
    middle = getattr(F, activation)(x @ adapter.down.weight.T + adapter.down.bias)
    torch.testing.assert_close(adapter(x), x + middle @ adapter.up.weight.T + adapter.up.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_added_trained_saved_and_loaded(family, kind, tmp_path):
    model = make_tiny(family)
    before, plain = logits(model, family), copy.deepcopy(model)
    assert add_adapters(model, 4, kind=kind, activation="gelu") is model  # gelu has no dead units
    assert len(adapter_names(model)) == NUMBERS[family][kind]
    size = NUMBERS[family][kind] * (2 * WIDTH * 4 + 4 + WIDTH)
    layer_norms = norms(plain) - head_norms(plain) if kind == "houlsby" else 0
    assert count_parameters(model) == (size + head(plain) + layer_norms, size + count_parameters(plain)[1])
    torch.testing.assert_close(logits(model, family), before, rtol=0, atol=1e-6)

    disturb(model)
    after = logits(model, family)
    assert (after - before).abs().max() > 1e-2
    model(**make_inputs(family)).logits.square().sum().backward()
    for name in adapter_names(model):
        adapter = model.get_submodule(name)
        assert adapter.down.weight.grad.any() and adapter.up.weight.grad.any(), name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    assert save_bottleneck(model, tmp_path / "saved") == tmp_path / "saved"
    saved = load_file(tmp_path / "saved" / "bottleneck.safetensors")
    assert sum(weight.numel() for weight in saved.values()) == count_parameters(model)[0]
    loaded = load_bottleneck(plain, tmp_path / "saved")
    torch.testing.assert_close(logits(loaded, family), after, rtol=0, atol=1e-6)
    assert trainable(loaded).keys() == trainable(model).keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_new_adapters_leave_the_logits_bitwise_equal():
    model = make_tiny("bert")
    before = logits(model)
    assert torch.equal(logits(add_adapters(model, 4, kind="houlsby")), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_stands_between_the_projection_and_the_residual(kind):
    model = add_adapters(make_tiny("bert"), 4, kind=kind)
    disturb(model)
    output = model.bert.encoder.layer[0].output
    inner, residual = torch.randn(2, INNER), torch.randn(2, WIDTH)
    dense = inner @ output.dense.weight.T + output.dense.bias
    adapter = output.dense.adapter
    adapted = dense + adapter.up(torch.relu(adapter.down(dense)))
    torch.testing.assert_close(output(inner, residual), output.LayerNorm(adapted + residual))
    attention = model.bert.encoder.layer[0].attention.output.dense
    assert hasattr(attention, "adapter") == (kind == "houlsby")


def test_a_copy_has_its_own_adapters():
    model = add_adapters(make_tiny("bert"), 4)
    before, twin = logits(model), copy.deepcopy(model)
    disturb(twin)
    assert torch.equal(logits(model), before)
    assert (logits(twin) - before).abs().max() > 1e-2
    model.load_state_dict(twin.state_dict())
    assert torch.equal(logits(model), logits(twin))
    assert model.double().get_submodule(adapter_names(model)[0]).down.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_fit_trains_the_adapters_and_leaves_the_base_unchanged(kind, tiny_data):
    model = add_adapters(make_tiny_bert(), 8, kind=kind)
    start = {name: p.clone() for name, p in model.named_parameters()}
    settings = TrainSettings(lr=0.02, num_epochs=2, keep_best=False, precision="fp32")
    history = fit(model, tiny_data, settings)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, start[name])
        assert moved == parameter.requires_grad, name
        expected = ".adapter." in name or name.startswith("classifier") or (kind == "houlsby" and "LayerNorm" in name)
        assert parameter.requires_grad == expected, name
    loss = evaluate(model, tiny_data["validation"]).loss
    assert loss == pytest.approx(history.epochs[-1]["validation_loss"])


def test_the_file_is_small_names_the_classes_and_fits_only_its_own_base(tmp_path):
    model = make_tiny_bert()
    model.config.id2label = {0: "bad", 1: "good"}
    save_bottleneck(add_adapters(model, 4, activation="gelu"), tmp_path)
    settings = json.loads((tmp_path / "bottleneck.json").read_text())
    assert settings == {
        "architecture": "BertForSequenceClassification", "kind": "pfeiffer", "width": 4, "activation": "gelu",
        "labels": ["bad", "good"],
    }  # fmt: skip
    numbers = 2 * (2 * 32 * 4 + 4 + 32) + 2 * 32 + 2
    assert (tmp_path / "bottleneck.safetensors").stat().st_size < 4 * numbers + 2000
    loaded = load_bottleneck(make_tiny_bert(), tmp_path)
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    assert loaded.get_submodule(adapter_names(loaded)[0]).activation == "gelu"
    for other, said in [
        (make_tiny_bert(num_labels=3), r"2 classes \['bad', 'good'\], the model's head is for 3"),
        (make_tiny("roberta"), "for a BertForSequenceClassification, this is a RobertaForSequenceClassification"),
    ]:
        with pytest.raises(ValueError, match=said):
            load_bottleneck(other, tmp_path)
        assert not adapter_names(other)
    narrow = make_tiny("bert")
    narrow.config.num_labels = 2
    with pytest.raises(ValueError, match="for a model with other layers"):
        load_bottleneck(narrow, tmp_path)
    assert len(trainable(narrow)) == len(list(narrow.parameters()))
    with pytest.raises(ValueError, match="no saved adapters"):
        load_bottleneck(make_tiny_bert(), tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no bottleneck adapters to save"):
        save_bottleneck(make_tiny_bert(), tmp_path)


def test_the_seed_sets_the_initial_weights_and_leaves_the_global_random_state_unchanged():
    assert_seed_sets_initial_weights(lambda model, **kwargs: add_adapters(model, 4, **kwargs), "down.weight")


@pytest.mark.parametrize(
    ("width", "options", "said"),
    [
        (0, {}, "width of an adapter is 0"),
        (4.0, {}, "width of an adapter is 4.0"),
        (True, {}, "width of an adapter is True"),
        (4, {"kind": "parallel"}, "no kind of adapter 'parallel'"),
        (4, {"activation": "sine"}, "no activation 'sine': choose from relu, gelu"),
    ],
)
def test_invalid_arguments_are_refused_and_leave_the_model_unchanged(width, options, said):
    model = make_tiny("bert")
    with pytest.raises(ValueError, match=said):
        add_adapters(model, width, **options)
    assert not adapter_names(model) and len(trainable(model)) == len(list(model.parameters()))


def test_adapters_are_not_added_twice_or_to_an_unknown_architecture():
    with pytest.raises(ValueError, match="already has bottleneck adapters"):
        add_adapters(add_adapters(make_tiny("bert"), 4), 4)
    config = BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2, num_labels=CLASSES, pad_token_id=0)
    with pytest.raises(ValueError, match="The blocks of BloomForSequenceClassification can't be read") as caught:
        add_adapters(BloomForSequenceClassification(config), 4)
    assert "\n" not in str(caught.value)
