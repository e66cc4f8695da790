"""What a run costs and how far it is: seconds, peak memory, a progress bar.

tqdm's own notebook bar is a widget; an executed notebook would keep it as broken metadata.
"""

import sys
import threading
import time
from types import TracebackType
from typing import Any

import psutil
from tqdm import tqdm

SAMPLE_SECONDS = 0.02


class Meter:
    """Measure the block under ``with``.

    The operating system keeps one peak for the life of a process, which says nothing of its second half;
    so the resident set is sampled from a thread.

    Attributes:
        seconds: wall-clock time of the block, once it has ended.
        peak_rss_mib: highest resident set size seen during the block, in MiB, all that was there before included.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_rss_mib = 0.0
        self._process = psutil.Process()

    def _sample(self) -> None:
        self.peak_rss_mib = max(self.peak_rss_mib, self._process.memory_info().rss / 2**20)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
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


REFRESH_SECONDS = 0.2

START_SECONDS = 2.0  # in a notebook, what takes less shows no bar: each leaves an empty line in the cell's outputs


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


class ProgressBar:
    """Shows how far a loop is, and a short text beside it.

    Outside of the main thread it is silent: in a notebook it would write into whatever cell runs meanwhile.

    Args:
        total: steps in all.
        label: what is going on.
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
        """Say that ``done`` steps of the total are over."""
        if self._terminal is not None:
            self._terminal.set_postfix_str(text, refresh=False)
            self._terminal.update(done - self.done)
        elif time.monotonic() - self._start > START_SECONDS and time.monotonic() - self._shown > REFRESH_SECONDS:
            self._shown = time.monotonic()
            filled = "█" * round(20 * done / self.total)
            left = (self._shown - self._start) * (self.total - done) / max(done, 1)
            self._show(f"{self.label} |{filled:<20}| {done}/{self.total}, {left:.0f} s left  {text}")
        self.done = done

    def close(self) -> None:
        """Take the bar away."""
        if self._terminal is not None:
            self._terminal.close()
        elif self._handle is not None:
            self._show("")

    def _show(self, text: str) -> None:
        """In the notebook, in the place of what was shown before."""
        from IPython.display import Pretty, display

        if self._handle is None:
            self._handle = display(Pretty(text), display_id=True)
        else:
            self._handle.update(Pretty(text))
