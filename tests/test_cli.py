"""The command `ftkit`, mostly on a tiny notebook that trains nothing."""

import errno
import json
import os
from pathlib import Path

import nbformat
import pytest

from ftkit import cli
from ftkit.data.assets import registry
from ftkit.lab.studies import recording


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook that doubles a number, in the current folder."""
    monkeypatch.chdir(tmp_path)
    parameters = nbformat.v4.new_code_cell("tier: str = 'cpu'\nx: float = 1.0", metadata={"tags": ["parameters"]})
    result = nbformat.v4.new_code_cell(
        "from ftkit.lab.results import save_metrics\n"
        "assert x > 0, 'x must be positive'\n"
        "path = save_metrics({'x': x, 'tier': tier}, {'double': {'accuracy': x * 2}})"
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, result]), "double.ipynb")
    return tmp_path / "double.ipynb"


def test_run_executes_prints_the_table_and_the_report(notebook: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "double", "-p", "x=1e-1", "--tier", "smoke", "--out", "out", "--html"]) == 0
    out = capsys.readouterr().out
    assert "double" in out and "0.200" in out
    report = Path(out.strip().splitlines()[-1])
    assert report.name == "report.html" and report.is_file()
    assert json.loads((report.parent / "metrics.json").read_text())["settings"] == {"x": 0.1, "tier": "smoke"}


def test_a_failing_run_exits_with_1_and_one_line(notebook: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "double", "-p", "x=-1", "--out", "out"]) == 1
    assert "ftkit: AssertionError: x must be positive" in capsys.readouterr().err


def test_the_tier_can_come_from_the_environment(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_TIER", "smoke")
    assert cli.main(["run", "double", "--out", "out"]) == 0
    assert json.loads(next(Path("out").glob("*/metrics.json")).read_text())["settings"]["tier"] == "smoke"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["run", "doubel"], "There is no notebook 'doubel': did you mean 'double'"),
        (["run", "double", "-p", "y=1"], "no parameter 'y': did you mean 'x'"),
        (["fetch", "minlm"], "did you mean 'minilm'"),
        (["fetch"], "There is nothing to fetch"),
        (["run", "double", "-p", "x=1", "-p", "x=2"], "x is given 2 times: give all its values at once, x=A,B"),
        (["run", "double", "-p", "x=1,2", "-p", "y=1"], "no parameter 'y': did you mean 'x'"),
        (["run", "doubel", "--help"], "There is no notebook 'doubel': did you mean 'double'"),
        (["study", "no_such_study"], "There is no study 'no_such_study'"),
        (["study", "full_fine_tuning", "--only", "seed=0", "seed=1"], "seed is given 2 times"),
        (["run", "double", "--out", "double.ipynb"], "double.ipynb cannot be written (File exists): give a folder"),
        (["run", "double", "--out", "double.ipynb/out"], "out cannot be written (Not a directory): give a folder"),
        (["run", "double", "--out", "double.ipynb", "-p", "x=1,2"], "double.ipynb cannot be written (File exists)"),
    ],
)
def test_mistakes_give_one_line(notebook: Path, capsys: pytest.CaptureFixture, command: list, words: str) -> None:
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lr=3e-4", [3e-4]), ("on=true", [True]), ("seeds=[0, 1]", [[0, 1]]), ("none=None", [None]),
        ("data=my file.csv", ["my file.csv"]), ("q=a=b", ["a=b"]), ("lr=1e-4,3e-4", [1e-4, 3e-4]),
    ],
)  # fmt: skip
def test_parameter_values(text: str, values: list) -> None:
    assert cli._parameter(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-p", "lr"], "'lr' is not of the form NAME=VALUE."),
        (["-p", "seed=0..1000000000"], "That is 1,000,000,001 runs, and a grid may have 10,000: give fewer values."),
        (["-p", "seed=4..0"], "The range 4..0 has its larger number first: write 0..4."),
        (["--jobs", "0"], "'0' is not a number of runs: give 1 or more."),
    ],
)
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture, options: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["run", "x", *options])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("notebook", "listed"), [([], False), (["01_full_fine_tuning"], True)])
def test_help_after_a_notebook_lists_its_parameters(
    capsys: pytest.CaptureFixture, notebook: list[str], listed: bool
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["run", *notebook, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: ftkit run [-h] [-p NAME=VALUE]")
    assert ("start from the pretrained weights" in out) == listed


def test_a_study_runs_only_the_rows_with_given_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []
    (tmp_path / "rates.csv").write_text('a,b\n1,"two\nlines"\n2,x\n', encoding="utf-8")

    def run_study(*given: object, scheduler: str | None = None) -> Path:
        asked.append((*given, scheduler))
        return tmp_path / "rates.csv"

    monkeypatch.setattr(recording, "run_study", run_study)
    assert cli.main(["study", "rates", "--only", "rows=50,100", "lr=1e-4"]) == 0
    assert asked == [("rates", {"rows": [50, 100], "lr": [1e-4]}, None)]
    assert capsys.readouterr().out == f"{tmp_path / 'rates.csv'}: 2 rows\n"


def test_a_report_that_cannot_be_written_does_not_hide_the_results(
    notebook: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(path: Path, text: str, real=Path.write_text, **options: object) -> int:
        if path.name.startswith("report.html"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["run", "double", "-p", "x=0.1", "--out", "out", "--html"]) == 1
    out, err = capsys.readouterr()
    assert "0.200" in out and out.splitlines()[-1].endswith("notebook.ipynb")
    assert "report.html cannot be written (No space left on device): free some space" in err.splitlines()[-1]


def test_verify_names_what_is_damaged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(registry, "verify", lambda name: None)
    assert cli.main(["assets", "--verify"]) == 0
    assert "as they were when unpacked" in capsys.readouterr().out
    monkeypatch.setattr(registry, "verify", lambda name: f"{name} is damaged." if name == "minilm" else None)
    assert cli.main(["assets", "--verify"]) == 1
    assert capsys.readouterr().out == "minilm is damaged.\n"


def test_assets_lists_all(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["assets"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in registry.names())
    assert cli.main(["assets", "--cards"]) == 0
    assert capsys.readouterr().out == (Path(__file__).parents[1] / "data" / "README.md").read_text(encoding="utf-8")
