"""nbgrader on what three students hand in for a lesson, at the smoke tier, without a network.

One has the notebook's own solutions, one makes the first catalogued mistake of each exercise, one changes nothing.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbgrader.api import Gradebook

from ftkit.data.assets import registry
from ftkit.lab.course.build import _lessons, build_course
from ftkit.lab.course.exercises import find_exercise
from ftkit.lab.course.judging import in_words_of

# name of the exercise, and of the student's function
GRADED = re.compile(r'\bgrade\(\s*"([^"]+)",\s*(\w+),?\s*\)')


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


LESSONS = [path for path in _lessons() if any(GRADED.search(cell.source) for cell in code_cells(path))]


def marks(cell: nbformat.NotebookNode) -> dict[str, object]:
    """nbgrader's metadata of a cell."""
    return cell.metadata.get("nbgrader", {})


def hand_in(course: Path, student: str, lesson: str, answers: dict[str, str]) -> None:
    """Hand in the released notebook, with other sources of some cells, by their grade_id."""
    notebook = nbformat.read(course / "release" / lesson / f"{lesson}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = answers.get(marks(cell).get("grade_id"), cell.source)
    folder = course / "submitted" / student / lesson
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{lesson}.ipynb")


def nbgrader(course: Path, *arguments: str) -> None:
    nowhere = "http://127.0.0.1:9"  # whoever asks the network all the same is refused
    env = os.environ | {"FTKIT_OFFLINE": "1", "FTKIT_TIER": "smoke", "FTKIT_RUN_DIR": str(course / "run")}
    env |= {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "ALL_PROXY": nowhere, "NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=course, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_right_answers_get_all_points_and_wrong_and_missing_ones_none(path: Path, tmp_path: Path) -> None:
    for asset in nbformat.read(path, as_version=4).metadata.ftkit.assets:
        registry.fetch(asset, progress=False)
    *_, course = build_course(tmp_path, [path])
    cells, lesson = code_cells(path), path.stem
    functions = dict(match.groups() for cell in cells for match in GRADED.finditer(cell.source))
    solutions = {marks(cell)["grade_id"]: cell.source for cell in cells if marks(cell).get("solution")}
    assert functions and functions.keys() <= solutions.keys()
    mistaken = {
        name: "from ftkit.lab.course.exercises import find_exercise\n\n"
        f'{function} = find_exercise("{name}").mistakes[0]'
        for name, function in functions.items()
    }
    hand_in(course, "right", lesson, solutions)
    hand_in(course, "wrong", lesson, mistaken)
    hand_in(course, "empty", lesson, {})
    nbgrader(course, "autograde", lesson)
    nbgrader(course, "generate_feedback", lesson)

    points = sum(marks(cell)["points"] for cell in cells if marks(cell).get("grade") and not marks(cell)["solution"])
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}", "ftkit") as book:
        scores = {student: book.find_submission(lesson, student).score for student in ("right", "wrong", "empty")}
    assert scores == {"right": points, "wrong": 0, "empty": 0}
    said = {}
    for student in scores:
        ran = code_cells(course / "autograded" / student / lesson / f"{lesson}.ipynb")
        assert all(cell.execution_count for cell in ran if cell.source.strip())
        failed = [cell for cell in ran if any(output.output_type == "error" for output in cell.outputs)]
        # their own copy has no hidden tests: for them, Run All ends
        assert all(marks(cell).get("grade") for cell in failed)
        assert len(failed) == (0 if student == "right" else sum(bool(marks(cell).get("grade")) for cell in ran))
        page = course / "feedback" / student / lesson / f"{lesson}.html"
        said[student] = " ".join(BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").get_text().split())
    for name in functions:
        assert f"{name}: {in_words_of(find_exercise(name).mistakes[0])}" in said["wrong"]
        assert f"{name}: not attempted yet" in said["empty"]


def test_there_are_lessons_to_grade() -> None:
    assert LESSONS
