"""Run notebooks and write their results and report; on tiny notebooks that train nothing."""

import base64
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import psutil
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from patience import count_calls, run_to_the_end

from ftkit.lab.results import LEDGER, format_table, read_ledger, results_table, save_metrics, write_whole
from ftkit.lab.runs import execution, notebooks, report
from ftkit.lab.runs.notebooks import Run, find_notebook, parameters_help, run_notebook
from ftkit.lab.runs.report import write_report
from ftkit.lab.settings import FullFineTuning

PARAMETERS = 'lr: float = 1e-4  # step size (eta = lr)\ndata: str | None = None\ntier: str = "cpu"'
METRICS = {
    "majority": {"accuracy": 0.5, "ci95": None, "seeds": [0], "trainable_parameters": 0},
    "linear_probe": {
        "accuracy": np.float64(0.65),
        "ci95": (0.62, 0.68),
        "seeds": [0, 1, 2],
        "trainable_parameters": np.int64(12770),
        "seconds": 12.34,
        "peak_rss_mib": np.float32(1812.5),
    },
}
IDEA = r"""## The idea
The loss $\ln C$, an inline `$HOME`, and $a < b$:

$$\mathcal{L} = -\frac{1}{N}\sum_i \log p(y_i \mid x_i)$$

```python
price = "$x$"
```
$\nosuchcommand{x}$ ![far away](https://example.org/far.png) ![near](near.png) [paper](https://example.org)

<script src="https://example.org/x.js"></script>
"""
OUTPUTS = """
import os, sys, pathlib
import ipywidgets, pandas
from IPython.display import HTML, Image, Javascript, display
from ftkit.lab.results import results_table, save_metrics
save_metrics({"lr": lr, "tier": tier}, {"full": {"accuracy": 0.8125, "ci95": [0.78, 0.84], "seeds": [0, 1]}})
print("lr is", lr, "at", tier, "from", sys.executable, "in", os.getcwd(), pathlib.Path.home() / "x")
print("step 1\\rstep 2", file=sys.stderr)
display(Image(data=__import__("base64").b64decode(PIXEL), format="png", metadata={"alt": "a pixel"}))
display(ipywidgets.IntSlider(), Javascript("fetch('https://example.org')"))
display(HTML('<iframe src="https://example.org"></iframe><link rel="stylesheet" href="https://example.org/a.css">'))
pandas.DataFrame({"sentence": ["a film"]})
"""
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNg+M9QDwADgQGAl5sDlwAAAABJRU5ErkJggg=="


def write_notebook(path: Path, *cells: str) -> Path:
    """A title, a `parameters` cell, then the given cells: Markdown if they begin with # and a space, else code."""
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    made = [new_markdown_cell("# A tiny notebook"), parameters]
    made += [new_markdown_cell(c) if re.match("#+ ", c) else new_code_cell(c) for c in cells]
    nbformat.write(new_notebook(cells=made), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """A finished run of a notebook with everything that a report must handle."""
    (folder / "near.png").write_bytes(base64.b64decode(PIXEL))
    notebook = write_notebook(folder / "tiny.ipynb", IDEA, f"PIXEL = {PIXEL!r}\n{OUTPUTS}", "", "# Again a title")
    other = folder / "jupyter" / "kernels" / "python3"  # a kernelspec of another interpreter, found first
    other.mkdir(parents=True)
    spec = {"argv": ["no-such-python", "{connection_file}"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        return run_notebook(notebook, {"lr": 3e-4}, tier="smoke", out=folder / "out", progress=False)


@pytest.fixture(scope="module")
def page(run: Run) -> BeautifulSoup:
    return BeautifulSoup(write_report(run).read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="module")
def failed(folder: Path) -> Run:
    cells = ("## Before", "print('so far')", "## The cause", "{}['nothing']", "## Takeaways", "print('later')")
    return run_notebook(write_notebook(folder / "fails.ipynb", *cells), out=folder / "out")


def test_parameters_tier_and_interpreter_reach_the_notebook(run: Run) -> None:
    text = run.executed.read_text(encoding="utf-8")
    assert f"lr is 0.0003 at smoke from {sys.executable} in {Path.cwd()}" in text
    assert run.error is None
    assert run.changed == {"lr": (1e-4, 3e-4)}
    assert run.settings == {"lr": 3e-4, "tier": "smoke"}
    assert run.metrics["full"]["accuracy"] == 0.8125
    assert 20 < run.peak_rss_mib < 2000
    left = {path.name for path in run.folder.iterdir()} - {"report.html"}
    assert left == {"settings.yaml", "notebook.ipynb", "metrics.json"}


def entry_of(run: Run) -> dict:
    (entry,) = [entry for entry in read_ledger(run.folder.parent / LEDGER) if entry["id"] == run.id]
    return entry


def test_every_run_is_in_the_ledger(run: Run, failed: Run) -> None:
    entry = entry_of(run)
    assert entry.pop("peak_rss_mib") == run.peak_rss_mib
    assert entry == {
        "id": run.id,
        "source": "run",
        "notebook": "tiny",
        "tier": "smoke",
        "started": run.started.isoformat(timespec="seconds"),
        "parameters": {"tier": "smoke", "lr": 3e-4},
        "settings": run.settings,
        "metrics": run.metrics,
        "seconds": run.seconds,
        "error": None,
        "digests": run.digests,
        "identity": run.identity,
    }
    assert (entry_of(failed)["error"], entry_of(failed)["metrics"]) == (failed.error, None)


def test_unknown_names_are_refused_before_anything_runs(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "tiny.ipynb")
    with pytest.raises(ValueError, match=r"no parameter 'lrr': did you mean 'lr'\?") as refused:
        run_notebook(notebook, {"lrr": 1}, out=tmp_path / "out")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"parameters\.lr is nan: give a finite number"):
        run_notebook(notebook, {"lr": float("nan")}, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"There is no tier 'smok': did you mean 'smoke'"):
        run_notebook(notebook, {"tier": "smok"}, out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"There is no notebook .*no_such\.ipynb"):
        run_notebook(tmp_path / "no_such.ipynb", out=tmp_path / "out")
    (tmp_path / "text.ipynb").write_text("not a notebook", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.ipynb cannot be read as a notebook"):
        run_notebook(tmp_path / "text.ipynb", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tagged(path: Path, *cells: nbformat.NotebookNode) -> Path:
    """A notebook of these cells, all tagged `parameters`, and one that prints."""
    for cell in cells:
        cell.metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=[*cells, new_code_cell("print('ran')")]), path)
    return path


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([new_code_cell(PARAMETERS), new_code_cell(PARAMETERS)], "2 cells have it"),  # JupyterLab copies tags
        ([new_markdown_cell("# Settings"), new_code_cell(PARAMETERS)], "2 cells have it"),
        ([new_markdown_cell(PARAMETERS)], "a markdown cell has it"),
        ([], "no cells have it"),
        ([new_code_cell("%load_ext autoreload\n" + PARAMETERS)], "not plain Python ('%load_ext autoreload')"),
        ([new_code_cell(PARAMETERS + "\n!ls")], "not plain Python ('!ls')"),
        ([new_code_cell("lr = 0.1")], 'has no tier: add the line tier = "cpu"'),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "01_full_fine_tuning"])
def test_a_notebook_needs_one_plain_parameters_cell(tmp_path: Path, name: str, cells: list, words: str) -> None:
    if "tier" in words and name != "tiny":
        pytest.skip("a settings class has a tier")
    notebook = tagged(tmp_path / f"{name}.ipynb", *[cell.copy() for cell in cells])
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        run_notebook(notebook, {"lr": 3e-3}, out=tmp_path / "out", progress=False)
    assert re.fullmatch(r"[^\n]+\.", str(refused.value))
    assert not (tmp_path / "out").exists()


SAVES = "from ftkit.lab.results import save_metrics\npath = save_metrics({'lr': lr, 'data': data, 'tier': tier}, {})"


def test_settings_that_are_not_what_was_given_are_an_error(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "resets.ipynb", "lr = 1e-4", SAVES)
    run = run_notebook(notebook, {"lr": 3e-3}, out=tmp_path / "out", progress=False)
    assert run.error == entry_of(run)["error"] == "lr was given as 0.003, but the notebook used 0.0001"
    assert run_notebook(notebook, {"lr": 1e-4}, out=tmp_path / "out", progress=False).error is None


@pytest.mark.parametrize(("used", "error"), [(40, None), (200, "rows was given as 100, but the notebook used 200")])
def test_a_notebook_may_use_fewer_rows_than_given(tmp_path: Path, used: int, error: str | None) -> None:
    notebook = tagged(tmp_path / "few.ipynb", new_code_cell("rows: int = 10\ntier: str = 'cpu'"))
    made = nbformat.read(notebook, as_version=4)
    made.cells[1].source = f"from ftkit.lab.results import save_metrics\npath = save_metrics({{'rows': {used}}}, {{}})"
    nbformat.write(made, notebook)
    assert run_notebook(notebook, {"rows": 100}, out=tmp_path / "out", progress=False).error == error


def test_notebooks_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    notebook = write_notebook(tmp_path / "notebooks" / "90_mine.ipynb")
    monkeypatch.chdir(tmp_path)
    assert find_notebook("90_mine") == find_notebook("notebooks/90_mine.ipynb") == notebook
    with pytest.raises(FileNotFoundError, match="did you mean '90_mine'"):
        find_notebook("90_min")


def test_a_failing_cell_keeps_what_ran(failed: Run) -> None:
    assert failed.error == "KeyError: 'nothing' (cell 4, “The cause”)"
    assert failed.metrics is None
    assert "so far" in failed.executed.read_text(encoding="utf-8")
    page = BeautifulSoup(write_report(failed).read_text(encoding="utf-8"), "html.parser")
    alert = page.select_one("header [role=alert]")
    assert failed.error in alert.get_text()
    assert "KeyError" in page.select_one(alert.a["href"]).get_text()
    assert "so far" in page.get_text()
    assert "Takeaways" not in page.get_text()  # text on results of cells that never ran


def test_a_kernel_that_dies_ends_the_run_with_an_error(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "dies.ipynb", "import os; os._exit(1)", "print('later')")
    run = run_notebook(notebook, out=tmp_path / "out {x}", progress=False)  # braces in a path are part of its name
    assert run.error.startswith("The kernel died")
    assert run.error in BeautifulSoup(write_report(run).read_text(encoding="utf-8"), "html.parser").get_text()


def test_an_interruption_while_output_is_read_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(
        client: NotebookClient, message: dict, *given: object, real=NotebookClient.process_message
    ) -> object:
        if message["msg_type"] == "stream":
            raise KeyboardInterrupt
        return real(client, message, *given)

    monkeypatch.setattr(NotebookClient, "process_message", interrupted)
    prints = "import os, pathlib\npathlib.Path('PID').write_text(str(os.getpid()))\nprint('so far')"
    monkeypatch.chdir(tmp_path)
    run = run_notebook(write_notebook(tmp_path / "prints.ipynb", prints), out=tmp_path / "out", progress=False)
    assert run.error == entry_of(run)["error"] == "Interrupted (cell 3, “A tiny notebook”)"
    assert not psutil.pid_exists(int(Path("PID").read_text()))
    assert nbformat.read(run.executed, as_version=4).metadata.papermill.end_time


def test_a_kernel_that_no_longer_answers_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_SILENCE", 2.0)
    cells = (
        "import os, signal; print('so far', os.getpid())",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "print('later')",
    )
    run = run_notebook(write_notebook(tmp_path / "stops.ipynb", *cells), out=tmp_path / "out", progress=False)
    assert run.error.endswith("it had not answered for 2 seconds (cell 4, “A tiny notebook”)")
    assert entry_of(run)["error"] == run.error
    text = BeautifulSoup(write_report(run).read_text(encoding="utf-8"), "html.parser").get_text()
    assert run.error in text
    assert not psutil.pid_exists(int(re.search(r"so far (\d+)", text)[1]))


def test_a_kernel_that_does_not_start_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(env: dict, real=execution._kernel) -> object:
        kernel = real(env)
        kernel.kernel_spec.argv[:] = [sys.executable, "-c", "raise SystemExit(1)"]
        return kernel

    monkeypatch.setattr(execution, "_kernel", broken)
    run = run_notebook(write_notebook(tmp_path / "tiny.ipynb", "print('ran')"), out=tmp_path / "out", progress=False)
    assert run.error == ("The kernel did not start: Kernel died before replying to kernel_info (before the first cell)")
    assert entry_of(run)["error"] == run.error
    page = BeautifulSoup(write_report(run).read_text(encoding="utf-8"), "html.parser")
    assert run.error in page.get_text()
    assert not page.select(".code_cell")


def test_a_flood_of_output_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = iter([1.5])  # once, so that the kernel is far ahead

    def process(client: NotebookClient, *given: object, real=NotebookClient.process_message) -> object:
        time.sleep(next(pauses, 0) if given[0]["msg_type"] == "stream" else 0)
        return real(client, *given)

    monkeypatch.setattr(NotebookClient, "process_message", process)
    floods = "for i in range(4000):\n    print(i, '.' * 10_000, flush=True)"
    run = run_notebook(write_notebook(tmp_path / "floods.ipynb", floods), out=tmp_path / "out", progress=False)
    assert run.error is None
    outputs = nbformat.read(run.executed, as_version=4).cells[-1].outputs
    printed = "".join(output.text for output in outputs).splitlines()
    assert [int(line.split()[0]) for line in printed] == list(range(4000))


def test_output_that_does_not_arrive_is_told_in_a_sentence(tmp_path: Path) -> None:
    failure = CellTimeoutError.error_from_timeout_and_cell("Timeout waiting for IOPub output", 4, new_code_cell("1\n2"))
    watch = SimpleNamespace(ended_kernel=False)
    told = execution._in_a_sentence(failure, watch, started=True)
    assert re.fullmatch(r"The output of the cell did not arrive [^\n]+: print less", told)


def test_a_notebook_that_ends_itself_did_not_finish(tmp_path: Path) -> None:
    cells = ("print('so far')", "import sys; sys.exit(0)", "print('later')")
    run = run_notebook(write_notebook(tmp_path / "exits.ipynb", *cells), out=tmp_path / "out", progress=False)
    assert run.error == "SystemExit: the cells below were not executed (cell 4, “A tiny notebook”)"
    run = run_notebook(write_notebook(tmp_path / "exits.ipynb", *cells[:2]), out=tmp_path / "out", progress=False)
    assert run.error is None  # in the last cell


@pytest.mark.parametrize(
    "content",
    [
        '{"settings": {"lr": 1', "[]", "", '{"settings": {}}', '{"settings": {}, "metrics": {"full": 0.5}}',
        '{"settings": {}, "metrics": {"full": {"accuracy": "high"}}}',
        '{"settings": {}, "metrics": {"full": {"accuracy": NaN}}}',
    ],
)  # fmt: skip
def test_damaged_metrics_are_an_error_of_the_run(tmp_path: Path, content: str) -> None:
    run = Run("a", tmp_path / "a", Path("tiny.ipynb"), "cpu", datetime.now().astimezone(), {"tier": "cpu"}, {}, {}, "")
    run.folder.mkdir()
    (run.folder / "metrics.json").write_text(content, encoding="utf-8")
    notebooks._read_metrics(run)
    notebooks._record(run)
    assert re.fullmatch(r"metrics\.json is damaged \([^\n]+", run.error)
    assert (entry_of(run)["error"], entry_of(run)["metrics"]) == (run.error, None)


def fill_disk(patch: pytest.MonkeyPatch, after: int) -> None:
    """Let the disk be full for executed notebooks after some writes, in the middle of the file."""
    writes = iter(range(1000))

    def write(path: Path, text: str, real=Path.write_text, **options: object) -> int:
        if path.name.startswith("notebook.ipynb") and next(writes) >= after:
            real(path, text[: len(text) // 2], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, text, **options)

    patch.setattr(Path, "write_text", write)


def test_a_disk_that_becomes_full_leaves_no_half_file(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "tiny.ipynb", "## Here", "print('so far')", "## There", "print('later')")
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, after=5)  # 1 at the start, then 2 for each cell
        run = run_notebook(notebook, out=tmp_path / "out", progress=False)
    assert re.fullmatch(r"\S+notebook\.ipynb cannot be written \(No space .*\): free .* \(cell 2, .*\)", run.error)
    assert entry_of(run)["error"] == run.error
    assert {path.name for path in run.folder.iterdir()} == {"settings.yaml", "notebook.ipynb"}
    assert nbformat.read(run.executed, as_version=4).cells[-1].source == "print('later')"


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "tiny.ipynb")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=r"cannot be written \(No space.*\): free"):
        fill_disk(patch, after=0)
        run_notebook(notebook, out=tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_settings_are_there_before_the_first_cell_runs(tmp_path: Path) -> None:
    cell = "import os, pathlib; print(pathlib.Path(os.environ['FTKIT_RUN_DIR'], 'settings.yaml').read_text())"
    run = run_notebook(
        write_notebook(tmp_path / "tiny.ipynb", cell), {"lr": 3e-4}, out=tmp_path / "out", progress=False
    )
    (output,) = nbformat.read(run.executed, as_version=4).cells[-1].outputs
    assert "lr: 0.0003" in output.text == (run.folder / "settings.yaml").read_text(encoding="utf-8") + "\n"


def test_a_run_that_cannot_be_recorded_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / LEDGER).mkdir(parents=True)  # not a file
    run = run_notebook(write_notebook(tmp_path / "tiny.ipynb"), out=tmp_path / "out", progress=False)
    assert re.fullmatch(rf"\S+{LEDGER} cannot be written \([^\n]+", run.error)


def test_any_printed_text_can_be_written(tmp_path: Path) -> None:
    assert write_whole(tmp_path / "a.json", json.dumps("a\ud800", ensure_ascii=False)).exists()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == "a\ud800"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to another process")
def test_ctrl_c_leaves_a_report_and_no_kernel(tmp_path: Path) -> None:
    sleep = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], stderr=subprocess.DEVNULL)\n"
        "print('so far')\n"
        "pids = pathlib.Path(os.environ['FTKIT_RUN_DIR']) / 'pids'\n"
        "pids.with_suffix('.part').write_text(f'{os.getpid()} {child.pid}')\n"
        "pids.with_suffix('.part').rename(pids)\n"
        "time.sleep(300)"
    )
    notebook = write_notebook(tmp_path / "sleeps.ipynb", sleep)
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ftkit.lab.runs.notebooks import run_notebook; from ftkit.lab.runs.report import write_report\n"
        "run = run_notebook(sys.argv[1], out=sys.argv[2])\n"
        "print(run.error, write_report(run).exists())"
    )
    command = [sys.executable, "-c", script, str(notebook), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (pids := list(tmp_path.glob("out/*/pids"))):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        family = [psutil.Process(int(pid)) for pid in pids[0].read_text().split()]
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert stdout.strip() == "Interrupted (cell 3, “A tiny notebook”) True"
    assert "Traceback" not in stderr
    assert "so far" in (pids[0].parent / "report.html").read_text(encoding="utf-8")
    assert psutil.wait_procs(family, timeout=10)[1] == []  # a killed process exists until the system has noticed
    (entry,) = read_ledger(tmp_path / "out" / LEDGER)
    assert entry["error"] == "Interrupted (cell 3, “A tiny notebook”)"


def test_the_bar_shows_the_heading_and_can_be_switched_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    notebook = write_notebook(tmp_path / "tiny.ipynb", "## The idea", "1")
    run_notebook(notebook, out=tmp_path / "out", progress=False)
    assert capfd.readouterr() == ("", "")
    run_notebook(notebook, out=tmp_path / "out")
    assert re.search(r"The idea +3/3 cells", capfd.readouterr().err)


def test_runs_started_together_get_separate_folders(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "tiny.ipynb")
    script = (
        "import sys; from ftkit.lab.runs.notebooks import run_notebook; print(run_notebook(sys.argv[1], out='out').id)"
    )

    def start(_: int) -> str:
        command = [sys.executable, "-c", script, str(notebook)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        ids = list(pool.map(start, range(3)))
    assert sorted(ids) == sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert sorted(ids) == sorted(entry["id"] for entry in read_ledger(tmp_path / "out" / LEDGER))
    assert len(set(ids)) == 3
    assert all(run_id.startswith("tiny-") for run_id in ids)


def test_a_report_loads_nothing(run: Run, page: BeautifulSoup) -> None:
    assert not page.select("script, link, iframe, object, embed")
    sources = [element["src"] for element in page.select("[src]")]
    assert len(sources) == 2  # the figure and the image beside the notebook
    assert all(source.startswith("data:image/png") for source in sources)
    assert not re.search(r"@import|url\(", write_report(run).read_text(encoding="utf-8"))
    assert "default-src 'none'" in page.select_one("meta[http-equiv]")["content"]
    assert page.select_one('a[href="https://example.org"]')  # a link is not loaded
    assert "[not shown: far away]" in page.get_text()


def test_equations_become_mathml(page: BeautifulSoup) -> None:
    equations = page.select("article math")
    assert [equation.get("display") for equation in equations] == ["inline", "inline", "block"]
    assert equations[1].get_text() == "a<b"
    assert page.find("code", string="$HOME")
    assert '"$x$"' in page.get_text()
    assert page.find("code", string=r"\nosuchcommand{x}")  # latex2mathml fails: the source is shown


def test_a_report_begins_with_its_summary(run: Run, page: BeautifulSoup) -> None:
    assert [heading.get_text() for heading in page.select("h1")] == ["A tiny notebook"]
    assert page.html["lang"] == "en"
    summary = page.select_one(".summary")
    text = summary.get_text(" ", strip=True)
    assert "full 0.812 0.780 to 0.840 2 – –" in text
    assert "lr 0.0003 0.0001" in text
    for fact in (f"Python {sys.version.split()[0]}", "torch 2", "logical cores", "revision", run.id):
        assert fact in text
    assert page.find(string=re.compile("lr is 0.0003")).find_previous(class_="summary") is summary
    assert not page.select("[role=alert]")


def test_the_summary_describes_each_changed_setting(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notebook.ipynb").write_bytes(run.executed.read_bytes())
    ours = replace(
        run,
        folder=tmp_path,
        notebook=Path("notebooks/01_full_fine_tuning.ipynb"),
        changed={"lr": (1e-4, 3e-4), "rows": (1000, 500)},
    )
    page = BeautifulSoup(write_report(ours).read_text(encoding="utf-8"), "html.parser")
    rows = [
        [cell.get_text() for cell in line.find_all(["th", "td"])] for line in page.select(".summary table.words tr")
    ]
    assert rows == [
        ["setting", "this run", "default", "meaning"],
        ["lr", "0.0003", "0.0001", "peak learning rate"],
        ["rows", "500", "1000", "training rows of each seed (rows)"],
    ]


def test_the_help_lists_every_parameter(tmp_path: Path) -> None:
    text = parameters_help(find_notebook("01_full_fine_tuning"))
    assert re.search(
        r"^  rows +training rows of each seed\n +int: 2 to 1,000,000 rows; default 64 \| 1,000 \| 6,000$", text, re.M
    )
    assert re.search(
        r"^  schedule +learning rate after warm-up\n +str: linear, cosine, constant; default linear$", text, re.M
    )
    names = [line.split()[0] for line in text.splitlines()[1::2]]
    assert names == list(FullFineTuning.model_fields)[1:]
    assert len({re.match(r" *\S+ +|$", line).end() for line in text.splitlines()[1::2]}) == 1  # aligned
    text = parameters_help(write_notebook(tmp_path / "tiny.ipynb"))
    assert text.splitlines()[1:] == ["  lr    default 0.0001", "  data  default None", "  tier  default cpu"]


def test_code_is_folded_and_widgets_are_left_out(page: BeautifulSoup) -> None:
    assert len(page.select("details.code")) == 3  # parameters, injected parameters, outputs; no empty cell
    assert not page.select("details.code[open]")
    assert not [code for code in page.select("article .input") if not code.find_parent("details")]
    assert "IntSlider(" not in " ".join(output.get_text() for output in page.select(".output"))
    assert page.find("img", alt="a pixel")
    assert "step 2" in page.get_text()
    assert "step 1" not in page.select_one(".output_stderr").get_text()
    assert page.select_one("article .scroll table")


def test_a_report_names_no_folder_of_the_machine(run: Run) -> None:
    text = BeautifulSoup(write_report(run).read_text(encoding="utf-8"), "html.parser").get_text()
    for private in (Path.home() / "x", Path.cwd(), Path(sys.executable).parent, run.folder):
        assert str(private) not in text
    # a path below the current folder may be shown relative to it
    assert re.search(rf"…/(?:\S+/)?{re.escape(Path(sys.executable).name)}", text)


def shown_of(*outputs: nbformat.NotebookNode) -> str:
    """The text that a report shows of a cell's outputs."""
    cell = new_code_cell("1", outputs=list(outputs))
    page = report._body(new_notebook(cells=[cell]), folder=Path())
    return "".join(element.get_text() for element in page.select(".output")).strip()


def printed(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return new_output("stream", name=name, text=text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\rb\rc", "c"), ("a\rb\n1\r2\n3", "b\n2\n3"), ("a\r\nb", "a\nb"), ("a\rb\r\nc", "b\nc"),
        ("x" * 1_000_000, "x" * 1_000_000),  # with time that grows as the square of the line, this takes an hour
        ("/" * 1_000_000, "/" * 1_000_000),
    ],
)  # fmt: skip
def test_a_report_shows_the_last_state_of_a_line(text: str, shown: str) -> None:
    assert shown_of(printed(text)).replace("\r", "") == shown


def test_long_markdown_is_shown_as_it_was_written() -> None:
    text = "*a" * 100_000
    assert shown_of(new_output("display_data", data={"text/markdown": text, "text/plain": "an object"})) == text
    assert shown_of(new_output("display_data", data={"text/markdown": "*a*", "text/plain": "an object"})) == "a"


def test_a_line_of_a_million_characters_costs_time_that_grows_with_it() -> None:
    """Every kind of output, and lines that regular expressions for paths, colours and progress bars stumble over."""
    code = """
from pathlib import Path
from nbformat.v4 import new_code_cell, new_notebook, new_output
from ftkit.lab.runs.report import _body, _without_paths
for piece in ("1, ", "a", "/", "/a", " /a", "C:\\\\a", "x\\r", "\\x1b[1"):
    text = piece * (1_000_000 // len(piece)) + "\\N{SNOWMAN}"
    outputs = [
        new_output("stream", name="stdout", text=text),
        new_output("execute_result", data={"text/plain": text, "text/markdown": text}),
        new_output("display_data", data={"text/html": f"<p>{text}</p>"}),
        new_output("error", ename="ValueError", evalue=text, traceback=[text]),
    ]
    page = _body(new_notebook(cells=[new_code_cell("1", outputs=outputs)]), folder=Path())
    print(repr(piece), _without_paths(str(page)).count("\\N{SNOWMAN}"))
"""
    printed = run_to_the_end(code).splitlines()
    assert len(printed) == 8
    assert all(line.endswith(" 4") for line in printed)


def test_the_work_for_a_report_grows_with_the_number_of_outputs_and_lines() -> None:
    def convert(outputs: list[nbformat.NotebookNode]) -> int:
        notebook = new_notebook(cells=[new_code_cell("1", outputs=outputs)])
        return count_calls(lambda: report._without_paths(str(report._body(notebook, folder=Path()))))

    table = "<table>" + "<tr><td>a/b</td><td>/home/me/x</td></tr>" * 20 + "</table>"
    for make in (
        lambda n: [printed(f"{i}\n") for i in range(n)],
        lambda n: [printed("".join(f"{i} /home/me/x\n" for i in range(n)))],
        lambda n: [new_output("display_data", data={"text/html": table}) for _ in range(n // 50)],
        lambda n: [new_output("display_data", data={"text/markdown": "a *b* $c$ /d/e/f"}) for _ in range(n // 10)],
    ):
        convert(make(50))  # what is imported or cached once
        few, many = convert(make(200)), convert(make(800))
        assert many < 4.4 * few


def test_pieces_of_a_stream_are_one_output() -> None:
    pieces = [printed("a "), printed("b\n"), printed("c", "stderr"), printed("d")]
    assert [output.text for output in report._merged(pieces)] == ["a b\n", "c", "d"]


def test_metrics_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_metrics({"data": Path("my.csv"), "seeds": (0, 1)}, METRICS, folder=tmp_path / "new")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["settings"] == {"data": "my.csv", "seeds": [0, 1]}
    assert record["metrics"]["linear_probe"]["ci95"] == [0.62, 0.68]
    assert record["metrics"]["linear_probe"]["trainable_parameters"] == 12770
    assert results_table(record["metrics"]).equals(results_table(METRICS))
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("FTKIT_RUN_DIR", raising=False)
    assert save_metrics({}, METRICS) == tmp_path / "runs" / "interactive" / "metrics.json"


@pytest.mark.parametrize("bad", [float("nan"), np.float32("inf"), np.array([1.0, np.nan])])
def test_metrics_that_are_not_finite_are_refused(tmp_path: Path, bad: object) -> None:
    save_metrics({}, METRICS, folder=tmp_path)
    before = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match=r"^metrics\.full\.accuracy.* is (nan|inf): [^\n]+$"):
        save_metrics({}, {"full": {"accuracy": bad}}, folder=tmp_path)
    with pytest.raises(TypeError, match=r"settings\.model has the type object"):
        save_metrics({"model": object()}, METRICS, folder=tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_the_table_is_the_same_in_a_notebook_and_a_terminal() -> None:
    table = results_table(METRICS)
    assert list(table.index) == ["majority", "linear probe"]
    assert list(table.loc["linear probe"]) == ["0.650", "0.620 to 0.680", "3", "12,770", "12.3"]
    assert table.loc["majority", "95 % interval"] == "–"
    lines = format_table(METRICS).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1  # aligned
    assert re.match(r"linear probe +0\.650 +0\.620 to 0\.680 +3 +12,770", lines[2])


def test_importing_runs_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'pandas', 'numpy', 'papermill', 'nbformat', 'nbconvert', 'matplotlib', 'psutil', 'tqdm'}"
    script = f"import sys, ftkit.lab.runs.notebooks; sys.exit(str({heavy} & set(sys.modules) or '') or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
