"""The declaration of a recorded study, ``data/studies/NAME.toml``: notebook, parameters, seeds.

A study runs the notebook's own cells tagged `study`, so that what is recorded is what the lesson shows.
"""

import ast
import csv
import hashlib
import itertools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ftkit.errors import StudyError, nearest
from ftkit.lab.runs.notebooks import find_notebook
from ftkit.lab.schema import NotebookSettings, in_words
from ftkit.lab.settings import settings_of

FOLDER = Path(__file__).parents[3] / "data" / "studies"

TEXTS = ("ended", "machine", "versions", "revision", "code")  # columns that are text even where they look like numbers


class Cell(NamedTuple):
    """A tagged code cell: its place among all cells, its source, whether it is the `parameters` cell."""

    number: int
    source: str
    parameters: bool


@dataclass(frozen=True)
class Declaration:
    """What ``NAME.toml`` declares.

    Attributes:
        name: of the study.
        folder: that its files are in.
        notebook: a name, or a path from that folder.
        fixed: values that it pins, by parameter; those of parameters that grids vary too are theirs where not varied.
        base: the settings where nothing is varied.
        rows: every run: the parameters that grids vary, and ``seed``. First all combinations with the first seed.
    """

    name: str
    folder: Path
    notebook: str
    fixed: dict[str, Any]
    base: NotebookSettings
    rows: list[dict[str, Any]]

    @property
    def csv(self) -> Path:
        """Where the rows are recorded."""
        return self.folder / f"{self.name}.csv"

    @property
    def varied(self) -> list[str]:
        """Parameters that grids vary."""
        return [name for name in self.rows[0] if name != "seed"]

    @cached_property
    def cells(self) -> list[Cell]:
        """The notebook's tagged cells, top to bottom, the `parameters` cell among them.

        Raises:
            FileNotFoundError: no such notebook.
            StudyError: it has no cell tagged `study`, or not one `parameters` cell.
        """
        import nbformat

        beside = self.folder / self.notebook
        path = beside if beside.is_file() else find_notebook(self.notebook)
        tagged = []
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            tags = {"parameters", "study"} & set(cell.metadata.get("tags", []))
            if cell.cell_type == "code" and tags:
                tagged.append(Cell(number, cell.source, "parameters" in tags))
        if sum(cell.parameters for cell in tagged) != 1 or len(tagged) == 1:
            raise StudyError(f"{path.name} can't be studied: tag one cell `parameters`, and those that train `study`.")
        return tagged

    @cached_property
    def code(self) -> str:
        """Digest of what is run: the code of the tagged cells, comments and spaces apart, and the fixed values."""
        # what must not void a study: new parameters (the fixed values stand for that cell), imports for other cells,
        # and where in the kit a name lives, since every public name of the kit exists only once
        trees = [ast.parse(cell.source) for cell in self.cells if not cell.parameters]
        used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
        shapes = []
        for tree in trees:
            for node in tree.body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    node.names = [name for name in node.names if (name.asname or name.name.partition(".")[0]) in used]
            ours = [node for node in tree.body if isinstance(node, ast.ImportFrom) and _of_the_kit(node)]
            bound = sorted([name.name, name.asname or name.name] for node in ours for name in node.names)
            tree.body = [node for node in tree.body if node not in ours and getattr(node, "names", True)]
            shapes.append([bound, _shape(tree)])
        values = self.base.model_dump(mode="json", include={"tier", *self.fixed} - set(self.varied))
        return hashlib.sha256(json.dumps([shapes, values], sort_keys=True).encode()).hexdigest()[:10]

    def key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """What tells a row from the others, as the CSV has it."""
        return tuple(str(row[name]) for name in self.rows[0])

    def having(self, **values: Any) -> list[dict[str, Any]]:
        """The declared rows in which each named parameter (or ``seed``) has the value, or one of the values.

        Raises:
            ValueError: the study varies no such parameter, or has no row with the value.
        """
        rows = self.rows
        for name, wanted in values.items():
            if name not in rows[0]:
                hint = f"did you mean {nearest(name, rows[0])!r}? It varies {', '.join(self.rows[0])}"
                raise ValueError(f"The study {self.name} does not vary {name!r}: {hint}.")
            there = list(dict.fromkeys(row[name] for row in self.rows))
            for value in several(wanted):
                if value not in there:
                    raise ValueError(f"The study {self.name} has no {name}={value!r}: it has {in_words(there)}.")
            rows = [row for row in rows if row[name] in several(wanted)]
        return rows

    def recorded(self) -> dict[tuple[str, ...], dict[str, str]]:
        """The rows of the CSV, as they are written there, by key.

        Raises:
            StudyError: the file lacks a parameter that the study varies.
        """
        if not self.csv.exists():
            return {}
        with self.csv.open(encoding="utf-8", newline="") as lines:
            try:
                return {self.key(row): row for row in csv.DictReader(lines)}
            except KeyError as name:
                cure = "move the file away or delete it, and run the study again"
                raise StudyError(f"{self.csv.name} has no column {name}, which the study varies: {cure}.") from None


def read_declaration(name: str, folder: Path = FOLDER) -> Declaration:
    """Read ``NAME.toml``; every combination of its parameters is checked.

    Raises:
        FileNotFoundError: no such study; the message has the nearest name.
        StudyError: the file does not have the form of a study.
        SettingsError: an unknown parameter, or a value that can't be.
    """
    file = folder / f"{name}.toml"
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.toml"))
        hint = f"did you mean {nearest(name, known)!r}? There is {', '.join(known)}" if known else "there is none here"
        raise FileNotFoundError(f"No study {name!r}: {hint}.")
    try:
        declared = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{file.name} is no TOML: {error}.") from None
    if set(declared) != {"notebook", "tier", "seeds", "parameters", "grid"}:
        raise StudyError(f"{file.name} has {', '.join(declared)}: give notebook, tier, seeds, [parameters], [[grid]].")
    tier, fixed, grids, seeds = (declared[part] for part in ("tier", "parameters", "grid", "seeds"))
    lists = (
        [seeds, *itertools.chain.from_iterable(grid.values() for grid in grids)]
        if isinstance(grids, list) and grids
        else []
    )
    if not lists or not all(isinstance(values, list) and values for values in lists):
        raise StudyError(f"{file.name} has no values to run: give seeds and each parameter of a [[grid]] a list.")
    if {"tier", "seed"} & {*fixed, *itertools.chain(*grids)}:
        raise StudyError(f"{file.name} has tier or seed among the parameters: give tier and seeds at the top.")
    schema = settings_of(declared["notebook"])
    if schema is None:
        raise StudyError(f"{file.name} is about {declared['notebook']!r}, which has no settings: name one that has.")
    combinations = []
    for seed, grid in itertools.product(seeds, grids):
        for values in itertools.product(*grid.values()):
            given = {**fixed, **dict(zip(grid, values, strict=True)), "seed": seed}
            combinations.append(schema.at(tier, **given))
    columns = [*dict.fromkeys(itertools.chain(*grids)), "seed"]
    rows: list[dict[str, Any]] = []
    for settings in combinations:
        row = {column: getattr(settings, column) for column in columns}
        if row not in rows:
            rows.append(row)
    base = schema.at(tier, **fixed, seed=seeds[0])
    return Declaration(name, folder, declared["notebook"], fixed, base, rows)


def several(value: Any) -> list[Any]:
    """A value, or several, as a list."""
    return list(value) if isinstance(value, list | tuple | range) else [value]


def _of_the_kit(node: ast.ImportFrom) -> bool:
    return (node.module or "").partition(".")[0] == "ftkit"


def _shape(node: Any) -> Any:
    """Python's syntax tree as plain JSON, without what is empty, so that it is the same in each version of Python."""
    if isinstance(node, ast.AST):
        fields = {name: _shape(value) for name, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, fields]
    return [_shape(item) for item in node] if isinstance(node, list) else repr(node)
