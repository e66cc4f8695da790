"""Emoji: which ones can be drawn, what they are called, and what their drawings look like."""

import itertools

import emoji
import numpy as np
import pytest

from ftkit.data.emoji import GROUPS, INKS, LANGUAGES, _font, _masks, caption, draw, emoji_names, group_of, jitter
from ftkit.errors import DataError

SOME = ["😺", "🐘", "⌚", "➖", "❗"]


def test_emoji_have_one_code_point_and_are_in_font_and_library() -> None:
    names = emoji_names()
    assert len(names) == 1377
    assert list(names) == sorted(names)
    assert names["😺"] == "grinning cat"
    assert names["👒"] == "woman’s hat"
    assert not set("🏻🏿🦰🇦") & set(names)  # parts of other emoji
    assert "☀" in names  # the library calls it unqualified, because it is text by default


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_and_captions_are_distinct_in_every_language(language: str) -> None:
    names = emoji_names(language)
    assert list(names) == list(emoji_names())
    assert not any(set(":_") & set(name) for name in names.values())
    captions = {caption(name, ink, language) for name in names.values() for ink in INKS}
    assert len(captions) == 1377 * len(INKS)


def test_languages_are_those_of_the_library() -> None:
    assert set(LANGUAGES) == set(emoji.LANGUAGES)
    with pytest.raises(DataError, match="language 'xx': take one of en, zh"):
        emoji_names("xx")
    with pytest.raises(DataError, match="language 'xx'"):
        caption("cat", "red", "xx")


@pytest.mark.parametrize(
    ("name", "ink", "language", "expected"),
    [
        ("grinning cat", "red", "en", "a red drawing of a grinning cat"),
        ("owl", "orange", "en", "an orange drawing of an owl"),
        ("unicorn", "blue", "en", "a blue drawing of a unicorn"),
        ("hourglass done", "black", "en", "a black drawing of an hourglass done"),
        ("one o’clock", "black", "en", "a black drawing of a one o’clock"),
        ("oncoming bus", "black", "en", "a black drawing of an oncoming bus"),
        ("猫", "red", "zh", "红色的猫"),
        ("katze", "purple", "de", "katze, lila"),
        ("chat", "red", "fr", "chat, rouge"),
    ],
)
def test_caption_describes_the_drawing(name: str, ink: str, language: str, expected: str) -> None:
    assert caption(name, ink, language) == expected


def test_unknown_ink_is_refused() -> None:
    with pytest.raises(DataError, match="There is no ink 'mauve': take one of black, red"):
        caption("cat", "mauve")


MEMBERS = {
    "face": "😀😭🙂🙄🤐🤯🥺🧐🫠☹",
    "animal": "🐘🐱🐝🦁🐸🕷🦆🪲🪼🐿",
    "plant": "🌵🌻🌲🍁🪴☘💐",
    "food": "🍎🍕🌽🥕🧀🫐🍿🌶🎂",
    "vehicle": "🚗🚀🚲⛵✈🛵🚚🏎🚢",
    "building": "🏠🏰🏥⛪🕌🗼",
    "piece of clothing": "👕👗🧦👠🎩🩳🥾",
    "clock": "⌚⏰🕐🕧🕰⏱",
    None: "🤖😺🙈🚦🚣🛑🍴☕👻🐚🐾🐽🌍🍄🏮⌛🥛🦠🧃🎒❤",
}


@pytest.mark.parametrize(("group", "members"), MEMBERS.items())
def test_group_has_its_members(group: str | None, members: str) -> None:
    assert {member: group_of(member) for member in members} == dict.fromkeys(members, group)


def test_groups_do_not_overlap_and_have_20_drawn_members_each() -> None:
    ranges = sorted(pair for group in GROUPS.values() for pair in group)
    assert all(first <= last for first, last in ranges)
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))
    members = [group_of(character) for character in emoji_names()]
    assert min(members.count(group) for group in GROUPS) >= 20


@pytest.mark.parametrize("rotation", [0.0, 30.0])
@pytest.mark.parametrize("size", [32, 128])
def test_glyph_is_centred_and_fills_84_percent(size: int, rotation: float) -> None:
    images = draw(SOME, size=size, rotation=rotation)
    assert (images.shape, images.dtype) == ((5, size, size, 3), np.uint8)
    for image in images:
        rows, columns, _ = np.nonzero(image < 255)
        spans = [np.array([axis.min(), axis.max()]) for axis in (rows, columns)]
        assert max(np.ptp(span) + 1 for span in spans) == pytest.approx(0.84 * size, abs=2)
        assert all(abs(span.sum() - (size - 1)) <= 3 for span in spans)


def test_every_emoji_is_visible_and_antialiased() -> None:
    images = draw(list(emoji_names()), size=32)
    assert (images.min(axis=(1, 2, 3)) < 128).all()
    assert len(np.unique(draw(["😺"]))) > 50  # antialiased


def test_drawing_is_repeatable_and_returns_a_copy() -> None:
    first = draw(SOME)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(draw(SOME), kept)
    np.testing.assert_array_equal(draw(SOME[::-1] + SOME), np.concatenate([kept[::-1], kept]))
    _masks.cache_clear()
    _font.cache_clear()
    np.testing.assert_array_equal(draw(SOME), kept)
    assert not _masks(("😺",), 32, 400, 0.0).flags.writeable


def test_ink_and_paper_are_mixed_by_coverage() -> None:
    grey = draw(["😺"])[0].astype(float)
    cover = 1 - grey / 255
    ink, paper = np.array([220, 38, 38]), np.array([10, 200, 90])
    drawn = draw(["😺"], ink=ink, paper=tuple(paper))[0]
    np.testing.assert_allclose(drawn, cover * ink + (1 - cover) * paper, atol=0.51)


def test_each_emoji_can_have_its_own_ink() -> None:
    inks = [INKS["red"], INKS["blue"], INKS["red"]]
    drawn = draw(["😺", "😺", "🐘"], ink=inks)
    for image, character, ink in zip(drawn, ["😺", "😺", "🐘"], inks, strict=True):
        np.testing.assert_array_equal(image, draw([character], ink=ink)[0])
    assert (drawn[0] != drawn[1]).any()


def test_weight_and_rotation_change_the_shape() -> None:
    thin, bold = (draw(["😺"], weight=weight) for weight in (300, 700))
    assert bold.mean() < thin.mean() - 10
    upright, turned = (draw(["⬆"], rotation=angle)[0].astype(int) for angle in (0.0, 90.0))
    # counter-clockwise, the arrow points to the left; a resampled edge may be off by a pixel
    assert np.abs(np.rot90(upright) - turned).mean() < 8 < np.abs(np.rot90(upright, -1) - turned).mean()


@pytest.mark.parametrize(
    ("characters", "options", "message"),
    [
        (["😺"], {"size": 7}, "size=7 pixels are too few"),
        (["😺"], {"weight": 299}, "weight=299 is not in the font's range"),
        (["😺"], {"weight": 701}, "weight=701 is not in the font's range"),
        (["😺", "鿿"], {}, "no drawing of '鿿'"),
        (["👨‍👩‍👧"], {}, "no drawing of"),
        ([" "], {}, "draws nothing for ' '"),
        (["😺"], {"ink": (0, 0, 256)}, r"ink=\(0, 0, 256\) is no colour"),
        (["😺"], {"paper": (-1, 0, 0)}, "is no colour: take"),
    ],
)
def test_what_cannot_be_drawn_is_refused(characters: list[str], options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        draw(characters, **options)


def test_drawing_no_emoji_gives_no_images() -> None:
    assert draw([], size=16).shape == (0, 16, 16, 3)


def test_jitter_stays_within_its_bounds_and_fills_with_the_corner_colour() -> None:
    size, paper = 100, (10, 20, 30)
    image = np.full((size, size, 3), paper, dtype=np.uint8)
    image[30:70, 30:70] = 200
    original, centres, areas = image.copy(), [], []
    for seed in range(40):
        moved = jitter(image, np.random.default_rng(seed))
        assert (moved.shape, moved.dtype) == (image.shape, np.uint8)
        assert all((moved[row, column] == paper).all() for row in (0, -1) for column in (0, -1))
        inside = moved[..., 0] > 105
        centres.append(np.argwhere(inside).mean(axis=0) - 49.5)
        areas.append(inside.mean() / 0.16)
    np.testing.assert_array_equal(image, original)
    furthest = np.abs(centres).max(axis=0)
    assert (furthest < 8.5).all() and (furthest > 6).all()
    assert 0.79 < min(areas) < 0.87 and 1.13 < max(areas) < 1.23
    first, again, other = (jitter(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_jitter_rotates_by_up_to_10_degrees_either_way() -> None:
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    image[48:52, 20:80] = 255  # a bar whose slope shows the angle
    angles = []
    for seed in range(40):
        rows, columns = np.nonzero(jitter(image, np.random.default_rng(seed))[..., 0] > 127)
        angles.append(np.degrees(np.arctan(np.polyfit(columns, rows, 1)[0])))
    assert -10.5 < min(angles) < -8 and 8 < max(angles) < 10.5
