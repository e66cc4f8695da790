"""Adapters over a base that started at random in part take that part along, whatever it is and whatever saves them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, disturb, make_inputs, make_tiny, make_word_tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ftkit.adapters.bottleneck import add_adapters, load_bottleneck, save_bottleneck
from ftkit.adapters.lora import add_ia3, add_lora, load_adapter, merge, save_adapter
from ftkit.models.loading import load, load_classifier, save

# peft reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

PEFT = {
    "lora": lambda model: add_lora(model, rank=2),
    "all-linear": lambda model: add_lora(model, rank=2, targets="all-linear"),  # the pooler, too
    "dora": lambda model: add_lora(model, rank=2, targets="all-linear", dora=True),
    "ia3": add_ia3,
}
BOTTLENECK = {
    kind: lambda model, kind=kind: add_adapters(model, 4, kind=kind, activation="gelu")
    for kind in ("pfeiffer", "houlsby")
}


def keep(weights: dict[str, torch.Tensor], *without: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if not any(part in name for part in without)}


# what is in the checkpoint
BASES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]] = {
    "no pooler": ("bert", lambda weights: keep(weights, "pooler")),
    "no last layer": ("bert", lambda weights: keep(weights, "layer.2.")),
    "fewer positions": (
        "bert", lambda weights: weights | {"embeddings.position_embeddings.weight": torch.ones(5, 16)},
    ),
    "no last block of GPT-2": ("gpt2", lambda weights: keep(weights, "h.2.")),
    "no body of ALBERT": ("albert", lambda weights: keep(weights, "albert_layers")),
    "nothing": ("bert", lambda weights: keep(weights, "")),
    "everything": ("bert", lambda weights: weights),
}  # fmt: skip


def make_base(kind: str, folder: Path, seed: int) -> PreTrainedModel:
    """Load a checkpoint without a part of its weights, which then depends on the seed."""
    family, cut = BASES[kind]
    if not folder.exists():
        make_tiny(family).base_model.save_pretrained(folder)
        make_word_tokenizer().save_pretrained(folder)
        weights = cut(load_file(folder / "model.safetensors"))
        save_file(weights or {"unused": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return load_classifier(folder, CLASSES, pretrained=kind != "nothing", seed=seed)[0].cpu()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**make_inputs("bert")).logits


def assert_same(model: nn.Module, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", PEFT)
@pytest.mark.parametrize("kind", BASES)
def test_a_peft_adapter_gives_the_same_logits_over_a_base_with_another_seed(
    kind: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = disturb(PEFT[method](make_base(kind, tmp_path / "base", seed=0)))
    expected = logits(model)
    folder = save_adapter(model, tmp_path / "adapter")
    capsys.readouterr()
    other = make_base(kind, tmp_path / "base", seed=1)
    told = capsys.readouterr().out
    loaded = load_adapter(other, folder)
    assert_same(loaded, expected)
    assert capsys.readouterr().out == ""
    assert ("start at random" in told) == (kind not in ("everything", "nothing"))  # so the seed mattered
    assert_same(PeftModel.from_pretrained(make_base(kind, tmp_path / "base", seed=2), folder), expected)
    again = save_adapter(loaded, tmp_path / "again")
    assert_same(load_adapter(make_base(kind, tmp_path / "base", seed=3), again), expected)
    if kind == "everything":
        saved = keep(load_file(folder / "adapter_model.safetensors"), "lora_", "ia3_")
        assert all(".classifier." in name for name in saved)  # the head only


@pytest.mark.parametrize("method", BOTTLENECK)
@pytest.mark.parametrize("kind", BASES)
def test_bottleneck_adapters_give_the_same_logits_over_a_base_with_another_seed(
    kind: str, method: str, tmp_path: Path
) -> None:
    model = disturb(BOTTLENECK[method](make_base(kind, tmp_path / "base", seed=0)))
    expected = logits(model)
    folder = save_bottleneck(model, tmp_path / "adapter")
    loaded = load_bottleneck(make_base(kind, tmp_path / "base", seed=1), folder)
    assert_same(loaded, expected)
    plain, _ = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=CLASSES, ignore_mismatched_sizes=True, output_loading_info=True
    )
    again = save_bottleneck(load_bottleneck(plain, folder), tmp_path / "again")  # which part was random is not lost
    assert_same(load_bottleneck(make_base(kind, tmp_path / "base", seed=3), again), expected)


def test_adapters_that_wrap_other_layers_of_one_base_are_saved_each_for_itself(tmp_path: Path) -> None:
    model = disturb(add_lora(make_base("no pooler", tmp_path / "base", seed=0), name="few", rank=2))
    model = disturb(add_lora(model, name="all", rank=2, targets="all-linear"))
    folders, expected = {}, {}
    for name in ("few", "all"):
        model.set_adapter(name)
        folders[name], expected[name] = save_adapter(model, tmp_path), logits(model)
        assert_same(load_adapter(make_base("no pooler", tmp_path / "base", seed=1), folders[name]), expected[name])
    for order in (("few", "all"), ("all", "few")):
        both = make_base("no pooler", tmp_path / "base", seed=1)
        for name in order:
            both = load_adapter(both, folders[name], name=name)
        for name in order:
            both.set_adapter(name)
            assert_same(both, expected[name])


def test_adapters_over_different_random_bases_are_not_put_on_one_base(tmp_path: Path) -> None:
    folders, expected = [], []
    for seed in (0, 1):
        model = disturb(add_lora(make_base("no pooler", tmp_path / "base", seed=seed), rank=2))
        folders.append(save_adapter(model, tmp_path / f"adapter {seed}"))
        expected.append(logits(model))
    model = load_adapter(make_base("no pooler", tmp_path / "base", seed=2), folders[0], name="first")
    with pytest.raises(ValueError, match=r"does not fit .*bert\.pooler\.dense.*: load a fresh copy") as caught:
        load_adapter(model, folders[1], name="second")
    assert "\n" not in str(caught.value)
    assert_same(model, expected[0])


def test_an_adapter_that_was_saved_without_the_random_part_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_base("no pooler", tmp_path / "base", seed=0)
    add_lora(model, rank=2).save_pretrained(tmp_path / "plain", save_embedding_layers=False)  # as plain peft would
    bottleneck = save_bottleneck(add_adapters(make_tiny("bert"), 4), tmp_path / "bottleneck")
    for load_it, folder in [(load_adapter, tmp_path / "plain"), (load_bottleneck, bottleneck)]:
        base = make_base("no pooler", tmp_path / "base", seed=1)
        capsys.readouterr()
        load_it(base, folder)
        assert capsys.readouterr().out == (
            f"{folder}: 2 weights of the base start at random and were not saved with the adapter, so its logits "
            "may differ from those in training: bert.pooler.dense.bias, bert.pooler.dense.weight\n"
        )


def test_a_merged_model_is_saved_with_its_random_part(tmp_path: Path) -> None:
    model = disturb(add_lora(make_base("no pooler", tmp_path / "base", seed=0), rank=2))
    folder = save(merge(model), make_word_tokenizer(), tmp_path / "merged")
    torch.testing.assert_close(logits(load(folder)[0].cpu()), logits(model), rtol=1e-5, atol=1e-5)
