from collections.abc import Callable, Iterator

import matplotlib.pyplot as plt
import pytest
import tiny_models
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.text import Text
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_models import make_tiny
from torch import nn

from ftkit import drawings
from ftkit.adapters import add_adapters, add_ia3, add_lora, bitfit
from ftkit.errors import FreezingError
from ftkit.models.modules import count_parameters
from ftkit.plots import Figure
from ftkit.training import freeze


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., MatplotlibFigure]]:
    """A function that draws a network and returns the figure; it stays open until the end."""
    figures = []

    def draw(model: nn.Module) -> MatplotlibFigure:
        with monkeypatch.context() as patch:
            patch.setattr(drawings, "Figure", lambda figure, alt, table: figures.append(figure))
            drawings.network(model)
        return figures[-1]

    yield draw
    plt.close("all")


def prompted(config: type, **options: object) -> nn.Module:
    options |= {} if config is PrefixTuningConfig else {"token_dim": tiny_models.WIDTH}
    return get_peft_model(make_tiny("llama lm"), config(num_virtual_tokens=4, task_type="CAUSAL_LM", **options))


MODELS = {
    "full": lambda: make_tiny("bert"),
    "last": lambda: freeze(make_tiny("bert"), 2),
    "bitfit": lambda: bitfit(make_tiny("bert")),
    "lora": lambda: add_lora(make_tiny("bert"), rank=2),
    "all linear": lambda: add_lora(make_tiny("albert"), rank=2, targets="all-linear"),
    "ia3": lambda: add_ia3(make_tiny("bert")),
    "adapter": lambda: add_adapters(make_tiny("bert"), 4),
    "houlsby": lambda: add_adapters(make_tiny("bert"), 4, kind="houlsby"),
    "prompt": lambda: prompted(PromptTuningConfig),
    "p-tuning": lambda: prompted(PromptEncoderConfig),
    "prefix": lambda: prompted(PrefixTuningConfig),
    **{family: lambda family=family: make_tiny(family) for family in ("gpt2 lm", "t5", "vit", "modernbert")},
}


def replaced_head(model: nn.Module) -> int:
    """Number of weights of the head that peft keeps beside the one that runs."""
    return sum(p.numel() for name, p in model.named_parameters() if "original_module" in name)


@pytest.mark.parametrize("name", MODELS)
def test_all_weights_of_a_network_are_drawn_once_and_said(name: str) -> None:
    model = MODELS[name]()
    figure = drawings.network(model)
    trainable, total = count_parameters(model)
    total -= replaced_head(model)
    assert (figure.table["weights"].sum(), figure.table["train"].sum()) == (total, trainable)
    assert f"In all, {trainable:,} of {total:,} weights train" in figure.alt
    assert not plt.get_fignums()


def boxes(figure: MatplotlibFigure) -> set[str]:
    """Colours of the boxes."""
    return {to_hex(box.get_facecolor()) for ax in figure.axes for box in ax.patches if box.get_fill()}


def texts(figure: MatplotlibFigure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


GREY, BLUE, ORANGE = to_hex("0.88"), "#0072b2", "#e69f00"


@pytest.mark.parametrize(
    ("name", "colours", "said"),
    [
        ("full", {BLUE}, "layers 0 to 2: 1,960 weights each, all train"),
        ("last", {GREY, BLUE}, "layers 0 to 1: 1,960 weights each, frozen; layer 2: 1,960 weights, all train"),
        ("bitfit", {GREY, BLUE}, "of which 136 train"),
        ("lora", {GREY, BLUE, ORANGE}, "of which 128 train (LoRA (query, value) in attention)"),
        ("ia3", {GREY, BLUE, ORANGE}, "(IA³ (key, value) in attention, IA³ (dense) in feed-forward)"),
        ("adapter", {GREY, BLUE, ORANGE}, "of which 148 train (adapter in feed-forward)"),
        ("houlsby", {GREY, BLUE, ORANGE}, "(adapter in attention, adapter in feed-forward)"),
        ("prompt", {GREY, ORANGE}, "of which 64 train (soft prompt (4 virtual tokens) in front of embeddings)"),
        ("prefix", {GREY, ORANGE}, "of which 64 train (prefix (4 virtual tokens) in front of attention)"),
    ],
)
def test_what_trains_has_a_colour_and_what_was_added_its_place(
    name: str, colours: set[str], said: str, drawn: Callable
) -> None:
    model = MODELS[name]()
    assert said in drawings.network(model).alt
    assert boxes(drawn(model)) == colours


def test_a_part_that_trains_in_part_is_hatched(drawn: Callable) -> None:
    hatched = [box for ax in drawn(MODELS["bitfit"]()).axes for box in ax.patches if box.get_hatch()]
    assert len(hatched) == 1 + 2 * 3 + 1  # embeddings, two parts in each of three blocks, the pooler
    assert "trains in part" in texts(drawn(MODELS["bitfit"]()))
    assert "trains in part" not in texts(drawn(MODELS["full"]()))


def test_the_numbers_that_are_drawn_are_those_of_the_table(drawn: Callable) -> None:
    model = MODELS["lora"]()
    shown, table = texts(drawn(model)), drawings.network(model).table
    for layer, row in table.iterrows():
        assert layer in shown and f"{row['weights']:,}" in shown
        assert (f"{row['train']:,}" if row["train"] else "frozen") in shown
    assert shown.count("LoRA\nquery, value") == 3


def test_the_input_is_at_the_bottom(drawn: Callable) -> None:
    height = {text.get_text(): text.get_position()[1] for text in drawn(MODELS["full"]()).axes[0].texts}
    assert height["input"] < height["layer 0"] < height["layer 2"] < height["head"] < height["output"]


def test_frozen_updates_are_grey(drawn: Callable) -> None:
    model = MODELS["lora"]().requires_grad_(False)
    assert boxes(drawn(model)) == {GREY}
    assert "frozen (LoRA (query, value) in attention)" in drawings.network(model).alt


def test_a_deep_network_is_drawn_with_one_row_for_layers_that_are_alike(drawn: Callable) -> None:
    config = tiny_models.CONFIGS["bert"].__class__(**tiny_models._TEXT | {"num_hidden_layers": 12})
    model = freeze(tiny_models.t.BertForSequenceClassification(config), 3)
    figure = drawings.network(model)
    assert figure.table.index.tolist() == ["embeddings", "layers 0 to 9", "layers 10 to 11", "head"]
    assert figure.table["weights"].sum() == count_parameters(model)[1]
    assert "layers 0 to 9,\neach" in texts(drawn(model))


def test_two_towers_stand_side_by_side(drawn: Callable) -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = make_tiny("bert").base_model, nn.Linear(3, 5).requires_grad_(False)
            self.text_head, self.image_head = nn.Linear(16, 2), nn.Linear(5, 2)
            self.logit_scale = nn.Parameter(torch.tensor(1.0))

    model = Towers()
    figure, (left, right) = drawings.network(model), drawn(model).axes
    trainable, total = count_parameters(model)
    assert f"In all, {trainable:,} of {total:,} weights train" in figure.alt
    assert "; 1 outside the boxes" in figure.alt
    assert "image tower: encoder: 20 weights, frozen; head: 12 weights, all train" in figure.alt
    assert {"text tower", "texts", "layer 2"} <= {text.get_text() for text in left.texts}
    assert {"image tower", "images", "encoder"} <= {text.get_text() for text in right.texts}


def test_a_title_takes_the_place_of_the_name_of_the_class() -> None:
    figure = drawings.network(make_tiny("bert"), title="Full fine-tuning")
    assert isinstance(figure, Figure) and figure.alt.startswith("Full fine-tuning, layers from input to output.")
    assert drawings.network(make_tiny("bert")).alt.startswith("BertForSequenceClassification, ")


def test_a_network_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(FreezingError, match=r"Linear can.t be read layer by layer"):
        drawings.network(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 5, "0 %"), (5, 5, "100 %"), (385, 22_713_986, "0.0017 %"), (9999, 10_000, "99.99 %")],
)
def test_a_share_is_never_rounded_to_nothing_or_to_all(part: int, whole: int, text: str) -> None:
    assert drawings._share(part, whole) == text
