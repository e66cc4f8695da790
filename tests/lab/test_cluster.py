"""Grids and studies on a dask.distributed cluster: a scheduler and two workers, each a process of its own, on loopback.

The workers share no folder with the client, except the one in which the notebooks of the tests say what they do.
"""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ftkit import cli
from ftkit.errors import ClusterError, StudyError
from ftkit.lab.machine import describe_machine
from ftkit.lab.results import LEDGER, read_ledger
from ftkit.lab.runs import cluster
from ftkit.lab.settings import FullFineTuning
from ftkit.lab.studies.recording import run_study

pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals to other processes")

PARAMETERS = 'lr: float = 0.1\nseed: int = 0\ndata: str | None = None\nmore: list = []\ntier: str = "cpu"'
SCORES = """
import os, pathlib
from ftkit.lab.results import save_metrics
assert lr < 1, "lr is too large"
texts = [pathlib.Path(name).read_text() for name in [data, *more] if name]
settings = {"lr": lr, "seed": seed, "data": data, "more": more, "test_rows": 100, "texts": texts}
settings["threads"] = os.environ["OMP_NUM_THREADS"]
score = {"accuracy": 0.5 + lr, "ci95": [0.5, 0.9], "seeds": [seed], "by_seed": [0.5 + lr]}
save_metrics(settings, {"full": score})
"""
HANGS = """
import os, pathlib, time
shared = pathlib.Path(os.environ["SHARED"])
if seed == 0 and not (shared / "go").exists():
    (shared / "part").write_text(f"{os.getpid()} {os.getppid()}")
    (shared / "part").rename(shared / "pids")
    time.sleep(300)
"""
STUDY = """
notebook = "01_full_fine_tuning.ipynb"
tier = "cpu"
seeds = [0, 1]
[parameters]
rows = 100
[[grid]]
lr = [1e-4, 1]
"""
TRAIN = """
import os
import numpy as np
from ftkit.training.state import History
from ftkit.metrics import Evaluation
from ftkit.lab.results import Outcome
from ftkit.lab.settings import FullFineTuning
settings = FullFineTuning.from_cell(globals())

def train(settings, seed, callbacks=()):
    print("not for the terminal")
    if settings.lr == 1 and "SHARED" in os.environ and not os.path.exists(os.environ["SHARED"] + "/go"):
        raise ValueError("the rate is too high")
    p = np.random.default_rng([seed, settings.rows]).dirichlet([1, 1], size=40)
    history = History(steps=[], ended="finished", trainable_parameters=7, seconds=1.234, peak_rss_mib=500.0)
    return Outcome(seed, history, {"test": Evaluation(np.arange(len(p)) % 2, p, 0.5)})
"""


class Machines:
    """A scheduler, and what starts workers of it."""

    def __init__(self, folder: Path, *, allowed_failures: int = 3) -> None:
        self.folder, self.processes = folder, []
        self.shared = folder / "shared"
        self.shared.mkdir()
        env = os.environ | {"SHARED": str(self.shared)}
        env["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = str(allowed_failures)
        self.env = {name: value for name, value in env.items() if not name.startswith("FTKIT")}
        file = folder / "scheduler.json"
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        while not file.exists():
            assert self.scheduler.poll() is None
            time.sleep(0.05)
        self.address = json.loads(file.read_text())["address"]

    def start(self, *command: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *command, "--no-dashboard"]
        log = (self.folder / f"{len(self.processes)}.log").open("w")
        process = subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def workers(self, count: int, *options: str) -> list[subprocess.Popen]:
        """Start workers with a thread each, and wait until the scheduler knows them."""
        from distributed import Client

        options = ("--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder), *options)
        started = [self.start("worker", self.address, *options) for _ in range(count)]
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(count)
        return started

    def stop(self, processes: list[subprocess.Popen]) -> None:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def machines(folder: Path, **options: int) -> Iterator[Machines]:
    started = Machines(folder, **options)
    try:
        yield started
    finally:
        started.stop(started.processes)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with machines(tmp_path_factory.mktemp("machines")) as started:
        started.workers(2)
        yield started


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return write(here / "tiny.ipynb", SCORES)


def write(path: Path, *cells: str) -> Path:
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Tiny"), parameters, *map(new_code_cell, cells)]), path)
    return path


def runs() -> list[dict]:
    return read_ledger(Path("out") / LEDGER)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def ended(pids: list[int]) -> bool:
    """Wait until these processes have ended; an ended one may remain as a zombie."""

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    end = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(alive, pids))


def test_a_grid_on_a_cluster_is_that_of_this_machine(
    notebook: Path, two: Machines, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "tiny", "-p", "lr=0.1,0.2,5", "--out", "out"]
    assert cli.main([*command, "--scheduler", two.address, "--html"]) == 1
    out, err = capfd.readouterr()
    assert re.search(r"lr=5 failed: AssertionError: lr is too large \(cell 3, “Tiny”\)", err)
    assert "3/3" in err
    assert "ftkit: 1 of 3 runs failed; the same command runs them again" in err
    assert re.search(r"lr +method +accuracy.*\n *0\.1 +full +0\.600 .*\n *0\.2 +full +0\.700", out)
    assert len(runs()) == 3
    for run in runs():
        files = {"notebook.ipynb", "settings.yaml", "report.html"} | ({"metrics.json"} if run["metrics"] else set())
        assert {path.name for path in (Path("out") / run["id"]).iterdir()} == files
        assert run["id"].endswith(run["identity"][:6])
    assert {path.name for path in Path("out").iterdir()} == {LEDGER, f".{LEDGER}.lock", *(run["id"] for run in runs())}
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    assert {run["settings"]["threads"] for run in runs() if run["settings"]} == {str(max(1, cores // 2))}

    command[3] = "lr=0.1,0.2"
    assert cli.main([*command, "--jobs", "2"]) == 0  # the same identities
    assert "2 of 2 runs are already done." in capfd.readouterr().err
    assert cli.main([*command, "--scheduler", "tcp://127.0.0.1:1"]) == 0  # nothing to do there
    assert len(runs()) == 3


def test_files_of_the_reader_reach_the_workers_and_keep_their_names_here(notebook: Path, two: Machines) -> None:
    Path("data").mkdir()
    Path("data/a,b.csv").write_text("relative")
    Path("../beside.csv").write_text("above")
    absolute = Path("../elsewhere").resolve()
    absolute.mkdir()
    (absolute / "c.csv").write_text("absolute")
    given = ["data/a,b.csv", "../beside.csv", str(absolute / "c.csv")]
    command = ["run", "tiny", "-p", f"data={json.dumps(given[0])},../beside.csv,{absolute / 'c.csv'}"]
    command += ["-p", f'more=["data/a,b.csv","{absolute / "c.csv"}"]', "--out", "out"]
    assert cli.main([*command, "--scheduler", two.address]) == 0
    more = [given[0], given[2]]
    texts = dict(zip(given, ["relative", "above", "absolute"], strict=True))
    by_data = {run["settings"]["data"]: run for run in runs()}
    assert by_data.keys() == texts.keys()
    for data, run in by_data.items():
        folder = Path("out") / run["id"]
        saved = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["settings"]
        assert saved == run["settings"]
        assert run["parameters"] == {"tier": "cpu", "data": data, "more": more}
        assert run["settings"] | {"data": data, "more": more} == run["settings"]
        assert run["settings"]["texts"] == [texts[data], "relative", "absolute"]
        again = ["run", "--settings", str(folder / "settings.yaml"), "--scheduler", "tcp://127.0.0.1:1", "--out", "out"]
        assert cli.main(again) == 0  # is done already
    assert cli.main([*command, "--jobs", "2"]) == 0
    assert len(runs()) == 3
    (absolute / "c.csv").write_text("changed")
    assert cli.main([*command, "--scheduler", two.address]) == 0  # other content: other runs, since `more` names it
    assert len(runs()) == 6


def test_files_that_are_too_large_are_refused(
    notebook: Path, two: Machines, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "MOST_BYTES", 2**14)
    Path("large.csv").write_bytes(b"x" * 2**14)
    command = ["run", "tiny", "-p", "data=large.csv", "--scheduler", two.address, "--out", "out"]
    assert cli.main(command) == 1
    assert re.search(r"^ftkit: large\.csv is too large, .*: give less data, or run it with --jobs\.$", error(capfd))


@pytest.mark.parametrize("allowed_failures", [0, 3])
def test_a_worker_that_dies_loses_its_run_and_not_the_grid(
    notebook: Path, tmp_path: Path, allowed_failures: int, capfd: pytest.CaptureFixture[str]
) -> None:
    write(notebook, HANGS, SCORES)
    with machines(tmp_path, allowed_failures=allowed_failures) as started:
        started.workers(2)
        command = ["run", "tiny", "-p", "seed=0..3", "--out", "out", "--scheduler", started.address]
        client = subprocess.Popen([sys.executable, "-m", "ftkit.cli", *command], stderr=subprocess.PIPE, text=True)
        wait_for(started.shared / "pids", client)
        pids = [int(pid) for pid in (started.shared / "pids").read_text().split()]
        (started.shared / "go").touch()  # for the second attempt
        os.kill(psutil.Process(pids[1]).ppid(), signal.SIGKILL)
        _, err = client.communicate()
        assert ended(pids)
        if allowed_failures:  # the scheduler gives the run to the other worker
            assert client.returncode == 0, err
        else:
            assert client.returncode == 1
            assert "seed=0 failed: the worker that ran it died, perhaps out of memory: give workers more" in err
            assert sorted(run["settings"]["seed"] for run in runs()) == [1, 2, 3]
            capfd.readouterr()
            assert cli.main(command) == 0
            assert "3 of 4 runs are already done." in capfd.readouterr().err
        assert sorted(run["settings"]["seed"] for run in runs()) == [0, 1, 2, 3]
        assert not any(run["error"] for run in runs())


def test_ctrl_c_leaves_no_process_and_a_whole_ledger(notebook: Path, two: Machines) -> None:
    write(notebook, HANGS, SCORES)
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ftkit import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "run", "tiny", "-p", "seed=1,0,2", "--out", "out"]
    (two.shared / "pids").unlink(missing_ok=True)
    client = subprocess.Popen([*command, "--scheduler", two.address], stderr=subprocess.PIPE, text=True)
    wait_for(two.shared / "pids", client)
    wait_for(Path("out") / LEDGER, client)
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=60)
    assert client.returncode == 130
    assert err.endswith("ftkit: interrupted\n")
    assert "Traceback" not in err
    assert ended([int(pid) for pid in (two.shared / "pids").read_text().split()])
    seeds = [run["settings"]["seed"] for run in runs()]
    assert seeds in ([1], [1, 2])
    assert len([path for path in Path("out").iterdir() if path.is_dir()]) == len(seeds)  # nothing half-written


def test_a_client_or_scheduler_that_is_killed_leaves_no_process(notebook: Path, tmp_path: Path) -> None:
    write(notebook, HANGS)
    with machines(tmp_path) as started:
        started.workers(1)
        command = [sys.executable, "-m", "ftkit.cli", "run", "tiny", "-p", "seed=0..1", "--out", "out"]
        for victim in ("client", "scheduler"):
            (started.shared / "pids").unlink(missing_ok=True)
            client = subprocess.Popen([*command, "--scheduler", started.address], stderr=subprocess.PIPE, text=True)
            wait_for(started.shared / "pids", client)
            pids = [int(pid) for pid in (started.shared / "pids").read_text().split()]
            (client if victim == "client" else started.scheduler).kill()
            _, err = client.communicate(timeout=60)
            assert ended(pids)
    assert client.returncode == 1
    gone = f"ftkit: The scheduler {started.address} has gone: start it, and give the same command again."
    assert err.splitlines()[-1] == gone
    assert "Traceback" not in err


def test_workers_that_are_missing_or_different_are_refused(
    notebook: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cases = [
        ("import sys; sys.modules['ftkit'] = None", r"cannot run this version of ftkit \(.*ftkit.*\): install ftkit"),
        ("import ftkit; ftkit.__version__ = '0.0.1'", r"has ftkit 0\.0\.1 \(source \w{8}\) and this machine has "),
        ("import platform; platform.python_version_tuple = lambda: ('3', '99', '1')", r"has Python 3\.99 and this"),
    ]
    with machines(tmp_path) as started:
        command = ["run", "tiny", "-p", "lr=0.1,0.2", "--out", "out", "--scheduler", started.address]
        assert cli.main(command) == 1
        assert error(capfd) == (
            f"ftkit: The scheduler {started.address} has no workers: start some, by dask worker {started.address}."
        )
        for code, message in cases:
            (tmp_path / "preload.py").write_text(code)
            workers = started.workers(1, "--preload", str(tmp_path / "preload.py"))
            assert cli.main(command) == 1
            assert re.search(rf"^ftkit: The worker tcp://[\d.:]+ {message}", error(capfd))
            started.stop(workers)
    assert not runs()


def error(capfd: pytest.CaptureFixture[str]) -> str:
    """What was said last on stderr, which has no traceback."""
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_a_grid_in_several_processes_of_a_launcher_is_refused(
    notebook: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["run", "tiny", "-p", "lr=0.1,0.2", "--out", "out"]) == 1
    assert error(capfd) == (
        "ftkit: `accelerate launch` has started this in several processes, and it is a grid of 2: launch each run by "
        "itself, without --scheduler."
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "'nonsense' is not the address of a scheduler: give tcp://host:port."),
        ("http://127.0.0.1:80", "'http://127.0.0.1:80' is not the address of a scheduler: give tcp://host:port."),
        ("tcp://127.0.0.1:1", "No scheduler answers at tcp://127.0.0.1:1 (Connection refused): give the address that"),
    ],
)
def test_a_wrong_address_is_refused_in_one_sentence(address: str, message: str) -> None:
    with pytest.raises(ClusterError, match=f"^{re.escape(message)}"), cluster.connect(address):
        pass


def test_a_study_runs_its_missing_rows_on_the_workers(
    notebook: Path, two: Machines, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: (two.shared / "go").unlink(missing_ok=True))
    folder = Path("studies")
    folder.mkdir()
    (folder / "tiny.toml").write_text(STUDY)
    cells = [new_code_cell(FullFineTuning.parameters_cell(), metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(TRAIN, metadata={"tags": ["study"]})]
    nbformat.write(new_notebook(cells=cells), folder / "01_full_fine_tuning.ipynb")
    with pytest.raises(StudyError, match="2 rows of tiny failed"):
        run_study("tiny", folder=folder, scheduler=two.address)
    assert "lr=1, seed=1 failed: ValueError: the rate is too high" in capfd.readouterr().err.replace("lr=1.0", "lr=1")
    rows = recorded(folder)
    assert {(row["lr"], row["seed"]) for row in rows} == {("0.0001", "0"), ("0.0001", "1")}
    (two.shared / "go").touch()
    assert run_study("tiny", progress=False, folder=folder, scheduler=two.address) == folder / "tiny.csv"
    assert len(recorded(folder)) == 4
    for name in ("machine", "versions"):  # here the workers' machine is this one
        assert {row[name] for row in recorded(folder)} == {describe_machine()[name]}
    on_cluster = sorted(map(without_order, recorded(folder)))
    (folder / "tiny.csv").unlink()
    run_study("tiny", progress=False, folder=folder)
    assert sorted(map(without_order, recorded(folder))) == on_cluster
    run_study("tiny", progress=False, folder=folder, scheduler="tcp://127.0.0.1:1")  # nothing is missing


def recorded(folder: Path) -> list[dict[str, str]]:
    with (folder / "tiny.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def without_order(row: dict[str, str]) -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in row.items() if name != "revision")


def test_what_is_packed_comes_out_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "ä ö.bin").write_bytes(bytes(range(256)))
    (source / "link").symlink_to(source / "deep" / "ä ö.bin")
    packed = cluster.pack({"here/folder": source, "here/text": b"content"})
    cluster.unpack(packed, tmp_path / "target")
    here = tmp_path / "target" / "here"
    assert (here / "folder" / "deep" / "ä ö.bin").read_bytes() == bytes(range(256))
    assert (here / "folder" / "link").read_bytes() == bytes(range(256))
    assert not (here / "folder" / "link").is_symlink()
    assert cluster.read_packed(packed, "here/text") == b"content"


@pytest.mark.parametrize("make", [list, tuple])
def test_parameters_name_files_where_the_worker_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").touch()
    given, files = cluster.as_sent({"lr": 0.1, "data": "a.csv", "note": "x" * 5000, "more": make(["a.csv", "b.csv"])})
    assert given == {"lr": 0.1, "data": "a.csv", "note": "x" * 5000, "more": ["a.csv", "b.csv"]}
    assert files == {"a.csv": Path("a.csv")}
    given, files = cluster.as_sent({"data": str(tmp_path / "a.csv")})
    assert re.fullmatch(r"sent/\w{6}/a\.csv", given["data"])
    assert files == {given["data"]: tmp_path / "a.csv"}
