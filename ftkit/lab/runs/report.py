"""Write an executed notebook as an HTML report that needs no network."""

import html
import itertools
import re
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat.v4 import new_output
from pygments.formatters import HtmlFormatter

from ftkit.lab.machine import describe_machine
from ftkit.lab.results import results_table, write_whole
from ftkit.lab.runs.notebooks import Run
from ftkit.lab.settings import settings_of

_LONG_MARKDOWN = 20_000  # characters; the time to convert Markdown can grow with the square of its length

_LONG_COLOURED = 100_000  # characters; so does the time to convert escape sequences of colours

_CODE_STYLE = "xcode"  # all its colours have enough contrast on a light background

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/…])(?:/[\w.+@-]+)+/(?=[\w.+@-])|\b[A-Za-z]:(?:\\[\w.+@ -]+)+\\")


def write_report(run: Run) -> Path:
    """Write ``report.html`` into the folder of a run, also of a failed one, and return its path.

    The report begins with a summary: the error if there is one, results, settings that differ from the defaults,
    machine, versions, time and memory. Then comes the executed notebook, with folded code and equations as MathML.
    """
    notebook = nbformat.read(run.executed, as_version=4)
    if run.error:  # drop text on results that do not exist, and the cells that papermill adds about the error
        notebook.cells = [cell for cell in notebook.cells if cell.metadata.get("papermill", {}).get("start_time")]
    body = _body(notebook, folder=run.notebook.parent)
    heading = body.find("h1")
    title = heading.extract().get_text().strip() if heading else run.notebook.stem
    for other in body.find_all("h1"):
        other.name = "h2"  # the page has one title
    failure = body.select_one(".code_cell:last-of-type .output_error") if run.error else None
    if failure:
        failure["id"] = "failure"
        failure.find_parent(class_="code_cell").details["open"] = ""
    schema = settings_of(run.notebook)
    return write_page(
        run.folder / "report.html",
        "report.html.j2",
        title=title,
        run=run,
        described={parameter.name: parameter for parameter in schema.parameters()} if schema else {},
        started=f"{run.started.day} {run.started:%B %Y, %H:%M}",
        duration=_duration(run.seconds),
        results=results_table(run.metrics).to_html(border=0) if run.metrics else None,
        machine=describe_machine() | {"device": (run.settings or {}).get("device", "not known")},
        body=body,
        failure_shown=failure is not None,
    )


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write an HTML page from a template, without the names of this machine's folders, and return its path.

    Args:
        path: file to write.
        template: name of a template beside this module.
        values: values for the template.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    code_style = HtmlFormatter(style=_CODE_STYLE).get_style_defs(".highlight")
    page = templates.get_template(template).render(code_style=code_style, **values)
    return write_whole(path, _without_paths(page))


def _body(notebook: nbformat.NotebookNode, folder: Path) -> BeautifulSoup:
    """Convert the cells to HTML that loads nothing; image files in Markdown are relative to ``folder``."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in _merged(cell.outputs) if _is_static(output)]
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.log.setLevel("ERROR")
    exporter.register_filter("markdown2html", _markdown_filter(folder))
    page = BeautifulSoup(exporter.from_notebook_node(notebook)[0], "html.parser")
    for element in page.select("script, link, iframe, object, embed, style[scoped], a.anchor-link"):
        element.decompose()
    for element in page.select("[src]"):
        if not element["src"].startswith("data:"):
            element.replace_with(f"[not shown: {element.get('alt') or element['src']}]")
    for link in page.select("a[href]"):
        if not link["href"].startswith(("https:", "http:", "mailto:", "#")):
            link.unwrap()
    for code in page.select(".input"):
        fold = code.wrap(page.new_tag("details", attrs={"class": "code"}))
        summary = page.new_tag("summary")
        summary.string = "code"
        fold.insert(0, summary)
    for table in page.select("table"):
        table.attrs.pop("border", None)
        for column in zip(*(line.find_all(["td", "th"]) for line in table.select("tr")), strict=False):
            sentences = any(len(cell.get_text()) >= 20 for cell in column if cell.name == "td")
            for cell in column:  # sentences wrap; numbers and names stay on one line, aligned to the right
                cell["class"] = "sentence" if sentences else "short" if cell.find_parent("tbody") else ""
        table.wrap(page.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))  # for the keyboard, too
    return page


def _merged(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join what a cell printed piece by piece: with an element for each line, a long page would take minutes."""
    merged: list[nbformat.NotebookNode] = []
    for name, group in itertools.groupby(outputs, key=lambda output: output.get("name")):
        if name is None:  # not a stream
            merged.extend(group)
        else:
            merged.append(new_output("stream", name=name, text="".join(output.text for output in group)))
    return merged


def _is_static(output: nbformat.NotebookNode) -> bool:
    """Whether an output shows something without a kernel; removes widgets and scripts from it."""
    if output.output_type == "stream":
        # earlier states of a progress bar; tried only where a line begins, which may be a million characters long
        output.text = _plain_if_long(re.sub(r"^[^\n]*\r(?!\n)", "", output.text, flags=re.MULTILINE))
        return bool(output.text.strip())
    if output.output_type == "error":
        output.traceback = [_plain_if_long(part) for part in output.traceback]
        return True
    if output.data.pop("application/vnd.jupyter.widget-view+json", None) is not None:
        output.data.pop("text/plain", None)
    output.data.pop("application/javascript", None)
    if len(output.data.get("text/markdown", "")) > _LONG_MARKDOWN:
        output.data = {"text/plain": output.data["text/markdown"]}
    if "text/plain" in output.data:
        output.data["text/plain"] = _plain_if_long(output.data["text/plain"])
    return any(str(value).strip() for value in output.data.values())


def _plain_if_long(text: str) -> str:
    return strip_ansi(text) if len(text) > _LONG_COLOURED else text


class _Renderer(IPythonRenderer):
    """Markdown renderer that turns equations into MathML, which browsers show without a script."""

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def mathml(latex: str, display: str) -> str:
    """Convert an equation to MathML, or to its LaTeX source as code if latex2mathml fails."""
    # replace commands that latex2mathml does not know
    known = re.sub(r"\\(begin|end)\{(aligned|align|gathered|split)\}", r"\\\1{align*}", latex.strip())
    known = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", known)
    try:
        mathml = convert(known, display=display).replace("<mi>&#x0007E;</mi>", "<mo>∼</mo>")
        mathml = re.sub(r"(<mi>(?:log|ln|exp)</mi>)(?=<m(?!o))", r'\1<mspace width="0.17em"></mspace>', mathml)
    except Exception:  # latex2mathml raises errors of many types, IndexError included
        mathml = "\\"
    return f"<code>{html.escape(latex.strip())}</code>" if "\\" in mathml else mathml


def _markdown_filter(folder: Path) -> Any:
    @jinja2.pass_context
    def markdown2html(context: jinja2.runtime.Context, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(escape=False, embed_images=True, path=str(folder), attachments=attachments)
        return MarkdownWithMath(renderer=renderer).render(source)

    return markdown2html


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _without_paths(page: str) -> str:
    """Remove the folders of absolute paths from the text of a page: they may contain a person's name."""
    soup = BeautifulSoup(page, "html.parser")
    known = sorted({str(Path.cwd()), str(Path.home())} - {"/"}, key=len, reverse=True)
    for text in soup.find_all(string=True):
        if text.parent.name == "style":
            continue
        shown = str(text)
        for folder in known:
            shown = re.sub(rf"(?<![\w.:/…]){re.escape(folder)}(?![\w.-])", "…", shown)
        shown = ABSOLUTE_PATH.sub("…/", shown)
        if shown != text:
            text.replace_with(shown)
    return str(soup)
