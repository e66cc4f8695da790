"""The notebooks as pages of the site: where they come from, their list, and links to where a term is explained."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.slugs import github_slugify
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.logging import getLogger

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

_FOLDERS = (".", "deeper")

# Bold or italics of a few words; the bold number and title of an exercise explains nothing.
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(?![\s\d*])([^*]{1,60})(?<!\s)\*{1,2}(?![\w*])")

_log = getLogger(__name__)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what this file adds to Sphinx."""
    app.connect("config-inited", _copy_notebooks)
    app.add_directive("lessons", Lessons)
    app.add_role("lesson", LessonLink())
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(folder: Path, pages: dict[str, str]) -> None:
    """Fill a folder of generated sources: what is unchanged is left alone, what is no longer a page is removed.

    Args:
        folder: below the sources of the site; not under version control.
        pages: text by path in the folder.
    """
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in folder.rglob("*.*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in pages:
            path.unlink()


def notebooks(*folders: str) -> list[Path]:
    """The notebooks of some folders under ``notebooks``, each folder in reading order."""
    return [path for folder in folders for path in sorted((NOTEBOOKS / folder).glob("*.ipynb"))]


def page_of(path: Path) -> str:
    """The source of a notebook's page, relative to the sources of the site."""
    return f"lessons/{path.relative_to(NOTEBOOKS).as_posix()}"


def _copy_notebooks(app: Sphinx, config: Config) -> None:
    """Copy the notebooks below the sources of the site, which is where Sphinx looks for pages."""
    pages = {}
    for path in notebooks(*_FOLDERS):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = [output for output in cell["outputs"] if not _is_empty(output)]
            _fold(cell)
        pages[path.relative_to(NOTEBOOKS).as_posix()] = json.dumps(notebook, ensure_ascii=False)
    write_pages(Path(app.srcdir) / "lessons", pages)


def _is_empty(output: dict[str, Any]) -> bool:
    """Whether an output shows nothing, as a line of progress that was cleared in the end."""
    return "data" in output and not any("".join(text).strip() for text in output["data"].values())


def _fold(cell: dict[str, Any]) -> None:
    """Fold the code that JupyterLab folds, the parameters, the solution of an exercise and its graded check."""
    metadata = cell["metadata"]
    tags = metadata.setdefault("tags", [])
    if cell["cell_type"] == "markdown":
        if _is_solution(cell):  # of a question that asks for a judgement
            answer = "".join(cell["source"])
            cell["source"] = f"<details>\n<summary>Show a solution</summary>\n\n{answer}\n\n</details>"
        return
    if _is_solution(cell):
        label = "a solution"
    elif metadata.get("nbgrader", {}).get("grade"):
        label = "the graded check"
    elif metadata.get("jupyter", {}).get("source_hidden") or "parameters" in tags:
        label = "the code"
    else:
        return
    tags.append("hide-input")
    metadata["mystnb"] = {"code_prompt_show": f"Show {label}", "code_prompt_hide": f"Hide {label}"}


@cache
def _texts(path: Path) -> list[str]:
    """The Markdown cells of a notebook, without the solutions of exercises."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown" and not _is_solution(c)]


def _is_solution(cell: dict[str, Any]) -> bool:
    return bool(cell["metadata"].get("nbgrader", {}).get("solution"))


class Lessons(SphinxDirective):
    """List the notebooks of a folder, with the title and the first paragraph of each, and put them into the sidebar.

    The argument is the folder under ``notebooks``; the content stands above the list. Where the folder has no notebook,
    nothing is shown.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Make the list."""
        self.env.note_reread()  # in each build: there may be another notebook
        folder, listed, entries = self.arguments[0], list(self.content), []
        label = "" if folder == "." else f"{folder}: "  # beside the lesson itself, which may have the same title
        for path in notebooks(folder):
            heading, _, rest = _texts(path)[0].partition("\n")
            title, number = heading.removeprefix("# "), path.stem.partition("_")[0]
            first_paragraph = rest.strip().partition("\n\n")[0]
            listed += ["", f"**{number}** [{title}]({page_of(path)})", "", first_paragraph]
            entries.append(f"{number} {label}{title.partition(':')[0]} </{page_of(path).removesuffix('.ipynb')}>")
        if not entries:
            return []
        toctree = ["", "```{toctree}", ":hidden:", "", *entries, "```"]
        return self.parse_text_to_nodes("\n".join([*listed, *toctree]))


class LessonLink(SphinxRole):
    """Link to the section of a lesson that explains a term: {lesson}`01 cross-entropy`.

    The section is looked up in the notebook, so the link is right after a section was renamed or moved, also to
    ``notebooks/deeper``.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Make the link; a lesson that has no such words is a warning."""
        number, _, term = self.text.partition(" ")
        found = [(path, heading) for path in notebooks(*_FOLDERS) if (heading := _section(path, term))]
        for path, heading in found:
            if path.name.startswith(f"{number}_"):
                self.env.note_dependency(str(path))
                deeper = ", going deeper" if path.parent != NOTEBOOKS else ""
                link = f"[lesson {number}{deeper}, “{heading}”]({page_of(path)}#{github_slugify(heading)})"
                return self.inliner.parse(link, self.lineno, self.inliner, self.inliner.parent)
        others = ", ".join(path.stem for path, _ in found) or "none"
        _log.warning(
            "No section of lesson %s has the words “%s”: name the lesson that explains the term. They are in: %s.",
            *(number, term, others),
            location=self.get_location(),
        )
        return [nodes.Text(f"lesson {number}")], []


def _section(path: Path, term: str) -> str | None:
    """The first heading that has a term, else the one over its first place in bold or italics, else over its first."""
    word = re.compile(rf"(?<!\w){re.escape(term)}", re.IGNORECASE)
    sections = list(_sections(path))
    emphasised = [(heading, " | ".join(_EMPHASIS.findall(text))) for heading, text in sections]
    for searched in ([(heading, heading) for heading, _ in sections], emphasised, sections):
        for heading, text in searched:
            if word.search(text):
                return heading
    return None


def _sections(path: Path) -> Iterator[tuple[str, str]]:
    """Heading and text of each section after the introduction, the further reading left out."""
    parts = re.split(r"^#{2,3} +(.+)$", "\n\n".join(_texts(path)), flags=re.MULTILINE)
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        if heading != "Further reading":
            yield heading.strip(), " ".join(text.split())
