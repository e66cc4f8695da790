"""Execute a notebook in a kernel, show the progress and measure the peak memory."""

import logging
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager
    from nbformat import NotebookNode


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

    Args:
        source: path of the notebook.
        target: path of the executed copy; it is written after each cell, so an error loses nothing.
        parameters: values by name, inserted below the `parameters` cell.
        env: environment variables for the kernel, in addition to those of this process.
        progress: show a bar on stderr.
    """
    import papermill
    from jupyter_core.utils import run_sync
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # its messages are in `error`
    kernel = _kernel(env)
    steps = _Steps(progress)
    memory = _PeakMemory(kernel, steps)
    error = None
    start = time.perf_counter()
    memory.start()
    try:
        papermill.execute_notebook(
            _literal(source),
            _literal(target),
            dict(parameters),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            km=kernel,
            on_notebook_start=steps.on_notebook_start,
            on_cell_execute=steps.on_cell_execute,
            on_cell_executed=steps.on_cell_executed,
        )
    except papermill.PapermillExecutionError as failure:
        message = (failure.evalue.strip().splitlines() or [""])[0].rstrip(".")
        error = f"{failure.ename}{': ' if message else ''}{message} ({steps.where})"
    except DeadKernelError:
        error = f"The kernel died, probably out of memory: try a smaller batch or fewer rows ({steps.where})"
    except KeyboardInterrupt:
        if not target.exists():
            raise
        error = f"Interrupted ({steps.where})"
    finally:
        memory.stop()
        steps.bar.close()
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)(now=error is not None)
        if kernel.connected:
            kernel.connected.stop_channels()
    return Execution(error, time.perf_counter() - start, memory.peak_mib)


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
    """Hooks for nbclient that update the progress bar and remember the current cell."""

    def __init__(self, shown: bool) -> None:
        from tqdm import tqdm

        layout = "{desc} {n_fmt}/{total_fmt} cells |{bar}| {elapsed}"
        self.bar = tqdm(desc="starting", total=0, disable=not shown, bar_format=layout, dynamic_ncols=True)
        self.headings: list[str] = []
        self.done = 0
        self.where = "before the first cell"

    def on_notebook_start(self, notebook: "NotebookNode") -> None:
        heading = ""
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                titles = [line.lstrip("#") for line in cell.source.splitlines() if line.startswith("#")]
                heading = titles[-1].strip() if titles else heading
            self.headings.append(heading)
        self.bar.total = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)

    def on_cell_execute(self, cell: "NotebookNode", cell_index: int) -> None:
        heading = self.headings[cell_index]
        self.where = f"cell {self.done + 1}" + (f", “{heading}”" if heading else "")
        self.bar.set_description_str(f"{heading[:40]:<40}")

    def on_cell_executed(self, cell: "NotebookNode", cell_index: int, execute_reply: dict) -> None:
        self.done += 1
        self.bar.update()


class _PeakMemory(threading.Thread):
    """Thread that samples the resident memory of the kernel and its children; shared pages count for each of them."""

    def __init__(self, kernel: "AsyncKernelManager", steps: _Steps) -> None:
        super().__init__(daemon=True)
        self.kernel, self.steps = kernel, steps
        self.ended = threading.Event()
        self.peak_mib = 0.0

    def run(self) -> None:
        import psutil

        while not self.ended.wait(0.25):
            if sys.stderr.isatty():
                self.steps.bar.refresh()  # keep the clock running during a long cell
            try:
                process = psutil.Process(self.kernel.provisioner.pid)
                family = [process, *process.children(recursive=True)]
                self.peak_mib = max(self.peak_mib, sum(p.memory_info().rss for p in family) / 2**20)
            except (psutil.Error, AttributeError):  # a child that just ended, or a kernel not started yet
                continue

    def stop(self) -> None:
        self.ended.set()
        self.join()
