import json
from pathlib import Path

import nbformat
import pytest

from ftkit import assets, cli


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook that doubles a number, in the current folder."""
    monkeypatch.chdir(tmp_path)
    parameters = nbformat.v4.new_code_cell("tier: str = 'cpu'\nx: float = 1.0", metadata={"tags": ["parameters"]})
    result = nbformat.v4.new_code_cell(
        "from ftkit.results import save_metrics\n"
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
        (["run", "doubel"], "No notebook 'doubel': did you mean 'double'"),
        (["run", "double", "-p", "y=1"], "no parameter 'y': did you mean 'x'"),
        (["fetch", "minlm"], "did you mean 'minilm'"),
        (["fetch"], "Nothing to fetch"),
    ],
)
def test_mistakes_give_one_line(notebook: Path, capsys: pytest.CaptureFixture, command: list, words: str) -> None:
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=3e-4", 3e-4), ("on=true", True), ("seeds=[0, 1]", [0, 1]), ("none=None", None),
        ("data=my file.csv", "my file.csv"), ("q=a=b", "a=b"),
    ],
)  # fmt: skip
def test_parameter_values(text: str, value: object) -> None:
    assert cli._parameter(text)[1] == value


def test_a_parameter_without_a_value_is_wrong_usage(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["run", "x", "-p", "lr"])
    assert exit_.value.code == 2
    assert "'lr' is not of the form NAME=VALUE" in capsys.readouterr().err


def test_assets_lists_all(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["assets"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in assets.names())
    assert cli.main(["assets", "--cards"]) == 0
    assert capsys.readouterr().out == (Path(__file__).parents[1] / "data" / "README.md").read_text(encoding="utf-8")
