"""Every error of the kit, and how a message says what to do.

A message is one sentence: what is wrong, the value, what to do.
"""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """That of the names, at least one, which is spelt most like ``name``."""
    return difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)[0]


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what is wrong and what to do."""


class AssetError(RuntimeError):
    """A model or data set that cannot be had; the message is one line that says what to do."""


class ModelError(ValueError):
    """A model can't be had as asked; the message says why and what to do."""


class TrainingError(RuntimeError):
    """Training can't go on; the message says where it stopped, the likely cause and what to do."""


class FreezingError(ValueError):
    """A network can't be frozen as asked; the message says why and what to pass instead."""


class FeatureCacheError(ValueError):
    """A prefix can't be cached; the message says why and what to do."""


class PromptError(ValueError):
    """A prompt can't be made as asked; the message says why and what to do."""


class SettingsError(ValueError):
    """A name or a value that can't be; the message is one sentence with the nearest name or the bound."""


class StudyError(RuntimeError):
    """A study can't be read, run or recorded; the message is one sentence that says what to do."""
