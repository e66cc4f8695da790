"""Run what is missing of a study, and record it."""

import contextlib
import csv
import hashlib
import io
import itertools
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import StudyError
from ftkit.lab.machine import describe_machine, gpu_name
from ftkit.lab.results import Outcome
from ftkit.lab.schema import in_words
from ftkit.lab.studies.declaration import FOLDER, TEXTS, Declaration, read_declaration

if TYPE_CHECKING:
    from filelock import FileLock


def run_study(
    name: str, only: Mapping[str, Any] | None = None, progress: bool = True, *, folder: Path = FOLDER
) -> Path:
    """Run what is missing of a study, in this process, and add each run to ``NAME.csv`` as soon as it is over.

    The file is replaced whole, under a lock, so a study can be killed at any moment and gone on with, and several
    processes can work on it at once: each row is run by one of them. FTKIT_TIER has no say here.

    Args:
        name: of the study.
        only: by parameter that is varied, or ``seed``: the value, or values, that a row must have to be run.
        progress: show a bar on stderr: the row that runs, how many are left, the time they will take.
        folder: holds the declaration and the rows.

    Returns:
        The path of the CSV.

    Raises:
        FileNotFoundError: no such study, or no such notebook.
        ValueError: a value that can't be, or one in ``only`` that no row has; nothing has run.
        StudyError: the recorded rows come from other code, or rows failed: each was reported, the others are done.
        KeyboardInterrupt: after Ctrl-C; the row that was running is not recorded.
    """
    from filelock import Timeout
    from tqdm import tqdm

    declaration = read_declaration(name, folder)
    chosen = declaration.having(**(only or {}))
    here = describe_machine()
    about = {key: value for key, value in here.items() if key in TEXTS}
    about["machine"] = ", ".join(filter(None, [about["machine"], gpu_name()]))
    recorded = _same_code(declaration)
    todo = [row for row in chosen if declaration.key(row) not in recorded]
    failed = 0
    with tqdm(total=len(todo), desc=name, unit="row", disable=not progress) as bar:
        for wait in (False, True):  # last, the rows that another process was at: it may have been killed
            busy = []
            for row in todo:
                try:
                    with _lock(declaration, declaration.key(row)).acquire(blocking=wait):
                        if declaration.key(row) not in _same_code(declaration):
                            bar.set_postfix_str(_told(row))
                            failed += not _attempt(declaration, row, about)
                except Timeout:
                    busy.append(row)
                    continue
                bar.update()
            todo = busy
    if failed:
        raise StudyError(f"{failed} rows of {name} failed, as reported above: mend the cause and run it again.")
    return declaration.csv


def _attempt(declaration: Declaration, row: Mapping[str, Any], about: Mapping[str, str]) -> bool:
    """Run a row and record it; or report in one line why it failed, and return False."""
    from tqdm import tqdm

    try:
        outcome = _outcome(declaration, row)
        if outcome.history.ended == "interrupted":
            raise KeyboardInterrupt
        record = _record(row, outcome) | about | {"code": declaration.code}
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        tqdm.write(f"{_told(row)} failed: {type(error).__name__}: {said}", file=sys.stderr)
        return False
    _append(declaration, record)
    return True


def _outcome(declaration: Declaration, row: Mapping[str, Any]) -> Outcome:
    """Execute the tagged cells with the row's parameters, and train."""
    from IPython.display import display

    first = declaration.base.seed  # as in a notebook that trains with all seeds, one after the other
    wanted = declaration.base.changed(**{**row, "seed": first})
    given = {name: getattr(wanted, name) for name in ("tier", "seed", *declaration.fixed, *declaration.varied)}
    namespace: dict[str, Any] = {"__name__": "__main__", "display": display}
    tier = os.environ.pop("FTKIT_TIER", None)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for cell in declaration.cells:
                exec(compile(cell.source, f"<cell {cell.number} of {declaration.notebook}>", "exec"), namespace)
                if cell.parameters:
                    namespace.update(given)
            if not {"settings", "train"} <= set(namespace):
                raise StudyError("no cell tagged `study` defines `settings`, or none `train(settings, seed)`")
            for name, value in given.items():  # rows, say, of which the data has fewer
                if getattr(namespace["settings"], name) != value:
                    raise StudyError(f"the notebook made {name}={getattr(namespace['settings'], name)} of {value}")
            return namespace["train"](namespace["settings"], row["seed"])
    finally:
        namespace.clear()  # or its functions, which refer to it, would keep networks and data in memory
        if tier is not None:
            os.environ["FTKIT_TIER"] = tier


def _record(row: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """A row of the CSV, as far as the run tells it."""
    if outcome.seed != row["seed"]:
        raise StudyError(f"`train` was given the seed {row['seed']} and returned an outcome of {outcome.seed}")
    scores = {
        f"{split}_{score}": float(value)
        for split, evaluation in outcome.evaluations.items()
        for score, value in evaluation.scores.items()
    } | {name: float(figure) for name, figure in outcome.figures.items()}
    for name, value in scores.items():
        if not math.isfinite(value):
            raise StudyError(f"{name} is {value}")
    history = outcome.history
    return {
        **row,
        **scores,
        "trainable_parameters": history.trainable_parameters,
        "steps": len(history.steps),
        "ended": history.ended,
        "seconds": round(history.seconds, 2),
        "peak_rss_mib": round(history.peak_rss_mib, 1),
    }


def _append(declaration: Declaration, record: Mapping[str, Any]) -> None:
    """Put a new file with one more row in the place of the CSV."""
    with _lock(declaration):
        rows = _same_code(declaration)
        rows.setdefault(declaration.key(record), {name: str(value) for name, value in record.items()})
        partial = _locks(declaration) / declaration.csv.name
        with partial.open("w", encoding="utf-8", newline="") as lines:
            columns = list(dict.fromkeys(itertools.chain(*rows.values())))
            writer = csv.DictWriter(lines, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows.values())
        partial.replace(declaration.csv)


def _same_code(declaration: Declaration) -> dict[tuple[str, ...], dict[str, str]]:
    """The recorded rows, all of the code as it is now."""
    rows = declaration.recorded()
    others = {row.get("code") for row in rows.values()} - {declaration.code}
    if others:
        raise StudyError(
            f"{declaration.csv.name} has rows of other code or fixed parameters ({', '.join(map(str, others))}; now "
            f"{declaration.code}): move the file away or delete it, and run the study again."
        )
    return rows


def _lock(declaration: Declaration, key: Iterable[str] = ()) -> "FileLock":
    """The lock of the CSV, or of one row while it runs; the system frees it when a process is killed."""
    from filelock import FileLock

    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    return FileLock(_locks(declaration) / f"{declaration.name}-{digest}.lock")


def _locks(declaration: Declaration) -> Path:
    """Folder for locks and unfinished files; git is told to ignore it, or each row would make the checkout modified."""
    folder = declaration.folder / ".locks"
    folder.mkdir(exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")
    return folder


def _told(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={in_words(value)}" for name, value in row.items())
