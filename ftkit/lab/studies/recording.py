"""Run the missing rows of a study and record them."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import StudyError, first_line
from ftkit.lab.machine import describe_machine, gpu_name
from ftkit.lab.results import Outcome, plain, write_whole
from ftkit.lab.runs.cluster import Call, as_sent, connect, read_packed
from ftkit.lab.schema import in_words
from ftkit.lab.studies.declaration import STUDIES_FOLDER, TEXT_COLUMNS, Declaration, read_declaration

if TYPE_CHECKING:
    from filelock import FileLock
    from tqdm import tqdm

    from ftkit.lab.runs.cluster import Cluster


# A child on a worker of a cluster: it reads a declaration and a row, runs the row and writes what is recorded of it.
_ON_WORKER = "from ftkit.lab.studies.recording import record_on_worker; sys.exit(record_on_worker())"


def run_study(
    name: str,
    only: Mapping[str, Any] | None = None,
    progress: bool = True,
    *,
    folder: Path = STUDIES_FOLDER,
    scheduler: str | None = None,
) -> Path:
    """Run the missing rows of a study, in this process or on a cluster, and add each to ``NAME.csv`` when it ends.

    The file is replaced as a whole, under a lock. A study can therefore be killed at any moment and continued later,
    and several processes can share it: each row is run by one of them. The variable FTKIT_TIER is ignored.

    Args:
        name: name of the study.
        only: values that a row must have to be run: a value or a list of values by varied parameter, or by ``seed``.
        progress: show a bar on stderr with the current row, the number of rows left and the remaining time.
        folder: folder of the declaration and of the recorded rows.
        scheduler: address of the scheduler of a dask.distributed cluster, on whose workers the rows run then.

    Returns:
        Path of the CSV.

    Raises:
        FileNotFoundError: there is no such study or no such notebook.
        ValueError: a value is not allowed, or no row has a value in ``only``; nothing has run.
        StudyError: the recorded rows come from other code, or rows failed. Each failure was reported; the other rows
            are recorded.
        ClusterError: the scheduler cannot be used, or it has gone. The rows that have ended are recorded.
        KeyboardInterrupt: after Ctrl-C; the current rows are not recorded.
    """
    from tqdm import tqdm

    declaration = read_declaration(name, folder)
    chosen = declaration.having(**(only or {}))
    recorded = _same_code(declaration)
    todo = [row for row in chosen if declaration.key(row) not in recorded]
    with (
        connect(scheduler) if scheduler and todo else contextlib.nullcontext() as cluster,
        tqdm(total=len(todo), desc=name, unit="row", disable=not progress) as bar,
    ):
        failed = _run_on(cluster, declaration, todo, bar) if cluster else _run_here(declaration, todo, bar)
    if failed:
        raise StudyError(f"{failed} rows of {name} failed, as reported above: fix the cause and run the study again.")
    return declaration.csv


def _run_here(declaration: Declaration, todo: list[dict[str, Any]], bar: "tqdm") -> int:
    """Run rows one after the other; return how many failed."""
    about, failed = _about(), 0
    for row, lock in _free_rows(declaration, todo, bar):
        with lock:
            bar.set_postfix_str(_row_label(row))
            failed += not _attempt(declaration, row, about)
        bar.update()
    return failed


def _run_on(cluster: "Cluster", declaration: Declaration, todo: list[dict[str, Any]], bar: "tqdm") -> int:
    """Run rows on the workers of a cluster, as many at a time as these have threads; return how many failed."""
    declaration.cells, declaration.code  # noqa: B018 (read once, and sent with the rest)
    for values in (declaration.fixed, *todo):
        if own := as_sent(values)[1]:
            raise StudyError(
                f"The study {declaration.name} uses {next(iter(own.values()))}, which the workers of a cluster do not "
                "have: run it without --scheduler."
            )
    sent = cluster.send({"declaration": pickle.dumps(declaration)})
    calls = (
        Call(lock, _row_label(row), _ON_WORKER, [json.dumps(row)], [sent])
        for row, lock in _free_rows(declaration, todo, bar)
    )
    failed = 0
    for call, returned in cluster.run(calls, bar):
        with call.item:
            if returned.error:
                bar.write(f"{call.name} failed: {returned.error}", file=sys.stderr)
                failed += 1
            else:
                _append(declaration, json.loads(read_packed(returned.packed, "out/record.json")))
        bar.update()
    return failed


def record_on_worker() -> int:
    """Run the row in the command line with the declaration in ``../declaration``, and write ``../out/record.json``.

    Returns:
        The exit code; 1 if the row failed, and stderr then ends with a line that says why.
    """
    declaration = pickle.loads(Path("../declaration").read_bytes())
    row = json.loads(sys.argv[1])
    try:
        record = _recorded(declaration, row, _about())
        write_whole(Path("../out/record.json"), json.dumps(plain(record, "record")))
    except Exception as error:
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


def _free_rows(
    declaration: Declaration, todo: list[dict[str, Any]], bar: "tqdm"
) -> Iterator[tuple[dict[str, Any], Any]]:
    """The rows that no other process has recorded or runs now, each with its lock, which the caller releases."""
    from filelock import Timeout

    for wait in (False, True):  # then wait for rows of other processes, one of which may have been killed
        busy = []
        for row in todo:
            lock = _lock(declaration, declaration.key(row))
            try:
                held = lock.acquire(blocking=wait)
            except Timeout:
                busy.append(row)
                continue
            if declaration.key(row) not in _same_code(declaration):
                yield row, held
            else:
                lock.release()
                bar.update()
        todo = busy


def _about() -> dict[str, str]:
    """The columns of a row that describe this machine."""
    here = describe_machine()
    about = {key: value for key, value in here.items() if key in TEXT_COLUMNS}
    return about | {"machine": ", ".join(filter(None, [about["machine"], gpu_name()]))}


def _attempt(declaration: Declaration, row: Mapping[str, Any], about: Mapping[str, str]) -> bool:
    """Run and record a row; if it fails, report why in one line and return False."""
    from tqdm import tqdm

    try:
        record = _recorded(declaration, row, about)
    except Exception as error:
        tqdm.write(f"{_row_label(row)} failed: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return False
    _append(declaration, record)
    return True


def _recorded(declaration: Declaration, row: Mapping[str, Any], about: Mapping[str, str]) -> dict[str, Any]:
    """Run a row and return its columns; raises KeyboardInterrupt if it was interrupted."""
    outcome = _outcome(declaration, row)
    if outcome.history.ended == "interrupted":
        raise KeyboardInterrupt
    return _record(row, outcome) | about | {"code": declaration.code}


def _outcome(declaration: Declaration, row: Mapping[str, Any]) -> Outcome:
    """Execute the tagged cells with the row's parameters, then call their ``train``."""
    from IPython.display import display

    first = declaration.base.seed  # the cells run with the first seed, as in a notebook that trains all seeds in turn
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
                raise StudyError("The cells tagged `study` must define both `settings` and `train(settings, seed)`.")
            for name, value in given.items():  # for example fewer rows, because the data has no more
                used = getattr(namespace["settings"], name)
                if used != value:
                    raise StudyError(f"The notebook changed {name} from {value} to {used}: declare a value it can use.")
            return namespace["train"](namespace["settings"], row["seed"])
    finally:
        namespace.clear()  # its functions refer to it and would keep networks and data in memory
        if tier is not None:
            os.environ["FTKIT_TIER"] = tier


def _record(row: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """The columns of a row that come from its run."""
    if outcome.seed != row["seed"]:
        raise StudyError(f"`train` returned an outcome with seed {outcome.seed}: it must use the seed {row['seed']}.")
    scores = {
        f"{split}_{score}": float(value)
        for split, evaluation in outcome.evaluations.items()
        for score, value in evaluation.scores.items()
    } | {name: float(figure) for name, figure in outcome.figures.items()}
    for name, value in scores.items():
        if not math.isfinite(value):
            raise StudyError(f"{name} is {value}: a record needs finite numbers.")
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
    """Replace the CSV by one with a further row."""
    with _lock(declaration):
        rows = _same_code(declaration)
        rows.setdefault(declaration.key(record), {name: str(value) for name, value in record.items()})
        lines = io.StringIO()
        columns = list(dict.fromkeys(itertools.chain(*rows.values())))
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        write_whole(declaration.csv, lines.getvalue())


def _same_code(declaration: Declaration) -> dict[tuple[str, ...], dict[str, str]]:
    """Read the recorded rows; raises StudyError if some come from other code than the current one."""
    rows = declaration.recorded()
    others = {row.get("code") for row in rows.values()} - {declaration.code}
    if others:
        raise StudyError(
            f"{declaration.csv.name} has rows of other code or fixed parameters ({', '.join(map(str, others))}; now "
            f"{declaration.code}): move or delete the file and run the study again."
        )
    return rows


def _lock(declaration: Declaration, key: Iterable[str] = ()) -> "FileLock":
    """Lock of the CSV or, with a key, of one row; the system releases it if the process is killed."""
    from filelock import FileLock

    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    return FileLock(_locks(declaration) / f"{declaration.name}-{digest}.lock")


def _locks(declaration: Declaration) -> Path:
    """Folder for locks; git ignores it, or every row would count as a modification of the checkout."""
    folder = declaration.folder / ".locks"
    folder.mkdir(exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")
    return folder


def _row_label(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={in_words(value)}" for name, value in row.items())
