"""Exercises, guesses and progress: right answers, stubs, every catalogued mistake, answers right by luck."""

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from torch.nn import functional as F

from ftkit.errors import CourseError
from ftkit.lab.course import exercises, guesses, records
from ftkit.lab.course.exercises import all_exercises, check, find_exercise, grade, hint, solution, yours_or_reference
from ftkit.lab.course.guesses import how_far, predict
from ftkit.lab.course.judging import Exercise, in_words_of, judge
from ftkit.lab.course.progress import progress
from ftkit.lab.course.records import read_progress

ROOT = Path(__file__).parents[2]
EXERCISES = {exercise.name: exercise for found in all_exercises().values() for exercise in found}
MISTAKES = [
    pytest.param(exercise, mistake, id=f"{name}-{mistake.__name__}")
    for name, exercise in EXERCISES.items()
    for mistake in exercise.mistakes
]
# Right answers of another kind than the reference
RIGHT = {
    "cross-entropy": ["return F.nll_loss(logits.log_softmax(-1), labels)"],
    "warm-up": ["return min(step / warmup, (total - step) / (total - warmup))"],
    "accumulation": ["return float(np.average(mean_losses, weights=sizes))"],
    "training-step": [
        "optimizer.zero_grad()\nloss = loss_function(network(**batch).logits, labels)\nloss.backward()\n"
        "torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)\noptimizer.step()\nreturn loss.item()"
    ],
    "learning-curve": [
        "if training[-1] / ln_c > 0.92:\n    return 'too high' if np.max(training) > 1.1 * ln_c else 'too low'\n"
        "return 'good' if validation[-1] - min(validation) < 0.08 else 'overfitting'"
    ],
    "clip-loss": [
        "t, v = (x / x.norm(dim=1, keepdim=True) for x in (text, image))\nz = s.exp() * t @ v.T\n"
        "return -(z.log_softmax(0).diagonal() + z.log_softmax(1).diagonal()).mean() / 2"
    ],
    "recall-at-k": [
        "best = np.argsort(-similarities, axis=1)[:, :k]\nreturn np.mean([i in line for i, line in enumerate(best)])"
    ],
}
# Wrong in their form, whatever the exercise computes, and the words that say so
WRONG = [
    ("cross-entropy", "return F.cross_entropy(logits, labels)", "without cross_entropy"),
    ("cross-entropy", "return torch.nn.CrossEntropyLoss()(logits, labels)", "without cross_entropy"),
    ("cross-entropy", "return imported(logits, labels)", "without cross_entropy"),
    ("cross-entropy", "return F.nll_loss(logits.log_softmax(-1), labels).item()", "return a tensor"),
    ("cross-entropy", "return F.nll_loss(logits.log_softmax(-1), labels).detach()", "has no gradient"),
    ("cross-entropy", "return F.nll_loss(logits.log_softmax(-1), labels, reduction='none')", "one number"),
    ("cross-entropy", "return torch.tensor(1.1)", "has no gradient"),
    ("cross-entropy", "return 0 * logits.sum() + 1.1", "it gives 1.1, and"),
    ("cross-entropy", "return 1.1 * F.nll_loss(logits.log_softmax(-1), labels)", r"it gives \S+, and \S+ is right"),
    ("warm-up", "return 0.5", "the same for all arguments"),
    ("warm-up", "return stpe / warmup", "NameError in line 2 of its cell: name 'stpe' is not defined"),
    ("warm-up", "raise SystemExit", "it raises SystemExit"),
    ("warm-up", "return 1 - step / total if step > warmup else step", "for step="),
    ("warm-up", "return 1 / 0", "it raises ZeroDivisionError in line 2"),
    ("accumulation", "mean_losses[0] = 0.0\nreturn 1.0", "changes what it is given"),
    ("accumulation", "return str(mean_losses)", "it gives '"),
    ("accumulation", "return 2.0", "the same for all arguments"),
    ("training-step", "return 0.0", "nothing moved|it gives"),
    ("training-step", "return loss_function(network(**batch).logits, labels) * 0", "it gives"),
    ("learning-curve", "return 'good'", "the same for all arguments"),
    ("recall-at-k", "return 0.5", "the same for all arguments"),
    ("recall-at-k", "return 1.0", "the same for all arguments"),
    ("recall-at-k", "return 0.25 if k == 1 else 0.75", "for similarities=an array of shape"),
]


def answer_of(exercise: Exercise, body: str) -> Callable:
    """A function as a reader would write it, with the parameters of the reference."""
    header = exercises.source_of(exercise.reference).partition("\n")[0]
    namespace: dict[str, object] = {"np": np, "torch": torch, "F": F, "imported": F.cross_entropy}
    exec(compile(f"{header}\n{textwrap.indent(body, '    ')}", "<cell>", "exec"), namespace)
    return namespace[exercise.reference.__name__]


def mine(exercise: Exercise) -> Callable:
    """A right answer that is not the reference."""
    return answer_of(exercise, RIGHT[exercise.name][0])


def problems(exercise: Exercise, answer: object) -> tuple[str | None, str | None]:
    """What the check and what the hidden tests say."""
    return judge(exercise, answer, exercises._CHECKED), judge(exercise, answer, exercises._GRADED)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of this test's progress, and a session that has seen no hint."""
    path = tmp_path / "progress.json"
    monkeypatch.setenv("FTKIT_PROGRESS", str(path))
    monkeypatch.setattr(exercises, "_hints_given", {})
    monkeypatch.setattr(exercises, "_replaced", {})
    monkeypatch.setattr(exercises, "_graded_lab", False)
    return path


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=list(EXERCISES))
def test_references_and_other_right_answers_pass_and_stubs_fail(exercise: Exercise) -> None:
    assert problems(exercise, exercise.reference) == (None, None)
    for body in RIGHT[exercise.name]:
        assert problems(exercise, answer_of(exercise, body)) == (None, None), body
    for body, words in {
        "raise NotImplementedError": "not attempted yet",
        "...": "not attempted yet: it returns nothing",
        "return ...": "not attempted yet: it returns nothing",
        "return None": "not attempted yet: it returns nothing",
    }.items():
        for problem in problems(exercise, answer_of(exercise, body)):
            assert problem.startswith(words), body
    assert all(problem.startswith("0.5 is not a function") for problem in problems(exercise, 0.5))


@pytest.mark.parametrize(("exercise", "mistake"), MISTAKES)
def test_each_mistake_is_named_by_check_and_hidden_tests(exercise: Exercise, mistake: Callable) -> None:
    assert problems(exercise, mistake) == (in_words_of(mistake),) * 2


@pytest.mark.parametrize(("name", "body", "words"), WRONG)
def test_other_wrong_answers_fail_in_words(name: str, body: str, words: str) -> None:
    before = F.cross_entropy
    for problem in problems(EXERCISES[name], answer_of(EXERCISES[name], body)):
        assert re.search(words, problem), problem
        assert "\n" not in problem
    assert F.cross_entropy is before


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=list(EXERCISES))
def test_luck_does_not_pass(exercise: Exercise) -> None:
    """What is right for the first arguments of the check is wrong for others, and so for the hidden tests."""
    arguments = exercise.cases[0](np.random.default_rng(exercises._CHECKED[0]))
    lucky = exercise.outcome(exercise.reference, arguments)
    lucky = lucky[0] if isinstance(lucky, tuple) else lucky
    assert all(problems(exercise, lambda *_: lucky))
    assert not set(exercises._CHECKED) & set(exercises._GRADED)


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=list(EXERCISES))
def test_an_exercise_is_complete(exercise: Exercise) -> None:
    assert len(exercise.mistakes) >= 5
    assert 1 <= exercise.minutes <= 30
    assert exercise.difficulty in (1, 2, 3)
    for said in [*map(in_words_of, exercise.mistakes), *(in_words_of(case) for case in exercise.cases[1:])]:
        assert not said.endswith(".")
    assert all(hint.endswith((".", "`.")) for hint in exercise.hints)
    assert exercises.source_of(exercise.reference).startswith("def ")


def test_the_solutions_of_the_lessons_pass_check_and_hidden_tests() -> None:
    seen = set()
    for path in ROOT.glob("notebooks/**/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            name = cell.metadata.get("nbgrader", {}).get("grade_id")
            if name in EXERCISES and cell.metadata.nbgrader.solution:
                namespace = {"np": np, "torch": torch, "F": F}
                exec(cell.source, namespace)
                assert problems(EXERCISES[name], namespace[EXERCISES[name].reference.__name__]) == (None, None)
                seen.add(name)
    assert seen >= {"cross-entropy", "training-step", "learning-curve", "warm-up", "accumulation"}


def test_check_prints_one_sentence_and_keeps_what_happened(kept: Path, capsys: pytest.CaptureFixture) -> None:
    exercise = EXERCISES["warm-up"]
    for answer in (exercise.mistakes[0], mine(exercise), answer_of(exercise, "raise NotImplementedError")):
        assert check("warm-up", answer) is None
    said = capsys.readouterr().out.splitlines()
    assert said == [f"warm-up: {in_words_of(exercise.mistakes[0])}", "warm-up: right", "warm-up: not attempted yet"]
    assert json.loads(kept.read_text())["exercises"] == {"warm-up": {"tries": 3, "right": True}}


def test_grade_raises_for_a_wrong_answer(capsys: pytest.CaptureFixture) -> None:
    exercise = EXERCISES["accumulation"]
    grade("accumulation", mine(exercise))
    assert capsys.readouterr().out == "accumulation: right\n"
    with pytest.raises(AssertionError, match="accumulation: a mean of means gives"):
        grade("accumulation", exercise.mistakes[0])


def test_a_right_answer_is_used_and_the_reference_takes_the_place_of_a_wrong_one(
    capsys: pytest.CaptureFixture,
) -> None:
    exercise = EXERCISES["warm-up"]
    own = mine(exercise)
    assert yours_or_reference("warm-up", own) is own
    assert yours_or_reference("warm-up", exercise.mistakes[0]) is exercise.reference
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "warm-up: the lesson goes on with yours"
    assert said[1].endswith("; the reference takes its place")
    exercises.without_reference()
    assert yours_or_reference("warm-up", own) is own
    with pytest.raises(CourseError, match=r"warm-up: not attempted yet\. The lesson goes on once"):
        yours_or_reference("warm-up", answer_of(exercise, "raise NotImplementedError"))
    capsys.readouterr()
    solution("warm-up")
    assert "shows no solutions" in capsys.readouterr().out


def test_hints_then_the_solution(capsys: pytest.CaptureFixture) -> None:
    for number in (1, 2, 3, 3):
        hint("warm-up")
        said = capsys.readouterr().out
        assert f"hint {number} of 3: {EXERCISES['warm-up'].hints[number - 1]}" in said
        assert said.strip().endswith('solution("warm-up")' if number == 3 else 'hint("warm-up")')
    solution("warm-up")
    namespace: dict[str, Callable] = {}
    exec(capsys.readouterr().out, namespace)
    assert problems(EXERCISES["warm-up"], namespace["warm_up_factor"]) == (None, None)
    assert read_progress()["exercises"]["warm-up"] == {"hints": 3, "solution": True}


def test_the_reference_does_not_pass_for_an_answer(capsys: pytest.CaptureFixture) -> None:
    """Also where a lesson gives the reader's function and what takes its place one name."""
    exercise = EXERCISES["warm-up"]
    with pytest.raises(AssertionError, match="this is the reference, not a function of yours"):
        grade("warm-up", exercise.reference)
    warm_up_factor = exercise.mistakes[0]
    for _ in range(2):
        warm_up_factor = yours_or_reference("warm-up", warm_up_factor)
        check("warm-up", warm_up_factor)
    assert capsys.readouterr().out.count(in_words_of(exercise.mistakes[0])) == 4
    with pytest.raises(AssertionError, match=in_words_of(exercise.mistakes[0])):
        grade("warm-up", warm_up_factor)
    grade("warm-up", yours_or_reference("warm-up", mine(exercise)))


def test_an_unknown_exercise_is_named_with_the_nearest() -> None:
    with pytest.raises(CourseError, match="There is no exercise 'warmup': did you mean 'warm-up'"):
        find_exercise("warmup")


def test_in_a_notebook_that_a_tool_executes_nothing_is_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTKIT_PROGRESS")
    monkeypatch.setattr(records, "progress_file", lambda: kept)
    check("warm-up", mine(EXERCISES["warm-up"]))
    assert not kept.exists()


def test_progress_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FTKIT_PROGRESS", str(tmp_path / "file" / "progress.json"))
    for _ in range(2):
        check("warm-up", mine(EXERCISES["warm-up"]))
    assert capsys.readouterr().out.count("Your progress is not kept") == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"exercises": 3}', '{"guesses": {"x": 1}}', '{"guesses": {"x": {}}}'])
def test_damaged_progress_is_put_aside(kept: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    kept.write_text(text)
    check("warm-up", mine(EXERCISES["warm-up"]))
    assert "progress.json.damaged" in capsys.readouterr().out
    assert kept.with_name("progress.json.damaged").read_text() == text
    assert read_progress()["exercises"]["warm-up"]["right"]


@pytest.mark.parametrize(
    ("guess", "words"),
    [
        (0.8, "accuracy: 0.76. Your guess was 0.8: 0.04 too high."),
        (0.7, "accuracy: 0.76. Your guess was 0.7: 0.06 too low."),
        (0.76, "accuracy: 0.76. Your guess was 0.76: exactly right."),
        ((0.7, 0.8), "accuracy: 0.76. Your range was 0.7 to 0.8: the truth is inside it."),
        ((0.9, 0.8), "accuracy: 0.76. Your range was 0.8 to 0.9: the truth is 0.04 below it."),
        ([0.5, 0.6], "accuracy: 0.76. Your range was 0.5 to 0.6: the truth is 0.16 above it."),
        (np.float32(0.5), "accuracy: 0.76. Your guess was 0.5: 0.26 too low."),
        (None, "accuracy: 0.76. There was no guess."),
        (..., "accuracy: 0.76. There was no guess."),
        ("0.8", "accuracy: 0.76. The guess '0.8' is no number: write one, or a range such as (0.7, 0.85)."),
        ((0.7, None), "accuracy: 0.76. The guess (0.7, None) is no number"),
        ("about\n70 per cent, " * 9, "accuracy: 0.76. The guess 'about\\n70 pe...70 per cent, ' is no number"),
        ((0, 7), "accuracy: 0.76. The guess (0, 7) is far from it: if you meant 0.7, write it with a point."),
        (75, "accuracy: 0.76. The guess 75 is far from it: if you meant per cent, write 75 % as 0.75."),
        (
            (70, 80),
            "accuracy: 0.76. The guess (70, 80) is far from it: if you meant per cent, write 70 % as 0.7.",
        ),
        ((0, 1), "accuracy: 0.76. Your range was 0 to 1: the truth is inside it."),
        (2, "accuracy: 0.76. Your guess was 2: 1.24 too high."),
        (float("nan"), "accuracy: 0.76. The guess nan is no number"),
    ],
)
def test_how_far_off_a_guess_was(guess: object, words: str, capsys: pytest.CaptureFixture) -> None:
    how_far(guess, np.float64(0.76), "accuracy")
    assert capsys.readouterr().out.startswith(words)
    assert bool(read_progress()["guesses"]) == ("Your" in words)


def test_only_the_first_guess_counts_and_large_numbers_are_readable(capsys: pytest.CaptureFixture) -> None:
    how_far(20_000_000, 22_713_986, "weights")
    assert "weights: 22,713,986. Your guess was 20,000,000: 2,713,986 too low." in capsys.readouterr().out
    how_far(22_713_986, 22_713_986, "weights")
    assert read_progress()["guesses"]["weights"]["low"] == 20_000_000
    how_far(0.5, 0.6)
    assert capsys.readouterr().out.endswith("It is 0.6. Your guess was 0.5: 0.1 too low.\n")
    assert list(read_progress()["guesses"]) == ["weights"]


def test_a_slider_that_nobody_touched_is_no_guess(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shown = []
    monkeypatch.setattr(guesses, "display", shown.append)
    guess = predict("accuracy", low=0.5, high=1)
    assert "Your guess: accuracy" in shown[0]._repr_html_()
    how_far(guess, 0.76)
    assert "There was no guess" in capsys.readouterr().out
    assert not read_progress()["guesses"]
    guess.slider.value = (0.7, 0.8)
    how_far(guess, 0.76)
    assert "the truth is inside it" in capsys.readouterr().out
    assert read_progress()["guesses"]["accuracy"] == {"low": 0.7, "high": 0.8, "sure": 0.8, "truth": 0.76}
    monkeypatch.setattr(guesses, "somebody_is_there", lambda: True)
    predict("accuracy", low=0.5, high=1)
    assert shown[-1].children[1].value == (0.5, 1)


@pytest.mark.parametrize(
    ("arguments", "words"), [({"low": 1, "high": 1}, "is not below"), ({"low": 0, "high": 1, "sure": 80}, "sure=80")]
)
def test_a_slider_that_cannot_be_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predict("accuracy", **arguments)


def test_progress_shows_exercises_and_how_well_ranges_hold(kept: Path) -> None:
    empty = progress()
    assert empty.figure is None
    assert "0 of" in repr(empty) and "not attempted" in repr(empty)
    check("warm-up", mine(EXERCISES["warm-up"]))
    check("recall-at-k", None)
    how_far(0.5, 0.5, "a number")  # no range
    for i in range(10):
        how_far((0.4, 0.6), 0.5 if i < 2 else 0.9, f"narrow {i}")
        how_far((0.0, 1.0), 0.5, f"wide {i}", sure=0.5)
    how_far((0.4, 0.6), 0.5, "one", sure=0.9)
    shown = progress()
    assert shown.exercises.loc[("01", "warm-up"), "state"] == "right"
    assert shown.exercises.loc[("06", "recall-at-k"), "state"] == "not yet right"
    assert "Of 10 ranges that should hold the truth in 80 % of cases, 2 did: they are too narrow." in shown.ranges
    assert "in 50 % of cases, 10 did: they are wider than they need be." in shown.ranges
    assert "Of 1 range that should hold the truth in 90 % of cases, 1 did: so far, that agrees." in shown.ranges
    assert "50 %: 100 %; 80 %: 20 %; 90 %: 100 %" in shown.figure.alt
    page = shown._repr_html_()
    assert shown.ranges in page and "<img alt=" in page


def test_the_door_offers_it_in_a_kernel_where_somebody_reads(tmp_path: Path, kept: Path) -> None:
    """Names come from ftkit.lab; without the variable, progress is kept since a person runs the cell."""
    code = (
        f"import os; os.environ.pop('FTKIT_PROGRESS'); os.environ['XDG_DATA_HOME'] = {str(tmp_path)!r}\n"
        "from ftkit.lab import check, grade, hint, how_far, predict, progress, solution, yours_or_reference\n"
        "from ftkit.lab import without_reference\n"
        "def warm_up_factor(step, warmup, total):\n"
        "    return undefined\n"
        "check('warm-up', warm_up_factor)"
    )
    manager, client = start_new_kernel()
    said = []
    try:
        client.execute_interactive(code, output_hook=lambda message: said.append(message["content"]), timeout=120)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "NameError in line 5 of its cell: name 'undefined'" in str(said)
    assert json.loads((tmp_path / "ftkit" / "progress.json").read_text())["exercises"]["warm-up"]["tries"] == 1
