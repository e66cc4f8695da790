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
from ftkit.plots import NO_MATH

_SIDE = 112  # side of an image as shown, in CSS pixels


def search_box(model: TwoTowers, pairs: Pairs, *, opening: str, k: int = 6) -> "SearchBox | StaticPreview":
    """Search images by a sentence and captions by an image; use it as the last expression of a cell.

    Args:
        model: trained two-tower model.
        pairs: images and captions to search in.
        opening: sentence at the start. If nobody is there to use the widget, a static preview shows the images found
            for this sentence and the captions found for the first image.
        k: number of images and captions to show at most.

    Raises:
        ValueError: ``pairs`` is empty.
    """
    if not len(pairs):
        raise ValueError("There are no images to search in: give at least one pair.")
    box = SearchBox(model, pairs, opening, k)
    if somebody_is_there():
        return box
    return StaticPreview(f"<p>{html.escape(opening)}</p>{box.found.value}{box.told.value}")


class SearchBox:
    """Widget with the images nearest to a sentence and the captions nearest to an image; see ``search_box``.

    Attributes:
        sentence, search_button, status, found: widgets of the search by a sentence; Enter and the button start it.
        image, told: widgets of the search by an image.
        thread: thread of the last search.
    """

    def __init__(self, model: TwoTowers, pairs: Pairs, opening: str, k: int) -> None:
        self.model, self.k = model, k
        self.thread: threading.Thread | None = None
        # keep one pair of those with the same image or caption, or a list of results could show one k times
        self._captions = [pairs.captions[i] for i in pairs.own_captions]
        self._own = pairs.captions_of_images
        self.pairs = pairs = pairs.take(pairs.own_images)
        self._image = F.normalize(model.encode_images(pairs.images).float(), dim=-1)
        self._text = F.normalize(model.encode_texts(self._captions).float(), dim=-1)
        style, wide = {"description_width": f"{len('sentence')}ch"}, {"width": "min(36em, 100%)"}
        # not continuous: the value arrives with Enter, or when the reader leaves the box
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
        """Show the images nearest to the sentence, nearest first."""
        query = F.normalize(self.model.encode_texts([self.sentence.value]).float(), dim=-1)[0]
        images, captions = self.pairs.images, self.pairs.captions
        nearest = self._nearest(self._image, query)
        self.found.value = _row([_card(images[i], captions[i], cosine) for i, cosine in nearest])

    def tell(self) -> None:
        """Show the chosen image and the captions nearest to it, nearest first."""
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
        """Indices of the k embeddings nearest to a query, with their cosines; all vectors have length 1."""
        cosines, order = (embeddings @ query).topk(min(self.k, len(embeddings)))
        return list(zip(order.tolist(), cosines.tolist(), strict=True))

    def _start(self) -> None:
        if self.search_button.disabled:  # a click on the button also leaves the box: two events
            return
        if not self.sentence.value.strip():
            self.status.value = said("Write a sentence into the box first.")
            return
        self.sentence.disabled = True  # a new sentence would not be searched until this search has ended
        self.thread = in_thread(self.search_button, self.status, self.search, self._ended)

    def _ended(self) -> None:
        self.sentence.disabled = False


def _row(parts: Sequence[str]) -> str:
    style = "display: flex; flex-wrap: wrap; gap: 0.8em; align-items: flex-start"
    return f'<div class="{NO_MATH}" style="{style}">{"".join(parts)}</div>'


def _card(image: NDArray[np.uint8], caption: str, cosine: float | None = None) -> str:
    """An image as HTML, with its cosine and caption below."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    source = base64.b64encode(buffer.getvalue()).decode("ascii")
    number = "" if cosine is None else f"<b>{cosine:.3f}</b> "
    return (
        f'<figure style="margin: 0; width: {_SIDE}px"><img alt="{html.escape(caption)}" width="{_SIDE}" '
        f'src="data:image/png;base64,{source}"><figcaption style="font-size: 0.85em; line-height: 1.3">'
        f"{number}{html.escape(caption)}</figcaption></figure>"
    )


def _marked(caption: str, own: list[str]) -> str:
    return f"<b>{html.escape(caption)}</b>" if caption in own else html.escape(caption)
