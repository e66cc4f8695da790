"""Results of a run: the outcome of each seed, metrics.json, the results table, the ledger of all runs."""

import errno
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from ftkit.metrics import Evaluation
    from ftkit.training.state import History

LEDGER = "ledger.jsonl"

_COLUMNS = ["accuracy", "95 % interval", "seeds", "trainable parameters", "seconds"]


@dataclass(frozen=True)
class Outcome:
    """Result of one training run with one seed.

    Attributes:
        seed: random seed of the run.
        history: losses, scores and cost of the training.
        evaluations: results of the trained model by split; the first split is the one reported by default.
        figures: further measurements by name; a study records them too.
    """

    seed: int
    history: "History"
    evaluations: Mapping[str, "Evaluation"]
    figures: Mapping[str, float] = field(default_factory=dict)


def mean_figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean of each of ``Outcome.figures`` over the runs of one method."""
    return {name: sum(outcome.figures[name] for outcome in outcomes) / len(outcomes) for name in outcomes[0].figures}


def method_entry(
    evaluations: "Sequence[Evaluation]", costs: Sequence[Any], *, seeds: Sequence[int], trainable_parameters: int
) -> dict[str, Any]:
    """Build one method's entry for metrics.json.

    Args:
        evaluations: one per seed, all on the same rows.
        costs: one per seed, each with ``seconds`` and ``peak_rss_mib`` (a History or a Meter).
        seeds: seeds of the runs.
        trainable_parameters: number of weights that the method trains.

    Returns:
        Mean accuracy with its 95 % interval, accuracy by seed, mean seconds and the highest peak memory.
    """
    from ftkit.metrics import over_seeds

    accuracy, ci95 = over_seeds(evaluations)
    return {
        "accuracy": accuracy,
        "ci95": ci95,
        "seeds": list(seeds),
        "by_seed": [evaluation.accuracy for evaluation in evaluations],
        "trainable_parameters": trainable_parameters,
        "seconds": sum(cost.seconds for cost in costs) / len(costs),
        "peak_rss_mib": max(cost.peak_rss_mib for cost in costs),
    }


def save_metrics(
    settings: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], *, folder: str | Path | None = None
) -> Path:
    """Write a notebook's results to ``metrics.json``; the notebook itself calls this.

    Args:
        settings: settings that produced the results.
        metrics: for each method ``accuracy``, ``ci95`` (low, high), ``seeds`` (a list), ``trainable_parameters``,
            ``seconds`` and ``peak_rss_mib``; None where a number makes no sense.
        folder: target folder; by default the run's folder, or ``runs/interactive`` when a person runs the notebook.
            Only by default does the tracker that ``ftkit run --track`` names get the results, too.

    Returns:
        The path of the file.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value cannot be written as JSON.
    """
    record = {"settings": plain(settings, "settings"), "metrics": plain(metrics, "metrics")}
    path = Path(folder or run_folder()) / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if folder is None and os.environ.get("FTKIT_TRACK"):
        from ftkit.training.tracking import track_scores

        track_scores(**record)
    return path


def write_whole(path: Path, text: str) -> Path:
    """Write a UTF-8 text file whole or not at all: into a temporary file beside it, which then replaces it.

    Args:
        path: the file; returned.
        text: its content; line ends are written as they are, and half a surrogate pair as its escape.

    Raises:
        OSError: it cannot be written; the message says why and what to do.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with writing(path):
        try:
            unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
            return unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Word an error of the operating system as a sentence: what cannot be written, why, what to do.

    Args:
        path: the file or folder that is written inside the ``with`` block.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = "free some space, or give a folder on another disk"
        else:
            cure = "give a folder that you can write to"
        raise type(error)(f"{path} cannot be written ({error.strerror or error}): {cure}.") from None


def run_folder() -> Path:
    """Folder of the run, or ``runs/interactive`` when a person runs the notebook."""
    return Path(os.environ.get("FTKIT_RUN_DIR") or runs_folder() / "interactive")


def runs_folder() -> Path:
    """Default folder for runs: ``runs`` in the current folder."""
    # JupyterLab starts kernels in the folder of the notebook, where only notebooks belong
    above = {"notebooks": 1, "deeper": 2}.get(Path.cwd().name, 0)
    return Path.cwd().joinpath(*[".."] * above).resolve() / "runs"


def results_table(metrics: Mapping[str, Mapping[str, Any]]) -> "pd.DataFrame":
    """Format results for people: one row per method, numbers as text, a dash where a number is missing.

    Args:
        metrics: entries by method, as for ``save_metrics``.

    Returns:
        Columns accuracy, 95 % interval, seeds, trainable parameters, seconds. The peak memory is that of a whole
        process and depends on what ran before: it does not rank methods, and is in metrics.json only.
    """
    import pandas as pd

    def shown(value: Any, form: str) -> str:
        return "–" if value is None else form.format(value)

    rows = []
    for method in metrics.values():
        seeds, ci95 = method.get("seeds"), method.get("ci95")
        rows.append(
            (
                shown(method.get("accuracy"), "{:.3f}"),
                shown(ci95, "{0[0]:.3f} to {0[1]:.3f}"),
                shown(len(seeds) if isinstance(seeds, list | tuple) else seeds, "{}"),
                shown(method.get("trainable_parameters"), "{:,}"),
                shown(method.get("seconds"), "{:,.1f}"),
            )
        )
    return pd.DataFrame(rows, index=[name.replace("_", " ") for name in metrics], columns=_COLUMNS)


def format_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Format `results_table` for a terminal: aligned plain text without a trailing newline."""
    return results_table(metrics).to_string()


def plain(value: Any, where: str) -> Any:
    """Convert a value to what JSON can hold.

    Args:
        value: numbers, texts, paths, arrays, tensors, and lists or dictionaries of them.
        where: name of the value in error messages.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value cannot be written as JSON.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: give a finite number, or None if there is none.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(
        f"{where} has the type {type(value).__name__}, which cannot be written as JSON: give a number, text or list."
    )


def append_to_ledger(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one run to the ledger; several processes may do so at the same time.

    The line is on the disk when this function returns.

    Args:
        path: path of the ledger; the file and its folder are created if missing.
        entry: record of the run: ``id``, ``source`` (run or panel), ``notebook``, ``tier``, ``started``,
            ``parameters``, ``settings``, ``metrics``, ``seconds``, ``peak_rss_mib``, ``error``.

    Raises:
        TypeError, ValueError: a value cannot be written as JSON; nothing is written.
        OSError: the ledger cannot be written; the message says why and what to do.
    """
    line = json.dumps(plain(entry, "entry")) + "\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path), path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a crash cut the last line short: start a new line after it
                    line = "\n" + line
            left = memoryview(line.encode())
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # no half line on a full disk
                raise


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read all entries of a ledger, oldest first; an empty list if there is no such file.

    A line that cannot be read, for example because a crash cut it short, is skipped with a warning.
    """
    if not path.exists():
        return []
    try:
        with _locked(path):
            lines = path.read_bytes().split(b"\n")
    except OSError:  # a lock cannot be made in a folder that is only to be read
        lines = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            warnings.warn(f"Line {number} of {path} is incomplete or not a JSON object: it is skipped.", stacklevel=2)
    return entries


def _locked(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(path.with_name(f".{path.name}.lock"))
