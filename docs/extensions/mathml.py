"""Equations as MathML, converted as in the reports of runs: browsers show it without a script."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

from ftkit.lab.runs.report import mathml

_log = getLogger(__name__)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what this file adds to Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(_converted(node, "inline"))
    raise nodes.SkipNode


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="equation">{_converted(node, "block")}</div>\n')
    raise nodes.SkipNode


def _converted(node: nodes.Element, display: str) -> str:
    html = mathml(node.astext(), display)
    if html.startswith("<code>"):  # the source, because it could not be converted
        _log.warning("The equation can't be shown as MathML: write %r more simply.", node.astext(), location=node)
    return html
