"""Recorded studies: on a tiny notebook that trains nothing, then those committed in data/studies."""

import ast
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from ftkit import plots
from ftkit.errors import SettingsError, StudyError
from ftkit.lab.machine import describe_machine
from ftkit.lab.settings import FullFineTuning
from ftkit.lab.studies.declaration import STUDIES_FOLDER, read_declaration
from ftkit.lab.studies.recording import run_study
from ftkit.lab.studies.study import Study, load_study

TOML = """
notebook = "01_full_fine_tuning.ipynb"
tier = "cpu"
seeds = [0, 1, 2]
[parameters]
lr = 1e-4
rows = 100
test_rows = 40
[[grid]]
rows = [50, 100]
[[grid]]
lr = [1e-4, 1]
schedule = ["linear", "cosine"]
"""
DECLARED = [
    (50, 1e-4, "linear"), (100, 1e-4, "linear"), (100, 1.0, "linear"), (100, 1e-4, "cosine"), (100, 1.0, "cosine")
]  # fmt: skip
SETUP = """
import os, time
import numpy as np
from ftkit.training.state import History
from ftkit.metrics import Evaluation
from ftkit.lab.results import Outcome
from ftkit.lab.settings import FullFineTuning
settings = FullFineTuning.from_cell(globals())
print("not for the terminal")
display(settings)
"""
TRAIN = '''
def train(settings, seed, callbacks=()):
    """Random predictions that depend on the seed and the number of rows."""
    with open(os.environ["RAN"], "a") as ran:
        ran.write(f"{settings.tier} {settings.rows} {settings.lr} {settings.schedule} {seed}\\n")
    if "MEET" in os.environ:  # wait for a second process
        open(os.path.join(os.environ["MEET"], str(os.getpid())), "w").close()
        while len(os.listdir(os.environ["MEET"])) < 2:
            time.sleep(0.01)
    time.sleep(float(os.environ.get("PAUSE", 0)))
    problem = os.environ.get("PROBLEM")
    if problem == "fails" and settings.lr == 1:
        raise ValueError("the rate is too high\\nand more")
    p = np.random.default_rng([seed, settings.rows]).dirichlet([1, 1], size=settings.test_rows)
    tested = Evaluation(np.arange(len(p)) % 2, p, float("nan") if problem == "diverges" and settings.lr == 1 else 0.5)
    steps = [{"step": 1, "loss": 0.7}] * 3
    ended = "interrupted" if problem == "interrupted" and seed == 1 else "finished"
    history = History(steps=steps, ended=ended, trainable_parameters=7, seconds=1.234, peak_rss_mib=500.0)
    return Outcome(seed, history, {"test": tested, "validation": tested}, {"forgetting": 0.25})
'''
COMMAND = """
import pathlib, sys
from ftkit.lab.studies.recording import run_study
run_study("tiny", folder=pathlib.Path(sys.argv[1]))
"""


def write_notebook(folder: Path, *study: str) -> None:
    cells = [new_code_cell(FullFineTuning.parameters_cell(), metadata={"tags": ["parameters"]})]
    cells += [new_code_cell("raise RuntimeError('this cell is not part of the study')")]
    cells += [new_code_cell(source, metadata={"tags": ["study", "other"]}) for source in study]
    nbformat.write(new_notebook(cells=cells), folder / "01_full_fine_tuning.ipynb")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAN", str(tmp_path / "ran.txt"))
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "tiny.toml").write_text(TOML)
    write_notebook(folder, SETUP, TRAIN)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "tiny.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def keys_of(folder: Path) -> Counter:
    return Counter((int(r["rows"]), float(r["lr"]), r["schedule"], int(r["seed"])) for r in rows_of(folder))


def ran(folder: Path) -> list[str]:
    return (folder.parent / "ran.txt").read_text().splitlines()


ALL = Counter((*combination, seed) for combination in DECLARED for seed in (0, 1, 2))


def test_each_combination_of_the_grids_runs_once_and_is_fully_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FTKIT_TIER", "smoke")
    assert run_study("tiny", progress=False, folder=folder) == folder / "tiny.csv"
    assert keys_of(folder) == ALL
    assert {line.split()[0] for line in ran(folder)} == {"cpu"}  # FTKIT_TIER is ignored
    assert os.environ["FTKIT_TIER"] == "smoke"
    row = next(row for row in rows_of(folder) if (row["rows"], row["seed"]) == ("50", "2"))
    p = np.random.default_rng([2, 50]).dirichlet([1, 1], size=40)
    assert float(row["test_accuracy"]) == np.mean(p.argmax(axis=1) == np.arange(40) % 2)
    assert 0 < float(row["validation_macro_f1"]) < 1
    expected = {
        "test_loss": "0.5",
        "trainable_parameters": "7",
        "steps": "3",
        "ended": "finished",
        "forgetting": "0.25",
    }
    expected |= {"seconds": "1.23", "peak_rss_mib": "500.0", "code": read_declaration("tiny", folder).code}
    expected |= {name: describe_machine()[name] for name in ("machine", "versions", "revision")}
    assert row.items() >= expected.items()
    assert capfd.readouterr() == ("", "")  # the output of the cells is not shown
    run_study("tiny", progress=False, folder=folder)
    assert len(ran(folder)) == len(ALL)  # nothing was missing


def test_the_bar_shows_the_current_row_and_the_number_of_rows(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_study("tiny", {"rows": 50}, folder=folder)
    shown = capfd.readouterr().err
    assert "rows=50, lr=0.0001, schedule=linear, seed=2" in shown
    assert "3/3" in shown


def test_only_selects_the_rows_with_a_value_or_one_of_several(folder: Path) -> None:
    run_study("tiny", {"lr": 1, "seed": [0, 2]}, progress=False, folder=folder)
    assert keys_of(folder) == Counter((100, 1.0, schedule, s) for schedule in ("linear", "cosine") for s in (0, 2))
    run_study("tiny", {"seed": range(1)}, progress=False, folder=folder)
    assert sum(keys_of(folder).values()) == 4 + 3


@pytest.mark.parametrize(
    ("only", "message"),
    [({"learning_rate": 1}, "does not vary 'learning_rate': did you mean"), ({"rows": [50, 51]}, "no rows=51: it has")],
)
def test_an_unknown_name_or_value_in_only_is_refused(folder: Path, only: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_study("tiny", only, progress=False, folder=folder)
    assert not (folder / "tiny.csv").exists()


def test_a_study_that_is_killed_and_resumed_loses_and_repeats_no_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAUSE", "0.2")
    generator, kills = np.random.default_rng(), 0
    while kills < 3:
        before = len(rows_of(folder)) if (folder / "tiny.csv").exists() else 0
        process = subprocess.Popen([sys.executable, "-c", COMMAND, folder], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not (folder / "tiny.csv").exists() or len(rows_of(folder)) < before + 2):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.3))  # during a row or its recording
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert before < len(rows_of(folder)) < len(ALL), "the study was over before the kill"
        assert max(keys_of(folder).values()) == 1
    run_study("tiny", progress=False, folder=folder)
    assert keys_of(folder) == ALL
    assert len(ran(folder)) <= len(ALL) + kills  # each kill loses only the current row


def test_an_interruption_while_a_row_is_written_leaves_the_csv_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study("tiny", {"rows": 50}, progress=False, folder=folder)
    before = (folder / "tiny.csv").read_bytes()

    def half(writer: csv.DictWriter, rows: list[dict[str, str]]) -> None:
        writer.writerow(next(iter(rows)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(csv.DictWriter, "writerows", half)
        run_study("tiny", progress=False, folder=folder)
    assert (folder / "tiny.csv").read_bytes() == before
    run_study("tiny", progress=False, folder=folder)
    assert keys_of(folder) == ALL


def test_two_processes_share_the_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE", "0.05")
    monkeypatch.setenv("MEET", str(folder.parent / "meet"))
    (folder.parent / "meet").mkdir()
    command = [sys.executable, "-c", COMMAND, folder]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert keys_of(folder) == ALL
    assert max(Counter(ran(folder)).values()) == 1  # no row ran twice
    assert all("seed=" in text for text in printed)  # and both ran some


def test_the_row_of_a_killed_process_is_run_by_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE", "30")
    holder = subprocess.Popen([sys.executable, "-c", COMMAND, folder], stderr=subprocess.DEVNULL)
    while not (folder.parent / "ran.txt").exists():
        time.sleep(0.01)
    monkeypatch.setenv("PAUSE", "0")
    other = subprocess.Popen([sys.executable, "-c", COMMAND, folder], stderr=subprocess.DEVNULL)
    while not (folder / "tiny.csv").exists() or len(rows_of(folder)) < len(ALL) - 1:
        time.sleep(0.01)
    assert other.poll() is None  # it waits for the last row
    holder.kill()
    holder.wait()
    assert other.wait() == 0
    assert keys_of(folder) == ALL


def test_rows_of_other_code_are_not_mixed(folder: Path) -> None:
    run_study("tiny", {"rows": 50}, progress=False, folder=folder)
    before = (folder / "tiny.csv").read_bytes()
    unused = "\nimport json\nfrom math import pi as circle"  # which only other cells of the notebook use
    write_notebook(folder, SETUP + unused + "\n# a comment", TRAIN.replace("p = np", "p  =  np"))
    run_study("tiny", {"rows": 50}, progress=False, folder=folder)  # the same code
    for change in ("code", "import", "fixed"):
        if change == "code":
            write_notebook(folder, SETUP, TRAIN.replace("[1, 1]", "[2, 1]"))
        elif change == "import":
            write_notebook(
                folder, SETUP.replace("import Outcome", "import Outcome as Result, Outcome"), TRAIN + "\nResult"
            )
        else:
            write_notebook(folder, SETUP, TRAIN)
            (folder / "tiny.toml").write_text(TOML.replace("test_rows = 40", "test_rows = 50"))
        with pytest.raises(
            StudyError, match=r"tiny.csv has rows of other code.*move or delete the file and run the study again"
        ) as error:
            run_study("tiny", progress=False, folder=folder)
        assert "\n" not in str(error.value)
        assert (folder / "tiny.csv").read_bytes() == before
    (folder / "tiny.toml").write_text(TOML + "[[grid]]\nwarmup = [0.2]\n")
    with pytest.raises(StudyError, match=r"tiny.csv has no column 'warmup'"):
        run_study("tiny", progress=False, folder=folder)


@pytest.mark.parametrize(
    ("problem", "message"), [("fails", "ValueError: the rate is too high"), ("diverges", "loss is nan")]
)
def test_a_failed_row_is_reported_and_the_others_are_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], problem: str, message: str
) -> None:
    monkeypatch.setenv("PROBLEM", problem)
    with pytest.raises(StudyError, match="6 rows of tiny failed"):
        run_study("tiny", progress=False, folder=folder)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("rows=100, lr=1, schedule=") and message in line for line in lines)
    assert keys_of(folder) == Counter(key for key in ALL.elements() if key[1] != 1)
    monkeypatch.delenv("PROBLEM")
    run_study("tiny", progress=False, folder=folder)
    assert keys_of(folder) == ALL


def test_ctrl_c_ends_the_study_without_the_current_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBLEM", "interrupted")
    with pytest.raises(KeyboardInterrupt):
        run_study("tiny", progress=False, folder=folder)
    assert keys_of(folder) == Counter((*combination, 0) for combination in DECLARED)
    monkeypatch.delenv("PROBLEM")
    run_study("tiny", progress=False, folder=folder)
    assert keys_of(folder) == ALL


def test_a_notebook_that_changes_a_declared_value_records_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_notebook(folder, SETUP + "settings = settings.changed(rows=min(settings.rows, 60))", TRAIN)
    with pytest.raises(StudyError, match="12 rows of tiny failed"):
        run_study("tiny", progress=False, folder=folder)
    assert "The notebook changed rows from 100 to 60" in capfd.readouterr().err
    assert {key[0] for key in keys_of(folder)} == {50}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows = [50", "rows = [1", "rows=1 is not allowed: .*from 2 to"),
        ("schedule =", "scedule =", "did you mean 'schedule'"),
        ("[[grid]]\nrows", "[[grids]]\nrows", "give exactly notebook, tier, seeds"),
        ("[[grid]]\nlr = [1e-4, 1]", "[[grid]]\nlr = 1", "a list"),
        ("seeds = [0, 1, 2]", "seeds = []", "a list"),
        ("seeds =", "seeds", "tiny.toml is not valid TOML"),
        ("lr = 1e-4\n", 'lr = 1e-4\ntier = "gpu"\n', "tier and seeds at the top"),
        ("01_full_fine_tuning", "my_own", "has no settings class"),
    ],
)
def test_a_wrong_declaration_is_refused_before_anything_runs(folder: Path, old: str, new: str, message: str) -> None:
    assert old in TOML
    (folder / "tiny.toml").write_text(TOML.replace(old, new))
    with pytest.raises((StudyError, SettingsError), match=message):
        run_study("tiny", progress=False, folder=folder)
    assert not (folder.parent / "ran.txt").exists()


def test_a_notebook_without_tagged_cells_is_refused(folder: Path) -> None:
    write_notebook(folder)
    with pytest.raises(
        StudyError, match=r"01_full_fine_tuning.ipynb lacks the tags of a study: tag one cell `parameters`"
    ):
        run_study("tiny", progress=False, folder=folder)


def test_for_an_unknown_study_the_nearest_name_is_suggested(folder: Path) -> None:
    for call in (run_study, load_study):
        with pytest.raises(FileNotFoundError, match="There is no study 'tinny': did you mean 'tiny'"):
            call("tinny", folder=folder)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_sees_no_file_of_a_run_except_the_recorded_rows(folder: Path) -> None:
    subprocess.run(["git", "init", "-q", folder], check=True)
    run_study("tiny", {"rows": 50}, progress=False, folder=folder)
    command = ["git", "-C", folder, "status", "--porcelain", "--untracked-files=all"]
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert {line[3:] for line in status.splitlines()} == {"01_full_fine_tuning.ipynb", "tiny.csv", "tiny.toml"}


def test_a_study_is_read_as_it_was_declared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StudyError, match="run `ftkit study tiny`"):
        load_study("tiny", folder)
    run_study("tiny", {"schedule": "cosine"}, progress=False, folder=folder)
    run_study("tiny", {"rows": 50}, progress=False, folder=folder)
    study = load_study("tiny", folder)
    assert "9 of 15 runs recorded" in capsys.readouterr().out
    run_study("tiny", progress=False, folder=folder)
    study = load_study("tiny", folder)
    assert capsys.readouterr().out == ""
    assert study.fixed == {"test_rows": 40}
    names = ["rows", "lr", "schedule", "seed"]
    assert study.rows[names].to_dict("records") == study.declaration.rows
    assert study.rows["test_accuracy"].between(0, 1).all()
    assert study.of()[names].to_numpy().tolist() == [[100, 1e-4, "linear", seed] for seed in (0, 1, 2)]
    assert study.of(lr=1, schedule="cosine", seed=[0, 2])["seed"].tolist() == [0, 2]
    with pytest.raises(ValueError, match="did you mean 'rows'"):
        study.of(row=50)
    assert study.summary("lr", schedule="cosine").index.tolist() == [1e-4, 1]
    recorded = study.rows.query("rows == 50")["validation_macro_f1"]
    assert study.summary("rows", "validation_macro_f1").loc[50, "mean"] == pytest.approx(recorded.mean())
    with pytest.raises(ValueError, match="no score 'accuracy'"):
        study.summary("rows", "accuracy")


def test_the_intervals_of_a_summary(folder: Path) -> None:
    declaration = read_declaration("tiny", folder)
    scores = {50: [0.7, 0.8, 0.75, 0.9, 0.85], 100: [0.5]}
    rows = [
        {"rows": n, "lr": 1e-4, "schedule": "linear", "seed": seed, "test_accuracy": score}
        for n, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]
    table = Study(declaration, pd.DataFrame(rows)).summary()
    # by hand: s = sqrt(0.025 / 4), t = 2.776445 for 4 degrees of freedom
    arm, run_arm = 2.776445 * 0.0790569 / 5**0.5, 2.776445 * 0.0790569 * 1.2**0.5
    assert table.loc[50].tolist() == pytest.approx(
        [0.8, 0.8 - arm, 0.8 + arm, 0.8 - run_arm, 0.8 + run_arm, 5], abs=1e-6
    )
    assert table.loc[100, ["mean", "seeds"]].tolist() == [0.5, 1]
    assert table.loc[100, ["low", "high", "run_low", "run_high"]].isna().all()  # one seed has no spread


def test_a_summary_lists_the_scores_in_the_order_of_the_seeds(folder: Path) -> None:
    rows = [
        {"rows": n, "lr": 1e-4, "schedule": "linear", "seed": seed, "test_accuracy": n / 1000 + seed / 10}
        for seed in (2, 0, 1)
        for n in (100, 50)
    ]
    rows[0]["test_accuracy"] = float("nan")  # of this run the score is not on record
    table = Study(read_declaration("tiny", folder), pd.DataFrame(rows)).summary(by_seed=True)
    assert table.loc[50, "by_seed"] == pytest.approx([0.05, 0.15, 0.25])
    assert table.loc[100, "by_seed"] == pytest.approx([0.1, 0.2])
    assert table["seeds"].tolist() == [3, 2]
    assert "by_seed" not in plots.study(table, xlabel="rows").table  # which the lesson shows
    assert "by_seed" not in plots.studies({"full": table}, xlabel="rows").table


def test_the_best_value_and_those_not_clearly_worse(folder: Path) -> None:
    """Differences paired by seed count, not the spread: a rate that is always a little worse is not near the best."""
    scores = {1e-4: [0.5, 0.9, 0.72], 1.0: [0.69, 0.79, 0.59]}
    rows = [
        {"rows": 100, "lr": lr, "schedule": "linear", "seed": seed, "test_accuracy": score}
        for lr, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]
    table = pd.DataFrame(rows)
    study = Study(read_declaration("tiny", folder), table)
    assert study.near_best("lr", "test_accuracy") == [1e-4, 1.0]
    table.loc[table["lr"] == 1e-4, "test_accuracy"] = [0.7, 0.8, 0.6]  # 0.01 above the other rate with each seed
    assert study.near_best("lr", "test_accuracy") == [1e-4]


def test_settings_to_which_a_study_applies(folder: Path) -> None:
    study = Study(read_declaration("tiny", folder), pd.DataFrame())
    ours = FullFineTuning.at("cpu", rows=100, test_rows=40)
    assert study.differing(ours, by="rows") == []
    assert study.differing(ours.changed(seed=7, num_seeds=1, live_rates=[1e-5], rows=60, keep=True), by="rows") == []
    assert study.differing(ours.changed(rows=60, schedule="cosine"), by="lr") == ["rows", "schedule"]
    assert study.differing(ours.changed(data=__file__), by="rows") == ["data"]  # a file replaces the data set


COMMITTED = sorted(path.stem for path in STUDIES_FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_study_fixes_all_settings_that_its_cells_read(name: str) -> None:
    declaration = read_declaration(name)
    trees = [ast.parse(cell.source) for cell in declaration.cells if not cell.parameters]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "settings"}
    without_value = {field for field, value in declaration.base.model_dump().items() if value is None}
    pinned = {*declaration.fixed, *without_value, "tier", "seed", "num_seeds"}
    assert read & set(type(declaration.base).model_fields) <= pinned


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_study_is_complete_and_belongs_to_the_committed_code(name: str) -> None:
    declaration = read_declaration(name)
    with declaration.csv.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert Counter(map(declaration.key, rows)) == Counter(map(declaration.key, declaration.rows))
    assert {row["code"] for row in rows} == {declaration.code}, f"move the CSV away and run `ftkit study {name}`"
    assert {row["ended"] for row in rows} <= {"finished", "stopped"}
    assert all(row["machine"] and row["versions"] and row["revision"] for row in rows)
