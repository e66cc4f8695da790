"""The editions of a small lesson, and nbgrader on what is handed in: a right, a half right and an empty answer."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbgrader.api import Gradebook

from ftkit import cli
from ftkit.errors import CourseError
from ftkit.lab.course import build
from ftkit.lab.course.build import build_course
from ftkit.lab.course.exercises import find_exercise, source_of
from ftkit.lab.course.judging import in_words_of

Notebook = nbformat.NotebookNode

WARM_UP = "if step < warmup:\n        return step / warmup\n    return (total - step) / (total - warmup)"
ACCUMULATE = "return sum(loss * size for loss, size in zip(mean_losses, sizes)) / sum(sizes)"
STUB = "raise NotImplementedError  # your code goes here"


def text_of(notebook: Notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def code(source: str, *, output: str = "", **metadata: object) -> Notebook:
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)] if output else []
    return nbformat.v4.new_code_cell(source, outputs=outputs, execution_count=1, metadata=metadata)


def marks(name: str, **values: object) -> dict[str, object]:
    """nbgrader's metadata of a cell."""
    usual = {"grade": False, "locked": False, "solution": False, "task": False, "schema_version": 3}
    return usual | {"grade_id": name} | values


def exercise_cells(name: str, header: str, body: str, points: int) -> list[Notebook]:
    """Solution, check, use, and graded cell of an exercise."""
    function = header.partition("(")[0]
    solution = f'def {header}:\n    """What it computes."""\n    ### BEGIN SOLUTION\n    {body}\n    ### END SOLUTION'
    hidden = (
        "# Graded on other arguments when you hand this in\n### BEGIN HIDDEN TESTS\nimport warnings\n\n"
        f'warnings.warn("this must not cost the points")\ngrade("{name}", {function})\n### END HIDDEN TESTS'
    )
    return [
        code(solution, nbgrader=marks(name, solution=True)),
        code(f'check("{name}", {function})', output=f"{name}: right\n"),
        code(f'{function} = yours_or_reference("{name}", {function})', output="SECRET"),
        code(hidden, nbgrader=marks(f"{name}-grade", grade=True, locked=True, points=points)),
    ]


def small_lesson() -> Notebook:
    """A lesson with two exercises and a guess."""
    cells = [
        nbformat.v4.new_markdown_cell("# A small lesson"),
        code('tier: str = "cpu"', tags=["parameters"]),
        code(
            "import os\n\nfrom ftkit.lab import check, grade, how_far, yours_or_reference\n\n"
            'tier = os.environ["FTKIT_TIER"]\nprint("set up")',
            output="set up\n",
        ),
        code("guess = 0.55  # half-way down\nrange_of_it = (\n    0.1,\n    0.2,\n)", tags=["predict"]),
        code("how_far(guess, 0.5)", output="SECRET"),
        *exercise_cells("warm-up", "warm_up_factor(step, warmup, total)", WARM_UP, points=1),
        *exercise_cells("accumulation", "accumulate(mean_losses, sizes)", ACCUMULATE, points=2),
        nbformat.v4.new_markdown_cell(
            "Which would you deploy?\n\n### BEGIN SOLUTION\nA good answer weighs the cost.\n### END SOLUTION",
            metadata={"nbgrader": marks("judgement", grade=True, solution=True, points=1)},
        ),
        code(
            'print("the end at", tier, warm_up_factor(10, 10, 20))',
            output="SECRET",
        ),
    ]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lesson, in the current folder."""
    monkeypatch.chdir(tmp_path)
    nbformat.write(small_lesson(), "small.ipynb")
    return tmp_path / "small.ipynb"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a build of the lesson."""
    folder = tmp_path_factory.mktemp("built")
    nbformat.write(small_lesson(), folder / "small.ipynb")
    build_course(folder / "out", [folder / "small.ipynb"])
    return folder / "out"


def read(path: Path) -> Notebook:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(notebook: Notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("edition", ["student", "nbgrader/release/small"])
def test_student_edition_and_release_have_stubs_open_guesses_and_no_answers(built: Path, edition: str) -> None:
    student = read(built / edition / "small.ipynb")
    source = code_of(student)
    assert source.count(STUB) == 2
    assert "guess = None  # half-way down" in source
    assert "range_of_it = None" in source and "0.2" not in source
    for hidden in ("zip(", "BEGIN SOLUTION", "HIDDEN", 'grade("', "0.55"):
        assert hidden not in source, hidden
    assert "Which would you deploy?" in text_of(student) and "*Your answer goes here.*" in text_of(student)
    assert "weighs the cost" not in text_of(student)
    shown = [cell for cell in student.cells if cell.get("outputs")]
    assert [cell.outputs[0].text for cell in shown] == (["set up\n"] if edition == "student" else [])
    compile(source, "student", "exec")


def test_instructor_edition_has_all_of_it_and_the_mistakes(built: Path) -> None:
    edition, source = read(built / "instructor" / "small.ipynb"), small_lesson()
    assert code_of(edition) == code_of(source)
    assert code_outputs(edition) == code_outputs(source)
    notes = [cell.source for cell in edition.cells if "For instructors" in cell.source]
    assert [note.splitlines()[0] for note in notes] == [
        "**For instructors: minutes of each section**",
        f"**For instructors: warm-up** (1 point, {find_exercise('warm-up').effort})",
        f"**For instructors: accumulation** (2 points, {find_exercise('accumulation').effort})",
    ]
    assert "| (the beginning) | 3 | warm-up 6, accumulation 5, judgement 8 |" in edition.cells[1].source
    exercise = find_exercise("accumulation")
    for said in (*exercise.hints, *map(in_words_of, exercise.mistakes), "return sum(mean_losses) / len(mean_losses)"):
        assert said in notes[2]
    assert '"""' not in notes[2]
    assert "weighs the cost" in text_of(edition)
    graded = next(i for i, cell in enumerate(edition.cells) if "accumulation-grade" in str(cell.metadata))
    assert edition.cells[graded + 1].source == notes[2]


def test_instructor_edition_of_lesson_01_has_the_recorded_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_release", lambda *_: None)
    build_course(tmp_path, ["01_full_fine_tuning"])
    edition = read(tmp_path / "instructor" / "01_full_fine_tuning.ipynb")
    last = edition.cells[-1].source
    assert "Study `full_fine_tuning`, test accuracy: " in last
    assert "| pretrained | lr | num_epochs | mean | SD over seeds | lowest | highest | seeds |" in last
    assert "| True | 0.0001 | 2 | 0.8" in last
    assert sum("For instructors: cross-entropy" in cell.source for cell in edition.cells) == 1
    student = read(tmp_path / "student" / "01_full_fine_tuning.ipynb")
    assert code_of(student).count(STUB) == 3
    assert "### BEGIN SOLUTION" not in code_of(student)


def nbgrader(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd="out/nbgrader",
        env=os.environ | {"OMP_NUM_THREADS": "1", "FTKIT_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def hand_in(student: str, change: Callable[[str], str]) -> None:
    """Hand in the released notebook with a changed source of its cells."""
    notebook = read(Path("out/nbgrader/release/small/small.ipynb"))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = change(cell.source)
    folder = Path("out/nbgrader/submitted") / student / "small"
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / "small.ipynb")


def answered(**bodies: str) -> Callable[[str], str]:
    def change(source: str) -> str:
        for function, body in bodies.items():
            if source.startswith(f"def {function}("):
                return source.replace(STUB, body)
        return source

    return change


def test_nbgrader_grades_a_right_a_half_right_and_an_empty_answer(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    hand_in("right", answered(warm_up_factor=WARM_UP, accumulate=ACCUMULATE))
    hand_in("half", answered(warm_up_factor=WARM_UP, accumulate="return sum(mean_losses) / len(mean_losses)"))
    hand_in("empty", lambda source: source)
    nbgrader("autograde", "small")
    nbgrader("generate_feedback", "small")
    with Gradebook("sqlite:///out/nbgrader/gradebook.db", "ftkit") as book:
        scores = {name: book.find_submission("small", name) for name in ("right", "half", "empty")}
        assert {name: found.score for name, found in scores.items()} == {"right": 3, "half": 1, "empty": 0}
        assert not any(found.needs_manual_grade for found in scores.values())
        assert scores["right"].max_score == 4  # the judgement is graded by hand, if there is one
    feedback = Path("out/nbgrader/feedback/half/small/small.html").read_text(encoding="utf-8")
    assert "a mean of means gives the small last part too much weight" in feedback
    ran = read(Path("out/nbgrader/autograded/empty/small/small.ipynb"))
    assert "the end at smoke 1.0" in str(ran.cells[-1].outputs)  # the lesson went on with the references


@pytest.mark.parametrize("folder", ["/tmp/extracted/", "C:\\extracted\\", ""])
def test_nbgrader_collects_files_named_student_and_lesson(folder: str, tmp_path: Path) -> None:
    (tmp_path / "nbgrader_config.py").write_text(build._CONFIG)
    with build._configured(tmp_path / "nbgrader_config.py") as settings:
        pattern = settings.FileNameCollectorPlugin.named_regexp
    for student in ("ada", "ada_b", "ben_07"):
        found = re.match(pattern, f"{folder}{student}_01_full_fine_tuning.ipynb").groupdict()
        assert found == {"student_id": student, "file_id": "01_full_fine_tuning"}


def test_without_reference_the_lesson_stops_at_what_is_missing(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_release", lambda *_: None)
    monkeypatch.setenv("FTKIT_TIER", "smoke")
    assert cli.main(["course", "build", "out", "small", "--no-reference"]) == 0
    assert code_of(read(Path("out/student/small.ipynb"))).count("without_reference()") == 1
    student = read(Path("out/student/small.ipynb"))
    for cell in student.cells:
        cell.source = answered(warm_up_factor=WARM_UP)(cell.source)
    NotebookClient(student, timeout=120, allow_errors=True).execute()
    said = code_outputs(student)
    assert "warm-up: the lesson goes on with yours" in said
    assert "CourseError: accumulation: not attempted yet. The lesson goes on once your function is right." in said
    assert read(Path("out/nbgrader/source/small/small.ipynb")).cells[2].metadata.nbgrader.locked


def code_outputs(notebook: Notebook) -> str:
    return "\n".join(
        output.get("text", "") + f"{output.get('ename', '')}: {output.get('evalue', '')}"
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def test_a_second_build_replaces_the_editions_and_keeps_what_is_the_instructors(
    lesson: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FTKIT_TIER", raising=False)
    build_course("out", ["small"])
    assert "FTKIT_TIER" not in os.environ
    config = Path("out/nbgrader/nbgrader_config.py")
    changed = config.read_text().replace("1800", "60").replace("your code goes here", "write")
    config.write_text(changed)
    submitted = Path("out/nbgrader/submitted/me/small/small.ipynb")
    submitted.parent.mkdir(parents=True)
    submitted.write_text("mine")
    capsys.readouterr()
    build_course("out", ["small"])
    assert "is kept" in capsys.readouterr().out
    assert config.read_text() == changed
    assert submitted.read_text() == "mine"
    for edition in ("student", "nbgrader/release/small"):
        assert "raise NotImplementedError  # write" in code_of(read(Path(f"out/{edition}/small.ipynb")))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "nbgrader").mkdir() or (out / "nbgrader/nbgrader_config.py").write_text("c ="), "mend it"),
        (lambda out: (out / "student").touch(), "cannot be written"),
    ],
)
def test_what_stands_in_the_way_is_said_in_one_line(
    lesson: Path, capsys: pytest.CaptureFixture, damage: Callable, words: str
) -> None:
    Path("out").mkdir()
    damage(Path("out"))
    assert cli.main(["course", "build", "out", "small"]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_faults_of_a_lesson_are_said_in_one_line(lesson: Path) -> None:
    notebook = read(lesson)
    notebook.cells[-2].metadata.nbgrader.grade_id = "warm-up"  # a second cell of this name
    nbformat.write(notebook, lesson)
    with pytest.raises(CourseError, match=r"nbgrader cannot release small: Duplicate grade id: warm-up\.$"):
        build_course("out", ["small"])
    Path("other").mkdir()
    nbformat.write(notebook, "other/small.ipynb")
    with pytest.raises(CourseError, match="2 notebooks are called small"):
        build_course("out", ["small", "other/small.ipynb"])
    with pytest.raises(FileNotFoundError, match="no notebook 'smal': did you mean 'small'"):
        build_course("out", ["smal"])


def test_nbgrader_is_asked_for_where_it_is_missing(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbgrader", None)
    with pytest.raises(CourseError, match=r'run `pip install "ftkit\[course\]"`'):
        build_course("out", ["small"])


@pytest.mark.parametrize(
    ("source", "opened"),
    [
        ("guess = 2 / 3", "guess = None"),
        ("guess: float = -0.7  # é", "guess: float = None  # é"),
        ("low, high = 0.6, 0.7", "low, high = None, None"),
        ("guess = (0.6, 0.7)\nother = [1,\n  2]", "guess = None\nother = None"),
        ("guess = predict('x', low=0, high=1)", "guess = predict('x', low=0, high=1)"),
        ("guess: float", "guess: float"),
    ],
)
def test_a_guess_written_in_literals_is_opened(source: str, opened: str) -> None:
    assert build._opened(source) == opened


def test_a_tag_on_a_text_opens_nothing_and_a_guess_that_is_no_python_is_refused(lesson: Path) -> None:
    notebook = read(lesson)
    notebook.cells[0].metadata["tags"] = ["predict"]
    nbformat.write(notebook, lesson)
    build_course("out", ["small"])
    assert read(Path("out/student/small.ipynb")).cells[0].source == "# A small lesson"
    next(cell for cell in notebook.cells if cell.source.startswith("guess")).source = "guess = about 0.7"
    nbformat.write(notebook, lesson)
    with pytest.raises(CourseError, match=r"tagged predict is no plain Python .*'guess = about 0.7'"):
        build_course("out", ["small"])


GUESSES = {
    "None": "There was no guess.",
    "0.75": "Your guess was 0.75: 0.05 too high.",
    "(0.6, 0.8)": "Your range was 0.6 to 0.8: the truth is inside it.",
    "'no idea'": "The guess 'no idea' is no number: write one, or a range such as (0.7, 0.85).",
    "0,7": "The guess (0, 7) is far from it: if you meant 0.7, write it with a point.",
}


def test_run_all_of_a_student_edition_ends_whatever_was_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but a guess that is no Python, or raises: there it stops, and no earlier guess is taken for this one."""
    monkeypatch.setenv("FTKIT_PROGRESS", str(tmp_path / "progress.json"))
    cells = [code("from ftkit.lab import check, how_far, progress, yours_or_reference")]
    for number in range(len(GUESSES) + 1):
        cells.append(code("guess = (0.6, 0.7)", tags=["predict"]))
        cells.append(code(f"how_far(guess, 0.7, 'accuracy {number}')"))
    cells[-2:-2] = exercise_cells("warm-up", "warm_up_factor(step, warmup, total)", WARM_UP, points=1)[:-1]
    cells[-2:-2] = [code("progress()")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "guesses.ipynb")
    student = read(build_course(tmp_path / "out", [tmp_path / "guesses.ipynb"])[0] / "guesses.ipynb")
    asked = [cell for cell in student.cells if "predict" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in asked] == ["guess = None"] * len(asked)
    for cell, guess in zip(asked, [*GUESSES, "undefined"], strict=True):
        cell.source = f"guess = {guess}"
    with pytest.raises(CellExecutionError, match=r"guess = undefined"):
        NotebookClient(student, timeout=120).execute()
    said = code_outputs(student)
    for number, words in enumerate(GUESSES.values()):
        assert f"accuracy {number}: 0.7. {words}\n" in said
    assert "warm-up: not attempted yet; the reference takes its place" in said
    assert "Of 1 range that should hold the truth in 80 % of cases, 1 did" in str(student.cells[-3].outputs)
    assert f"accuracy {len(GUESSES)}" not in said
    assert set(json.loads((tmp_path / "progress.json").read_text())["guesses"]) == {"accuracy 1", "accuracy 2"}


def test_all_lessons_are_built_by_default() -> None:
    names = [path.stem for path in build._lessons()]
    assert names[0] == "01_full_fine_tuning" and len(names) >= 6
    assert source_of(find_exercise("warm-up").reference).startswith("def warm_up_factor(")


@pytest.mark.parametrize(
    ("source", "asks"),
    [("guess = predict('x', low=0, high=1)", True), ("p = model.predict(X)", False), ("q = my_predict(X)", False)],
)
def test_only_a_question_hides_what_follows(source: str, asks: bool) -> None:
    assert build._asks_for_a_guess(code(source)) == asks
