"""Compare runs: the settings in which they differ and their scores."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import TYPE_CHECKING, Any

from ftkit.lab.results import LEDGER, read_ledger, results_table, write_whole
from ftkit.lab.schema import in_words

if TYPE_CHECKING:
    import pandas as pd

_NOT_COMPARED = ("seed", "num_seeds", "keep")  # runs that differ only in these are pooled

_INTERVAL = (
    "95 % interval: for one run, the bootstrap over its rows and seeds; for several runs, mean ± 1.96 √(s²/n + "
    "p(1−p)/N), where s² is the variance between the n seeds, p the mean and N the number of test rows."
)


@dataclass(frozen=True)
class TableRow:
    """One method with one combination of settings.

    Attributes:
        settings: values of the settings that differ among the runs.
        method: name of the method.
        entry: its entry as in metrics.json, pooled over the runs.
    """

    settings: dict[str, Any]
    method: str
    entry: dict[str, Any]

    @property
    def name(self) -> str:
        """Settings and method as text."""
        return ", ".join([*(f"{name}={_shown(value)}" for name, value in self.settings.items()), self.method])


@dataclass(frozen=True)
class RunTable:
    """Comparison of the runs of one notebook.

    Attributes:
        notebook: name of the notebook.
        rows: one per method and combination of settings.
        superseded: number of runs left out, because the notebook or its data changed after them.
    """

    notebook: str
    rows: list[TableRow]
    superseded: int

    def table(self) -> "pd.DataFrame":
        """Table for people: the settings that differ, the method, then the columns of `results_table`."""
        table = results_table({str(i): row.entry for i, row in enumerate(self.rows)}).reset_index(drop=True)
        columns = {name: [_shown(row.settings[name]) for row in self.rows] for name in self.rows[0].settings}
        columns["method"] = [row.method.replace("_", " ") for row in self.rows]
        for place, (name, cells) in enumerate(columns.items()):
            table.insert(place, name, cells, allow_duplicates=True)
        return table

    def numbers(self) -> "pd.DataFrame":
        """Table for a file: the same numbers in full precision."""
        import pandas as pd

        cost = ("trainable_parameters", "seconds", "peak_rss_mib")
        lines = []
        for row in self.rows:
            low, high = row.entry.get("ci95") or (None, None)
            line = {"notebook": self.notebook, **row.settings, "method": row.method}
            line |= {"accuracy": row.entry.get("accuracy"), "low": low, "high": high}
            line |= {"seeds": len(row.entry.get("seeds") or [])} | {name: row.entry.get(name) for name in cost}
            lines.append(line)
        return pd.DataFrame(lines)

    @property
    def notes(self) -> list[str]:
        """Sentences to print below the table."""
        left_out = f"Left out: {self.superseded} runs of an earlier version of the notebook or its data."
        return [_INTERVAL, left_out] if self.superseded else [_INTERVAL]


def compare_runs(folder: Path, identities: Collection[str] | None = None) -> list[RunTable]:
    """Compare the runs in a folder's ledger that finished with results.

    If a run was repeated, the last repetition counts.

    Args:
        folder: folder of the runs.
        identities: identities of the runs to compare; all by default.

    Returns:
        One comparison per notebook.

    Raises:
        ValueError: the ledger has no such run.
    """
    runs = {}
    for entry in read_ledger(folder / LEDGER):
        wanted = identities is None or entry.get("identity") in identities
        if wanted and entry.get("metrics") and entry.get("settings") is not None and not entry.get("error"):
            key = entry.get("identity", entry["id"])
            runs.pop(key, None)  # so that it moves to the end
            runs[key] = entry
    if not runs:
        raise ValueError(f"There is nothing to compare: {folder / LEDGER} has no finished run with results.")
    notebooks = dict.fromkeys(entry["notebook"] for entry in runs.values())
    return [_comparison(name, [run for run in runs.values() if run["notebook"] == name]) for name in notebooks]


def format_comparisons(comparisons: Sequence[RunTable]) -> str:
    """Format comparisons for a terminal: one section per notebook, no trailing newline."""
    sections = []
    for comparison in comparisons:
        title = [comparison.notebook] if len(comparisons) > 1 else []
        sections.append("\n".join([*title, comparison.table().to_string(index=False), *comparison.notes]))
    return "\n\n".join(sections)


def write_comparisons(comparisons: Sequence[RunTable], folder: Path) -> tuple[Path, Path]:
    """Write ``compare.csv`` and ``compare.html`` into a folder and return their paths; the page needs no network."""
    import pandas as pd

    from ftkit import plots
    from ftkit.lab.runs.report import ABSOLUTE_PATH, write_page

    sections = []
    for comparison in comparisons:
        drawn: dict[str, Any] = {}
        for number, row in enumerate(comparison.rows):
            if row.entry.get("ci95"):
                name = ABSOLUTE_PATH.sub("…/", row.name)  # write_page removes folders only from text, not from figures
                drawn[f"{name} ({number})" if name in drawn else name] = row.entry
        figure = plots.scores(drawn, axis="accuracy")._repr_html_() if drawn else ""
        with pd.option_context("display.max_colwidth", None):
            table = comparison.table().to_html(index=False, border=0)
        sections.append({"title": comparison.notebook, "figure": figure, "table": table, "notes": comparison.notes})
    page = write_page(folder / "compare.html", "compare.html.j2", title="Runs compared", sections=sections)
    numbers = pd.concat([comparison.numbers() for comparison in comparisons])
    return write_whole(folder / "compare.csv", numbers.to_csv(index=False)), page


def _comparison(notebook: str, runs: Sequence[Mapping[str, Any]]) -> RunTable:
    latest = {version: digest for run in runs for version, digest in _versions(run).items()}
    current = [run for run in runs if all(latest[key] == digest for key, digest in _versions(run).items())]
    repetitions: dict[str, list[Mapping[str, Any]]] = {}
    for run in current:
        repetitions.setdefault(json.dumps(_attributes(run), sort_keys=True), []).append(run)
    attributes = {key: _attributes(same[0]) for key, same in repetitions.items()}
    names = dict.fromkeys(name for values in attributes.values() for name in values)
    differing = [name for name in names if len({json.dumps(values.get(name)) for values in attributes.values()}) > 1]
    rows = []
    for key in sorted(repetitions, key=lambda key: [_order(attributes[key].get(name)) for name in differing]):
        settings = {name: attributes[key].get(name) for name in differing}
        for method in dict.fromkeys(method for run in repetitions[key] for method in run["metrics"]):
            having = [run for run in repetitions[key] if method in run["metrics"]]
            pooled = _pooled([run["metrics"][method] for run in having], having[0])
            split = having[0]["metrics"][method].get("split", "test")
            rows.append(TableRow(settings, method if split == "test" else f"{method} ({split})", pooled))
    return RunTable(notebook, rows, len(runs) - len(current))


def _attributes(run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that two runs must share to be repetitions with other seeds."""
    settings = {name: value for name, value in run["settings"].items() if name not in _NOT_COMPARED}
    return settings | {"stopped": run.get("ended", "finished") != "finished"}


def _versions(run: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Digests of the notebook and of the files that the run read, by parameter and file names."""
    return {(name, json.dumps(run["parameters"].get(name))): digest for name, digest in run.get("digests", {}).items()}


def _pooled(entries: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """Pool one method's entries of several runs; without accuracies by seed, return the entry of the last run."""
    last = entries[-1]
    if len(entries) == 1 or not all(entry.get("by_seed") for entry in entries):
        return dict(last)
    by_seed = {
        seed: accuracy
        for entry in entries
        for seed, accuracy in zip(entry["seeds"], entry["by_seed"], strict=True)  # a repeated seed counts once
    }
    if len(by_seed) == len(last["by_seed"]):
        return dict(last)
    p, rows = mean(by_seed.values()), run["settings"].get("test_rows")
    ci95 = None
    if rows and last.get("split", "test") == "test":
        arm = 1.96 * math.sqrt(variance(by_seed.values()) / len(by_seed) + p * (1 - p) / rows)
        ci95 = [max(0.0, p - arm), min(1.0, p + arm)]
    seconds = [entry["seconds"] for entry in entries if entry.get("seconds") is not None]
    peaks = [entry["peak_rss_mib"] for entry in entries if entry.get("peak_rss_mib") is not None]
    return {
        "accuracy": p,
        "ci95": ci95,
        "seeds": list(by_seed),
        "trainable_parameters": last.get("trainable_parameters"),
        "seconds": mean(seconds) if seconds else None,
        "peak_rss_mib": max(peaks, default=None),
    }


def _order(value: Any) -> tuple[bool, float, str]:
    """Sort key: numbers by size, then texts."""
    number = isinstance(value, int | float)
    return not number, value if number else 0, str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return in_words(value)
    return json.dumps(value, ensure_ascii=False)  # in full: two rates must not look the same
