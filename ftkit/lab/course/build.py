"""The editions of the lessons: for students, for instructors, and a course folder of nbgrader."""

import ast
import copy
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import CourseError, first_line
from ftkit.lab.course.exercises import all_exercises, source_of
from ftkit.lab.course.judging import Exercise, in_words_of
from ftkit.lab.course.minutes import sections_of, sections_table
from ftkit.lab.results import write_whole, writing
from ftkit.lab.runs.notebooks import find_notebook
from ftkit.lab.studies.declaration import STUDIES_FOLDER
from ftkit.lab.studies.study import load_study

if TYPE_CHECKING:
    from nbformat import NotebookNode

LESSONS_FOLDER = Path(__file__).parents[3] / "notebooks"

_CONFIG = '''"""nbgrader's configuration; `ftkit course build` writes it once and leaves your changes alone."""

import os
import sys
from pathlib import Path

# nbgrader calls other programs of its environment by their names
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
# a lesson is graded offline and at its smallest tier, unless these variables say otherwise
os.environ.setdefault("FTKIT_OFFLINE", "1")
os.environ.setdefault("FTKIT_TIER", "smoke")

c = get_config()
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError  # your code goes here"}
c.ClearSolutions.text_stub = "*Your answer goes here.*"
c.Execute.timeout = 1800  # seconds for one cell; after nbgrader's 30 it would stop a training
# `nbgrader zip_collect` takes files whose names are STUDENT_NN_topic.ipynb
c.FileNameCollectorPlugin.named_regexp = r"(.*[/\\\\])?(?P<student_id>[^/\\\\]+)_(?P<file_id>\\d\\d_\\w+)"
c.IgnorePattern.enabled = True  # a warning or a progress bar in a graded cell would otherwise cost all its points
c.IgnorePattern.pattern = r"[\\s\\S]"  # all that is written to stderr; an exception still costs them
'''

_NO_REFERENCE = """from ftkit.lab import without_reference

without_reference()  # a graded lab: it goes on with what you write, or stops"""


def build_course(out: str | Path, notebooks: Sequence[str | Path] = (), *, reference: bool = True) -> list[Path]:
    """Make the student edition, the instructor edition and a course folder of nbgrader.

    In the student edition, stubs stand in place of the solutions, hidden tests are absent, and guesses are open. Cells
    above the first that asks something of the student (to write, or to guess) keep their outputs; all others lose them,
    because they depend on the answer or give it away. The instructor edition has everything, and at its top the
    minutes of each section, after each exercise its hints and common mistakes, at its end the scores over seeds of the
    recorded studies. nbgrader itself makes the release from ``OUT/nbgrader/source``.

    Files of an earlier build are replaced; what nbgrader has collected and graded stays, and so does a changed
    ``nbgrader_config.py``.

    Args:
        out: folder for ``student``, ``instructor`` and ``nbgrader``; created if missing.
        notebooks: names or paths; all lessons by default.
        reference: whether the reference takes the place of a wrong answer; if not, a lesson stops there.

    Returns:
        The three folders.

    Raises:
        CourseError: nbgrader is not installed, or cannot make a release.
        FileNotFoundError: there is no such notebook.
        OSError: a file cannot be written; the message says why and what to do.
    """
    import nbformat

    try:
        import nbgrader  # noqa: F401
    except ImportError:
        raise CourseError('nbgrader is not installed: run `pip install "ftkit[course]"`.') from None
    sources = [find_notebook(name) for name in notebooks] or [*_lessons()]
    if not sources:
        raise CourseError(f"There are no notebooks in {LESSONS_FOLDER}: name those to build.")
    for name in {path.stem for path in sources}:
        if (same := [path for path in sources if path.stem == name])[1:]:
            raise CourseError(f"{len(same)} notebooks are called {name}: an edition can have only one of them.")
    out = Path(out)
    folders = [out / name for name in ("student", "instructor", "nbgrader")]
    with writing(out):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    config = folders[2] / "nbgrader_config.py"
    if not config.exists():
        write_whole(config, _CONFIG)
    elif config.read_text(encoding="utf-8") != _CONFIG:
        print(f"{config} differs from what the build would write, and is kept.")
    with _configured(config) as settings:
        for path in sources:
            notebook = nbformat.read(path, as_version=4)
            if not reference:
                notebook.cells.insert(_first_code(notebook), _no_reference_cell())
            _write(folders[0] / path.name, _for_students(notebook, settings))
            _write(folders[1] / path.name, _for_instructors(notebook, path))
            if any(cell.metadata.get("nbgrader", {}).get("grade") for cell in notebook.cells):
                _write(folders[2] / "source" / path.stem / path.name, _with_open_guesses(notebook))
                _release(path.stem, settings)
    return folders


def _lessons() -> Iterable[Path]:
    return sorted(LESSONS_FOLDER.glob("*.ipynb")) + sorted(LESSONS_FOLDER.glob("deeper/*.ipynb"))


def _write(path: Path, notebook: "NotebookNode") -> None:
    import nbformat

    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, nbformat.writes(notebook) + "\n")


def _first_code(notebook: "NotebookNode") -> int:
    """Index of the first code cell that is not the `parameters` cell."""
    return next(
        i
        for i, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
    )


def _no_reference_cell() -> "NotebookNode":
    """A locked cell, which nbgrader restores if a student changes it."""
    from nbformat.v4 import new_code_cell

    locked = {"grade": False, "grade_id": "no-reference", "locked": True, "schema_version": 3, "solution": False}
    return new_code_cell(_NO_REFERENCE, metadata={"nbgrader": {**locked, "task": False}})


def _for_students(notebook: "NotebookNode", settings: Any) -> "NotebookNode":
    """Without solutions, hidden tests, and outputs from the first cell on that asks something of the student."""
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions

    notebook = _with_open_guesses(notebook)
    asked = False
    for cell in notebook.cells:
        asked = asked or bool(cell.metadata.get("nbgrader", {}).get("solution")) or _asks_for_a_guess(cell)
        if asked and cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    for step in (ClearSolutions(config=settings), ClearHiddenTests(config=settings)):
        notebook, _ = step.preprocess(notebook, {})
    return notebook


def _asks_for_a_guess(cell: "NotebookNode") -> bool:
    by_widget = cell.cell_type == "code" and re.search(r"(?<![\w.])predict\(", cell.source)  # not model.predict(
    return "predict" in cell.metadata.get("tags", []) or bool(by_widget)


def _with_open_guesses(notebook: "NotebookNode") -> "NotebookNode":
    """A copy in which what is assigned in the code cells tagged `predict` is None, if it is written in literals."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "predict" in cell.metadata.get("tags", []):
            try:
                cell.source = _opened(cell.source)
            except SyntaxError as error:
                raise CourseError(
                    f"A cell tagged predict is no plain Python ({error.msg}: {(error.text or '').strip()!r}): write "
                    "guess = … in it, and nothing else."
                ) from None
    return notebook


_LITERAL = (ast.Constant, ast.Tuple, ast.List, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop, ast.expr_context)


def _opened(source: str) -> str:
    lines = source.split("\n")
    for node in reversed(ast.parse(source).body):
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if value is not None and all(isinstance(part, _LITERAL) for part in ast.walk(value)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            several = next((target.elts for target in targets if isinstance(target, ast.Tuple | ast.List)), [None])
            nothing = ", ".join(["None"] * len(several))  # low, high = None cannot be unpacked
            first, last = value.lineno - 1, value.end_lineno - 1
            # columns are bytes
            before = lines[first].encode()[: value.col_offset].decode()
            after = lines[last].encode()[value.end_col_offset :].decode()
            lines[first : last + 1] = [f"{before}{nothing}{after}"]
    return "\n".join(lines)


def _for_instructors(notebook: "NotebookNode", path: Path) -> "NotebookNode":
    """With minutes at the top, hints and common mistakes after each exercise, and the recorded scores at the end."""
    from nbformat.v4 import new_markdown_cell

    known = {exercise.name: exercise for exercises in all_exercises().values() for exercise in exercises}
    edition = copy.deepcopy(notebook)
    edition.cells = []
    waiting: list[str] = []  # exercises whose graded cell has not come yet
    for cell in copy.deepcopy(notebook.cells):
        edition.cells.append(cell)
        marks = cell.metadata.get("nbgrader", {})
        if marks.get("solution") and marks.get("grade_id") in known:
            waiting.append(marks["grade_id"])
        elif marks.get("grade"):
            edition.cells += [new_markdown_cell(_notes_on(known[name], marks.get("points"))) for name in waiting]
            waiting = []
    edition.cells += [new_markdown_cell(_notes_on(known[name], None)) for name in waiting]
    minutes = f"**For instructors: minutes of each section**\n\n{sections_table(sections_of(notebook))}"
    edition.cells.insert(1, new_markdown_cell(minutes))
    if expected := _expected_scores(path):
        edition.cells.append(new_markdown_cell(expected))
    return edition


def _notes_on(exercise: Exercise, points: float | None) -> str:
    """Hints and common mistakes of an exercise, as Markdown."""
    worth = f"{points:g} point{'' if points == 1 else 's'}, " if points is not None else ""
    hints = "\n".join(f"{i}. {hint}" for i, hint in enumerate(exercise.hints, 1))
    mistakes = "\n\n".join(
        f"The check says: {in_words_of(mistake)}.\n\n```python\n{_without_docstring(source_of(mistake))}\n```"
        for mistake in exercise.mistakes
    )
    special = "".join(f"\n- {in_words_of(case)}" for case in exercise.cases if case.__doc__)
    special = f"\n\nSpecial cases that are tried, too:{special}" if special else ""
    forbidden = f"\n\nNot allowed: `{'`, `'.join(exercise.forbidden)}`." if exercise.forbidden else ""
    return (
        f"**For instructors: {exercise.name}** ({worth}{exercise.effort})\n\nHints:\n\n{hints}{forbidden}{special}\n\n"
        f"What students get wrong:\n\n{mistakes}"
    )


def _without_docstring(source: str) -> str:
    tree = ast.parse(source).body[0]
    note = tree.body[0]
    lines = source.split("\n")
    return "\n".join(lines[: note.lineno - 1] + lines[note.end_lineno :])


def _expected_scores(path: Path) -> str:
    """Scores over the seeds of the recorded studies of a notebook, as Markdown; "" if there are none."""
    parts = []
    for file in sorted(STUDIES_FOLDER.glob("*.toml")):
        if f'notebook = "{path.stem}"' not in file.read_text(encoding="utf-8"):
            continue
        study = load_study(file.stem)
        score = next((name for name in study.rows if str(name).startswith("test_")), None)
        if score is None:
            continue
        varied = study.declaration.varied
        rows = study.rows.astype(dict.fromkeys(varied, str))
        table = rows.groupby(varied, sort=False)[score].agg(["mean", "std", "min", "max", "count"])
        lines = ["| " + " | ".join([*varied, "mean", "SD over seeds", "lowest", "highest", "seeds"]) + " |"]
        lines.append("|" + "---|" * (len(varied) + 5))
        for values, row in table.iterrows():
            names = values if isinstance(values, tuple) else (values,)
            numbers = [f"{row[name]:.3f}" for name in ("mean", "std", "min", "max")] + [f"{row['count']:.0f}"]
            lines.append("| " + " | ".join([*map(str, names), *numbers]) + " |")
        parts.append(f"Study `{file.stem}`, {str(score).replace('_', ' ')}: {study.origin}.\n\n" + "\n".join(lines))
    return "**For instructors: what to expect, on record**\n\n" + "\n\n".join(parts) if parts else ""


@contextmanager
def _configured(path: Path) -> Iterator[Any]:
    """The configuration of nbgrader; what it sets in the environment holds inside the ``with`` block."""
    from traitlets.config import PyFileConfigLoader

    environment = dict(os.environ)
    try:
        try:
            settings = PyFileConfigLoader(path.name, str(path.parent)).load_config()
        except Exception as error:
            cure = "mend it, or delete it to get a new one"
            raise CourseError(f"{path} cannot be used ({first_line(error)}): {cure}.") from None
        yield settings
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _release(name: str, settings: Any) -> None:
    """Let nbgrader make ``release/NAME`` from ``source/NAME``, and keep the hidden tests in its gradebook."""
    from nbgrader.converters import GenerateAssignment
    from nbgrader.coursedir import CourseDirectory
    from nbgrader.utils import capture_log

    log = logging.getLogger("ftkit.nbgrader")
    log.propagate = False
    log.setLevel(logging.WARNING)
    step = GenerateAssignment(coursedir=CourseDirectory(config=settings, assignment_id=name), config=settings, log=log)
    step.force = True
    result = capture_log(step)
    if not result["success"]:
        log = result.get("log", "") + result["error"]
        reasons = re.findall(r"^ +[\w.]*(?:Error|Exception): (.+)$", log, re.MULTILINE)  # ends of nbgrader's tracebacks
        reason = reasons[0] if reasons else log.strip().splitlines()[-1]
        raise CourseError(f"nbgrader cannot release {name}: {reason.rstrip('.')}.")
