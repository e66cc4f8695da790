"""Executing a notebook with parameters, and the results that it leaves.

A run is a folder ``OUT/<run id>/`` with the executed ``notebook.ipynb``, the ``metrics.json`` that the notebook
wrote through `save_metrics` and, if asked for, a ``report.html`` (`ftkit.report`).
"""

import ast
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ftkit import TIERS
from ftkit.execution import execute
from ftkit.schema import settings_of


@dataclass
class Run:
    """One execution of a notebook.

    ``changed`` maps each parameter that was given another value than its default to (default, value); ``settings``
    and ``metrics`` are the two parts of metrics.json, None where the notebook did not come so far; ``error`` is one
    line, None if the run finished; ``peak_rss_mib`` is the kernel's, its child processes included.
    """

    id: str
    folder: Path
    notebook: Path
    tier: str
    started: datetime
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    settings: dict[str, Any] | None = None
    metrics: dict[str, dict[str, Any]] | None = None
    error: str | None = None
    seconds: float = 0.0
    peak_rss_mib: float = 0.0
    report: Path | None = None

    @property
    def executed(self) -> Path:
        """The executed copy of the notebook."""
        return self.folder / "notebook.ipynb"


def run_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    tier: str = "cpu",
    out: str | Path = "runs",
    html: bool = False,
    progress: bool = True,
) -> Run:
    """Execute a notebook with papermill, on this interpreter and in the current folder.

    Relative paths among the parameters therefore mean what they mean to the caller. A cell that fails, a kernel
    that dies and Ctrl-C end the run, not the caller: what was executed is kept, and ``Run.error`` says what happened.

    Args:
        notebook: a path, or the name of a notebook in ``notebooks/``.
        parameters: values for names of the notebook's `parameters` cell.
        tier: smoke, cpu or gpu; the notebook's parameter of that name.
        out: folder that the run's own folder is made in.
        html: also write ``report.html``.
        progress: show a bar on stderr: cells done, and the heading of the one that runs.

    Raises:
        FileNotFoundError: no such notebook.
        ValueError: an unknown tier or parameter, or a file that is no notebook; nothing has run.
    """
    source = find_notebook(notebook)
    given = {"tier": tier, **(parameters or {})}
    changed = check_parameters(source, given)
    run = _new_run(source, given, Path(out))
    run.changed = changed
    env = {"FTKIT_RUN_DIR": str(run.folder), "FTKIT_TIER": run.tier}
    run.error, run.seconds, run.peak_rss_mib = execute(source, run.executed, given, env=env, progress=progress)
    written = run.folder / "metrics.json"
    if written.exists():
        record = json.loads(written.read_text(encoding="utf-8"))
        run.settings, run.metrics = record["settings"], record["metrics"]
    if html:
        from ftkit.report import write_report

        run.report = write_report(run)
    return run


def find_notebook(name: str | Path) -> Path:
    """The absolute path of a notebook given by path or by name.

    Raises:
        FileNotFoundError: it is neither a file nor a name in ``notebooks/``; the message has the nearest name.
    """
    folders = (Path(), Path("notebooks"), Path(__file__).parents[1] / "notebooks")
    file = Path(name) if Path(name).suffix == ".ipynb" else Path(f"{name}.ipynb")
    for folder in folders:
        if (folder / file).is_file():
            return (folder / file).resolve()
    known = sorted({path.stem for folder in folders for path in folder.glob("*.ipynb")})
    hint = f"did you mean {_nearest(file.stem, known)!r}? {_listed(known)}" if known else "give the path of one"
    raise FileNotFoundError(f"No notebook {str(name)!r}: {hint}.")


def assets_of(notebook: Path) -> list[str]:
    """Names of the assets that a notebook reads with its default parameters, as its metadata lists them."""
    import nbformat

    return list(nbformat.read(notebook, as_version=4).metadata.get("ftkit", {}).get("assets", []))


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which of the given parameters, ``tier`` among them, differ from their defaults: name to (default, value).

    Raises:
        ValueError: an unknown name or, where the notebook has a settings class, a value that can't be.
    """
    schema = settings_of(notebook)
    if schema is not None:
        return schema.at(**given).differing()
    known = default_parameters(notebook)
    for name in given:
        if name not in known:  # papermill would only warn, and run for minutes with the default
            nearest = f": did you mean {_nearest(name, known)!r}? {_listed(known)}" if known else ""
            raise ValueError(f"Notebook {notebook.stem} has no parameter {name!r}{nearest}.")
    if given["tier"] not in TIERS:
        raise ValueError(f"Unknown tier {given['tier']!r}: did you mean {_nearest(given['tier'], TIERS)!r}?")
    return {name: (known[name], value) for name, value in given.items() if name != "tier" and value != known[name]}


def default_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults of the cell tagged `parameters`; a default that is no literal is given as its source text.

    Raises:
        ValueError: the file is no notebook, or its `parameters` cell is no Python.
    """
    import nbformat

    try:
        cells = nbformat.read(notebook, as_version=4).cells
        tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        # parsed here since papermill's own reader gives up on a line whose comment has a "="
        statements = ast.parse(tagged[0] if tagged else "").body
    except (ValueError, AttributeError, SyntaxError, nbformat.ValidationError) as error:
        raise ValueError(f"{notebook.name} can't be read as a notebook: {str(error).splitlines()[0]}.") from error
    defaults = {}
    for statement in statements:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            try:
                defaults[ast.unparse(target)] = ast.literal_eval(statement.value)
            except ValueError:
                defaults[ast.unparse(target)] = ast.unparse(statement.value)
    return defaults


def _new_run(source: Path, given: dict[str, Any], out: Path) -> Run:
    """Make a folder of its own for the run: its id is unique also among processes that start in the same second."""
    started = datetime.now().astimezone()
    digest = hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()[:6]
    first = f"{source.stem}-{started:%Y%m%d-%H%M%S}-{digest}"
    out.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:
        run_id = first if attempt == 1 else f"{first}-{attempt}"
        try:
            (out / run_id).mkdir()  # atomic: of several processes one gets it
        except FileExistsError:
            attempt += 1
        else:
            return Run(run_id, (out / run_id).resolve(), source, given["tier"], started)


def _nearest(name: str, names: Any) -> str:
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _listed(names: Any) -> str:
    return "It can be " + ", ".join(names)
