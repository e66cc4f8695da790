"""Measure the time and peak memory of each notebook at the smoke and the cpu tier, from imports to the last cell.

``--write`` also leaves the notebook as it is committed: with the outputs of the cpu tier, executed once from top to
bottom, and the measured figures in its header. It records the figures in data/measured.json, and puts the results of
notebook 01 into the table of the README, and the minutes of each lesson into docs/instructors.md.

    python benchmarks/notebooks.py [01_full_fine_tuning …] [--write]
"""

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path

import nbformat

from ftkit.lab.course.guide import GUIDE, MEASURED, filled, replace_between
from ftkit.lab.course.minutes import sections_of, total_minutes
from ftkit.lab.results import results_table
from ftkit.lab.runs.execution import execute

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
README = Path(__file__).parents[1] / "README.md"
SHOWN_IN_README = "01_full_fine_tuning"


def measure(notebook: Path, tier: str, folder: Path) -> tuple[dict[str, float], Path]:
    """Execute a notebook with the defaults of a tier; returns its figures and the executed copy."""
    executed = folder / f"{tier}.ipynb"
    env = {"FTKIT_TIER": tier, "FTKIT_RUN_DIR": str(folder)}
    run = execute(notebook, executed, {}, env=env, progress=os.isatty(2))
    if run.error:
        raise SystemExit(f"{notebook.stem} at the {tier} tier: {run.error}")
    return {"seconds": round(run.seconds, 1), "peak_rss_mib": round(run.peak_rss_mib)}, executed


def write(notebook: Path, executed: Path, figures: dict[str, dict[str, float]]) -> None:
    """Replace the notebook by its executed copy, without the metadata that execution adds, and record its figures."""
    cells = nbformat.read(executed, as_version=4)
    cells.metadata.pop("papermill", None)
    cells.metadata.pop("widgets", None)
    for cell in cells.cells:
        for added in ("papermill", "execution", "exception"):
            cell.metadata.pop(added, None)
        if not cell.metadata.get("tags", [True]):
            del cell.metadata["tags"]
    needs = f"{needs_table(figures)}\n\n{reading_minutes(cells)}"
    cells.cells[0].source = replace_between("needs", needs, cells.cells[0].source)
    nbformat.write(cells, notebook)
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    measured[notebook.stem] = {**figures, **digests(cells)}
    MEASURED.write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    GUIDE.write_text(filled(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


def needs_table(figures: dict[str, dict[str, float]]) -> str:
    """The table of time and memory in the header of the notebook."""
    rows = [
        f"| {tier} | {_minutes(figures[tier]['seconds'])} | {figures[tier]['peak_rss_mib'] / 1024:.1f} GiB |"
        for tier in ("smoke", "cpu")
    ]
    return "\n".join(["| tier | time on 2 cores | memory |", "|---|---|---|", *rows, "| gpu | not measured | |"])


def reading_minutes(notebook: nbformat.NotebookNode) -> str:
    """How long a person needs, for the header of the notebook."""
    read, solve = total_minutes(sections_of(notebook))
    return f"Reading takes about {read} minutes, the exercises about {solve}."


def digests(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Digests of the code and of the outputs, which show whether either was edited after the measurement."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    parts = {"code": [cell.source for cell in code], "outputs": [cell.outputs for cell in code]}
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for name, part in parts.items()
    }


def write_results(metrics: dict[str, dict[str, object]]) -> None:
    """Replace the table of results in the README by those of a run."""
    table = results_table(metrics)
    lines = [["method", *table.columns], ["---"] * (1 + len(table.columns)), *map(list, table.itertuples())]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    README.write_text(replace_between("results", markdown, README.read_text(encoding="utf-8")), encoding="utf-8")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, without .ipynb; all by default")
    parser.add_argument("--write", action="store_true", help="keep the outputs of the cpu tier and the figures")
    arguments = parser.parse_args()
    results = {}
    for notebook in sorted(NOTEBOOKS.rglob("*.ipynb"), key=lambda path: path.name):
        if arguments.names and notebook.stem not in arguments.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures = {}
            for tier in ("smoke", "cpu"):
                figures[tier], executed = measure(notebook, tier, Path(folder))
            if arguments.write:
                write(notebook, executed, figures)
                if notebook.stem == SHOWN_IN_README:
                    write_results(json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))["metrics"])
        results[notebook.stem] = figures
    print(json.dumps(results))


if __name__ == "__main__":
    main()
