"""Figures of images and texts: numbers, labels and positions."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.offsetbox import AnnotationBbox
from matplotlib.text import Text
from PIL import Image

from ftkit import plots
from ftkit.contrastive import plots as contrastive_plots
from ftkit.data.pairs import Pairs

RNG = np.random.default_rng(0)
CAPTIONS = ["a cat", "a dog that runs after a very long red train", "costs $5 or $6"]
PAIRS = Pairs(RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), CAPTIONS, pd.DataFrame(index=range(3)))
SIMILARITIES = np.array([[0.9, 0.2, 0.1], [0.3, 0.4, 0.5], [0.0, -0.001, 0.8]])
TEXT, IMAGE = np.array([[0.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 0.0], [3.0, 2.0]])
RECALL = pd.DataFrame({"1": [0.3, 0.1], "5": [0.6, 0.2], "10": [0.9, 0.4]}, index=[64, 16])
FIGURES = {
    "gallery": lambda: contrastive_plots.gallery(PAIRS, columns=2),
    "similarity": lambda: contrastive_plots.similarity(SIMILARITIES, PAIRS),
    "space": lambda: contrastive_plots.space(TEXT, IMAGE, captions=CAPTIONS[:2]),
    "recall": lambda: contrastive_plots.recall(RECALL, xlabel="batch size", guessing=0.05),
    "recall by name": lambda: contrastive_plots.recall(RECALL.set_axis(["linear", "mlp"]), xlabel="head"),
}


@pytest.fixture
def drawn(monkeypatch):
    """A function that draws a figure and returns its axes, which stay open until the test ends."""
    figures = []

    def draw(name: str) -> list[plt.Axes]:
        monkeypatch.setattr(contrastive_plots, "Figure", lambda figure, alt, table: figures.append(figure))
        FIGURES[name]()
        return figures[-1].axes

    yield draw
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_no_figure_stays_open_and_axes_are_labelled(name, drawn):
    assert isinstance(FIGURES[name](), plots.Figure)
    assert not plt.get_fignums()
    if name != "gallery":
        ax, *bars = drawn(name)
        assert ax.get_xlabel() and ax.get_ylabel() and all(bar.get_ylabel() == "cosine" for bar in bars)


def test_a_gallery_shows_each_image_above_its_caption(drawn):
    figure = FIGURES["gallery"]()
    assert figure.alt == f"Gallery of 3 images: {'; '.join(CAPTIONS)}."
    assert figure.table["caption"].tolist() == CAPTIONS
    axes = drawn("gallery")
    assert len(axes) == 4 and not axes[3].images
    for ax, image, caption in zip(axes, PAIRS.images, CAPTIONS, strict=False):
        assert np.array_equal(ax.images[0].get_array(), image)
        assert ax.texts[0].get_text().replace("\n", " ") == caption


def test_a_gallery_names_its_titles_and_refuses_a_wrong_number_of_them():
    figure = contrastive_plots.gallery(PAIRS, titles=["query", "first", "second"])
    assert "first: a dog" in figure.alt and figure.table["title"].tolist() == ["query", "first", "second"]
    with pytest.raises(ValueError, match="2 titles for 3 images"):
        contrastive_plots.gallery(PAIRS, titles=["query", "first"])
    with pytest.raises(ValueError, match="no images"):
        contrastive_plots.gallery(PAIRS.take(np.zeros(len(PAIRS), dtype=bool)))
    many = PAIRS.take([0] * 14)
    assert contrastive_plots.gallery(many).alt.count("a cat") == 12
    assert "and 2 more" in contrastive_plots.gallery(many).alt


def test_a_heat_map_has_a_row_per_text_and_a_column_per_image(drawn):
    figure = FIGURES["similarity"]()
    assert figure.table.to_numpy().tolist() == SIMILARITIES.tolist()
    assert figure.table.index.tolist() == figure.table.columns.tolist() == CAPTIONS
    assert "mean 0.70 with their own image, 0.18 with the others; 2 of 3 texts are nearest" in figure.alt
    ax, _ = drawn("similarity")
    assert [label.get_text() for label in ax.get_yticklabels()] == [CAPTIONS[0], f"{CAPTIONS[1][:31]}…", CAPTIONS[2]]
    assert [text.get_text() for text in ax.texts[:3]] == ["0.90", "0.20", "0.10"]
    assert ax.texts[7].get_text() == "0.00"  # not -0.00
    images = [artist for artist in ax.artists if isinstance(artist, AnnotationBbox)]
    assert [image.xy[0] for image in images] == [0, 1, 2]
    assert all(np.array_equal(i.offsetbox.get_data(), p) for i, p in zip(images, PAIRS.images, strict=True))
    assert [patch.get_center().tolist() for patch in ax.patches] == [[i, i] for i in range(3)]


def test_a_large_heat_map_has_no_numbers_and_keeps_its_limits(monkeypatch):
    figures = []
    monkeypatch.setattr(contrastive_plots, "Figure", lambda figure, alt, table: figures.append(figure))
    contrastive_plots.similarity(np.eye(9), PAIRS.take([0] * 9), limits=(-1, 2))
    ax = figures[0].axes[0]
    assert not ax.texts and ax.images[0].get_clim() == (-1, 2)
    plt.close("all")


def test_similarities_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="3 × 3"):
        contrastive_plots.similarity(np.eye(2), PAIRS)


def test_a_projection_keeps_distances_in_a_plane():
    plane = np.linalg.qr(RNG.normal(size=(16, 2)))[0].T
    text, image = contrastive_plots.project(TEXT @ plane, IMAGE @ plane)
    assert text.shape == image.shape == (2, 2)
    assert np.linalg.norm(text - image, axis=1) == pytest.approx([3, 3])
    assert np.linalg.norm(text[0] - text[1]) == pytest.approx(2)
    assert np.abs(text[:, 0] - image[:, 0]) == pytest.approx([3, 3])  # the first direction differs most


def test_a_map_joins_the_text_and_the_image_of_each_pair(drawn):
    figure = FIGURES["space"]()
    assert "2 pairs" in figure.alt and "are 3.00 apart; a text and its own image are 3.00 apart" in figure.alt
    assert figure.table.loc[CAPTIONS[1]].tolist() == [0, 2, 3, 2]
    (ax,) = drawn("space")
    assert [line.get_xydata().tolist() for line in ax.lines[:2]] == [[[0, 0], [3, 0]], [[0, 2], [3, 2]]]
    assert ax.get_aspect() == 1
    with pytest.raises(ValueError, match="1 captions for 2"):
        contrastive_plots.space(TEXT, IMAGE, captions=["one"])
    with pytest.raises(ValueError, match="shape"):
        contrastive_plots.space(TEXT, IMAGE[:1])


def test_recall_is_one_line_per_rank_in_the_order_of_the_values(drawn):
    figure = FIGURES["recall"]()
    assert figure.table["recall at 5"].to_dict() == {16: 0.2, 64: 0.6}
    assert "recall at 1: 16 0.10, 64 0.30;" in figure.alt and "guessing, at 5: 0.05" in figure.alt
    (ax,) = drawn("recall")
    assert ax.get_xscale() == "log"
    assert ax.lines[0].get_xydata().tolist() == [[16, 0.1], [64, 0.3]]
    assert list(ax.lines[3].get_ydata()) == [0.05, 0.05]
    (ax,) = drawn("recall by name")
    assert ax.get_xscale() == "linear" and len(ax.lines) == 3
    assert [label.get_text() for label in ax.get_xticklabels()] == ["linear", "mlp"]


ODD = ["$", "$$", r"$\frac$", "$5 to $10", "_x", "<b>&", "100 % {}", "a_b"]
ODD_PAIRS = Pairs(RNG.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), ODD, pd.DataFrame(index=range(8)))
ODD_RECALL = pd.DataFrame({name: [0.3, 0.1] for name in ODD}, index=["$", "_$$"])
ODD_FIGURES = {
    "gallery": lambda: contrastive_plots.gallery(ODD_PAIRS, titles=ODD),
    "similarity": lambda: contrastive_plots.similarity(np.eye(8), ODD_PAIRS, label="$ and $"),
    "space": lambda: contrastive_plots.space(np.eye(8)[:, :2], np.eye(8)[:, 1:3], captions=ODD, title="$ and $"),
    "recall": lambda: contrastive_plots.recall(ODD_RECALL, xlabel="$ and $"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD_FIGURES)
def test_no_character_of_a_text_has_a_meaning_in_a_figure(name, monkeypatch):
    assert len(ODD_FIGURES[name]().png) > 1000
    figures = []
    monkeypatch.setattr(contrastive_plots, "Figure", lambda figure, alt, table: figures.append(figure))
    ODD_FIGURES[name]()
    shown = [text for text in figures[0].findobj(Text) if text.get_text()]
    assert shown and not any(text.get_parse_math() for text in shown)
    if name == "recall":
        assert [text.get_text().strip("\u200b") for text in figures[0].axes[0].get_legend().get_texts()] == ODD
    plt.close("all")


def test_long_captions_and_many_pairs_make_no_large_figure():
    long = "a very long description of it " * 400
    pairs = Pairs(ODD_PAIRS.images, [long, "好评差评质量很好物流很快" * 100, *ODD[2:]], ODD_PAIRS.facts)
    many = pairs.take([i % 8 for i in range(150)])
    for figure in (
        contrastive_plots.gallery(pairs, titles=[long, *ODD[1:]]),
        contrastive_plots.similarity(np.eye(8), pairs),
        contrastive_plots.similarity(np.eye(150), many),
        contrastive_plots.recall(RECALL.set_axis([long, "b"]), xlabel="head"),
    ):
        assert len(figure.alt) <= 2000 and max(Image.open(io.BytesIO(figure.png)).size) < 2500


@pytest.mark.filterwarnings("ignore:Glyph")  # boxes are as wide as the letters
def test_wide_letters_of_neighbouring_captions_do_not_overlap(drawn, monkeypatch):
    chinese = Pairs(PAIRS.images, ["红色的猫和蓝色的狗在草地上玩耍"] * 3, PAIRS.facts)
    monkeypatch.setitem(FIGURES, "gallery", lambda: contrastive_plots.gallery(chinese))
    axes = drawn("gallery")
    axes[0].figure.draw_without_rendering()
    ends = [ax.texts[0].get_window_extent().intervalx for ax in axes]
    assert ends[0][1] < ends[1][0] and ends[1][1] < ends[2][0]
