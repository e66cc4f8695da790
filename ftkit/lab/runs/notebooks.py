"""One run of a notebook with its parameters, and what it leaves behind.

A run is a folder ``OUT/<run id>/`` with the executed ``notebook.ipynb`` and the ``metrics.json`` that the notebook
wrote through `save_metrics`; it adds a line to ``OUT/ledger.jsonl``.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ftkit import TIERS
from ftkit.errors import nearest
from ftkit.lab import results
from ftkit.lab.results import plain
from ftkit.lab.runs.execution import execute
from ftkit.lab.schema import in_words
from ftkit.lab.settings import settings_of


@dataclass
class Run:
    """One execution of a notebook.

    ``changed`` maps each parameter that was given another value than its default to (default, value); ``digests`` and
    ``identity`` are what `identify` returns; ``settings`` and ``metrics`` are the two parts of metrics.json, None where
    the notebook did not come so far; ``error`` is one line, None if the run finished; ``peak_rss_mib`` is the kernel's,
    its child processes included.
    """

    id: str
    folder: Path
    notebook: Path
    tier: str
    started: datetime
    parameters: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]
    digests: dict[str, str]
    identity: str
    settings: dict[str, Any] | None = None
    metrics: dict[str, dict[str, Any]] | None = None
    error: str | None = None
    seconds: float = 0.0
    peak_rss_mib: float = 0.0

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
        progress: show a bar on stderr: cells done, and the heading of the one that runs.

    Raises:
        FileNotFoundError: no such notebook.
        ValueError: an unknown tier or parameter, or a file that is no notebook; nothing has run.
    """
    source = find_notebook(notebook)
    run = _new_run(source, {"tier": tier, **(parameters or {})}, Path(out))
    env = {"FTKIT_RUN_DIR": str(run.folder), "FTKIT_TIER": run.tier}
    run.error = "It ended before the first cell"
    try:
        run.error, run.seconds, run.peak_rss_mib = execute(
            source, run.executed, run.parameters, env=env, progress=progress
        )
    finally:
        _record(run)
    return run


def find_notebook(name: str | Path) -> Path:
    """The absolute path of a notebook given by path or by name.

    Raises:
        FileNotFoundError: it is neither a file nor a name in ``notebooks/``; the message has the nearest name.
    """
    folders = (Path(), Path("notebooks"), Path(__file__).parents[3] / "notebooks")
    file = Path(name) if Path(name).suffix == ".ipynb" else Path(f"{name}.ipynb")
    for folder in folders:
        if (folder / file).is_file():
            return (folder / file).resolve()
    known = sorted({path.stem for folder in folders for path in folder.glob("*.ipynb")})
    hint = f"did you mean {nearest(file.stem, known)!r}? {_listed(known)}" if known else "give the path of one"
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
            hint = f": did you mean {nearest(name, known)!r}? {_listed(known)}" if known else ""
            raise ValueError(f"Notebook {notebook.stem} has no parameter {name!r}{hint}.")
    if given["tier"] not in TIERS:
        raise ValueError(f"Unknown tier {given['tier']!r}: did you mean {nearest(given['tier'], TIERS)!r}?")
    return {name: (known[name], value) for name, value in given.items() if name != "tier" and value != known[name]}


def identify(notebook: Path, given: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """What a run stands on, and what tells it from other runs.

    Args:
        notebook: its path.
        given: the parameters, ``tier`` among them, checked.

    Returns:
        Digests of the notebook's code cells (under "notebook") and of the file or folder that a parameter names
        (under the parameter's name); and one digest of these, the notebook's name and all parameters.
    """
    schema = settings_of(notebook)
    values = plain(schema.at(**given).model_dump() if schema else given, "parameters")
    digests = {"notebook": _code_digest(notebook, notebook.stat().st_mtime_ns)}
    digests |= {name: digest for name, value in values.items() if (digest := _content_digest(value))}
    return digests, _digest(json.dumps([notebook.stem, digests, values], sort_keys=True))


def parameters_help(notebook: Path) -> str:
    """The parameters that ``ftkit run`` takes for a notebook, two lines each, as argparse would list them."""
    schema = settings_of(notebook)
    if schema is None:
        listed = {name: [f"default {default}"] for name, default in default_parameters(notebook).items()}
    else:
        listed = {}
        for parameter in schema.parameters()[1:]:  # the tier is an option
            kind = ": ".join(filter(None, [parameter.kind, parameter.allowed_units]))
            defaults = [
                json.dumps(default) if isinstance(default, list) else in_words(default)  # as -p takes it
                for default in parameter.defaults.values()
            ]
            default = defaults[0] if len(set(defaults)) == 1 else " | ".join(defaults)
            listed[parameter.name] = [parameter.help, f"{kind}; default {default}"]
    indent = max(map(len, listed), default=0) + 4
    text = [f"parameters of {notebook.stem}, given as -p NAME=VALUE (defaults at {' | '.join(TIERS)}):"]
    for name, lines in listed.items():
        for label, line in zip((name, ""), lines, strict=False):
            text.append(f"  {label:<{indent - 2}}{line}")
    return "\n".join(text)


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
    changed = check_parameters(source, given)
    digests, identity = identify(source, given)
    started = datetime.now().astimezone()
    first = f"{source.stem}-{started:%Y%m%d-%H%M%S}-{identity[:6]}"
    out.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:
        run_id = first if attempt == 1 else f"{first}-{attempt}"
        try:
            (out / run_id).mkdir()  # atomic: of several processes one gets it
        except FileExistsError:
            attempt += 1
        else:
            folder = (out / run_id).resolve()
            return Run(run_id, folder, source, given["tier"], started, given, changed, digests, identity)


def _record(run: Run) -> None:
    """Read what the notebook saved, and enter the run in the ledger."""
    written = run.folder / "metrics.json"
    if written.exists():
        record = json.loads(written.read_text(encoding="utf-8"))
        run.settings, run.metrics = record["settings"], record["metrics"]
    entry = {
        "id": run.id,
        "source": "run",
        "notebook": run.notebook.stem,
        "tier": run.tier,
        "started": run.started.isoformat(timespec="seconds"),
        "parameters": run.parameters,
        "settings": run.settings,
        "metrics": run.metrics,
        "seconds": run.seconds,
        "peak_rss_mib": run.peak_rss_mib,
        "error": run.error,
        "digests": run.digests,
        "identity": run.identity,
    }
    results.append_to_ledger(run.folder.parent / results.LEDGER, entry)


@functools.cache
def _code_digest(notebook: Path, changed_at: int) -> str:
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    return _digest(json.dumps([cell.source for cell in cells if cell.cell_type == "code"]))


def _content_digest(value: Any) -> str | None:
    """Of the file that a value names, or of the files in the folder; None where it names none."""
    if not isinstance(value, str) or not value:
        return None
    try:
        path = Path(value).resolve()
        files = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
        return _digest("".join(_file_digest(file, file.stat().st_mtime_ns) for file in files)) if files else None
    except (OSError, ValueError):  # no path at all, such as a long text
        return None


@functools.cache
def _file_digest(file: Path, changed_at: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _listed(names: Any) -> str:
    return "It can be " + ", ".join(names)
