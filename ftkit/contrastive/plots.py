"""Figures with images in them."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA

from ftkit.data.pairs import Pairs
from ftkit.plots import COLOURS, STYLE, Figure

SHORT = 32  # characters of a caption beside a heat map

LEGIBLE = 8  # pairs up to which the cells of a heat map have room for their numbers

HEAD = 0.85  # of a cell's side, covered by the image above it

NAMED = 12  # captions that an alt text names, at most


def gallery(pairs: Pairs, *, columns: int = 6, titles: Sequence[str] | None = None) -> Figure:
    """Images in a grid, each with its caption below.

    Args:
        pairs: N images and captions.
        columns: images in a row, at most.
        titles: N texts that stand above the images.

    Raises:
        ValueError: there are no images, or not as many titles.
    """
    if not len(pairs):
        raise ValueError("There are no images to show.")
    titles = _as_many("titles", titles, len(pairs))
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    below = [textwrap.fill(caption, 20) for caption in pairs.captions]
    lines = max(text.count("\n") + 1 for text in below)
    size = (1.7 * columns, (1.6 + 0.17 * lines + 0.25 * bool(titles)) * rows)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        drawn, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for ax in grid.flat:
            ax.set_axis_off()
        for i, (ax, image, text) in enumerate(zip(grid.flat, pairs.images, below, strict=False)):
            ax.imshow(image)
            ax.text(0.5, -0.04, text, transform=ax.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
            if titles:
                ax.set_title(titles[i], fontsize=9, parse_math=False)
    names = [f"{title}: {caption}" for title, caption in zip(titles, pairs.captions, strict=True)] if titles else None
    table = pd.DataFrame({**({"title": titles} if titles else {}), "caption": pairs.captions})
    return Figure(drawn, f"Gallery of {len(pairs)} images: {_named(names or pairs.captions)}.", table)


def similarity(
    similarities: ArrayLike, pairs: Pairs, *, label: str = "cosine", limits: tuple[float, float] | None = None
) -> Figure:
    """How near each text (row) is to each image (column), as a heat map; a frame where they are a pair.

    Args:
        similarities: shape (B, B), of texts by images.
        pairs: the B pairs, in that order.
        label: what the values are.
        limits: values of the lightest and of the darkest shade; None takes the smallest and the largest.

    Raises:
        ValueError: the matrix is not of these pairs.
    """
    values, count = np.asarray(similarities, dtype=float), len(pairs)
    if values.shape != (count, count):
        raise ValueError(f"Of {count} pairs there are {count} × {count} similarities, not {values.shape}.")
    low, high = limits or (values.min(), values.max())
    cell = min(0.75, max(0.16, 6 / count))  # inches
    with plt.rc_context({**STYLE, "axes.grid": False}):
        drawn, ax = plt.subplots(figsize=(cell * count / 0.75, cell * count))
        shown = ax.imshow(values, cmap="Blues", vmin=low, vmax=high)
        for i in range(count):
            # inside the frame's line, or the frames of neighbours would overlap
            frame = plt.Rectangle((i - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor=COLOURS[1], lw=2)
            ax.add_patch(frame)
            _put_above(ax, pairs.images[i], i, HEAD * 72 * cell)
        if count <= LEGIBLE:
            for (i, j), value in np.ndenumerate(values):
                colour = "white" if value - low > 0.6 * (high - low) else "black"
                ax.text(j, i, f"{value:z.2f}", ha="center", va="center", color=colour, fontsize=9)
        rows = [text if len(text) <= SHORT else f"{text[: SHORT - 1].rstrip()}…" for text in pairs.captions]
        ax.set_yticks(range(count), rows, fontsize=min(9, 45 * cell), parse_math=False)
        ax.set(xticks=[], xlabel="image (framed: of the same pair)", ylabel="text")
        bar = drawn.colorbar(shown, ax=ax, fraction=0.05, pad=0.03, label=label)
        bar.outline.set_visible(False)
    first = int((values.argmax(axis=1) == np.arange(count)).sum())
    own = values.diagonal().mean()
    other = (values.sum() - values.trace()) / max(count * (count - 1), 1)
    alt = (
        f"Heat map of the {label} of {count} texts with {count} images: mean {own:.2f} with their own image"
        + (f", {other:.2f} with the others" if count > 1 else "")
        + f"; {first} of {count} texts are nearest to their own. Texts: {_named(pairs.captions)}."
    )
    table = pd.DataFrame(values, index=pairs.captions, columns=pairs.captions).rename_axis("text \\ image")
    return Figure(drawn, alt, table)


def project(text: ArrayLike, image: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two directions in which embeddings of both kinds together differ most (principal component analysis).

    It is linear, and keeps distances in these two directions only: what is near on the map may be far apart in the
    others, but what is far apart on the map is at least as far apart in truth.

    Args:
        text, image: embeddings, shape (N, D) each.

    Returns:
        Their places on the map, shape (N, 2) each.
    """
    text, image = np.asarray(text, dtype=float), np.asarray(image, dtype=float)
    placed = PCA(2, svd_solver="full").fit_transform(np.concatenate([text, image]))
    return placed[: len(text)], placed[len(text) :]


def space(
    text: ArrayLike,
    image: ArrayLike,
    *,
    captions: Sequence[str] | None = None,
    title: str = "texts and images in the common space",
) -> Figure:
    """A map of texts and images, a thin line between the two of each pair.

    Args:
        text, image: their places, shape (N, 2) each, as ``project`` gives them.
        captions: N texts, for the table.
        title: above the map.

    Raises:
        ValueError: the places are not of N pairs.
    """
    text, image = np.asarray(text, dtype=float), np.asarray(image, dtype=float)
    if text.shape != image.shape or text.ndim != 2 or text.shape[1] != 2:
        raise ValueError(f"Places have shape (N, 2), of texts and of images: not {text.shape} and {image.shape}.")
    captions = _as_many("captions", captions, len(text))
    marker_size = 36 if len(text) <= 200 else 12
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, 5))
        ax.plot(*np.stack([text, image]).transpose(2, 0, 1), color="0.6", lw=0.6, alpha=0.7, zorder=1)
        for places, name, marker, colour in ((text, "text", "o", COLOURS[0]), (image, "image", "^", COLOURS[1])):
            ax.scatter(*places.T, s=marker_size, marker=marker, color=colour, alpha=0.85, label=name, zorder=2)
        ax.plot([], [], color="0.6", lw=1, label="a pair")
        ax.set(xlabel="first principal direction", ylabel="second principal direction")
        ax.set_title(title, fontsize=11, parse_math=False)
        ax.set_aspect("equal", adjustable="datalim")
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    within = np.linalg.norm(text - image, axis=1).mean()
    gap = np.linalg.norm(text.mean(axis=0) - image.mean(axis=0))
    alt = (
        f"{title[:1].upper()}{title[1:]}: a map of {len(text)} pairs. The centres of texts and of images are "
        f"{gap:.2f} apart, a text and its own image {within:.2f} on average."
    )
    table = pd.DataFrame(np.hstack([text, image]), columns=["text 1", "text 2", "image 1", "image 2"])
    return Figure(drawn, alt, table.set_axis(captions, axis=0) if captions else table)


def recall(table: pd.DataFrame, *, xlabel: str, guessing: float | None = None) -> Figure:
    """Recall at several ranks by one parameter: a line for each rank, on a logarithmic axis if the values are numbers.

    Args:
        table: by value of the parameter, a column for each rank ("1", "5", "10", or any name).
        xlabel: name and unit of the parameter.
        guessing: recall at 5 of a random order, drawn as a grey line.
    """
    numeric = pd.api.types.is_numeric_dtype(table.index)
    table = table.sort_index() if numeric else table
    places = table.index if numeric else range(len(table))
    names = [f"recall at {column}" if str(column).isdigit() else str(column) for column in table.columns]
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 3.8))
        for i, (name, column) in enumerate(zip(names, table.columns, strict=True)):
            look = {"color": COLOURS[i % len(COLOURS)], "markersize": 6, "lw": 1.4}
            ax.plot(places, table[column], f"{'os^Dv<>'[i % 7]}-", label=name, **look)
        if guessing is not None:
            ax.axhline(guessing, color="0.6", zorder=0, label="guessing, at 5")
        if numeric:
            # a logarithm of nought there is none
            ax.set_xscale("log" if min(places) > 0 else "linear")
            ax.set_xticks(places, [f"{value:g}" for value in places])
            ax.minorticks_off()
        else:
            ax.set_xticks(places, table.index, rotation=20 if len(table) > 4 else 0, parse_math=False)
        ax.set(xlabel=xlabel, ylabel="recall (share of the queries)", ylim=(0, 1.03))
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    told = [
        f"{name}: " + ", ".join(f"{_told(value)} {height:.2f}" for value, height in table[column].items())
        for name, column in zip(names, table.columns, strict=True)
    ]
    told += [] if guessing is None else [f"guessing, at 5: {guessing:.2f}"]
    numbers = table.set_axis(names, axis=1).rename_axis(index=xlabel, columns=None)
    return Figure(drawn, f"Recall by {xlabel}. {'; '.join(told)}.", numbers)


def _put_above(ax: plt.Axes, image: NDArray[np.uint8], column: int, points: float) -> None:
    """An image as the head of a column, so many points wide."""
    drawn = OffsetImage(image, zoom=points / len(image), dpi_cor=True)
    place = {"xycoords": ax.get_xaxis_transform(), "boxcoords": "offset points", "box_alignment": (0.5, 0)}
    ax.add_artist(AnnotationBbox(drawn, (column, 1), xybox=(0, 4), frameon=False, pad=0, **place))


def _as_many(what: str, texts: Sequence[str] | None, count: int) -> list[str]:
    texts = list(texts or [])
    if texts and len(texts) != count:
        raise ValueError(f"There are {len(texts)} {what} for {count} images: give one each.")
    return texts


def _named(texts: Sequence[str]) -> str:
    """The first of some texts, for an alt text, and how many more there are."""
    more = [f"and {len(texts) - NAMED} more"] if len(texts) > NAMED else []
    return "; ".join([*texts[:NAMED], *more])


def _told(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
