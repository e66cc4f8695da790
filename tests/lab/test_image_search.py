"""The search box, with a model that knows only colours."""

import re
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from torch import Tensor

from ftkit.data.pairs import Pairs
from ftkit.lab.widgets import image_search
from ftkit.lab.widgets.display import StaticPreview
from ftkit.lab.widgets.image_search import SearchBox, search_box

CAPTIONS = ["red <b>", "green", "blue", "red green", "green"]
COLOURS = [(200, 0, 0), (0, 100, 0), (0, 0, 50), (90, 90, 0), (10, 90, 0)]
IMAGES = np.array(COLOURS, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
PAIRS = Pairs(IMAGES, CAPTIONS, pd.DataFrame(index=range(5)))


class Colours:
    """Embeds an image as its mean colour and a text as the counts of colour names in it; neither has length 1."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode_texts(self, texts) -> Tensor:
        self.asked.append(list(texts))
        if "fail" in texts:
            raise ValueError("no such <word>")
        return torch.tensor([[float(text.count(name)) for name in ("red", "green", "blue")] for text in texts])

    def encode_images(self, images) -> Tensor:
        return torch.tensor(np.asarray(images).mean(axis=(1, 2)))


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> SearchBox:
    monkeypatch.setattr(image_search, "somebody_is_there", lambda: True)
    return search_box(Colours(), PAIRS, opening="red", k=3)


def ask(box: SearchBox, sentence: str) -> None:
    box.sentence.value = sentence  # as Enter does
    if box.thread:
        box.thread.join()


def alts(shown: str) -> list[str]:
    return re.findall(r'<img alt="([^"]*)"', shown)


def cosines(shown: str) -> list[float]:
    return [float(number) for number in re.findall(r"<(?:b|td)>(-?\d\.\d{3})<", shown)]


def test_a_sentence_finds_the_nearest_images_in_order(box):
    assert alts(box.found.value) == ["red &lt;b&gt;", "red green", "green"]
    assert cosines(box.found.value) == pytest.approx([1, 0.5**0.5, 10 / (10**2 + 90**2) ** 0.5], abs=1e-3)
    ask(box, "green")
    assert alts(box.found.value) == ["green", "green", "red green"]
    assert box.status.value == "" and not box.search_button.disabled and not box.sentence.disabled


def test_all_captions_of_an_image_are_marked_as_its_own(monkeypatch):
    monkeypatch.setattr(image_search, "somebody_is_there", lambda: True)
    chosen = [0, 1, 2, 1]
    captions = ["red", "green", "blue", "green green"]
    pairs = Pairs(IMAGES[chosen], captions, pd.DataFrame(index=range(4)), image_ids=np.array(chosen))
    box = search_box(Colours(), pairs, opening="green", k=4)
    assert alts(box.found.value) == ["green", "red", "blue"]  # each image once
    assert box.image.max == 2
    box.image.value = 1
    assert re.findall("<b>(green[^<]*)</b>", box.told.value) == ["green", "green green"]


def test_an_image_finds_the_nearest_captions_each_once(box):
    assert alts(box.told.value) == ["red &lt;b&gt;"]
    box.image.value = 4
    assert alts(box.told.value) == ["green"]
    told = re.findall(r'<td style="text-align: left">(.*?)</td>', box.told.value)
    assert told == ["<b>green</b>", "red green", "red &lt;b&gt;"]  # its own is bold, text is escaped
    assert cosines(box.told.value) == sorted(cosines(box.told.value), reverse=True)
    assert "red <b>" not in box.told.value + box.found.value


def test_captions_are_not_set_as_formulas():
    pairs = Pairs(IMAGES[:2], ["from $1 to $2", "<i>&amp;"], pd.DataFrame(index=range(2)))
    box = SearchBox(Colours(), pairs, "red", k=2)
    for shown in (box.found, box.told):
        page = BeautifulSoup(shown.value, "html.parser")
        assert {"from $1 to $2", "<i>&amp;"} <= {text.strip() for text in page.find_all(string=True)}
        assert "mathjax_ignore" in page.div["class"]


def test_pairs_are_encoded_once(box):
    box.image.value = 2
    ask(box, "blue")
    assert box.model.asked == [["red <b>", "green", "blue", "red green"], ["red"], ["blue"]]


def test_an_empty_sentence_is_refused(box):
    found = box.found.value
    ask(box, "   ")
    assert "Write a sentence" in box.status.value and box.found.value == found
    box.search_button.click()
    assert box.thread is None
    ask(box, "blue")
    assert box.status.value == "" and alts(box.found.value)[0] == "blue"


def test_an_error_is_shown_and_the_button_works_again(box):
    ask(box, "fail")
    assert "no such &lt;word&gt;" in box.status.value
    assert not box.search_button.disabled and not box.sentence.disabled
    box.search_button.click()
    box.thread.join()
    assert box.model.asked[-2:] == [["fail"], ["fail"]]


def test_a_click_that_leaves_the_box_searches_once(box, monkeypatch):
    proceed, encode = threading.Event(), box.model.encode_texts

    def slowly(texts):
        proceed.wait(10)
        return encode(texts)

    monkeypatch.setattr(box.model, "encode_texts", slowly)
    box.sentence.value = "blue"
    assert box.search_button.disabled and box.sentence.disabled and "working" in box.status.value
    box.search_button.click()
    proceed.set()
    box.thread.join()
    assert box.model.asked.count(["blue"]) == 1


def test_the_static_preview_shows_what_the_opening_and_the_first_image_find():
    preview = search_box(Colours(), PAIRS, opening="green & red", k=2)
    assert isinstance(preview, StaticPreview)
    shown = preview._repr_html_()
    assert "green &amp; red" in shown and "JupyterLab" in shown
    assert alts(shown) == ["red green", "green", "red &lt;b&gt;"]
    assert len(cosines(shown)) == 4


def test_no_pairs_are_refused_and_few_are_all_shown():
    with pytest.raises(ValueError, match="There are no images to search in"):
        search_box(Colours(), PAIRS.take(np.zeros(len(PAIRS), dtype=bool)), opening="red")
    box = SearchBox(Colours(), PAIRS.take([0, 1]), "", 6)
    assert box.found.value == "" and len(cosines(box.told.value)) == 2
