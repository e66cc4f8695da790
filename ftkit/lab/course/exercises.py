"""What a lesson and its reader do with an exercise: check, hint, solution, grade, and use of the answer."""

import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ftkit.errors import CourseError, did_you_mean
from ftkit.lab.course import lessons
from ftkit.lab.course.judging import Exercise, judge
from ftkit.lab.course.records import update_progress

_CHECKED, _GRADED = range(8), range(1000, 1024)  # seeds: grades are given on other arguments than those of the check

_replaced: dict[str, Any] = {}  # what the reader wrote where the reference has taken its place

_hints_given: dict[str, int] = {}

_graded_lab = False


def check(name: str, answer: Any) -> None:
    """Print whether an answer is right, and which common mistake it makes if not. It never raises for an answer.

    Args:
        name: name of the exercise.
        answer: the function that the reader wrote.

    Raises:
        CourseError: there is no such exercise.
    """
    problem = _judged(find_exercise(name), answer, _CHECKED)
    print(f"{name}: {problem or 'right'}")

    def change(entry: dict[str, Any]) -> None:
        entry["tries"] = entry.get("tries", 0) + 1
        entry["right"] = entry.get("right", False) or problem is None

    _note(name, change)


def grade(name: str, answer: Any) -> None:
    """Judge an answer on other random arguments than ``check``; for the hidden tests of a graded cell.

    Args:
        name: name of the exercise.
        answer: the function that the reader wrote.

    Raises:
        AssertionError: the answer is wrong; the message says how.
        CourseError: there is no such exercise.
    """
    problem = _judged(find_exercise(name), answer, _GRADED)
    if problem is not None:
        raise AssertionError(f"{name}: {problem}")
    print(f"{name}: right")


def yours_or_reference(name: str, answer: Any) -> Callable:
    """The reader's function if it is right, otherwise the reference; which of them, is printed.

    What it returns may have the name of the reader's function: ``check`` and ``grade`` still judge what they wrote.

    Args:
        name: name of the exercise.
        answer: the function that the reader wrote.

    Raises:
        CourseError: the answer is wrong and this is a graded lab (see ``without_reference``), or there is no such
            exercise.
    """
    exercise = find_exercise(name)
    problem = _judged(exercise, answer, _CHECKED)
    if problem is None:
        print(f"{name}: the lesson goes on with yours")
        return answer
    if _graded_lab:
        raise CourseError(f"{name}: {problem}. The lesson goes on once your function is right.")
    print(f"{name}: {problem}; the reference takes its place")
    if answer is not exercise.reference:
        _replaced[name] = answer
    return exercise.reference


def without_reference() -> None:
    """Make this session one of a graded lab: no reference takes the place of an answer, and no solution is shown."""
    global _graded_lab
    _graded_lab = True


def hint(name: str) -> None:
    """Print a hint; the second and the third call help more.

    Args:
        name: name of the exercise.

    Raises:
        CourseError: there is no such exercise.
    """
    hints = find_exercise(name).hints
    given = _hints_given[name] = min(_hints_given.get(name, 0) + 1, len(hints))
    further = f'hint("{name}")' if given < len(hints) else "" if _graded_lab else f'solution("{name}")'
    print(f"{name}, hint {given} of {len(hints)}: {hints[given - 1]}" + (f"\nMore: {further}" if further else ""))
    _note(name, lambda entry: entry.update(hints=max(entry.get("hints", 0), given)))


def solution(name: str) -> None:
    """Print the code of the reference, except in a graded lab.

    Args:
        name: name of the exercise.

    Raises:
        CourseError: there is no such exercise.
    """
    exercise = find_exercise(name)
    if _graded_lab:
        print(f"{name}: this is a graded lab, which shows no solutions; hint({name!r}) helps")
        return
    print(source_of(exercise.reference))
    _note(name, lambda entry: entry.update(solution=True))


def source_of(function: Callable) -> str:
    """The source of a reference or of a mistake, without a margin."""
    return textwrap.dedent(inspect.getsource(function)).rstrip()


def find_exercise(name: str) -> Exercise:
    """Find an exercise by its name.

    Raises:
        CourseError: there is no such exercise; the message suggests the nearest name.
    """
    known = {exercise.name: exercise for exercises in all_exercises().values() for exercise in exercises}
    if name not in known:
        raise CourseError(
            f"There is no exercise {name!r}: {did_you_mean(name, known)} The exercises are {', '.join(known)}."
        )
    return known[name]


@cache
def all_exercises() -> dict[str, list[Exercise]]:
    """All exercises by the number of their lesson, such as 01, in the order of the lessons."""
    found = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(lessons.__path__)):
        functions = vars(importlib.import_module(f"{lessons.__name__}.{module}"))
        found[module.removeprefix("lesson_")] = [
            describe() for function, describe in functions.items() if function.startswith("exercise_")
        ]
    return found


def _judged(exercise: Exercise, answer: Any, seeds: Sequence[int]) -> str | None:
    """Judge what the reader wrote, even where the name of their function stands for the reference by now."""
    if answer is exercise.reference:
        if exercise.name not in _replaced:
            return "this is the reference, not a function of yours"
        answer = _replaced[exercise.name]
    return judge(exercise, answer, seeds)


def _note(name: str, change: Callable[[dict[str, Any]], None]) -> None:
    update_progress(lambda content: change(content["exercises"].setdefault(name, {})))
