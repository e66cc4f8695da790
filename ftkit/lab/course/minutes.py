"""How long a lesson takes, section by section: reading its prose and code, and its exercises.

The minutes are for planning: the rates of reading are assumed.
"""

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftkit.lab.course.exercises import all_exercises

if TYPE_CHECKING:
    from nbformat import NotebookNode

WORDS_A_MINUTE = 200
LINES_A_MINUTE = 10  # of code, with what it shows
USUAL_MINUTES = 8  # of an exercise that the catalogue does not have yet

_BEGINNING = "(the beginning)"


@dataclass
class Section:
    """What stands below one heading of a lesson.

    Attributes:
        title: the heading.
        words: number of words of prose.
        code_lines: number of lines of code that the reader sees, without blank ones.
        exercises: minutes of each exercise, by its name.
    """

    title: str
    words: int = 0
    code_lines: int = 0
    exercises: dict[str, int] = field(default_factory=dict)

    @property
    def reading_minutes(self) -> float:
        return self.words / WORDS_A_MINUTE + self.code_lines / LINES_A_MINUTE


def sections_of(notebook: "NotebookNode") -> list[Section]:
    """The sections of a lesson, which begin at headings of the second level; those without content are left out.

    Folded cells, the `parameters` cell and graded cells count for nothing: they are not for reading. An exercise that
    is graded by hand takes the minutes that the cell above states: "(10 minutes".

    Args:
        notebook: the lesson, with its solutions.
    """
    known = {exercise.name: exercise.minutes for exercises in all_exercises().values() for exercise in exercises}
    sections, stated = [Section(_BEGINNING)], None
    for cell in notebook.cells:
        marks = cell.metadata.get("nbgrader", {})
        if cell.cell_type == "markdown":
            _read_prose(cell.source, sections)
        elif not (
            marks.get("grade")
            or "parameters" in cell.metadata.get("tags", [])
            or cell.metadata.get("jupyter", {}).get("source_hidden")
        ):
            sections[-1].code_lines += sum(bool(line.strip()) for line in cell.source.splitlines())
        if marks.get("solution"):
            minutes = known.get(marks["grade_id"]) or (int(stated[1]) if stated else USUAL_MINUTES)
            sections[-1].exercises[marks["grade_id"]] = minutes
        stated = re.search(r"\((\d+) minutes", cell.source) if cell.cell_type == "markdown" else None
    return [section for section in sections if section.words or section.code_lines]


def _read_prose(source: str, sections: list[Section]) -> None:
    """Count the words of a cell for the last section, and begin a new one at each heading of the second level."""
    source = re.sub(r"<!-- needs -->.*?<!-- /needs -->|### BEGIN SOLUTION.*?### END SOLUTION", "", source, flags=re.S)
    in_code = False
    for line in source.splitlines():
        in_code ^= line.startswith("```")
        if line.startswith("## ") and not in_code:
            sections.append(Section(line[3:].strip()))
        else:
            sections[-1].words += sum(bool(re.search(r"\w", word)) for word in line.split())


def total_minutes(sections: list[Section]) -> tuple[int, int]:
    """Minutes to read a lesson, rounded up, and for its exercises."""
    read = math.ceil(sum(section.reading_minutes for section in sections))
    return read, sum(sum(section.exercises.values()) for section in sections)


def sections_table(sections: list[Section]) -> str:
    """Minutes of the sections of a lesson, as Markdown."""
    lines = ["| section | read | exercises |", "|---|---|---|"]
    for section in sections:
        tasks = ", ".join(f"{name} {minutes}" for name, minutes in section.exercises.items())
        lines.append(f"| {section.title} | {math.ceil(section.reading_minutes)} | {tasks} |")
    return "\n".join(lines)
