"""The bar as a reader meets it: on a terminal, in a pipe, in a notebook."""

import os
import subprocess
import sys
import textwrap

import nbformat
import pytest
from nbclient import NotebookClient

from ftkit.training import monitor

LOOP = """
import time
from ftkit.training import monitor as progress
progress.START_SECONDS = 0.1
bar = progress.ProgressBar(4, "training")
for step in range(1, 5):
    time.sleep(0.12)
    bar.update(step, f"loss {1 / step:.2f}")
bar.close()
print("done", progress.in_notebook())
"""


def test_a_pipe_gets_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == "done False\n"


def test_a_terminal_shows_a_bar_that_goes_away() -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # a new one has no width
    process = subprocess.Popen([sys.executable, "-c", LOOP], stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # so Linux says that the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait() == 0
    text = seen.decode()
    assert "training" in text
    assert "loss 0." in text
    assert "\n" not in text
    assert text.endswith("\r")
    assert text.split("\r")[-2].strip() == ""  # wiped out


def run_notebook(*cells: str) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return notebook


def test_a_notebook_keeps_no_trace_of_a_closed_bar() -> None:
    notebook = run_notebook(LOOP, LOOP.replace("bar.close()", ""))
    closed, left_open = (cell.outputs for cell in notebook.cells)

    shown = [output for output in left_open if output.output_type == "display_data"]
    assert "█ | 3/4" in shown[0].data["text/plain"] or "| 4/4" in shown[0].data["text/plain"]  # it was there

    assert "".join(output.text for output in closed if output.output_type == "stream") == "done True\n"
    for output in closed:
        assert output.get("name") != "stderr"
        if output.output_type == "display_data":
            assert output.data == {"text/plain": ""}
    assert "widgets" not in notebook.metadata


def test_what_is_over_soon_shows_no_bar_in_a_notebook() -> None:
    notebook = run_notebook(LOOP.replace("START_SECONDS = 0.1", "START_SECONDS = 60"))
    assert [output.output_type for output in notebook.cells[0].outputs] == ["stream"]


def test_another_thread_writes_into_no_cell() -> None:
    notebook = run_notebook(f"""
def loop():
{textwrap.indent(LOOP, "    ")}
import threading
thread = threading.Thread(target=loop)
thread.start()
thread.join()
""")
    (output,) = notebook.cells[0].outputs
    assert output.text == "done True\n"


def test_here_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not monitor.in_notebook()
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not monitor.in_notebook()
