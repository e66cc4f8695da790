"""Execute a notebook in a kernel, show the progress and measure the peak memory."""

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit.errors import first_line
from ftkit.lab.results import write_whole

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager
    from nbformat import NotebookNode

# Seconds without a heartbeat until a kernel is ended. The heart beats in a thread of its own, also during a long cell.
_SILENCE = 60.0

# A kernel drops output if more than 1,000 messages wait to be sent. After this line, run in it, all of them can wait.
_QUEUE_ALL = "(lambda out: out.schedule(lambda: setattr(out.socket, 'sndhwm', 0)))(get_ipython().kernel.iopub_thread)"

_OUTPUT_TIMEOUT = 120  # seconds from the end of a cell until the last of its output arrives


class Execution(NamedTuple):
    """Result of an execution.

    Attributes:
        error: error message in one line, None if all cells ran.
        seconds: duration.
        peak_rss_mib: peak memory of the kernel and its child processes, in MiB.
    """

    error: str | None
    seconds: float
    peak_rss_mib: float


def execute(
    source: Path, target: Path, parameters: Mapping[str, Any], *, env: Mapping[str, str], progress: bool
) -> Execution:
    """Execute a notebook with papermill, in the current folder.

    Whatever ends the execution (a failing cell, a kernel that dies or no longer answers, output that does not arrive, a
    full disk, Ctrl-C) is told in ``Execution.error``, and the cells executed so far are kept.

    Args:
        source: path of the notebook.
        target: path of the executed copy; it is written whole before and after each cell, so an error loses nothing.
        parameters: values by name, inserted below the `parameters` cell.
        env: environment variables for the kernel, in addition to those of this process.
        progress: show a bar on stderr.

    Raises:
        OSError: the executed copy cannot be written; no cell has run.
    """
    import papermill
    from jupyter_core.utils import run_sync

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # its messages are in `error`
    steps = _Steps(source, target, progress)
    steps.save()
    kernel = _kernel(env)
    watch = _Watch(kernel, steps)
    error = None
    start = time.perf_counter()
    watch.start()

    def on_notebook_start(notebook: "NotebookNode") -> None:
        kernel.connected.execute(_QUEUE_ALL, silent=True)
        steps.on_notebook_start(notebook)

    try:
        papermill.execute_notebook(
            _literal(source),
            None,  # papermill would leave half a file on a full disk
            dict(parameters),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            km=kernel,
            iopub_timeout=_OUTPUT_TIMEOUT,
            on_notebook_start=on_notebook_start,
            on_cell_execute=steps.on_cell_execute,
            on_cell_executed=steps.on_cell_executed,
        )
        if steps.ended_early:
            error = "SystemExit: the cells below were not executed"
    except KeyboardInterrupt:
        error = "Interrupted"
    except Exception as failure:
        error = _in_a_sentence(failure, watch, started=steps.started)
    finally:
        watch.stop()
        steps.bar.close()
        for _ in range(3):  # asyncio hands an interruption on to each task that waited for the interrupted one
            with contextlib.suppress(KeyboardInterrupt):
                run_sync(asyncio.sleep)(0.01)
        if kernel.has_kernel:
            try:
                run_sync(kernel.shutdown_kernel)(now=error is not None)
            except KeyboardInterrupt:  # again
                watch.kill_kernel()
        if kernel.connected:
            kernel.connected.stop_channels()
    try:
        steps.save()
    except OSError as failure:
        error = error or first_line(failure)
    if error:
        error = f"{error.rstrip('.')} ({steps.where})"
    return Execution(error, time.perf_counter() - start, watch.peak_mib)


def _in_a_sentence(failure: Exception, watch: "_Watch", *, started: bool) -> str:
    """What ended an execution, in one line."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError

    if watch.ended_kernel:
        return f"The kernel was ended, because it had not answered for {_SILENCE:g} seconds"
    if isinstance(failure, PapermillExecutionError):
        message = (failure.evalue.strip().splitlines() or [""])[0]
        return f"{failure.ename}{': ' if message else ''}{message}"
    if isinstance(failure, DeadKernelError):
        return "The kernel died, probably out of memory: try a smaller batch or fewer rows"
    if isinstance(failure, CellTimeoutError):
        return f"The output of the cell did not arrive within {_OUTPUT_TIMEOUT} seconds of its end: print less"
    if not started:
        return f"The kernel did not start: {first_line(failure)}"
    return first_line(failure) if isinstance(failure, OSError) else f"{type(failure).__name__}: {first_line(failure)}"


def _literal(path: Path) -> str:
    """Escape braces in a path: papermill formats paths with the parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _kernel(env: Mapping[str, str]) -> Any:
    """Kernel manager for this Python interpreter; an installed kernelspec "python3" may belong to another one."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict(), env=dict(env))
        connected = None
        shutdown_wait_time = 2.0  # give exit handlers up to two seconds; unloading torch would take longer

        def client(self, **kwargs: Any) -> Any:
            self.connected = super().client(**kwargs)  # nbclient does not close it
            return self.connected

    return ThisInterpreter(transport_encryption="auto")


class _Steps:
    """Hooks for nbclient that write the executed copy, update the progress bar and remember the current cell."""

    def __init__(self, source: Path, target: Path, shown: bool) -> None:
        import nbformat
        from tqdm import tqdm

        layout = "{desc} {n_fmt}/{total_fmt} cells |{bar}| {elapsed}"
        self.bar = tqdm(desc="starting", total=0, disable=not shown, bar_format=layout, dynamic_ncols=True)
        self.target = target
        self.notebook = nbformat.read(source, as_version=4)
        for cell in self.notebook.cells:  # nothing has run yet
            cell.metadata.pop("papermill", None)
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        self.headings: list[str] = []
        self.started = False
        self.done = self.total = 0
        self.where = "before the first cell"

    @property
    def ended_early(self) -> bool:
        """Whether a cell raised SystemExit(0), which papermill takes for a success, above other cells."""
        return self.done < self.total and bool(self.notebook.metadata.papermill.get("exception"))

    def save(self) -> None:
        import nbformat

        write_whole(self.target, nbformat.writes(self.notebook))

    def on_notebook_start(self, notebook: "NotebookNode") -> None:
        self.notebook, self.started = notebook, True
        heading = ""
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                titles = [line.lstrip("#") for line in cell.source.splitlines() if line.startswith("#")]
                heading = titles[-1].strip() if titles else heading
            self.headings.append(heading)
        self.total = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
        self.bar.total = self.total

    def on_cell_execute(self, cell: "NotebookNode", cell_index: int) -> None:
        self.save()
        heading = self.headings[cell_index]
        self.where = f"cell {self.done + 1}" + (f", “{heading}”" if heading else "")
        self.bar.set_description_str(f"{heading[:40]:<40}")

    def on_cell_executed(self, cell: "NotebookNode", cell_index: int, execute_reply: dict) -> None:
        self.done += 1
        self.bar.update()
        self.save()


class _Watch(threading.Thread):
    """Thread that samples the memory of the kernel and its children, and ends a kernel that no longer answers.

    Shared pages count for each process.
    """

    def __init__(self, kernel: "AsyncKernelManager", steps: _Steps) -> None:
        super().__init__(daemon=True)
        self.kernel, self.steps = kernel, steps
        self.ended = threading.Event()
        self.ended_kernel = False
        self.peak_mib = 0.0

    def run(self) -> None:
        import psutil

        answered = time.monotonic()
        while not self.ended.wait(0.25):
            if not self.steps.started or self.kernel.connected.hb_channel.is_beating():
                answered = time.monotonic()
            elif time.monotonic() - answered > _SILENCE and not self.ended_kernel:
                self.ended_kernel = True
                self.kill_kernel()  # nbclient notices
            if sys.stderr.isatty():
                self.steps.bar.refresh()  # keep the clock running during a long cell
            try:
                process = psutil.Process(self.kernel.provisioner.pid)
                family = [process, *process.children(recursive=True)]
                self.peak_mib = max(self.peak_mib, sum(p.memory_info().rss for p in family) / 2**20)
            except (psutil.Error, AttributeError):  # a child that just ended, or a kernel not started yet
                continue

    def kill_kernel(self) -> None:
        """End the kernel and its children at once, also stopped ones."""
        import psutil

        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.kernel.provisioner.pid)
            family = process.children(recursive=True)
            process.kill()
            for child in family:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    child.kill()

    def stop(self) -> None:
        self.ended.set()
        self.join()
