"""How a setting is declared, checked and refused.

The `parameters` cell, the control panel, the options of ``ftkit run`` and the header of the report come from it.
"""

import ast
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ftkit import TIERS
from ftkit.data.assets import registry
from ftkit.errors import SettingsError, nearest

LINE_LENGTH = 96  # of notebook cells


@dataclass(frozen=True)
class Parameter:
    """One setting, for those who show it.

    Attributes:
        name: of the field.
        kind: float, int, bool, str or list.
        help: one line.
        unit: what it is counted in, "" where it has none.
        low, high: bounds, themselves allowed; None where there is none.
        choices: all values it can have; empty where that is no short list.
        log: whether steps of it are factors.
        defaults: value at each tier.
    """

    name: str
    kind: str
    help: str
    unit: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    log: bool
    defaults: Mapping[str, Any]

    @property
    def allowed(self) -> str:
        """The bounds or the choices in words; "" where anything of the kind goes."""
        if self.choices:
            return ", ".join(self.choices)
        if self.kind == "bool":
            return "True, False"
        return "" if self.low is None else f"{in_words(self.low)} to {in_words(self.high)}"

    @property
    def allowed_units(self) -> str:
        """The same with the unit."""
        return f"{self.allowed} {self.unit}".strip()


def setting(
    help: str,
    cpu: Any,
    *,
    smoke: Any = ...,
    gpu: Any = ...,
    between: tuple[float, float] | None = None,
    unit: str = "",
    log: bool = False,
) -> Any:
    """A field of a settings class.

    Args:
        help: one line.
        cpu, smoke, gpu: default at each tier; that of cpu where another is not given.
        between: bounds, themselves allowed; of each item where it is a list.
        unit: what it is counted in.
        log: whether steps of it are factors, as for rates.
    """
    defaults = {"smoke": cpu if smoke is ... else smoke, "cpu": cpu, "gpu": cpu if gpu is ... else gpu}
    low, high = between or (None, None)
    extra = {"unit": unit, "low": low, "high": high, "log": log, "defaults": defaults}
    bounds = {} if between is None or isinstance(cpu, list) else {"ge": low, "le": high}
    return Field(description=help, json_schema_extra=extra, **bounds)


class NotebookSettings(BaseModel):
    """What all notebooks share: a tier picks the defaults, a value that is given wins.

    Attributes:
        NOTEBOOK: name of the notebook.
        PANEL: the settings that its control panel has, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
    NOTEBOOK: ClassVar[str]
    PANEL: ClassVar[tuple[str, ...]]

    tier: Literal["smoke", "cpu", "gpu"] = setting("picks the value of whatever is None below", "cpu")

    @property
    def seeds(self) -> list[int]:
        """All seeds of the run, where the notebook has a first seed and a number of them."""
        return list(range(self.seed, self.seed + self.num_seeds))

    @field_validator("*")
    @classmethod
    def _items_within_bounds(cls, value: Any, field: ValidationInfo) -> Any:
        parameter = _parameter(cls, field.field_name)
        for item in value if isinstance(value, list) and parameter.low is not None else []:
            if not parameter.low <= item <= parameter.high:
                raise ValueError(f"{in_words(item)} is outside {parameter.allowed}")
        return value

    @classmethod
    def at(cls, tier: str, **given: Any) -> Self:
        """The settings of a tier; a given value that is not None replaces its default.

        Raises:
            SettingsError: no such tier, an unknown name, a value that can't be.
        """
        if tier not in TIERS:
            raise SettingsError(
                f"There is no tier {tier!r}: {_did_you_mean(tier, TIERS)} It can be {', '.join(TIERS)}."
            )
        defaults = {parameter.name: parameter.defaults[tier] for parameter in cls.parameters()}
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls._checked(defaults | chosen | {"tier": tier})

    @classmethod
    def from_cell(cls, namespace: Mapping[str, Any]) -> Self:
        """The settings of a notebook's `parameters` cell: called with ``globals()`` in the cell after it.

        FTKIT_TIER overrides the tier: tools that execute notebooks but pass no parameters (nbval) choose it so.

        Args:
            namespace: holds, under the names of the settings, their values.

        Raises:
            SettingsError: as for ``at``; also an unknown name that papermill was given.
        """
        for name in _injected(namespace.get("In", [])):
            if name not in cls.model_fields:
                raise SettingsError(cls._unknown(name))
        given = {name: namespace.get(name) for name in cls.model_fields}
        return cls.at(**given | {"tier": os.environ.get("FTKIT_TIER", given["tier"])})

    def changed(self, **given: Any) -> Self:
        """These settings with other values; checked, unlike ``model_copy``.

        Raises:
            SettingsError: as for ``at``.
        """
        return self._checked(self.model_dump() | given)

    def differing(self) -> dict[str, tuple[Any, Any]]:
        """What is not the default of the tier: name to (default, value)."""
        pairs = {p.name: (p.defaults[self.tier], getattr(self, p.name)) for p in self.parameters()[1:]}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """Every setting, in the order of the `parameters` cell."""
        return [_parameter(cls, name) for name in cls.model_fields]

    @classmethod
    def parameters_cell(cls) -> str:
        """Source of the notebook's `parameters` cell."""
        lines = ['tier: str = "cpu"  # smoke, cpu or gpu: picks the value of whatever is None below']
        for parameter in cls.parameters()[1:]:
            line = f"{parameter.name}: {parameter.kind} | None = None  # {parameter.help}"
            default = parameter.defaults["cpu"]
            for note in (parameter.allowed, "" if default is None else f"at cpu {in_words(default)}"):
                line += f"; {note}" if note and len(f"{line}; {note}") <= LINE_LENGTH else ""
            lines.append(line)
        return "\n".join(lines)

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> Self:
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(cls._refusal(error.errors()[0])) from None

    @classmethod
    def _refusal(cls, error: Mapping[str, Any]) -> str:
        """pydantic's error as a sentence."""
        name, value = str(error["loc"][0]), error["input"]
        if error["type"] == "extra_forbidden":
            return cls._unknown(name)
        parameter = _parameter(cls, name)
        if error["type"] == "literal_error":
            cure = f"{_did_you_mean(str(value), parameter.choices)} It can be {parameter.allowed}"
        elif error["type"] == "value_error":
            return f"{name}={value!r} can't be: {error['msg'].removeprefix('Value error, ')}."
        else:
            kinds = {"float": "a number", "int": "a whole number", "bool": "true or false"}
            kinds |= {"list": f"a list such as {json.dumps(parameter.defaults['cpu'])}"}
            cure = ", ".join(filter(None, [f"give {kinds.get(parameter.kind, 'a text')}", parameter.allowed]))
        return f"{name}={value!r} can't be: {cure} ({parameter.help})."

    @classmethod
    def _unknown(cls, name: str) -> str:
        names = list(cls.model_fields)
        return f"{cls.NOTEBOOK} has no parameter {name!r}: {_did_you_mean(name, names)} It has {', '.join(names)}."


def in_words(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, bool | str) or value is None:
        return str(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _parameter(cls: type[NotebookSettings], name: str) -> Parameter:
    info = cls.model_fields[name]
    kind = info.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # with None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    kind = "str" if choices else (typing.get_origin(kind) or kind).__name__
    return Parameter(name, kind, info.description, choices=choices, **info.json_schema_extra)


def _injected(history: Sequence[str]) -> list[str]:
    """Names that papermill's cell assigns, if papermill executes this notebook."""
    cells = [source for source in history if re.match(r"# Parameters\n", source)]
    return [
        ast.unparse(statement.targets[0])
        for source in cells[-1:]
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
    ]


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    return f"did you mean {nearest(name, names)!r}?"


def _known_model(name: str) -> str:
    return _named(name, registry.names("text-encoder") + registry.names("language-model"))


def _known_image_model(name: str) -> str:
    return _named(name, [*registry.names("image-encoder"), "small-vit"])


def _known_images(name: str) -> str:
    return _named(name, registry.names("images"))


def _named(name: str, known: list[str]) -> str:
    """One of the known names, a hub id or a folder that is there."""
    if name not in known and "/" not in name and not (name and Path(name).is_dir()):
        raise ValueError(f"{_did_you_mean(name, known)} Give {', '.join(known)}, a folder or a hub id (owner/name)")
    return name


def _known_dataset(name: str) -> str:
    known = registry.names("text-classification")
    if Path(name).is_file():
        raise ValueError("a file of your own is given as data")
    if name not in known and "/" not in name:
        raise ValueError(f"{_did_you_mean(name, known)} Give {', '.join(known)} or a hub id (owner/name)")
    return name


def _source(name: str) -> str:
    return name if Path(name).is_file() else _known_dataset(name)


def _existing_file(name: str) -> str:
    if not Path(name).is_file():
        raise ValueError("there is no such file: give its path, from the current folder or from the root")
    return name


Model = Annotated[str, AfterValidator(_known_model)]

Dataset = Annotated[str, AfterValidator(_known_dataset)]

OwnFile = Annotated[str, AfterValidator(_existing_file)]

Source = Annotated[str, AfterValidator(_source)]  # a data set or a file of the reader's

ImageModel = Annotated[str, AfterValidator(_known_image_model)]

Images = Annotated[str, AfterValidator(_known_images)]  # images with captions
