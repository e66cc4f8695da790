"""Seconds and peak memory of a run, and its progress bar.

The notebook bar of tqdm is a widget, which an executed notebook would keep as broken metadata.
"""

import sys
import threading
import time
from types import TracebackType
from typing import Any

import psutil
from tqdm import tqdm

_SAMPLE_SECONDS = 0.02


class Meter:
    """Measure the block under ``with``.

    The operating system knows only the peak of a whole process, so a thread samples the resident memory.

    Attributes:
        seconds: wall-clock time of the block, once it has ended.
        peak_rss_mib: highest resident memory of the process during the block, in MiB.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_rss_mib = 0.0
        self._process = psutil.Process()

    def _sample(self) -> None:
        self.peak_rss_mib = max(self.peak_rss_mib, self._process.memory_info().rss / 2**20)

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._sample()

    def __enter__(self) -> "Meter":
        self.seconds = self.peak_rss_mib = 0.0
        self._done = threading.Event()
        self._start = time.perf_counter()
        self._sample()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        self.seconds = time.perf_counter() - self._start


_REFRESH_SECONDS = 0.2

START_SECONDS = 2.0  # no bar in a notebook for shorter work, because every bar leaves an empty line in the output


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


class ProgressBar:
    """A progress bar for a terminal or a notebook, with a short text beside it.

    In another thread than the main one it shows nothing: it would write into the cell that happens to be running.

    Args:
        total: number of steps.
        label: text in front of the bar.
    """

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.done = total, label, 0
        self._handle: Any = None
        self._terminal: tqdm | None = None
        self._start = self._shown = time.monotonic()
        shown = threading.current_thread() is threading.main_thread()
        if not (in_notebook() and shown):
            self._terminal = tqdm(total=total, desc=label, leave=False, disable=not (shown and sys.stderr.isatty()))

    def update(self, done: int, text: str = "") -> None:
        """Show that ``done`` steps are done."""
        if self._terminal is not None:
            self._terminal.set_postfix_str(text, refresh=False)
            self._terminal.update(done - self.done)
        elif time.monotonic() - self._start > START_SECONDS and time.monotonic() - self._shown > _REFRESH_SECONDS:
            self._shown = time.monotonic()
            filled = "█" * round(20 * done / self.total)
            left = (self._shown - self._start) * (self.total - done) / max(done, 1)
            self._show(f"{self.label} |{filled:<20}| {done}/{self.total}, {left:.0f} s left  {text}")
        self.done = done

    def close(self) -> None:
        """Remove the bar."""
        if self._terminal is not None:
            self._terminal.close()
        elif self._handle is not None:
            self._show("")

    def _show(self, text: str) -> None:
        """Replace what the notebook shows for this bar."""
        from IPython.display import Pretty, display

        if self._handle is None:
            self._handle = display(Pretty(text), display_id=True)
        else:
            self._handle.update(Pretty(text))
