"""Settings files: what is written is read back as it was, YAML's traps, what is refused, runs from a file."""

import json
import shlex
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from ftkit import TIERS, cli
from ftkit.errors import SettingsError
from ftkit.lab import settings
from ftkit.lab.results import read_ledger
from ftkit.lab.runs.notebooks import check_parameters, find_notebook, identify, settings_text
from ftkit.lab.schema import NotebookSettings
from ftkit.lab.settings_file import format_settings, read_settings, write_command

SCHEMAS = [item for item in vars(settings).values() if isinstance(item, type) and hasattr(item, "NOTEBOOK")]

TEXTS = [
    "minilm", "no", "Off", "y", "Yes", "1e-4", "0..4", "2024-01-01", "1:30", "010", "true", "None", "null", "~", "",
    " a", "a: b", "2024-13-01",
    "x #y", "- a", "é ü", "a\nb", "\u2028\x85\x07", "0x1f", "1_000", ".inf", "a'b\"c", "😀", "[a]", "{b}", "?", "key:",
    "1.", "<<", "=", "&a", "*a", "!x", "%y", "`q", "C:\\x", "a, b.csv", "~/x.csv", "owner/name:config",
]  # fmt: skip
VALUES = [1e-7, 1e-4, 1 / 3, 1e22, 16.0, 5, -3, True, False, None, [200, 0.5], ["a, b", "no"], []]


@pytest.mark.parametrize("value", [*TEXTS, *VALUES, TEXTS], ids=repr)
def test_every_value_is_read_back(tmp_path: Path, value: Any) -> None:
    text = format_settings("own", "cpu", {"x": value}, {"several": [value, 1]}, defaults={"tier": "cpu", "x": value})
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    read = read_settings(tmp_path / "s.yaml")
    assert (read.notebook, read.tier, read.grid) == ("own", "cpu", {"several": [value, 1]})
    assert repr(read.parameters) == repr({"x": value})
    assert yaml.safe_load(text)["parameters"] == {"x": value}  # by programs that read YAML 1.1, too


@pytest.mark.parametrize("value", [*TEXTS, *VALUES, TEXTS], ids=repr)
def test_the_command_gives_every_value(value: Any) -> None:
    given = cli._parser().parse_args(shlex.split(write_command("own", "cpu", {"x": value}))[1:])
    assert (given.notebook, given.tier, given.parameter) == ("own", "cpu", [("x", [value])])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.NOTEBOOK)
def test_the_comments_of_a_file_are_the_defaults(tmp_path: Path, schema: type[NotebookSettings], tier: str) -> None:
    """A file in which every comment is made a setting sets every parameter to its default."""
    text = format_settings(schema.NOTEBOOK, tier, {}, schema=schema)
    head, parameters = text.split("parameters:\n")
    set_all = "\n".join(line.replace("  # ", "  ", 1) for line in parameters.splitlines())
    (tmp_path / "s.yaml").write_text(f"{head}parameters:\n{set_all}", encoding="utf-8")
    read = read_settings(tmp_path / "s.yaml")
    assert list(read.parameters) == [parameter.name for parameter in schema.parameters()[1:]]
    assert schema.at(read.tier, **read.parameters) == schema.at(tier)
    assert all(parameter.help in text for parameter in schema.parameters()[1:])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "s.yaml, line 1, is not YAML (expected the node content"),
        ("tier: cpu\na: b: c", "s.yaml, line 2, is not YAML (mapping values are not allowed here)"),
        ("a: 1\n\tb: 1", "s.yaml, line 2, is not YAML"),
        ("x: !!python/object:os.system 1", "s.yaml, line 1, is not YAML (could not determine a constructor"),
        ("\x00", "s.yaml is not YAML (special characters are not allowed)"),
        ("[" * 3000, "s.yaml is not YAML (maximum recursion depth"),
        ("x: &a [*a]", "s.yaml is not YAML (Circular reference detected)"),
        ("parameters: {a: !!timestamp 2024-01-01}", "s.yaml is not YAML (Object of type date"),
        ("", "s.yaml has no settings: give notebook, tier and parameters"),
        ("- lr", "s.yaml has no settings"),
        (
            "lr: 1",
            "s.yaml has the key 'lr': did you mean 'tier'? Its keys are notebook, tier, parameters, grid; a para",
        ),
        ("notebok: a", "did you mean 'notebook'"),
        ("notebook: 1", "s.yaml has notebook: 1: give a name."),
        ("tier: [cpu]", 's.yaml has tier: ["cpu"]: give a name.'),
        ("parameters: 3", "s.yaml has parameters: 3: write NAME: VALUE below it"),
        ("grid: [1]", "s.yaml has grid: [1]: write NAME: VALUE below it"),
        ("grid: {lr: []}", "s.yaml has no value for lr under grid: give a list of values, [A, B]."),
        ("tier: cpu\ntier: gpu", "s.yaml, line 1: tier is given 2 times: leave one of them."),
        ("parameters:\n  lr: 1\n  lr: 2", "s.yaml, line 2: lr is given 2 times: leave one of them."),
        ("parameters: {1: 2}", "s.yaml, line 1: the key 1 is no name: give a name."),
        ("parameters:\n  keep: no", 's.yaml, line 2: no may mean false or the word: write false or "no".'),
        ("parameters:\n  keep: On", 's.yaml, line 2: On may mean true or the word: write true or "On".'),
        ("parameters: {lr: 1}\ngrid: {lr: [1]}", "s.yaml has lr under parameters and under grid: leave it in one"),
        ("tier: cpu\ngrid: {tier: [cpu]}", "s.yaml has tier twice: leave one of them."),
        (
            "notebook: 01_full_fine_tuning\nparameters: {lr: [1e-4, 3e-4]}",
            "s.yaml has several values for lr under parameters: put them under grid.",
        ),
    ],
)
def test_what_is_no_settings_file_is_refused_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as refusal:
        read_settings(tmp_path / "s.yaml")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_of_another_encoding_or_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes("text: Überschrift".encode("latin-1"))
    with pytest.raises(SettingsError, match="is not UTF-8 text: save it as UTF-8"):
        read_settings(tmp_path / "s.yaml")
    with pytest.raises(FileNotFoundError, match=r"There is no settings file .*gone.yaml: write one with"):
        read_settings(tmp_path / "gone.yaml")
    (tmp_path / "s.yaml").write_bytes(b"\xef\xbb\xbfnotebook: a\r\ngrid:\r\n  x: 0..2\r\n")  # as Windows writes it
    assert (read_settings(tmp_path / "s.yaml").notebook, read_settings(tmp_path / "s.yaml").grid) == (
        "a",
        {"x": "0..2"},
    )


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook that doubles a number, in the current folder."""
    monkeypatch.chdir(tmp_path)
    parameters = "tier: str = 'cpu'\nx: float = 1.0\nnames: list = ['a']\nkeep: bool = False"
    result = (
        "from ftkit.lab.results import save_metrics\n"
        "path = save_metrics({'x': x, 'names': names, 'keep': keep, 'tier': tier}, {'double': {'accuracy': x * 2}})"
    )
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(result),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), "double.ipynb")
    return tmp_path / "double.ipynb"


def settings_of_runs(out: str) -> list[dict[str, Any]]:
    return sorted((e["settings"] for e in read_ledger(Path(out) / "ledger.jsonl")), key=json.dumps)


def test_a_run_leaves_its_settings_and_runs_again_from_them(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", "double", "-p", "x=1e-1", "-p", 'names=["no", "b"]', "--keep", "--tier", "smoke"]
    assert cli.main([*run, "--save", "s.yaml", "--out", "one"]) == 0
    (left,) = Path("one").glob("*/settings.yaml")
    assert left.read_bytes() == Path("s.yaml").read_bytes()
    assert cli.main(["run", "--settings", str(left), "--out", "two"]) == 0
    assert cli.main(["run", "--settings", "s.yaml", "-p", "x=2", "--tier", "cpu", "--out", "three"]) == 0
    given = {"x": 0.1, "names": ["no", "b"], "keep": True, "tier": "smoke"}
    assert settings_of_runs("one") == settings_of_runs("two") == [given]
    assert settings_of_runs("three") == [given | {"x": 2, "tier": "cpu"}]
    first, second, third = (read_ledger(Path(out) / "ledger.jsonl")[0]["identity"] for out in ("one", "two", "three"))
    assert first == second != third


def test_a_grid_is_saved_and_runs_again_from_its_file(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["-p", "x=1,2", "-p", 'names=["a"],["b", "c"]', "-p", "keep=true"]
    assert cli.main(["run", "double", *grid, "--save", "s.yaml", "--jobs", "2", "--out", "out"]) == 0
    capsys.readouterr()
    assert cli.main(["run", "--settings", "s.yaml", "--out", "out"]) == 0
    assert "4 of 4 runs are already done." in capsys.readouterr().err
    assert read_settings("s.yaml").grid == {"x": [1, 2], "names": [["a"], ["b", "c"]]}
    Path("s.yaml").write_text("notebook: double\ngrid: {x: 5..6}", encoding="utf-8")
    assert cli.main(["run", "--settings", "s.yaml", "--out", "range"]) == 0
    assert [used["x"] for used in settings_of_runs("range")] == [5, 6]


@pytest.mark.parametrize(
    ("text", "command", "words"),
    [
        ("notebook: double\nparameters: {y: 1}", [], "no parameter 'y': did you mean 'x'"),
        ("notebook: doubel", [], "There is no notebook 'doubel': did you mean 'double'"),
        ("notebook: double\ntier: huge", [], "There is no tier 'huge'"),
        ("notebook: other", ["double"], "s.yaml is for the notebook other, and double is given: leave double out"),
        ("parameters: {x: 1}", [], "There is nothing to run: give the NOTEBOOK, or a file that names one"),
        (
            "notebook: 01_full_fine_tuning\nparameters: {lr: 5}",
            [],
            "lr=5 is not allowed: give a number from 1e-07 to 1",
        ),
        ("notebook: 01_full_fine_tuning\nparameters: {rats: 5}", [], "no parameter 'rats': did you mean"),
        ("notebook: 01_full_fine_tuning\nparameters: {rows: 2024-01-01}", [], "rows='2024-01-01' is not allowed"),
        ("notebook: double", ["--save", "double.ipynb"], "double.ipynb exists already, with other settings"),
        ("notebook: double", ["--save", "gone/s.yaml"], "gone/s.yaml cannot be written (No such file or directory)"),
    ],
)
def test_mistakes_give_one_line_and_run_nothing(
    notebook: Path, capsys: pytest.CaptureFixture[str], text: str, command: list[str], words: str
) -> None:
    Path("s.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["run", *command, "--settings", "s.yaml", "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(Path().glob("out/*"))


def test_keep_is_refused_where_there_is_nothing_to_keep(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "05_catastrophic_forgetting", "--keep"]) == 1
    assert capsys.readouterr().err == (
        "ftkit: 05_catastrophic_forgetting has no parameter `keep`, so it keeps no model: leave --keep out.\n"
    )


def test_a_run_that_keeps_its_model_is_another_run() -> None:
    notebook = find_notebook("01_full_fine_tuning")
    without, kept = ({"tier": "smoke", "keep": keep} for keep in (False, True))
    assert identify(notebook, without)[1] == identify(notebook, {"tier": "smoke"})[1] != identify(notebook, kept)[1]
    assert check_parameters(notebook, kept) == {"keep": (False, True)}


def test_a_notebook_is_named_so_that_it_is_found(notebook: Path) -> None:
    """By its name alone, by its path below the current folder, or by its whole path."""
    Path("below").mkdir()
    below = Path("below", "01_full_fine_tuning.ipynb")
    below.write_bytes(find_notebook("01_full_fine_tuning").read_bytes())
    for name in ("double", "01_full_fine_tuning", "below/01_full_fine_tuning.ipynb"):
        path = find_notebook(name)
        assert settings_text(path, {"tier": "smoke"}).splitlines()[2] == f"notebook: {name}"
