"""Figures of pairs, similarities, embeddings and recall."""

import textwrap
import unicodedata
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA

from ftkit.data.pairs import Pairs
from ftkit.plots import COLOURS, STYLE, Figure, look, short, side_legend, ticks

_MAX_PAIRS_WITH_NUMBERS = 8  # in a larger heat map the numbers do not fit into the cells

_IMAGE_SHARE = 0.85  # width of the image above a column, in widths of the column

_MAX_PAIRS_WITH_IMAGES = 40  # in a larger heat map the images above the columns are too small to be seen

_MAX_CAPTIONS_IN_ALT = 12

_MAX_LINES = 6  # of a caption in a gallery


def gallery(pairs: Pairs, *, columns: int = 6, titles: Sequence[str] | None = None) -> Figure:
    """Show images in a grid, each with its caption below.

    Args:
        pairs: N images and captions.
        columns: maximum number of images in a row.
        titles: N texts, shown above the images.

    Raises:
        ValueError: there are no images, or the number of titles is not N.
    """
    if not len(pairs):
        raise ValueError("There are no images to show.")
    titles = _check_count("titles", titles, len(pairs))
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    below = [_wrap(caption) for caption in pairs.captions]
    lines = max(text.count("\n") + 1 for text in below)
    size = (1.7 * columns, (1.6 + 0.17 * lines + 0.25 * bool(titles)) * rows)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        drawn, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for ax in grid.flat:
            ax.set_axis_off()
        for i, (ax, image, text) in enumerate(zip(grid.flat, pairs.images, below, strict=False)):
            ax.imshow(image)
            ax.text(0.5, -0.04, text, transform=ax.transAxes, ha="center", va="top", fontsize=8)
            if titles:
                ax.set_title(short(titles[i], 24), fontsize=9)
    names = [f"{title}: {caption}" for title, caption in zip(titles, pairs.captions, strict=True)] if titles else None
    table = pd.DataFrame({**({"title": titles} if titles else {}), "caption": pairs.captions})
    return Figure(drawn, f"Gallery of {len(pairs)} images: {_first_few(names or pairs.captions)}.", table)


def similarity(
    similarities: ArrayLike, pairs: Pairs, *, label: str = "cosine", limits: tuple[float, float] | None = None
) -> Figure:
    """Show the similarity of each text (row) to each image (column) as a heat map; the cells of the pairs are framed.

    Args:
        similarities: of texts (rows) and images (columns), shape (B, B).
        pairs: the B pairs, in the same order.
        label: name of the values.
        limits: values of the lightest and the darkest shade; None uses the smallest and the largest value.

    Raises:
        ValueError: the matrix does not have shape (B, B).
    """
    values, count = np.asarray(similarities, dtype=float), len(pairs)
    if values.shape != (count, count):
        raise ValueError(f"Similarities of shape {values.shape} do not fit {count} pairs: pass {count} × {count}.")
    low, high = limits or (values.min(), values.max())
    cell = min(0.75, 6 / count)  # inches
    with plt.rc_context({**STYLE, "axes.grid": False}):
        drawn, ax = plt.subplots(figsize=(cell * count / 0.75, cell * count))
        shown = ax.imshow(values, cmap="Blues", vmin=low, vmax=high)
        for i in range(count):
            # smaller than the cell, or the frames of neighbours would overlap
            frame = plt.Rectangle(
                (i - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor=COLOURS[1], lw=min(2, 12 * cell)
            )
            ax.add_patch(frame)
            if count <= _MAX_PAIRS_WITH_IMAGES:
                _put_above(ax, pairs.images[i], i, _IMAGE_SHARE * 72 * cell)
        if count <= _MAX_PAIRS_WITH_NUMBERS:
            for (i, j), value in np.ndenumerate(values):
                colour = "white" if value - low > 0.6 * (high - low) else "black"
                ax.text(j, i, f"{value:z.2f}", ha="center", va="center", color=colour, fontsize=9)
        positions, labels = ticks(pairs.captions)
        ax.set_yticks(positions, labels, fontsize=min(9, 45 * 6 / len(labels)))
        ax.set(xticks=[], xlabel="image (framed: same pair)", ylabel="text")
        bar = drawn.colorbar(shown, ax=ax, fraction=0.05, pad=0.03, label=label)
        bar.outline.set_visible(False)
    num_correct = int((values.argmax(axis=1) == np.arange(count)).sum())
    own_mean = values.diagonal().mean()
    other_mean = (values.sum() - values.trace()) / max(count * (count - 1), 1)
    alt = (
        f"Heat map of the {label} of {count} texts with {count} images: mean {own_mean:.2f} with their own image"
        + (f", {other_mean:.2f} with the others" if count > 1 else "")
        + f"; {num_correct} of {count} texts are nearest to their own image. Texts: {_first_few(pairs.captions)}."
    )
    table = pd.DataFrame(values, index=pairs.captions, columns=pairs.captions).rename_axis("text \\ image")
    return Figure(drawn, alt, table)


def project(text: ArrayLike, image: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project text and image embeddings together onto their first two principal components.

    The projection is linear and can only shorten distances: points that are close on the map may be far apart in the
    space, but points that are far apart on the map are at least as far apart in the space.

    Args:
        text, image: embeddings, shape (N, D) each.

    Returns:
        Coordinates of the texts and of the images, shape (N, 2) each.
    """
    text, image = np.asarray(text, dtype=float), np.asarray(image, dtype=float)
    points = PCA(2, svd_solver="full").fit_transform(np.concatenate([text, image]))
    return points[: len(text)], points[len(text) :]


def space(
    text: ArrayLike,
    image: ArrayLike,
    *,
    captions: Sequence[str] | None = None,
    title: str = "texts and images in the common space",
) -> Figure:
    """Show a map of texts and images, with a thin line between the text and the image of each pair.

    Args:
        text, image: coordinates from ``project``, shape (N, 2) each.
        captions: N texts, for the table.
        title: title of the map.

    Raises:
        ValueError: the coordinates do not have shape (N, 2), or the number of captions is not N.
    """
    text, image = np.asarray(text, dtype=float), np.asarray(image, dtype=float)
    if text.shape != image.shape or text.ndim != 2 or text.shape[1] != 2:
        raise ValueError(f"Texts and images need shape (N, 2), not {text.shape} and {image.shape}: call project first.")
    captions = _check_count("captions", captions, len(text))
    marker_size = 36 if len(text) <= 200 else 12
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(6.5, 5))
        ax.plot(*np.stack([text, image]).transpose(2, 0, 1), color="0.6", lw=0.6, alpha=0.7, zorder=1)
        for points, name, marker, colour in ((text, "text", "o", COLOURS[0]), (image, "image", "^", COLOURS[1])):
            ax.scatter(*points.T, s=marker_size, marker=marker, color=colour, alpha=0.85, label=name, zorder=2)
        ax.plot([], [], color="0.6", lw=1, label="a pair")
        ax.set(xlabel="first principal direction", ylabel="second principal direction")
        ax.set_title(title, fontsize=11)
        ax.set_aspect("equal", adjustable="datalim")
        side_legend(ax)
    within = np.linalg.norm(text - image, axis=1).mean()
    gap = np.linalg.norm(text.mean(axis=0) - image.mean(axis=0))
    alt = (
        f"{title[:1].upper()}{title[1:]}: a map of {len(text)} pairs. The centres of texts and of images are "
        f"{gap:.2f} apart; a text and its own image are {within:.2f} apart on average."
    )
    table = pd.DataFrame(np.hstack([text, image]), columns=["text 1", "text 2", "image 1", "image 2"])
    return Figure(drawn, alt, table.set_axis(captions, axis=0) if captions else table)


def recall(table: pd.DataFrame, *, xlabel: str, guessing: float | None = None) -> Figure:
    """Plot recall at several ranks against one parameter, one line per rank.

    The axis of the parameter is logarithmic if all its values are positive numbers.

    Args:
        table: indexed by the parameter's values, with a column for each rank ("1", "5", "10", or any other name).
        xlabel: name and unit of the parameter.
        guessing: recall at 5 of a random order, drawn as a grey line.
    """
    numeric = pd.api.types.is_numeric_dtype(table.index)
    table = table.sort_index() if numeric else table
    positions = table.index if numeric else range(len(table))
    names = [f"recall at {column}" if str(column).isdigit() else str(column) for column in table.columns]
    with plt.rc_context(STYLE):
        drawn, ax = plt.subplots(figsize=(7.5, 3.8))
        for i, (name, column) in enumerate(zip(names, table.columns, strict=True)):
            ax.plot(positions, table[column], label=short(name), markersize=6, lw=1.4, **look(i))
        if guessing is not None:
            ax.axhline(guessing, color="0.6", zorder=0, label="guessing, at 5")
        if numeric:
            ax.set_xscale("log" if min(positions) > 0 else "linear")
            ax.set_xticks(positions, [f"{value:g}" for value in positions])
            ax.minorticks_off()
        else:
            ax.set_xticks(*ticks(table.index), rotation=20 if len(table) > 4 else 0)
        ax.set(xlabel=xlabel, ylabel="recall (share of the queries)", ylim=(0, 1.03))
        side_legend(ax)
    lines = [
        f"{name}: " + ", ".join(f"{_as_text(value)} {height:.2f}" for value, height in table[column].items())
        for name, column in zip(names, table.columns, strict=True)
    ]
    lines += [] if guessing is None else [f"guessing, at 5: {guessing:.2f}"]
    numbers = table.set_axis(names, axis=1).rename_axis(index=xlabel, columns=None)
    return Figure(drawn, f"Recall by {xlabel}. {'; '.join(lines)}.", numbers)


def _wrap(caption: str) -> str:
    """Break a caption into lines for below its image; letters of Chinese, Japanese and Korean are twice as wide."""
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in caption)
    return textwrap.fill(caption, 12 if wide else 20, max_lines=_MAX_LINES, placeholder="…")


def _put_above(ax: plt.Axes, image: NDArray[np.uint8], column: int, width: float) -> None:
    """Draw an image above a column; ``width`` is in points."""
    drawn = OffsetImage(image, zoom=width / len(image), dpi_cor=True)
    place = {"xycoords": ax.get_xaxis_transform(), "boxcoords": "offset points", "box_alignment": (0.5, 0)}
    ax.add_artist(AnnotationBbox(drawn, (column, 1), xybox=(0, 4), frameon=False, pad=0, **place))


def _check_count(what: str, texts: Sequence[str] | None, count: int) -> list[str]:
    texts = list(texts or [])
    if texts and len(texts) != count:
        raise ValueError(f"There are {len(texts)} {what} for {count} images: give one for each.")
    return texts


def _first_few(texts: Sequence[str]) -> str:
    """The first texts, and how many more there are, for an alt text."""
    more = len(texts) - _MAX_CAPTIONS_IN_ALT
    first = [short(text, 100) for text in texts[:_MAX_CAPTIONS_IN_ALT]]
    return "; ".join([*first, *([f"and {more} more"] if more > 0 else [])])


def _as_text(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
