"""The generated parts of the guide for instructors: minutes of sections, mistakes, what is scaled to a class."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ftkit.lab.course import guide
from ftkit.lab.course.exercises import find_exercise
from ftkit.lab.course.minutes import USUAL_MINUTES, sections_of, sections_table

FIGURES = {
    "cores": 2,
    "students": 4,
    "alone": {"seconds": 60.0},
    "together": {"seconds": 120.0, "cpu_seconds": 54.0, "private_mib": 1000, "shared_mib": 200, "together_mib": 4100},
    "all_threads": {"seconds": 150.0},
    "server_mib": 24,
}


def lesson() -> nbformat.NotebookNode:
    prose = (
        "# A lesson\n\n<!-- needs -->\n\n| not | counted |\n\n<!-- /needs -->\n\n" + "word " * 250 + "\n\n## First\n\n"
        "two words\n\n```\n## no heading\n```"
    )
    solution = {"grade": False, "solution": True}
    graded = {"grade": True, "solution": False, "grade_id": "warm-up-check"}
    return new_notebook(
        cells=[
            new_markdown_cell(prose),
            new_code_cell("x = 1", metadata={"tags": ["parameters"]}),
            new_code_cell("import torch", metadata={"jupyter": {"source_hidden": True}}),
            new_code_cell("a = 1\n\nb = 2"),
            new_markdown_cell("## Exercises\n\n- one"),
            new_code_cell("def f():\n    pass", metadata={"nbgrader": {**solution, "grade_id": "warm-up"}}),
            new_code_cell("assert f", metadata={"nbgrader": graded}),
            new_markdown_cell(
                "Why?\n### BEGIN SOLUTION\nA long answer\n### END SOLUTION",
                metadata={"nbgrader": {**solution, "grade": True, "grade_id": "no such exercise"}},
            ),
        ]
    )


def test_sections_have_their_words_code_and_exercises() -> None:
    beginning, first, exercises = sections_of(lesson())
    assert (beginning.title, beginning.words, beginning.code_lines) == ("(the beginning)", 252, 0)
    assert (first.title, first.words, first.code_lines) == ("First", 4, 2)
    assert first.reading_minutes == pytest.approx(4 / 200 + 2 / 10)
    assert (exercises.words, exercises.code_lines) == (2, 2)
    assert exercises.exercises == {"warm-up": find_exercise("warm-up").minutes, "no such exercise": USUAL_MINUTES}
    assert sections_table([beginning, first]).splitlines()[2:] == ["| (the beginning) | 2 |  |", "| First | 1 |  |"]


def test_the_guide_is_up_to_date() -> None:
    text = guide.GUIDE.read_text(encoding="utf-8")
    assert text == guide.filled(text), "run `python -m ftkit.lab.course.guide`"
    for mark in ("minutes", "sections", "mistakes", "classroom"):
        assert text.count(f"<!-- {mark} -->") == text.count(f"<!-- /{mark} -->") == 1


def test_the_guide_has_each_lesson_and_each_mistake() -> None:
    text = guide.GUIDE.read_text(encoding="utf-8")
    assert "| 01 " in text and "| 06 " in text
    assert "- a mean of means gives the small last part too much weight" in text


def test_a_class_is_scaled_from_what_was_measured() -> None:
    assert guide.class_memory_mib(FIGURES) == 30 * 1024 + 200
    assert guide.class_seconds(FIGURES, cores=10) == 120 * 30 / 4 * 2 / 10
    assert guide.class_seconds(FIGURES, cores=1000) == 60  # never less than one alone
    assert guide.class_cores(FIGURES) == pytest.approx(30 * 54 / 5400)
    table = guide.classroom_table({"cpu": FIGURES, "smoke": FIGURES})
    assert "| | tier smoke | tier cpu |" in table
    assert "**scaled to 30**: memory | **30 GiB** | **30 GiB** |" in table
    assert "Not measured yet" in guide.classroom_table({})
