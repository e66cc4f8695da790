"""The emoji data set: images drawn from a font and their names as captions; and jitter for augmentation."""

import functools
import re
from collections.abc import Sequence

import emoji
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageFont

from ftkit.data.assets import registry
from ftkit.errors import DataError

Ink = tuple[int, int, int]  # red, green and blue, each from 0 to 255

_FILL = 0.84  # longer side of the glyph, as a share of the square's side

#: The colours that emoji are drawn in, by name: red, green and blue, each from 0 to 255.
INKS: dict[str, Ink] = {
    "black": (0, 0, 0),
    "red": (220, 38, 38),
    "blue": (37, 99, 235),
    "green": (22, 140, 60),
    "orange": (245, 140, 20),
    "purple": (140, 50, 200),
}

# The words for INKS, in the same order.
_INK_WORDS = {
    "en": "black red blue green orange purple",
    "zh": "黑色 红色 蓝色 绿色 橙色 紫色",
    "es": "negro rojo azul verde naranja morado",
    "ja": "黒 赤 青 緑 オレンジ 紫",
    "ko": "검은색 빨간색 파란색 초록색 주황색 보라색",
    "pt": "preto vermelho azul verde laranja roxo",
    "it": "nero rosso blu verde arancione viola",
    "fr": "noir rouge bleu vert orange violet",
    "de": "schwarz rot blau grün orange lila",
    "fa": "سیاه قرمز آبی سبز نارنجی بنفش",
    "id": "hitam merah biru hijau oranye ungu",
    "ru": "чёрный красный синий зелёный оранжевый фиолетовый",
    "tr": "siyah kırmızı mavi yeşil turuncu mor",
    "ar": "أسود أحمر أزرق أخضر برتقالي بنفسجي",
}

LANGUAGES = tuple(_INK_WORDS)

#: The groups of emoji: first and last code points.
#: An emoji of two kinds at once (a cat's face, a person on a bicycle) is in no group.
GROUPS: dict[str, tuple[tuple[int, int], ...]] = {
    "face": (
        (0x2639, 0x263A), (0x1F47F, 0x1F47F), (0x1F600, 0x1F637), (0x1F641, 0x1F644), (0x1F910, 0x1F915),
        (0x1F917, 0x1F917), (0x1F920, 0x1F925), (0x1F927, 0x1F92F), (0x1F970, 0x1F976), (0x1F978, 0x1F97A),
        (0x1F9D0, 0x1F9D0), (0x1FAE0, 0x1FAE5), (0x1FAE8, 0x1FAEB),
    ),
    "animal": (
        (0x1F400, 0x1F419), (0x1F41B, 0x1F43C), (0x1F43F, 0x1F43F), (0x1F54A, 0x1F54A), (0x1F577, 0x1F577),
        (0x1F980, 0x1F99F), (0x1F9A1, 0x1F9AE), (0x1FAB0, 0x1FAB3), (0x1FABC, 0x1FABC), (0x1FABF, 0x1FABF),
        (0x1FACC, 0x1FACF),
    ),
    "plant": (
        (0x2618, 0x2618), (0x1F331, 0x1F335), (0x1F337, 0x1F33C), (0x1F33E, 0x1F343), (0x1F490, 0x1F490),
        (0x1F940, 0x1F940), (0x1FAB4, 0x1FAB4), (0x1FAB7, 0x1FAB7), (0x1FABB, 0x1FABB), (0x1FABE, 0x1FABE),
    ),
    "food": (
        (0x1F32D, 0x1F330), (0x1F336, 0x1F336), (0x1F33D, 0x1F33D), (0x1F345, 0x1F373), (0x1F37F, 0x1F37F),
        (0x1F382, 0x1F382), (0x1F950, 0x1F95A), (0x1F95C, 0x1F960), (0x1F965, 0x1F96F), (0x1F9C0, 0x1F9C2),
        (0x1F9C4, 0x1F9C8), (0x1FAD0, 0x1FAD5), (0x1FAD8, 0x1FAD8), (0x1FADA, 0x1FADD),
    ),
    "vehicle": (
        (0x26F4, 0x26F5), (0x2708, 0x2708), (0x1F3CD, 0x1F3CE), (0x1F680, 0x1F688), (0x1F68A, 0x1F68E),
        (0x1F690, 0x1F6A2), (0x1F6A4, 0x1F6A4), (0x1F6B2, 0x1F6B2), (0x1F6E5, 0x1F6E5), (0x1F6E9, 0x1F6EC),
        (0x1F6F3, 0x1F6F6), (0x1F6F8, 0x1F6F8), (0x1F6FA, 0x1F6FB),
    ),
    "building": (
        (0x26EA, 0x26EA), (0x1F3D8, 0x1F3D8), (0x1F3DA, 0x1F3DB), (0x1F3DF, 0x1F3E6), (0x1F3E8, 0x1F3ED),
        (0x1F3EF, 0x1F3F0), (0x1F492, 0x1F492), (0x1F54B, 0x1F54D), (0x1F5FC, 0x1F5FC), (0x1F6D5, 0x1F6D6),
        (0x1F6D9, 0x1F6D9),
    ),
    "piece of clothing": (
        (0x1F393, 0x1F393), (0x1F3A9, 0x1F3A9), (0x1F3BD, 0x1F3BD), (0x1F452, 0x1F452), (0x1F454, 0x1F45A),
        (0x1F45E, 0x1F462), (0x1F94B, 0x1F94B), (0x1F97B, 0x1F97C), (0x1F97E, 0x1F97F), (0x1F9BA, 0x1F9BA),
        (0x1F9E2, 0x1F9E6), (0x1FA70, 0x1FA74),
    ),
    "clock": ((0x231A, 0x231A), (0x23F0, 0x23F2), (0x1F550, 0x1F567), (0x1F570, 0x1F570)),
}  # fmt: skip

_FONT = "NotoEmoji[wght].ttf"

_AN = re.compile(r"(?!unicorn|euro|ewe\b|one\b)[aeiou]|hourglass|x-ray|SOS|NG ", re.IGNORECASE)


def emoji_names(language: str = "en") -> dict[str, str]:
    """Names of all emoji that can be drawn: those with one code point that both the font and the library `emoji` have.

    Args:
        language: one of ``LANGUAGES``.

    Returns:
        The name of each emoji in words ("grinning cat") by its character, in the order of code points.

    Raises:
        DataError: the library has no names in that language.
        AssetError: the font cannot be fetched.
    """
    _check_language(language)
    return dict(_names(language))


@functools.cache
def _names(language: str) -> dict[str, str]:
    emoji.config.load_language(language)
    drawn = _charmap()
    known = (character for character in emoji.EMOJI_DATA if len(character) == 1 and ord(character) in drawn)
    return {
        character: " ".join(emoji.EMOJI_DATA[character][language].strip(":").replace("_", " ").split())
        for character in sorted(known)
        # the others are parts of emoji: skin tones and hair
        if emoji.EMOJI_DATA[character]["status"] != emoji.STATUS["component"]
    }


def group_of(character: str) -> str | None:
    """The group of ``GROUPS`` that an emoji belongs to, or None."""
    point = ord(character)
    for group, ranges in GROUPS.items():
        if any(first <= point <= last for first, last in ranges):
            return group
    return None


def caption(name: str, ink: str = "black", language: str = "en") -> str:
    """Describe a drawing: "a red drawing of a grinning cat", "红色的猫", "chat, rouge".

    Args:
        name: name of the emoji in that language.
        ink: a name from ``INKS``.
        language: one of ``LANGUAGES``.

    Raises:
        DataError: the ink or the language is unknown.
    """
    _check_language(language)
    if ink not in INKS:
        raise DataError(f"There is no ink {ink!r}: take one of {', '.join(INKS)}.")
    word = dict(zip(INKS, _INK_WORDS[language].split(), strict=True))[ink]
    if language == "en":
        return f"{_with_article(word)} drawing of {_with_article(name)}"
    return f"{word}的{name}" if language == "zh" else f"{name}, {word}"


def _with_article(noun: str) -> str:
    return f"{'an' if _AN.match(noun) else 'a'} {noun}"


def _check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise DataError(f"Emoji have no names in the language {language!r}: take one of {', '.join(LANGUAGES)}.")


def draw(
    characters: Sequence[str],
    *,
    size: int = 128,
    weight: int = 400,
    ink: ArrayLike = (0, 0, 0),
    paper: Ink = (255, 255, 255),
    rotation: float = 0.0,
) -> NDArray[np.uint8]:
    """Draw emoji, each centred in a square, with its longer side at 84 % of the square's side.

    Args:
        characters: N emoji of one code point.
        size: side of the square in pixels, 8 or more.
        weight: stroke weight, from 300 (thin) to 700 (bold).
        ink: colour of the strokes, shape (3,), or one colour for each emoji, shape (N, 3); from 0 to 255.
        paper: colour of the background.
        rotation: degrees, counter-clockwise.

    Returns:
        RGB images, uint8 of shape (N, size, size, 3).

    Raises:
        DataError: a size, weight or colour is out of range, or the font has no drawing of a character.
        AssetError: the font cannot be fetched.
    """
    if size < 8:
        raise DataError(f"size={size} pixels are too few to draw in: take 8 or more.")
    if not 300 <= weight <= 700:
        raise DataError(f"weight={weight} is not in the font's range: take 300 to 700.")
    for name, colour in (("ink", ink), ("paper", paper)):
        if not (np.min(colour) >= 0 and np.max(colour) <= 255):
            raise DataError(f"{name}={colour} is no colour: take (r, g, b) from 0 to 255.")
    if lacking := [character for character in characters if len(character) != 1 or ord(character) not in _charmap()]:
        raise DataError(f"The font has no drawing of {lacking[0]!r}: take characters from `emoji_names()`.")
    unique = tuple(dict.fromkeys(characters))  # the same shape may be drawn in several inks
    number = {character: i for i, character in enumerate(unique)}
    shapes = _masks(unique, size, weight, float(rotation))
    rows = np.array([number[character] for character in characters], dtype=np.int64)
    inks = np.broadcast_to(np.asarray(ink, dtype=np.int64), (len(rows), 3))
    images = np.empty((len(rows), size, size, 3), dtype=np.uint8)
    cover = np.arange(256)[:, None] / 255
    for colour in np.unique(inks, axis=0):
        blend = np.rint(cover * colour + (1 - cover) * np.asarray(paper)).astype(np.uint8)  # (256, 3)
        for i in np.flatnonzero((inks == colour).all(axis=1)):
            images[i] = blend[shapes[rows[i]]]
    return images


@functools.lru_cache(maxsize=8)
def _masks(characters: tuple[str, ...], size: int, weight: int, rotation: float) -> NDArray[np.uint8]:
    """Ink coverage of each pixel, from 0 to 255, shape (N, size, size); read-only, because it is cached."""
    font = _font(max(64, round(1.5 * size)), weight)  # larger than needed; scaled down below
    masks = np.zeros((len(characters), size, size), dtype=np.uint8)
    with registry.reading("emoji"):
        for mask, character in zip(masks, characters, strict=True):
            glyph = font.getmask(character, "L")
            shape = Image.frombytes("L", glyph.size, bytes(glyph))
            if shape.getbbox() is None:
                raise DataError(f"The font draws nothing for {character!r}: take characters from `emoji_names()`.")
            shape = shape.crop(shape.getbbox())
            if rotation:
                shape = shape.rotate(rotation, resample=Image.Resampling.BICUBIC, expand=True)
                shape = shape.crop(shape.getbbox())
            scale = _FILL * size / max(shape.size)
            width, height = (max(1, round(side * scale)) for side in shape.size)
            top, left = (size - height) // 2, (size - width) // 2
            mask[top : top + height, left : left + width] = shape.resize((width, height), Image.Resampling.BICUBIC)
    masks.flags.writeable = False
    return masks


@functools.cache
def _charmap() -> frozenset[int]:
    """Code points that the font has a drawing of."""
    from matplotlib.ft2font import FT2Font  # Pillow does not say which characters a font has

    with registry.reading("emoji") as folder:
        return frozenset(FT2Font(str(folder / _FONT)).get_charmap())


@functools.lru_cache(maxsize=4)
def _font(pixels: int, weight: int) -> ImageFont.FreeTypeFont:
    # Every build of Pillow has the basic layout, but not the other one; both place single glyphs in the same way.
    with registry.reading("emoji") as folder:
        font = ImageFont.truetype(folder / _FONT, pixels, layout_engine=ImageFont.Layout.BASIC)
        font.set_variation_by_axes([weight])
    return font


def jitter(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Augment an image: rotate it by up to 10 degrees, shift it by up to 8 % of its side and scale it by up to 10 %.

    Args:
        image: shape (S, S, 3).
        rng: draws the rotation, the shift and the scale.

    Returns:
        An image of the same shape; uncovered pixels have the colour of the upper left pixel.
    """
    side = len(image)
    angle = np.deg2rad(rng.uniform(-10, 10))
    right, down = rng.uniform(-0.08, 0.08, size=2) * side
    scale = rng.uniform(0.9, 1.1)
    cos, sin, middle = np.cos(angle) / scale, np.sin(angle) / scale, side / 2
    # Pillow maps each pixel of the result to its source, so this is the inverse: shift back, then rotate and scale.
    x, y = middle + right, middle + down
    inverse = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    moved = Image.fromarray(image).transform(
        (side, side),
        Image.Transform.AFFINE,
        inverse,
        resample=Image.Resampling.BILINEAR,
        fillcolor=tuple(int(value) for value in image[0, 0]),
    )
    return np.array(moved)
