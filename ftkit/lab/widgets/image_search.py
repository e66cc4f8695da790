"""A search box for images."""

import base64
import html
import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from ipywidgets import HTML, Button, HBox, IntSlider, Text, VBox
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ftkit.contrastive.towers import TwoTowers
from ftkit.data.pairs import Pairs
from ftkit.lab.widgets.display import StaticPreview, in_thread, said, somebody_is_there

SIDE = 112  # of an image as shown, in CSS pixels


def search_box(model: TwoTowers, pairs: Pairs, *, opening: str, k: int = 6) -> "SearchBox | StaticPreview":
    """Images for a sentence, and captions for an image, as the last expression of a cell.

    Args:
        model: two towers, trained.
        pairs: N images and captions, among which is searched.
        opening: the sentence at the start; what it finds is shown, and what the first image finds.
        k: images and captions to be shown, at most.

    Raises:
        ValueError: there is nothing to search among.
    """
    if not len(pairs):
        raise ValueError("There are no images to search among.")
    box = SearchBox(model, pairs, opening, k)
    if somebody_is_there():
        return box
    return StaticPreview(f"<p>{html.escape(opening)}</p>{box.found.value}{box.told.value}")


class SearchBox:
    """A sentence with the nearest images, below it an image with the nearest captions; see ``search_box``.

    Attributes:
        sentence, search_button, status, found: widgets of the sentence's row; Enter searches, as the button does.
        image, told: widgets of the image's row.
        thread: of the last search.
    """

    def __init__(self, model: TwoTowers, pairs: Pairs, opening: str, k: int) -> None:
        self.model, self.k = model, k
        self.thread: threading.Thread | None = None
        # of pairs with the same image or caption, one stands for all: else a list would say one thing k times
        self._captions = [pairs.captions[i] for i in pairs.own_captions]
        self._own = pairs.captions_of_images
        self.pairs = pairs = pairs.take(pairs.own_images)
        self._image = F.normalize(model.encode_images(pairs.images).float(), dim=-1)
        self._text = F.normalize(model.encode_texts(self._captions).float(), dim=-1)
        style, wide = {"description_width": f"{len('sentence')}ch"}, {"width": "min(36em, 100%)"}
        # not continuous: the value comes with Enter, or when the box is left
        self.sentence = Text(opening, description="sentence", continuous_update=False, style=style, layout=wide)
        self.search_button = Button(description="Search", button_style="primary")
        last = len(pairs) - 1
        self.image = IntSlider(
            0, min=0, max=last, description="image", continuous_update=False, style=style, layout=wide
        )
        self.status, self.found, self.told = HTML(), HTML(), HTML()
        if opening.strip():
            self.search()
        self.tell()
        self.sentence.observe(lambda _: self._start(), "value")
        self.search_button.on_click(lambda _: self._start())
        self.image.observe(lambda _: self.tell(), "value")
        by_text = VBox([HBox([self.sentence, self.search_button]), self.status, self.found])
        self._box = VBox([by_text, VBox([self.image, self.told])])

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return self._box._repr_mimebundle_(**options)

    def search(self) -> None:
        """Show the images that are nearest to the sentence, the nearest first."""
        query = F.normalize(self.model.encode_texts([self.sentence.value]).float(), dim=-1)[0]
        images, captions = self.pairs.images, self.pairs.captions
        nearest = self._nearest(self._image, query)
        self.found.value = _row([_card(images[i], captions[i], cosine) for i, cosine in nearest])

    def tell(self) -> None:
        """Show the picked image, and the captions that are nearest to it, the nearest first."""
        i = self.image.value
        own = self._own[i]
        rows = "".join(
            f'<tr><td>{cosine:.3f}</td><td style="text-align: left">{_marked(self._captions[j], own)}</td></tr>'
            for j, cosine in self._nearest(self._text, self._image[i])
        )
        heads = '<th scope="col">cosine</th><th scope="col" style="text-align: left">caption (bold: its own)</th>'
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        self.told.value = _row([_card(self.pairs.images[i], self.pairs.captions[i]), table])

    def _nearest(self, embeddings: Tensor, query: Tensor) -> list[tuple[int, float]]:
        """Numbers and cosines of the k embeddings that are nearest to a query, all of length 1."""
        cosines, order = (embeddings @ query).topk(min(self.k, len(embeddings)))
        return list(zip(order.tolist(), cosines.tolist(), strict=True))

    def _start(self) -> None:
        if self.search_button.disabled:  # a click that leaves the box says it twice
            return
        if not self.sentence.value.strip():
            self.status.value = said("Write a sentence into the box first.")
            return
        self.sentence.disabled = True  # what were written meanwhile would not be searched
        self.thread = in_thread(self.search_button, self.status, self.search, self._ended)

    def _ended(self) -> None:
        self.sentence.disabled = False


def _row(parts: Sequence[str]) -> str:
    return f'<div style="display: flex; flex-wrap: wrap; gap: 0.8em; align-items: flex-start">{"".join(parts)}</div>'


def _card(image: NDArray[np.uint8], caption: str, cosine: float | None = None) -> str:
    """An image with its caption below, and its cosine."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    source = base64.b64encode(buffer.getvalue()).decode("ascii")
    number = "" if cosine is None else f"<b>{cosine:.3f}</b> "
    return (
        f'<figure style="margin: 0; width: {SIDE}px"><img alt="{html.escape(caption)}" width="{SIDE}" '
        f'src="data:image/png;base64,{source}"><figcaption style="font-size: 0.85em; line-height: 1.3">'
        f"{number}{html.escape(caption)}</figcaption></figure>"
    )


def _marked(caption: str, own: list[str]) -> str:
    return f"<b>{html.escape(caption)}</b>" if caption in own else html.escape(caption)
