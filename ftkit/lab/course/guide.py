"""The parts of the guide for instructors that are not typed: minutes, common mistakes, what a class needs.

``python -m ftkit.lab.course.guide`` puts them into docs/instructors.md.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftkit.lab.course.build import LESSONS_FOLDER
from ftkit.lab.course.exercises import all_exercises
from ftkit.lab.course.judging import in_words_of
from ftkit.lab.course.minutes import (
    LINES_A_MINUTE,
    USUAL_MINUTES,
    WORDS_A_MINUTE,
    sections_of,
    sections_table,
    total_minutes,
)
from ftkit.lab.results import write_whole

GUIDE = Path(__file__).parents[3] / "docs" / "instructors.md"
MEASURED = Path(__file__).parents[3] / "data" / "measured.json"

CLASS_SIZE = 30  # students
_LAB = 90  # minutes
_SERVERS = (8, 16, 32)  # cores


def filled(text: str) -> str:
    """The guide with its generated parts as they are now.

    Args:
        text: the guide, with pairs of comments such as ``<!-- minutes -->`` and ``<!-- /minutes -->``.
    """
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    parts = {
        "minutes": minutes_of_lessons(measured),
        "sections": minutes_of_sections(),
        "mistakes": common_mistakes(),
        "classroom": classroom_table(measured.get("classroom", {})),
    }
    for mark, content in parts.items():
        text = replace_between(mark, content, text)
    return text


def replace_between(mark: str, content: str, text: str) -> str:
    """The text, with ``content`` in place of what stands between the two comments with that mark."""
    return re.sub(
        rf"<!-- {mark} -->.*?<!-- /{mark} -->",
        lambda _: f"<!-- {mark} -->\n\n{content}\n\n<!-- /{mark} -->",
        text,
        flags=re.DOTALL,
    )


def minutes_of_lessons(measured: Mapping[str, Any]) -> str:
    """A line for each lesson: minutes to read it, for its exercises, and to run it, as Markdown.

    Args:
        measured: the content of data/measured.json.
    """
    lines = [
        "| lesson | read | exercises | run | all three |",
        "|---|---|---|---|---|",
    ]
    known = {exercise.name for exercises in all_exercises().values() for exercise in exercises}
    unknown = set()
    for title, stem, sections in _lessons():
        read, solve = total_minutes(sections)
        tasks = {name for section in sections for name in section.exercises}
        if tasks - known:
            unknown.add(stem[:2])
        seconds = measured.get(stem, {}).get("cpu", {}).get("seconds")
        run = math.ceil(seconds / 60) if seconds else None
        shown = [title, read, f"{solve} ({len(tasks)})", run or "not measured", read + solve + (run or 0)]
        lines.append(f"| {' | '.join(map(str, shown))} |")
    notes = (
        f"Minutes; in brackets the number of exercises. For reading, {WORDS_A_MINUTE} words or {LINES_A_MINUTE} lines "
        "of code a minute\nare assumed. Running is the tier cpu on 2 cores, from imports to the last cell, as measured."
    )
    if unknown:
        notes += (
            f"\nLesson{'s' if len(unknown) > 1 else ''} {', '.join(sorted(unknown))}: exercises without minutes of "
            f"their own count {USUAL_MINUTES} each."
        )
    return "\n".join(lines) + f"\n\n{notes}"


def minutes_of_sections() -> str:
    """A table of the sections of each lesson, as Markdown."""
    return "\n\n".join(f"**{title}**\n\n{sections_table(sections)}" for title, _, sections in _lessons())


def _lessons() -> list[tuple[str, str, list]]:
    """Title, name and sections of each lesson, in the order of reading."""
    import nbformat

    found = []
    for path in sorted(LESSONS_FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0].source.removeprefix("# ").partition(":")[0].partition("\n")[0]
        found.append((f"{path.stem[:2]} {title}", path.stem, sections_of(notebook)))
    return found


def common_mistakes() -> str:
    """What the check says about each catalogued mistake, by exercise, as Markdown."""
    parts = []
    for lesson, exercises in all_exercises().items():
        for exercise in exercises:
            said = dict.fromkeys(map(in_words_of, exercise.mistakes))  # several mistakes may be told in one way
            lines = [f"**{exercise.name}** (lesson {lesson}, {exercise.effort})\n", *(f"- {words}" for words in said)]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def classroom_table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """What several students at once need, by tier, as Markdown.

    Args:
        measured: the figures of benchmarks/classroom.py by tier; see there what they are.
    """
    tiers = [tier for tier in ("smoke", "cpu") if tier in measured]
    if not tiers:
        return "Not measured yet: `python benchmarks/classroom.py --write`."
    figures = [measured[tier] for tier in tiers]
    count, cores = figures[0]["students"], figures[0]["cores"]
    rows: dict[str, list[str]] = {
        "one student alone": [_time(each["alone"]["seconds"]) for each in figures],
        f"{count} students at once": [_time(each["together"]["seconds"]) for each in figures],
        "the same without `OMP_NUM_THREADS=1`": [_time(each["all_threads"]["seconds"]) for each in figures],
        "processor time of one": [_time(each["together"]["cpu_seconds"]) for each in figures],
        "memory of one kernel that no other shares": [_gib(each["together"]["private_mib"]) for each in figures],
        "memory that all kernels share, once": [_gib(each["together"]["shared_mib"]) for each in figures],
        f"memory of {count} kernels together": [_gib(each["together"]["together_mib"]) for each in figures],
        "memory of an idle JupyterLab server": [_gib(each["server_mib"]) for each in figures],
        f"**scaled to {CLASS_SIZE}**: memory": [f"**{_gib(class_memory_mib(each))}**" for each in figures],
    }
    for size in _SERVERS:
        label = f"**scaled to {CLASS_SIZE}**: all at once on {size} cores"
        rows[label] = [f"**{_time(class_seconds(each, size))}**" for each in figures]
    label = f"**scaled to {CLASS_SIZE}**: cores, if each runs it once in {_LAB} minutes"
    rows[label] = [f"**{class_cores(each):.1f}**" for each in figures]
    lines = [f"| | {' | '.join(f'tier {tier}' for tier in tiers)} |", "|---|" + "---|" * len(tiers)]
    lines += [f"| {label} | {' | '.join(values)} |" for label, values in rows.items()]
    return "\n".join(lines) + f"\n\nMeasured on {cores} cores with lesson 01; the lines in bold are computed from that."


def class_memory_mib(figures: Mapping[str, Any]) -> float:
    """Memory of a class whose kernels are all at their peak: what is private adds up, what is shared is there once."""
    together = figures["together"]
    return CLASS_SIZE * (together["private_mib"] + figures["server_mib"]) + together["shared_mib"]


def class_seconds(figures: Mapping[str, Any], cores: int) -> float:
    """Seconds until a class that starts at once is done: the work grows with the class, and the cores share it."""
    scaled = figures["together"]["seconds"] * CLASS_SIZE / figures["students"] * figures["cores"] / cores
    return max(scaled, figures["alone"]["seconds"])


def class_cores(figures: Mapping[str, Any]) -> float:
    """Cores that are busy, on average, while each student of a class runs the lesson once in a lab."""
    return CLASS_SIZE * figures["together"]["cpu_seconds"] / (60 * _LAB)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _gib(mib: float) -> str:
    return f"{mib / 1024:.0f} GiB" if mib >= 10240 else f"{mib / 1024:.1f} GiB"


if __name__ == "__main__":
    write_whole(GUIDE, filled(GUIDE.read_text(encoding="utf-8")))
