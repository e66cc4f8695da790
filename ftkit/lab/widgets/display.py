"""Helpers that all widgets share: detect a reader, show a static preview if there is none, work in a thread."""

import html
import threading
from collections.abc import Callable

from IPython import get_ipython
from ipywidgets import HTML, Button

from ftkit.errors import first_line
from ftkit.plots import NO_MATH


def somebody_is_there() -> bool:
    """Whether a person runs the current cell: tools that execute notebooks do not allow ``input()``, frontends do."""
    kernel = getattr(get_ipython(), "kernel", None)
    request = kernel.get_parent() if kernel else {}
    return request.get("content", {}).get("allow_stdin", False)


def in_one_line(problem: Exception) -> str:
    """First line of an error message, after its type unless it is a ValueError or RuntimeError (as the kit raises)."""
    line, kind = first_line(problem), type(problem).__name__
    return line if isinstance(problem, ValueError | RuntimeError) or line == kind else f"{kind}: {line}"


class StaticPreview:
    """HTML in place of a widget, for notebooks that are executed with nobody to use it.

    Args:
        shown: HTML that the widget would show.
    """

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        return "[a widget: run this cell in JupyterLab to use it]"

    def _repr_html_(self) -> str:
        note = "<p><em>Static preview: run this cell in JupyterLab to use it.</em></p>"
        return f'<div class="{NO_MATH}">{note}{self._shown}</div>'


def in_thread(button: Button, status: HTML, work: Callable[[], None], after: Callable[[], None]) -> threading.Thread:
    """Run a function in a thread, with the button disabled meanwhile; the status shows an error if there is one.

    Args:
        button: the button that started the work.
        status: widget for messages.
        work: the function to run.
        after: called in the thread when the work has ended, after an error too.
    """

    def run() -> None:
        try:
            work()
            status.value = ""
        except Exception as problem:
            status.value = said(in_one_line(problem))
        finally:
            button.disabled = False
            after()

    button.disabled = True
    status.value = said("working …")
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def said(text: str) -> str:
    """Status text as HTML that screen readers read out."""
    return f'<span role="status" class="{NO_MATH}">{html.escape(text)}</span>'
