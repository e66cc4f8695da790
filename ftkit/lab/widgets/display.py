"""What widgets share: whether a person is there, and a static preview where nobody is."""

import html
import threading
from collections.abc import Callable

from IPython import get_ipython
from ipywidgets import HTML, Button


def somebody_is_there() -> bool:
    """Whether the running cell was sent by a person: tools that execute notebooks allow no ``input()``."""
    kernel = getattr(get_ipython(), "kernel", None)
    request = kernel.get_parent() if kernel else {}
    return request.get("content", {}).get("allow_stdin", False)


def in_one_line(problem: Exception) -> str:
    """What is said of an error: ours are sentences, of others the kind matters too."""
    lines = str(problem).splitlines() or [""]
    kind = "" if isinstance(problem, ValueError | RuntimeError) and lines[0] else type(problem).__name__
    return ": ".join(filter(None, [kind, lines[0]]))


class StaticPreview:
    """What a widget shows, where nobody is there to use it."""

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        return "[a widget: run this cell in JupyterLab to use it]"

    def _repr_html_(self) -> str:
        return f"<p><em>An image: run this cell in JupyterLab to use it.</em></p>{self._shown}"


def in_thread(button: Button, status: HTML, work: Callable[[], None], after: Callable[[], None]) -> threading.Thread:
    """Do some work in a thread, the button disabled meanwhile; what goes wrong is said in the status."""

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
    status.value = said("at work …")
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def said(text: str) -> str:
    return f'<span role="status">{html.escape(text)}</span>'
