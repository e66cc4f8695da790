"""The file in which a reader's progress is kept."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

from ftkit.lab.results import write_whole
from ftkit.lab.widgets.display import somebody_is_there

_SECTIONS = ("exercises", "guesses")

_said: set[Path] = set()  # files of which it was said that they cannot be written


def progress_file() -> Path:
    """Path of the file: ``FTKIT_PROGRESS``, or ``progress.json`` in the user's folder for data."""
    given = os.environ.get("FTKIT_PROGRESS")
    return Path(given).expanduser() if given else Path(platformdirs.user_data_dir("ftkit")) / "progress.json"


def read_progress() -> dict[str, dict[str, dict[str, Any]]]:
    """Read the file.

    Returns:
        ``exercises``: by name, the number of tries, whether it is right, how many hints and whether the solution were
        asked for. ``guesses``: by what was guessed, low, high, how sure (share of such ranges that should hold the
        truth), and truth. Both are empty if there is no file, or none that can be read.
    """
    try:
        return _parse(progress_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {name: {} for name in _SECTIONS}


def update_progress(change: Callable[[dict[str, dict[str, dict[str, Any]]]], None]) -> None:
    """Change what is kept. A file that cannot be written is no error: that is said once.

    Nothing is kept when a tool executes the notebook with nobody to read it, unless ``FTKIT_PROGRESS`` is set.

    Args:
        change: changes the content of the file, as ``read_progress`` returns it, in place.
    """
    from filelock import FileLock

    if not (os.environ.get("FTKIT_PROGRESS") or somebody_is_there()):
        return
    path = progress_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=5):
            content = _content_to_change(path)
            change(content)
            write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as problem:  # a lock that is never free is one, too
        if path not in _said:
            _said.add(path)
            print(f"Your progress is not kept: {problem}")


def _content_to_change(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What the file holds; one that cannot be read is put aside."""
    if not path.exists():
        return {name: {} for name in _SECTIONS}
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except ValueError:
        aside = path.replace(path.with_name(f"{path.name}.damaged"))
        print(f"Your progress could not be read and starts anew: what there was is in {aside.name} beside it.")
        return {name: {} for name in _SECTIONS}


def _parse(text: str) -> dict[str, dict[str, dict[str, Any]]]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("no object")
    sections = {name: content.get(name, {}) for name in _SECTIONS}
    for section in sections.values():
        if not isinstance(section, dict) or not all(isinstance(entry, dict) for entry in section.values()):
            raise ValueError("no objects by name")
    if not all({"low", "high", "sure", "truth"} <= set(guess) for guess in sections["guesses"].values()):
        raise ValueError("a guess is incomplete")
    return content | sections
