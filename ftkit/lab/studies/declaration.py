"""The declaration of a recorded study, ``data/studies/NAME.toml``: notebook, parameters, seeds.

A study runs the notebook's own cells tagged `study`, so the record belongs to the code that the lesson shows.
"""

import ast
import csv
import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ftkit.errors import StudyError, did_you_mean
from ftkit.lab.runs.grid import check_size
from ftkit.lab.runs.notebooks import find_notebook
from ftkit.lab.schema import NotebookSettings, in_words
from ftkit.lab.settings import settings_of

STUDIES_FOLDER = Path(__file__).parents[3] / "data" / "studies"

TEXT_COLUMNS = ("ended", "machine", "versions", "revision", "code")  # text even if they look like numbers


class Cell(NamedTuple):
    """A tagged code cell.

    Attributes:
        number: its index among all cells of the notebook.
        source: its source code.
        parameters: whether it is the `parameters` cell.
    """

    number: int
    source: str
    parameters: bool


@dataclass(frozen=True)
class Declaration:
    """Content of a ``NAME.toml``.

    Attributes:
        name: name of the study.
        folder: folder of its files.
        notebook: name of the notebook, or its path relative to ``folder``.
        fixed: values by parameter that hold in every grid that does not vary the parameter.
        base: settings of a run in which nothing is varied.
        rows: the runs, each with the value of every varied parameter and ``seed``; all combinations with the first
            seed come first.
    """

    name: str
    folder: Path
    notebook: str
    fixed: dict[str, Any]
    base: NotebookSettings
    rows: list[dict[str, Any]]

    @property
    def csv(self) -> Path:
        """Path of the recorded rows."""
        return self.folder / f"{self.name}.csv"

    @property
    def varied(self) -> list[str]:
        """Names of the parameters that at least one grid varies."""
        return [name for name in self.rows[0] if name != "seed"]

    @cached_property
    def cells(self) -> list[Cell]:
        """The notebook's cells tagged `parameters` or `study`, from top to bottom.

        Raises:
            FileNotFoundError: there is no such notebook.
            StudyError: the notebook has no cell tagged `study`, or not exactly one tagged `parameters`.
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
            raise StudyError(
                f"{path.name} lacks the tags of a study: tag one cell `parameters`, and those that train `study`."
            )
        return tagged

    @cached_property
    def code(self) -> str:
        """Digest of the tagged cells' code, without comments and spaces, and of the fixed values."""
        # A recorded study stays valid after changes that cannot affect its numbers: new parameters (the fixed values
        # take the place of that cell), imports that only other cells use, and a move of a name within ftkit (a public
        # name exists only once there).
        trees = [ast.parse(cell.source) for cell in self.cells if not cell.parameters]
        used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
        shapes = []
        for tree in trees:
            for node in tree.body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    node.names = [name for name in node.names if (name.asname or name.name.partition(".")[0]) in used]
            ours = [node for node in tree.body if isinstance(node, ast.ImportFrom) and _imports_ftkit(node)]
            bound = sorted([name.name, name.asname or name.name] for node in ours for name in node.names)
            tree.body = [node for node in tree.body if node not in ours and getattr(node, "names", True)]
            shapes.append([bound, _shape(tree)])
        values = self.base.model_dump(mode="json", include={"tier", *self.fixed} - set(self.varied))
        return hashlib.sha256(json.dumps([shapes, values], sort_keys=True).encode()).hexdigest()[:10]

    def key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Key of a row: the texts of its varied parameters and seed, as in the CSV."""
        return tuple(str(row[name]) for name in self.rows[0])

    def having(self, **values: Any) -> list[dict[str, Any]]:
        """Select the declared rows with given values.

        Args:
            values: a value or a list of values by varied parameter, or by ``seed``.

        Raises:
            ValueError: the study does not vary such a parameter, or has no row with the value.
        """
        rows = self.rows
        for name, wanted in values.items():
            if name not in rows[0]:
                hint = f"{did_you_mean(name, self.rows[0])} It varies {', '.join(self.rows[0])}"
                raise ValueError(f"The study {self.name} does not vary {name!r}: {hint}.")
            declared = list(dict.fromkeys(row[name] for row in self.rows))
            for value in several(wanted):
                if value not in declared:
                    raise ValueError(f"The study {self.name} has no {name}={value!r}: it has {in_words(declared)}.")
            rows = [row for row in rows if row[name] in several(wanted)]
        return rows

    def recorded(self) -> dict[tuple[str, ...], dict[str, str]]:
        """Read the rows of the CSV as texts, by their keys.

        Raises:
            StudyError: the file has no column for a parameter that the study varies.
        """
        if not self.csv.exists():
            return {}
        with self.csv.open(encoding="utf-8", newline="") as lines:
            try:
                return {self.key(row): row for row in csv.DictReader(lines)}
            except KeyError as name:
                cure = "move or delete the file and run the study again"
                raise StudyError(f"{self.csv.name} has no column {name}, which the study varies: {cure}.") from None


def read_declaration(name: str, folder: Path = STUDIES_FOLDER) -> Declaration:
    """Read ``NAME.toml`` and check every combination of its parameters.

    Args:
        name: name of the study.
        folder: folder of the file.

    Raises:
        FileNotFoundError: there is no such study; the message suggests the nearest name.
        StudyError: the file does not declare a study.
        SettingsError: a parameter is unknown or a value is not allowed.
        ValueError: these are too many runs.
    """
    file = folder / f"{name}.toml"
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.toml"))
        hint = f"{did_you_mean(name, known)} The studies are {', '.join(known)}" if known else f"declare it in {file}"
        raise FileNotFoundError(f"There is no study {name!r}: {hint}.")
    try:
        declared = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{file.name} is not valid TOML: {error}.") from None
    if set(declared) != {"notebook", "tier", "seeds", "parameters", "grid"}:
        raise StudyError(
            f"{file.name} has {', '.join(declared)}: give exactly notebook, tier, seeds, [parameters] and [[grid]]."
        )
    tier, fixed, grids, seeds = (declared[part] for part in ("tier", "parameters", "grid", "seeds"))
    lists = (
        [seeds, *itertools.chain.from_iterable(grid.values() for grid in grids)]
        if isinstance(grids, list) and grids
        else []
    )
    if not lists or not all(isinstance(values, list) and values for values in lists):
        raise StudyError(f"{file.name} has no values to run: give `seeds` and every parameter of a [[grid]] as a list.")
    if {"tier", "seed"} & {*fixed, *itertools.chain(*grids)}:
        raise StudyError(f"{file.name} has `tier` or `seed` as a parameter: give tier and seeds at the top.")
    schema = settings_of(declared["notebook"])
    if schema is None:
        raise StudyError(f"{file.name} names {declared['notebook']!r}, which has no settings class: name one that has.")
    check_size(len(seeds) * sum(math.prod(map(len, grid.values())) for grid in grids))
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
    """Turn a value, or a list, tuple or range of values, into a list."""
    return list(value) if isinstance(value, list | tuple | range) else [value]


def _imports_ftkit(node: ast.ImportFrom) -> bool:
    return (node.module or "").partition(".")[0] == "ftkit"


def _shape(node: Any) -> Any:
    """Convert a syntax tree to plain JSON without empty fields, so that it is the same in all versions of Python."""
    if isinstance(node, ast.AST):
        fields = {name: _shape(value) for name, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, fields]
    return [_shape(item) for item in node] if isinstance(node, list) else repr(node)
