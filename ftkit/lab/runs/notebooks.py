"""Run a notebook with parameters.

A run is a folder ``OUT/<run id>/`` with its ``settings.yaml``, the executed ``notebook.ipynb`` and the ``metrics.json``
that the notebook wrote through `save_metrics`, and a line in ``OUT/ledger.jsonl``.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ftkit import TIERS
from ftkit.errors import SettingsError, did_you_mean, first_line
from ftkit.lab.results import LEDGER, append_to_ledger, plain, results_table, write_whole, writing
from ftkit.lab.runs.execution import execute
from ftkit.lab.schema import in_words
from ftkit.lab.settings import settings_of
from ftkit.lab.settings_file import format_settings

_AT_MOST = ("rows", "test_rows", "examples")  # a notebook may use fewer than given, if the data has no more

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # of accelerate's, those that need only their package


@dataclass
class Run:
    """One execution of a notebook.

    Attributes:
        id: name of the run's folder.
        folder: the run's folder.
        notebook: path of the notebook.
        tier: smoke, cpu or gpu.
        started: time at the start, with the time zone.
        parameters: the given parameters, ``tier`` among them.
        changed: parameters whose value differs from the default, as name to (default, value).
        digests, identity: see `identify`.
        settings, metrics: the two parts of metrics.json, None if the notebook did not get that far.
        error: error message in one line, None if the run finished.
        seconds: duration of the execution.
        peak_rss_mib: peak memory of the kernel and its child processes, in MiB.
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
    track: str | None = None,
) -> Run:
    """Execute a notebook with papermill, in this Python environment and in the current folder.

    A relative path in a parameter is therefore relative to the caller's folder. Whatever ends the run early (a cell
    that fails, a kernel that dies, a full disk, Ctrl-C) raises no error: the cells executed so far are kept and
    ``Run.error`` says what happened. It is also an error if metrics.json has other settings than those given.

    Args:
        notebook: a path, or the name of a notebook in ``notebooks/``.
        parameters: values by name, for the notebook's `parameters` cell.
        tier: smoke, cpu or gpu; the notebook's parameter of that name.
        out: folder in which the run's own folder is created.
        progress: show a bar on stderr with the number of executed cells and the heading of the current one.
        track: one of ``TRACKERS``, which gets the losses of every ``fit`` and the scores; None for none.

    Returns:
        The run; it is in the ledger.

    Raises:
        FileNotFoundError: there is no such notebook.
        ValueError: the tier, a parameter or the tracker is unknown, or the file is not a notebook with one `parameters`
            cell; nothing has run.
        OSError: the folder cannot be written; nothing has run and nothing is left.
    """
    source = find_notebook(notebook)
    check_tracker(track)
    run = _new_run(source, {"tier": tier, **(parameters or {})}, Path(out))
    env = {"FTKIT_RUN_DIR": str(run.folder), "FTKIT_TIER": run.tier, "FTKIT_TRACK": track or ""}
    run.error = "Interrupted"
    try:
        write_whole(run.folder / "settings.yaml", settings_text(source, run.parameters))
        run.error, run.seconds, run.peak_rss_mib = execute(
            source, run.executed, run.parameters, env=env, progress=progress
        )
    finally:
        if run.executed.exists():
            _read_metrics(run)
            _record(run)
        else:  # nothing has run
            shutil.rmtree(run.folder, ignore_errors=True)
    return run


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is unknown or not installed.

    Args:
        name: one of ``TRACKERS``, or None for none.

    Raises:
        ValueError: it cannot be used; the message says what to do.
    """
    if name is not None and name not in TRACKERS:
        raise ValueError(
            f"There is no tracker {name!r}: {did_you_mean(name, TRACKERS)} The trackers are {', '.join(TRACKERS)}."
        )
    if name is not None and importlib.util.find_spec(name) is None:
        raise ValueError(f"The tracker {name} is not installed: run `pip install {name}`, or leave --track out.")


def settings_text(notebook: Path, given: Mapping[str, Any], grid: Mapping[str, Sequence[Any]] | None = None) -> str:
    """Write the settings of a run, or of a grid, as the text of a settings file.

    Args:
        notebook: path of the notebook.
        given: checked parameters, ``tier`` among them unless it varies.
        grid: the values of the parameters that vary.
    """
    parameters = {name: plain(value, name) for name, value in given.items() if name != "tier"}
    schema = settings_of(notebook)
    return format_settings(
        _name_of(notebook),
        given.get("tier"),
        parameters,
        {name: plain(values, name) for name, values in (grid or {}).items()},
        schema=schema,
        defaults=None if schema else default_parameters(notebook),
    )


def _name_of(notebook: Path) -> str:
    """What `find_notebook` finds a notebook by: its name alone, a path from the current folder, or a whole path."""
    for name in (notebook.stem, os.path.relpath(notebook)):
        with contextlib.suppress(FileNotFoundError, ValueError):  # on another drive there is no relative path
            if not name.startswith("..") and find_notebook(name) == notebook:
                return name
    return str(notebook)


def make_out_folder(out: str | Path) -> Path:
    """Create the folder of the runs, unless it exists, and return its path.

    Raises:
        OSError: it cannot be created, or nothing can be written there, for example because the disk is full.
    """
    out = Path(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"x" * 4096)
    return out


def find_notebook(name: str | Path) -> Path:
    """Find the absolute path of a notebook.

    Args:
        name: a path, or the name of a notebook in ``notebooks/`` or ``notebooks/deeper/``.

    Raises:
        FileNotFoundError: there is no such notebook; the message suggests the nearest name.
    """
    lessons = [Path("notebooks"), Path(__file__).parents[3] / "notebooks"]
    folders = (Path(), *lessons, *(folder / "deeper" for folder in lessons))
    file = Path(name) if Path(name).suffix == ".ipynb" else Path(f"{name}.ipynb")
    for folder in folders:
        if (folder / file).is_file():
            return (folder / file).resolve()
    known = sorted({path.stem for folder in folders for path in folder.glob("*.ipynb")})
    hint = f"{did_you_mean(file.stem, known)} The notebooks are {', '.join(known)}" if known else "give its path"
    raise FileNotFoundError(f"There is no notebook {str(name)!r}: {hint}.")


def assets_of(notebook: Path) -> list[str]:
    """Names of the assets that a notebook needs with its default parameters, as listed in its metadata."""
    import nbformat

    return list(nbformat.read(notebook, as_version=4).metadata.get("ftkit", {}).get("assets", []))


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Check parameters and find those that differ from their defaults.

    Args:
        notebook: path of the notebook.
        given: parameters, ``tier`` among them.

    Returns:
        The parameters that differ, as name to (default, value).

    Raises:
        ValueError: a name is unknown, the notebook has not exactly one `parameters` cell or, if it has a settings
            class, a value is not allowed.
    """
    known = default_parameters(notebook)
    schema = settings_of(notebook)
    if schema is not None:
        return schema.at(**given).differing()
    if "tier" not in known:
        raise ValueError(f'The `parameters` cell of {notebook.name} has no tier: add the line tier = "cpu" to it.')
    for name in given:
        if name not in known:  # papermill would only warn, then run for minutes with the default
            hint = f": {did_you_mean(name, known)} It has {', '.join(known)}" if known else ""
            raise ValueError(f"The notebook {notebook.stem} has no parameter {name!r}{hint}.")
    if given["tier"] not in TIERS:
        hint = f"{did_you_mean(given['tier'], TIERS)} The tiers are {', '.join(TIERS)}"
        raise ValueError(f"There is no tier {given['tier']!r}: {hint}.")
    return {name: (known[name], value) for name, value in given.items() if name != "tier" and value != known[name]}


def has_parameter(notebook: Path, name: str) -> bool:
    """Whether a notebook has a parameter of this name."""
    schema = settings_of(notebook)
    return name in (schema.model_fields if schema else default_parameters(notebook))


def identify(notebook: Path, given: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Compute the digests that tell a run from other runs.

    Args:
        notebook: path of the notebook.
        given: checked parameters, ``tier`` among them.

    Returns:
        digests: digest of the notebook's code cells under "notebook", and of the files and folders that a parameter
            names, under the parameter's name.
        identity: one digest of all these, the notebook's name and all parameters.
    """
    schema = settings_of(notebook)
    values = plain(schema.at(**given).model_dump() if schema else given, "parameters")
    digests = {"notebook": _code_digest(notebook, notebook.stat().st_mtime_ns)}
    digests |= {name: digest for name, value in values.items() if (digest := _content_digest(value))}
    return digests, _digest(json.dumps([notebook.stem, digests, values], sort_keys=True))


def parameters_help(notebook: Path) -> str:
    """Help text on the parameters of a notebook for ``ftkit run``, two lines per parameter."""
    schema = settings_of(notebook)
    if schema is None:
        listed = {name: [f"default {default}"] for name, default in default_parameters(notebook).items()}
    else:
        listed = {}
        for parameter in schema.parameters()[1:]:  # the tier has an option of its own
            kind = ": ".join(filter(None, [parameter.kind, parameter.allowed_units]))
            defaults = [
                json.dumps(default) if isinstance(default, list) else in_words(default)  # as one gives it to -p
                for default in parameter.defaults.values()
            ]
            default = defaults[0] if len(set(defaults)) == 1 else " | ".join(defaults)
            listed[parameter.name] = [parameter.help, f"{kind}; default {default}"]
    indent = max(map(len, listed), default=0) + 4
    text = [f"parameters of {notebook.stem}, set with -p NAME=VALUE (defaults at {' | '.join(TIERS)}):"]
    for name, lines in listed.items():
        for label, line in zip((name, ""), lines, strict=False):
            text.append(f"  {label:<{indent - 2}}{line}")
    return "\n".join(text)


def default_parameters(notebook: Path) -> dict[str, Any]:
    """Read names and defaults from the cell tagged `parameters`.

    Returns:
        Defaults by name; one that is not a literal is returned as source text.

    Raises:
        ValueError: the file is not a notebook, or has not exactly one `parameters` cell, or that is not plain Python.
    """
    return dict(_default_parameters(notebook, notebook.stat().st_mtime_ns))


@functools.cache
def _default_parameters(notebook: Path, changed_at: int) -> dict[str, Any]:
    import nbformat

    try:
        cells = nbformat.read(notebook, as_version=4).cells
        tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise ValueError(f"{notebook.name} cannot be read as a notebook: {first_line(error)}.") from error
    if len(tagged) != 1 or tagged[0].cell_type != "code":  # of several, only the last one would count
        have = f"{len(tagged) or 'no'} cells have" if len(tagged) != 1 else f"a {tagged[0].cell_type} cell has"
        raise ValueError(
            f"{notebook.name} needs the tag `parameters` on one code cell, which sets the parameters and the tier, "
            f"and {have} it: correct the tags."
        )
    try:  # not by papermill's own reader, which fails on a line with a "=" in its comment
        statements = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ValueError(
            f"The `parameters` cell of {notebook.name} is not plain Python ({line!r}): move magics and shell commands "
            "to another cell, and correct mistakes."
        ) from None
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
    """Create the run's folder; its id is unique even among processes that start in the same second."""
    changed = check_parameters(source, given)
    digests, identity = identify(source, given)
    started = datetime.now().astimezone()
    first = f"{source.stem}-{started:%Y%m%d-%H%M%S}-{identity[:6]}"
    make_out_folder(out)
    attempt = 1
    while True:
        run_id = first if attempt == 1 else f"{first}-{attempt}"
        try:
            with writing(out / run_id):
                (out / run_id).mkdir()  # atomic: only one of several processes succeeds
        except FileExistsError:
            attempt += 1
        else:
            folder = (out / run_id).resolve()
            return Run(run_id, folder, source, given["tier"], started, given, changed, digests, identity)


def _read_metrics(run: Run) -> None:
    """Read what the notebook saved; a damaged file, and settings that are not what was given, are errors of the run."""
    written = run.folder / "metrics.json"
    try:
        record = json.loads(written.read_text(encoding="utf-8"))
        settings, metrics = (dict(plain(record[part], part)) for part in ("settings", "metrics"))
        results_table(metrics)
    except FileNotFoundError:
        return
    except Exception as error:  # anything may stand in the file
        damage = f"{type(error).__name__}: {first_line(error)}"
        run.error = run.error or f"metrics.json is damaged ({damage}): write it with nothing but `save_metrics`"
        return
    run.settings, run.metrics = settings, metrics
    schema, asked = settings_of(run.notebook), run.parameters
    if schema:
        with contextlib.suppress(SettingsError):  # a file that was given may be gone by now
            asked = plain(schema.at(**run.parameters).model_dump(), "parameters")
    asked = plain(asked, "parameters")
    for name in run.parameters:
        given, used = asked[name], settings.get(name, asked[name])
        fewer = name in _AT_MOST and isinstance(used, int) and isinstance(given, int) and used < given
        if used != given and not fewer:
            run.error = run.error or f"{name} was given as {given!r}, but the notebook used {used!r}"


def _record(run: Run) -> None:
    """Append the run to the ledger; a ledger that cannot be written is an error of the run."""
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
    try:
        append_to_ledger(run.folder.parent / LEDGER, entry)
    except OSError as error:
        run.error = run.error or str(error).rstrip(".")


@functools.cache
def _code_digest(notebook: Path, changed_at: int) -> str:
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    return _digest(json.dumps([cell.source for cell in cells if cell.cell_type == "code"]))


def _content_digest(value: Any) -> str | None:
    """Digest of the files that a value names: a file, those in a folder, those of a list; None if it names none."""
    if isinstance(value, list):
        digests = [_content_digest(item) for item in value]
        return _digest(json.dumps(digests)) if any(digests) else None
    if not isinstance(value, str) or not value:
        return None
    try:
        path = Path(value).resolve()
        files = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
        return _digest("".join(_file_digest(file, file.stat().st_mtime_ns) for file in files)) if files else None
    except (OSError, ValueError):  # not a path, for example a long text
        return None


@functools.cache
def _file_digest(file: Path, changed_at: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
