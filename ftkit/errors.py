"""Every error class of the kit, and the helpers that word their messages.

A message is one sentence: what is wrong, the value, what to do.
"""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """The data cannot be used as requested, for example because a column is missing."""


class AssetError(RuntimeError):
    """A pinned model or data set is unknown, or cannot be downloaded, verified or stored."""


class ModelError(ValueError):
    """A model cannot be loaded or built as requested."""


class FreezingError(ValueError):
    """The layers of a model cannot be told apart, or cannot be frozen as requested."""


class FeatureCacheError(ValueError):
    """The outputs of the frozen layers cannot be cached."""


class TrainingError(RuntimeError):
    """Training cannot start or continue, for example because the loss is not a number."""


class PromptError(ValueError):
    """A prompt cannot be built from the given template, rows or examples."""


class SettingsError(ValueError):
    """A setting has an unknown name or an invalid value."""


class StudyError(RuntimeError):
    """A study cannot be read, run or recorded."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the one of ``names`` (at least one) whose spelling is most similar to ``name``."""
    return difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)[0]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the question "did you mean 'x'?", where x is the one of ``names`` (at least one) nearest to ``name``."""
    return f"did you mean {nearest(name, names)!r}?"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
