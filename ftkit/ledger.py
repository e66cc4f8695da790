"""The ledger of a folder of runs: JSON Lines, a line a run, appended under a lock and read past a line cut short."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftkit.results import plain

NAME = "ledger.jsonl"


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line, on the disk when this returns; several processes may append at once.

    Args:
        path: of the ledger; it and its folder are made where they are missing.
        entry: what the run leaves: ``id``, ``source`` (run or panel), ``notebook``, ``tier``, ``started``,
            ``parameters``, ``settings``, ``metrics``, ``seconds``, ``peak_rss_mib``, ``error``.

    Raises:
        TypeError, ValueError: a value has no JSON form; nothing is written.
    """
    line = json.dumps(plain(entry, "entry")) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a crash cut the last line short: it shall not spoil this one
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Every entry, the oldest first; none where there is no file.

    A line that can't be read, cut short by a crash, is skipped with a warning.
    """
    if not path.exists():
        return []
    with _locked(path):
        lines = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            warnings.warn(f"Line {number} of {path} is cut short or no JSON object: it is skipped.", stacklevel=2)
    return entries


def _locked(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(path.with_name(f".{path.name}.lock"))
