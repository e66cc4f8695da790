"""What a block of code costs: seconds on the clock and the peak of the process's resident memory."""

import threading
import time
from types import TracebackType

import psutil

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
