"""The name that was probably meant, for the errors that refuse another."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """That of the names, at least one, which is spelt most like ``name``."""
    return difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)[0]
