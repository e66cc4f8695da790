"""A progress bar that leaves nothing behind: on a terminal a tqdm bar, in a notebook one line of text that goes away.

tqdm's own notebook bar is a widget; an executed notebook would keep it as broken metadata.
"""

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

REFRESH_SECONDS = 0.2
START_SECONDS = 2.0  # in a notebook, what takes less shows no bar: each leaves an empty line in the cell's outputs


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


class Bar:
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
