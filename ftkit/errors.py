"""Every error class of the kit, and the helpers that word their messages.

A message is one sentence: what is wrong, the value, what to do.
"""

import difflib
from collections.abc import Iterable, Sequence


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


class ClusterError(RuntimeError):
    """A cluster cannot be reached, has no workers or other versions, or cannot be given a file."""


class CourseError(RuntimeError):
    """An exercise is unknown, a graded lab cannot go on, or an edition of the course cannot be made."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the one of ``names`` (at least one) whose spelling is most similar to ``name``."""
    return difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)[0]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the question "did you mean 'x'?", where x is the one of ``names`` (at least one) nearest to ``name``."""
    return f"did you mean {nearest(name, names)!r}?"


def unknown_setting(owner: str, name: str, names: Sequence[str]) -> str:
    """Return the sentence on a setting that there is not: what has it not, which name it resembles, and all names."""
    return f"{owner} has no parameter {name!r}: {did_you_mean(name, names)} It has {', '.join(names)}."


def bad_value(name: str, value: object, help: str, *, kind: str, allowed: str = "", choices: Sequence[str] = ()) -> str:
    """Return the sentence on a value that a setting cannot have.

    Args:
        name, value: the setting and the value.
        help: what the setting is, in one line.
        kind: name of its type: float, int, bool, …; or in words, such as "a list".
        allowed: its bounds in words, such as "from 1 to 100"; "" if there are none.
        choices: the only values that it can have, if it is a choice.
    """
    if choices:
        cure = f"{did_you_mean(str(value), choices)} Give one of {', '.join(choices)}"
    else:
        kinds = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text"}
        cure = f"give {kinds.get(kind, kind)} {allowed}".rstrip()
    return f"{name}={value!r} is not allowed: {cure} ({help})."


def in_brief(items: Sequence[object], most: int = 3) -> str:
    """Return the first items, at most ``most`` of them, and how many more there are: "a, b, c and 5 more"."""
    more = len(items) - most
    return ", ".join(map(str, items[:most])) + (f" and {more:,} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
