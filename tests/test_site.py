"""The site, built without a network: each link inside it leads somewhere, and no page loads anything from elsewhere."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb"))
DOORS = sorted(path.parent.name for path in (ROOT / "ftkit").glob("*/__init__.py"))

BUILD = """
import socket, sys
from sphinx.cmd.build import main

def refuse(*_):
    raise OSError("the site asks the network")

socket.socket.connect = socket.getaddrinfo = refuse
sys.exit(main(sys.argv[1:]))
"""
FROM_ELSEWHERE = re.compile(r"\s*(https?:)?//")
STYLE_LOADS = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]*)")

Pages = dict[Path, BeautifulSoup]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    command = [sys.executable, "-c", BUILD, *options, str(ROOT / "docs"), str(folder / "html")]
    done = subprocess.run(command, env=os.environ | {"FTKIT_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> Pages:
    return read_pages(site)


def read_pages(folder: Path) -> Pages:
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in folder.rglob("*.html")}


def broken_links(pages: Pages) -> list[str]:
    """Links to files and places that are not there."""
    places = {path: {element["id"] for element in page.select("[id]")} for path, page in pages.items()}
    problems = []
    for path, page in pages.items():
        for element in page.select("[href], [src]"):
            link = element.get("href") or element.get("src") or ""
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                problems.append(f"{path.name}: {link} is no file")
            elif parts.fragment and unquote(parts.fragment) not in places.get(target, ()):
                problems.append(f"{path.name}: {link} is no place in its page")
    return problems


def loads_from_elsewhere(folder: Path, pages: Pages) -> list[str]:
    """What pages and style sheets load from another host; a link that one may click loads nothing."""
    problems = []
    for path, page in pages.items():
        for element in page.select("link[href], [src], [srcset], [poster], object[data], image[href]"):
            for name in ("href", "src", "srcset", "poster", "data"):
                if FROM_ELSEWHERE.match(element.get(name, "")):
                    problems.append(f"{path.name}: {element[name]}")
        styles = [style.get_text() for style in page.select("style")]
        styles += [element["style"] for element in page.select("[style]")]
        problems += [f"{path.name}: {found}" for style in styles for found in STYLE_LOADS.findall(style)]
    for path in folder.rglob("*.css"):
        problems += [f"{path.name}: {found}" for found in STYLE_LOADS.findall(path.read_text(encoding="utf-8"))]
    return problems


def test_every_link_inside_leads_somewhere(pages: Pages) -> None:
    assert broken_links(pages) == []


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: Pages) -> None:
    assert loads_from_elsewhere(site, pages) == []


def test_checks_notice_damage(tmp_path: Path) -> None:
    (tmp_path / "style.css").write_text("a { background: url('https://far/b.png') }", encoding="utf-8")
    (tmp_path / "a.html").write_text(
        "<link rel=stylesheet href=style.css><p id=here><a href=#here></a><a href=#gone></a><a href=b.html></a>"
        "<a href=https://far></a><script src=//far/s.js></script><img src=data:,><img src=lost.png>"
        "<style>@import 'http://far/f.css'</style>",
        encoding="utf-8",
    )
    pages = read_pages(tmp_path)
    assert broken_links(pages) == [
        "a.html: #gone is no place in its page",
        "a.html: b.html is no file",
        "a.html: lost.png is no file",
    ]
    assert loads_from_elsewhere(tmp_path, pages) == [
        "a.html: //far/s.js",
        "a.html: http://far/f.css",
        "style.css: https://far/b.png",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "notebooks").as_posix())
def test_a_lesson_is_shown_with_its_outputs(site: Path, pages: Pages, path: Path) -> None:
    page = pages[site / "lessons" / path.relative_to(ROOT / "notebooks").with_suffix(".html")]
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0].source.partition("\n")[0].removeprefix("# ")
    assert page.h1.get_text().removesuffix("¶").removesuffix("#") == title
    assert any(title == link.get_text() for link in pages[site / "lessons.html"].select("article a"))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = BeautifulSoup("".join(o.get("data", {}).get("text/html", "") for o in outputs), "html.parser")
    figures = [image["alt"] for image in shown.select("img")]
    assert [image["alt"] for image in page.select("article .cell_output img")] == figures
    folded = "".join(code.get_text() for code in page.select("details .highlight"))
    hidden = [cell.source for cell in notebook.cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    parameters = next(cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert all(source in folded for source in {parameters, *hidden})
    assert not re.search(r"\$\$|\\frac", " ".join(p.get_text() for p in page.select("article p")))


def test_equations_are_mathml(site: Path, pages: Pages) -> None:
    equation = pages[site / "lessons" / "03_lora_and_adapters.html"].select_one(".equation math")
    assert equation["display"] == "block"
    assert len(equation.select("mfrac")) == 1  # alpha / r


@pytest.mark.parametrize("room", DOORS)
def test_the_reference_describes_what_a_door_offers(site: Path, pages: Pages, room: str) -> None:
    page = pages[site / "reference" / f"{room}.html"]
    for name in importlib.import_module(f"ftkit.{room}").__all__:
        entry = page.find(id=f"ftkit.{room}.{name}")
        assert entry is not None, name
        assert entry.find_next_sibling("dd").get_text().strip(), name


def test_each_term_of_the_glossary_leads_to_its_explanation(site: Path, pages: Pages) -> None:
    terms = pages[site / "glossary.html"].select("dl.glossary dt")
    assert len(terms) > 50
    assert [term.get_text() for term in terms if not term.find_next_sibling("dd").find("a")] == []


def test_a_term_is_looked_up_where_a_lesson_explains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "extensions")
    lessons = importlib.import_module("lessons")
    cells = [
        "# A lesson\n\nIt has a head, a probe, a seed.",
        "## First\n\nA seed, and a *probe*, in one\nbatch.",
        "### Then\n\nThe **seed** is 3.\n\n**1. The batch.**",
        "## What is a probe?\n\nNo head.",
        "## Further reading\n\nOn *dropout*.",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "01_lesson.ipynb")
    expected = {
        "seed": "Then",  # bold
        "Probe": "What is a probe?",  # a heading
        "batch": "First",  # the bold title of an exercise does not count
        "one batch": "First",
        "head": "What is a probe?",  # the introduction does not count
        "dropout": None,
        "ee": None,
    }
    assert {term: lessons._section(tmp_path / "01_lesson.ipynb", term) for term in expected} == expected
