"""How messages are worded."""

import pytest

from ftkit.errors import in_brief


@pytest.mark.parametrize(
    ("items", "most", "said"),
    [
        ([], 3, ""),
        ([1, 2, 3], 3, "1, 2, 3"),
        (["a", "b", "c", "d"], 3, "a, b, c and 1 more"),
        (list(range(2000)), 3, "0, 1, 2 and 1,997 more"),
        (list("abcdefghij"), 8, "a, b, c, d, e, f, g, h and 2 more"),
    ],
)
def test_a_long_list_is_cut_and_says_how_many_more_there_are(items: list, most: int, said: str) -> None:
    assert in_brief(items, most) == said
