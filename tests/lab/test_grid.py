"""Grids: how values of the command line are parsed, and runs in separate processes; on tiny notebooks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ftkit import cli
from ftkit.errors import SettingsError
from ftkit.lab.results import LEDGER, read_ledger
from ftkit.lab.runs import grid

PARAMETERS = 'lr: float = 0.1\nseed: int = 0\ndata: str | None = None\nnote: str = ""\ntier: str = "cpu"'
SCORES = """
import os, pathlib
from ftkit.lab.results import save_metrics
assert lr < 1, "lr is too large"
limits = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
settings = {"lr": lr, "seed": seed, "data": data, "test_rows": 100, **limits}
score = {"accuracy": 0.5 + lr, "ci95": [0.5, 0.9], "seeds": [seed], "by_seed": [0.5 + lr]}
path = save_metrics(settings, {"full": score})
"""
SLEEPS = """
import os, pathlib, time
part = pathlib.Path(os.environ["FTKIT_RUN_DIR"]) / "part"
part.write_text(f"{os.getpid()} {os.getppid()}")
part.rename(part.with_name("pids"))
time.sleep(300)
"""


def write(path: Path, *cells: str) -> Path:
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    made = [new_markdown_cell("# Tiny"), parameters, *map(new_code_cell, cells)]
    nbformat.write(new_notebook(cells=made), path)
    return path


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return write(tmp_path / "tiny.ipynb", SCORES)


def runs_on(pid: int) -> bool:
    """Whether a process is alive; in a container without an init, an ended one may remain as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def runs() -> list[dict]:
    return read_ledger(Path("out") / LEDGER)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("3e-4", [3e-4]),
        ("1e-4,3e-4", [1e-4, 3e-4]),
        ("0..4", [0, 1, 2, 3, 4]),
        ("-1..1, 7", [-1, 0, 1, 7]),
        ("linear, cosine", ["linear", "cosine"]),
        ("true,None", [True, None]),
        ("", [""]),
        (" a text ", [" a text "]),
        ("[1,2]", [[1, 2]]),
        ("[1,2],[3]", [[1, 2], [3]]),
        ("(1, 2),3", [(1, 2), 3]),
        ('{"a": 1, "b": [2, 3]}', [{"a": 1, "b": [2, 3]}]),
        ("{'a': 1, 'b': 2},x", [{"a": 1, "b": 2}, "x"]),
        ('"a,b"', ["a,b"]),
        (r'"a\",b", c', ['a",b', "c"]),
        ('"0..4"', ["0..4"]),
        ("'a,b',c", ["a,b", "c"]),
        ("[1,2", ["[1,2"]),
        ("[a,b]", ["[a,b]"]),
        ("{1,2}", ["{1,2}"]),
        ("../a..b", ["../a..b"]),
        ("don't, can't", ["don't", "can't"]),
        ("x" * 5000, ["x" * 5000]),
    ],
)
def test_values_of(text: str, values: list) -> None:
    assert grid.values_of(text) == values


def test_the_name_of_an_existing_file_is_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert grid.values_of("a,b.csv") == ["a", "b.csv"]
    Path("a,b.csv").touch()
    Path("1").touch()
    assert grid.values_of("a,b.csv") == ["a,b.csv"]
    assert grid.values_of("1") == [1]  # a number, although there is such a file


def test_a_range_with_its_larger_number_first_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The range 4\.\.0 has its larger number first: write 0\.\.4\."):
        grid.values_of("4..0")


@pytest.mark.parametrize("text", ["0..1000000000", "0..9999,0..9999", "0..10000", "-1000000000..5, 7"])
def test_a_range_is_counted_before_it_is_built(text: str) -> None:
    with pytest.raises(ValueError, match=r"^That is [\d,]{6,} runs, and a grid may have 10,000: give fewer values\.$"):
        grid.values_of(text)
    assert len(grid.values_of("1..10000")) == 10_000


def test_a_range_of_very_long_numbers_is_a_text() -> None:
    assert grid.values_of(f"0..{'9' * 5000}") == [f"0..{'9' * 5000}"]


def test_the_runs_of_a_grid_are_counted_before_it_is_built(notebook: Path) -> None:
    axes = {name: range(10_000) for name in ("lr", "seed", "note")}  # 1e12 runs
    with pytest.raises(ValueError, match=r"That is 1,000,000,000,000 runs, and a grid may have 10,000"):
        grid.plan(notebook, axes, tier="cpu")


def test_a_plan_is_the_product_of_all_values_without_repetitions(notebook: Path) -> None:
    jobs = grid.plan(notebook, {"lr": [0.1, 0.2, 0.1], "seed": [0, 1], "note": ["x"]}, tier="cpu")
    pairs = [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    assert [job.parameters for job in jobs] == [{"lr": lr, "seed": seed, "note": "x"} for lr, seed in pairs]
    assert [job.name for job in jobs] == [f"lr={lr}, seed={seed}" for lr, seed in pairs]
    assert len(grid.plan(notebook, {}, tier="cpu")) == 1


def test_every_combination_is_checked_before_anything_starts(notebook: Path) -> None:
    with pytest.raises(ValueError, match="no parameter 'lrr': did you mean 'lr'"):
        grid.plan(notebook, {"lrr": [0.1, 0.2]}, tier="cpu")
    with pytest.raises(SettingsError, match=r"lr=7 is not allowed: give a number from 1e-07 to 1"):
        grid.plan(first_notebook(), {"lr": [1e-4, 7]}, tier="smoke")
    with pytest.raises(ValueError, match=r"lr is given 2 times: give all its values at once, lr=A,B"):
        grid.each_once([("lr", [1]), ("seed", [0]), ("lr", [2])])


def first_notebook() -> Path:
    return Path(__file__).parents[2] / "notebooks" / "01_full_fine_tuning.ipynb"


def test_an_identity_depends_on_code_parameters_and_files(notebook: Path) -> None:
    def identity(**given: object) -> str:
        return grid.plan(notebook, {name: [value] for name, value in given.items()}, tier="cpu")[0].identity

    Path("my.csv").write_text("text,label\n", encoding="utf-8")
    Path("model").mkdir()
    Path("model/weights").write_text("1", encoding="utf-8")
    of_file, of_folder, plain = identity(data="my.csv"), identity(data="model"), identity(lr=0.1)
    of_list = identity(data=["other.csv", "my.csv"])
    assert len({of_file, of_folder, plain, identity(lr=0.2), identity(data="other.csv")}) == 5
    assert (of_file, of_folder) == (identity(data="my.csv"), identity(data="model"))
    Path("my.csv").write_text("text,label\na,b\n", encoding="utf-8")
    Path("model/weights").write_text("2", encoding="utf-8")
    assert identity(data="my.csv") != of_file
    assert identity(data=["other.csv", "my.csv"]) != of_list
    assert identity(data="model") != of_folder
    made = nbformat.read(notebook, as_version=4)
    made.cells[0].source = "# Only words have changed"
    nbformat.write(made, notebook)
    assert identity(lr=0.1) == plain
    write(notebook, SCORES, "1")
    assert identity(lr=0.1) != plain


def test_with_a_settings_class_giving_a_default_is_the_same_run() -> None:
    axes = {"lr": [None, 1e-4, 3e-4], "rows": [1000]}
    assert [job.parameters["lr"] for job in grid.plan(first_notebook(), axes, tier="cpu")] == [1e-4, 3e-4]


def test_a_grid_runs_what_is_missing(notebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["run", "tiny", "-p", "lr=0.1,0.2,5", "-p", 'note="0..1, é"', "--jobs", "2", "--out", "out"]
    assert cli.main(command) == 1
    out, err = capfd.readouterr()
    assert re.search(r"lr=5 failed: AssertionError: lr is too large \(cell 3, “Tiny”\)", err)
    assert "ftkit: 1 of 3 runs failed; the same command runs them again" in err
    assert "3/3" in err  # the bar of the grid
    assert re.search(r"lr +method +accuracy.*\n *0\.1 +full +0\.600 .*\n *0\.2 +full +0\.700", out)
    first = runs()
    assert sorted(run["parameters"]["lr"] for run in first) == [0.1, 0.2, 5]
    assert {run["parameters"]["note"] for run in first} == {"0..1, é"}
    threads = (
        str(max(1, len(psutil.Process().cpu_affinity()) // 2)) if hasattr(psutil.Process, "cpu_affinity") else None
    )
    finished = [run for run in first if not run["error"]]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        assert threads is None or [run["settings"][name] for run in finished] == [threads] * 2

    gone = next(run for run in finished if run["parameters"]["lr"] == 0.2)
    for file in (Path("out") / gone["id"]).iterdir():
        file.unlink()
    (Path("out") / gone["id"]).rmdir()
    command[3] = "lr=0.1,0.2,0.3"
    assert cli.main(command) == 0
    assert "1 of 3 runs are already done." in capfd.readouterr().err
    assert [run["parameters"]["lr"] for run in runs()[3:]] in ([0.2, 0.3], [0.3, 0.2])

    assert cli.main(command) == 0
    assert len(runs()) == 5
    out, err = capfd.readouterr()
    assert err == "3 of 3 runs are already done.\n"
    assert re.search(r"^ *0\.3 +full +0\.800", out, re.MULTILINE)


def test_a_changed_notebook_is_run_again_with_all_threads(notebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["run", "tiny", "-p", "seed=0..1", "--out", "out"]
    assert cli.main(command) == 0
    write(notebook, SCORES.replace("0.5 + lr", "0.7 + lr"))
    assert cli.main(command) == 0
    assert len(runs()) == 4
    assert {run["settings"]["OMP_NUM_THREADS"] for run in runs()} == {None}  # one job at a time: unlimited
    assert cli.main(["compare", "out"]) == 0
    out = capfd.readouterr().out.split("95 % interval:")
    assert re.search(r"^ *full +0\.800 ", out[-2].rpartition("method")[2], re.MULTILINE)
    assert "Left out: 2 runs of an earlier version of the notebook or its data." in out[-1]


def test_one_combination_is_an_ordinary_run(notebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.main(["run", "tiny", "-p", "lr=0.3", "--jobs", "2", "--out", "out"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-1].endswith("notebook.ipynb")
    assert "already done" not in err
    assert [run["settings"]["OMP_NUM_THREADS"] for run in runs()] == [None, None]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to another process")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_leaves_no_process(notebook: Path, presses: int) -> None:
    write(notebook, SLEEPS)
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ftkit import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "run", "tiny", "-p", "seed=0..2", "--jobs", "2", "--out", "out", "--html"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while len(started := list(Path().glob("out/*/pids"))) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        pids = [int(pid) for path in started for pid in path.read_text().split()]
        assert len(set(pids)) == 4  # kernels and the processes of the runs
        process.send_signal(signal.SIGINT)
        if presses == 2:
            while "Ctrl-C again kills them" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.endswith("ftkit: interrupted\n")
    assert "Traceback" not in err
    assert not any(map(runs_on, pids))
    if presses == 1:
        assert [run["error"] for run in runs()] == ["Interrupted (cell 3, “Tiny”)"] * 2
        assert all((path.parent / "report.html").exists() for path in started)
    assert len([path for path in Path("out").iterdir() if path.is_dir()]) == 2  # the third run did not start


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to another process")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_act_as_ctrl_c(notebook: Path, name: str) -> None:
    write(notebook, SLEEPS)
    command = [sys.executable, "-m", "ftkit.cli", "run", "tiny", "--out", "out", "--html"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not (started := list(Path().glob("out/*/pids"))):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        kernel, _ = map(int, started[0].read_text().split())
        for _ in range(2):  # a terminal that is closed sends several
            process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "ftkit: Interrupted (cell 3, “Tiny”)" in err
    assert "Traceback" not in err
    assert not runs_on(kernel)
    assert (started[0].parent / "report.html").exists()
    assert [run["error"] for run in runs()] == ["Interrupted (cell 3, “Tiny”)"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL to another process")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGHUP"])
def test_no_run_outlives_its_grid(notebook: Path, name: str) -> None:
    write(notebook, SLEEPS)
    command = [sys.executable, "-m", "ftkit.cli", "run", "tiny", "-p", "seed=0..2", "--jobs", "2", "--out", "out"]
    process = subprocess.Popen([*command, "--html"], stderr=subprocess.DEVNULL)
    try:
        while len(started := list(Path().glob("out/*/pids"))) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        family = [psutil.Process(int(pid)) for path in started for pid in path.read_text().split()]
        process.send_signal(getattr(signal, name))
        process.wait()
    finally:
        process.kill()
    gone, alive = psutil.wait_procs(family, timeout=60)
    for left in alive:
        left.kill()
    assert (len(gone), alive) == (4, [])
    assert [run["error"] for run in runs()] == ["Interrupted (cell 3, “Tiny”)"] * 2
    assert all((path.parent / "report.html").exists() for path in started)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGHUP")
def test_nohup_is_respected() -> None:
    script = (
        "import signal; from ftkit import cli; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "cli.main(['assets']); print(signal.getsignal(signal.SIGHUP).name)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "SIG_IGN"


def test_jobs_get_their_parameters_as_json(notebook: Path) -> None:
    write(
        notebook,
        "import json, os, pathlib\n(pathlib.Path(os.environ['FTKIT_RUN_DIR']) / 'given').write_text(json.dumps(note))",
    )
    given = [["a", {"b,c": None}], "-p 'é,\n"]
    jobs = grid.plan(notebook, {"note": given}, tier="cpu")
    assert grid.run_grid(notebook, jobs, tier="cpu", out="out", jobs=2) == 0
    arrived = [json.loads(path.read_text()) for path in Path("out").glob("*/given")]
    assert sorted(map(repr, arrived)) == sorted(map(repr, given))
    assert os.environ.get("OMP_NUM_THREADS") is None  # this process keeps its own
