"""Recorded studies: a grid too long for a lesson, run into ``data/studies/NAME.csv``, a row a run; and its reading."""

import contextlib
import csv
import hashlib
import io
import itertools
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.declaration import FOLDER, Declaration, StudyError, read_declaration, several
from ftkit.machine import describe_machine, gpu_name
from ftkit.results import Outcome
from ftkit.schema import NotebookSettings, in_words
from ftkit.spelling import nearest

if TYPE_CHECKING:
    import pandas as pd
    from filelock import FileLock

SCORES = ("accuracy", "macro_f1", "loss")  # of each split
TEXTS = ("ended", "machine", "versions", "revision", "code")  # columns that are text even where they look like numbers


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


@dataclass(frozen=True)
class Study:
    """A recorded study, for a notebook to show.

    Attributes:
        declaration: what was to be run.
        rows: what was recorded, in the order of the declaration: varied parameters, ``seed``, scores by split
            (``test_accuracy``), cost, machine, versions, git revision.
    """

    declaration: Declaration
    rows: "pd.DataFrame"

    @property
    def fixed(self) -> dict[str, Any]:
        """The parameters that have one value in the whole study."""
        return {name: value for name, value in self.declaration.fixed.items() if name not in self.declaration.varied}

    def of(self, **values: Any) -> "pd.DataFrame":
        """The rows with these values of varied parameters (or seeds), and the fixed or default value of the others.

        Args:
            values: a value, or a list of values, by parameter.

        Raises:
            ValueError: the study varies no such parameter, or declares no row with the value.
        """
        self.declaration.having(**values)
        rows = self.rows
        for name in [*self.declaration.varied, *(["seed"] if "seed" in values else [])]:
            rows = rows[rows[name].isin(several(values.get(name, getattr(self.declaration.base, name))))]
        return rows

    def summary(self, by: str = "rows", score: str = "test_accuracy", **where: Any) -> "pd.DataFrame":
        """A score by the values of one parameter, over the seeds; the others as for ``of``.

        All runs are scored on the same test rows, so both intervals speak of the seeds (drawn rows, new weights,
        order) only, not of another draw of test rows. They take the scores for normally distributed.

        Args:
            by: a varied parameter.
            score: a column of ``rows``.
            where: values of other varied parameters.

        Returns:
            By value: mean, low, high, run_low, run_high, as in ``over_runs``; seeds, how many.

        Raises:
            ValueError: no such parameter, value or score.
        """
        import pandas as pd

        if score not in self.rows:
            raise ValueError(f"The study has no score {score!r}: did you mean {nearest(score, self.rows.columns)!r}?")
        self.declaration.having(**{by: []})
        rows = self.of(**where, **{by: list({row[by] for row in self.declaration.rows})})
        groups = rows.groupby(by)[score]
        table = pd.DataFrame({value: over_runs(scores) for value, scores in groups}).T
        return table.assign(seeds=groups.count()).rename_axis(index=by, columns=score)

    def near_best(self, by: str, score: str, **where: Any) -> list[Any]:
        """The value of a parameter with the highest mean score, then those that can't be told from it.

        Told from it is a value whose difference from it, seed by seed, has a 95 % t interval above 0.

        Args:
            by, score, where: as for ``summary``.
        """
        means = self.summary(by, score, **where)["mean"]
        rows = self.of(**where, **{by: list(means.index)})
        by_seed = rows.pivot_table(index="seed", columns=by, values=score)
        best = means.idxmax()
        behind = by_seed.drop(columns=best).rsub(by_seed[best], axis=0)
        return [best, *(value for value in behind if not over_runs(behind[value])["low"] > 0)]

    @property
    def origin(self) -> str:
        """Where the record comes from, in one line: how many runs, how long, on what."""
        rows = self.rows
        told = [", ".join(dict.fromkeys(rows[column])) for column in ("machine", "versions", "revision")]
        return f"{len(rows)} runs, {rows['seconds'].sum() / 60:.0f} minutes of training; " + "; ".join(told)

    def differing(self, settings: NotebookSettings, by: str) -> list[str]:
        """Names of the parameters, ``by`` apart, in which settings differ from the study: none, and it applies.

        Compared are the parameters that the study pins or varies, and those that are None in it (TOML can't say so).
        """
        ours = self.declaration.base.model_dump()
        compared = {*self.declaration.fixed, *self.declaration.varied, *(name for name in ours if ours[name] is None)}
        return [name for name in ours if name in compared - {by} and getattr(settings, name) != ours[name]]


def over_runs(values: "pd.Series") -> "pd.Series":
    """A score over runs with several seeds, or the difference of two methods seed by seed.

    Args:
        values: one a run, shape (seeds,), taken for normally distributed.

    Returns:
        mean; low and high, the 95 % t interval of the mean; run_low and run_high, the 95 % prediction interval of one
        further run. The intervals are NaN where there is one run.
    """
    import pandas as pd
    from scipy.stats import t

    mean, count = values.mean(), values.count()
    arm = t.ppf(0.975, count - 1) * values.std()
    of_mean, of_run = arm / count**0.5, arm * (1 + 1 / count) ** 0.5
    ends = {"low": mean - of_mean, "high": mean + of_mean, "run_low": mean - of_run, "run_high": mean + of_run}
    return pd.Series({"mean": mean, **ends})


def load_study(name: str, folder: Path = FOLDER) -> Study:
    """Read what was recorded of a study; prints one sentence if declared rows are missing.

    Raises:
        FileNotFoundError: no such study.
        StudyError: nothing is recorded yet.
    """
    import pandas as pd

    declaration = read_declaration(name, folder)
    recorded = declaration.recorded()
    rows = [row for row in declaration.rows if declaration.key(row) in recorded]
    if not rows:
        raise StudyError(f"Nothing is recorded of the study {name}: run `ftkit study {name}`.")
    if len(rows) < len(declaration.rows):
        print(f"{name}: {len(rows)} of {len(declaration.rows)} runs recorded; `ftkit study {name}` runs the others.")
    table = pd.DataFrame([recorded[declaration.key(row)] | row for row in rows])  # parameters typed, as declared
    numbers = [column for column in table if column not in {*rows[0], *TEXTS}]
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return Study(declaration, table)


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
        f"{split}_{score}": float(getattr(evaluation, score))
        for split, evaluation in outcome.evaluations.items()
        for score in SCORES
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
