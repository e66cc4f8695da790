"""The reference: a page for each room with what its door offers, and for each module that is imported by itself."""

import importlib
import re
from pathlib import Path

from lessons import write_pages
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer

import ftkit

PACKAGE = Path(ftkit.__file__).parent


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what this file adds to Sphinx."""
    app.connect("config-inited", _write_pages)
    app.connect("autodoc-process-docstring", _describe_constant)
    app.connect("autodoc-process-docstring", _describe_settings)
    app.connect("autodoc-process-signature", _shorten_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write_pages(app: Sphinx, config: Config) -> None:
    pages = {}
    for door in sorted(PACKAGE.glob("*/__init__.py")):
        room = door.parent
        pages[f"{room.name}.md"] = _page(f"ftkit.{room.name}")
        if (room / "plots.py").exists():
            pages[f"{room.name}.plots.md"] = _page(f"ftkit.{room.name}.plots")
    for module in ("drawings", "errors", "metrics", "plots"):
        pages[f"{module}.md"] = _page(f"ftkit.{module}")
    write_pages(Path(app.srcdir) / "reference", pages)


def _page(module: str) -> str:
    loaded = importlib.import_module(module)
    # autodoc passes over constants, for they have no docstring
    constants = [name for name in getattr(loaded, "__all__", []) if not callable(getattr(loaded, name))]
    return "\n".join(
        [
            f"# {module}",
            "",
            "```{eval-rst}",
            f".. automodule:: {module}",
            "   :members:",
            *(f"\n.. autodata:: {module}.{name}" for name in constants),
            "```",
            "",
        ]
    )


def _describe_constant(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Take the description of a constant that a door offers from the ``#:`` comment in the file that defines it."""
    if what != "data":
        return
    lines.clear()  # the docstring of its type
    module, _, constant = name.rpartition(".")
    for path in (PACKAGE.parent / module.replace(".", "/")).glob("*.py"):
        try:
            comments = ModuleAnalyzer.for_module(f"{module}.{path.stem}").find_attr_docs()
        except PycodeError:
            continue
        if ("", constant) in comments:
            lines[:] = comments["", constant]


def _describe_settings(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Take the description of each setting from its declaration."""
    if _are_settings(value):
        lines.append("")
        for field, info in value.model_fields.items():  # a setting of a notebook has a default for each tier instead
            default = "" if info.is_required() else f"; default ``{info.default!r}``"
            lines.append(f":param {field}: {info.description}{default}")


def _shorten_signature(
    app: Sphinx, what: str, name: str, value: object, options: object, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Leave the types of settings out, for they are long, and the modules of all other types."""
    if _are_settings(value):
        return "(**settings)", None
    return signature and re.sub(r"~(\w+\.)+", "", signature), returned


def _are_settings(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
