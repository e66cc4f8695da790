"""What a run scored: the outcome of each seed, metrics.json, the results table, the ledger of all runs."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from ftkit.metrics import Evaluation
    from ftkit.training.state import History

COLUMNS = ("accuracy", "95 % interval", "seeds", "trainable parameters", "seconds", "peak memory (MiB)")


@dataclass(frozen=True)
class Outcome:
    """One training run of one seed.

    Attributes:
        seed: that it was made with.
        history: of the training; it has the cost too.
        evaluations: of the trained model, by split; a score is looked at in the first one first.
        figures: by name, what else was measured of it; a study records them.
    """

    seed: int
    history: "History"
    evaluations: Mapping[str, "Evaluation"]
    figures: Mapping[str, float] = field(default_factory=dict)


def mean_figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The further figures of one method's runs, each the mean over them."""
    return {name: sum(outcome.figures[name] for outcome in outcomes) / len(outcomes) for name in outcomes[0].figures}


def method_entry(
    evaluations: "Sequence[Evaluation]", costs: Sequence[Any], *, seeds: Sequence[int], trainable_parameters: int
) -> dict[str, Any]:
    """One method's entry in metrics.json.

    Args:
        evaluations: one a seed, on the same rows.
        costs: one a seed, each with ``seconds`` and ``peak_rss_mib`` (a History or a Meter); entered are the mean
            seconds and the highest peak.
        seeds: of the runs.
        trainable_parameters: number of weights that the method trains.
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
    """Write a notebook's results as ``metrics.json``, whole or not at all; called by the notebook itself.

    Args:
        settings: the settings that the results were got with.
        metrics: for each method ``accuracy``, ``ci95`` (low, high), ``seeds`` (a list), ``trainable_parameters``,
            ``seconds`` and ``peak_rss_mib``; None where a figure makes no sense.
        folder: where to; by default the run's folder, or ``runs/interactive`` when a person runs the notebook.

    Returns:
        The path of the file.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value has no JSON form.
    """
    folder = folder or os.environ.get("FTKIT_RUN_DIR") or runs_folder() / "interactive"
    record = {"settings": plain(settings, "settings"), "metrics": plain(metrics, "metrics")}
    path = Path(folder) / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"metrics.json.{os.getpid()}")
    unfinished.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def runs_folder() -> Path:
    """Where runs go by default: ``runs`` in the current folder."""
    # JupyterLab starts kernels in notebooks/, which is to hold notebooks only
    return (Path.cwd().parent if Path.cwd().name == "notebooks" else Path.cwd()) / "runs"


def results_table(metrics: Mapping[str, Mapping[str, Any]]) -> "pd.DataFrame":
    """The results as people read them: a row a method, `COLUMNS` as text, a dash for what there is no figure for."""
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
                shown(method.get("peak_rss_mib"), "{:,.0f}"),
            )
        )
    return pd.DataFrame(rows, index=[name.replace("_", " ") for name in metrics], columns=list(COLUMNS))


def format_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """`results_table` for a terminal: aligned plain text, no trailing newline."""
    return results_table(metrics).to_string()


def plain(value: Any, where: str) -> Any:
    """``value`` as plain JSON; ``where`` names it in errors."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: give a finite number, or None for no figure.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which has no JSON form: give a number, text or list.")


LEDGER = "ledger.jsonl"


def append_to_ledger(path: Path, entry: Mapping[str, Any]) -> None:
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


def read_ledger(path: Path) -> list[dict[str, Any]]:
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
