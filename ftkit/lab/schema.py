"""Declare and check the settings of a notebook.

The `parameters` cell, the control panel, the options of ``ftkit run`` and the summary of the report are built from
these declarations.
"""

import ast
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ftkit import TIERS
from ftkit.data.assets import registry
from ftkit.errors import SettingsError, bad_value, did_you_mean, unknown_setting

_LINE_LENGTH = 96  # characters in a line of a notebook cell


@dataclass(frozen=True)
class Parameter:
    """One setting, as the panel, the command line and the report describe it.

    Attributes:
        name: name of the field.
        kind: float, int, bool, str or list.
        help: description in one line.
        unit: unit of the value, "" if it has none.
        low, high: smallest and largest allowed value, None if there are no bounds.
        choices: all allowed values; empty if any value of the kind is allowed.
        log: whether a control changes it by factors rather than by equal steps.
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
        """The bounds or the choices in words; "" if any value of the kind is allowed."""
        if self.choices:
            return ", ".join(self.choices)
        if self.kind == "bool":
            return "True, False"
        return "" if self.low is None else f"{in_words(self.low)} to {in_words(self.high)}"

    @property
    def allowed_units(self) -> str:
        """The bounds or the choices in words, followed by the unit."""
        return f"{self.allowed} {self.unit}".strip()


def setting(
    help: str,
    cpu: Any,
    *,
    smoke: Any = ...,
    gpu: Any = ...,
    between: tuple[float, float] | None = None,
    times: int = 1,
    unit: str = "",
    log: bool = False,
) -> Any:
    """Declare a field of a settings class.

    Args:
        help: description in one line.
        cpu, smoke, gpu: default at each tier; smoke and gpu take that of cpu if they are not given.
        between: smallest and largest allowed value; for a list, of each item.
        times: up to this multiple of the largest value is allowed to the lesson itself, in ``changed``.
        unit: unit of the value.
        log: whether a control changes it by factors rather than by equal steps, as for learning rates.
    """
    defaults = {"smoke": cpu if smoke is ... else smoke, "cpu": cpu, "gpu": cpu if gpu is ... else gpu}
    low, high = between or (None, None)
    extra = {"unit": unit, "low": low, "high": high, "log": log, "defaults": defaults}
    bounds = {} if between is None or isinstance(cpu, list) else {"ge": low, "le": high * times}
    return Field(description=help, json_schema_extra=extra, **bounds)


class NotebookSettings(BaseModel):
    """Base of all settings classes: the tier picks the defaults, and a given value replaces its default.

    Attributes:
        NOTEBOOK: name of the notebook.
        PANEL: names of the settings that its control panel shows, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
    NOTEBOOK: ClassVar[str]
    PANEL: ClassVar[tuple[str, ...]]

    tier: Literal["smoke", "cpu", "gpu"] = setting("picks the default of every parameter that is None", "cpu")

    @property
    def seeds(self) -> list[int]:
        """All seeds of the run, for a notebook with the settings ``seed`` and ``num_seeds``."""
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
        """Build the settings of a tier.

        Args:
            tier: smoke, cpu or gpu.
            given: values that replace defaults; None keeps the default.

        Raises:
            SettingsError: the tier or a name is unknown, or a value is not allowed.
        """
        if tier not in TIERS:
            raise SettingsError(
                f"There is no tier {tier!r}: {did_you_mean(tier, TIERS)} The tiers are {', '.join(TIERS)}."
            )
        defaults = {parameter.name: parameter.defaults[tier] for parameter in cls.parameters()}
        chosen = {name: value for name, value in given.items() if value is not None}
        settings = cls._checked(defaults | chosen | {"tier": tier})
        for parameter in cls.parameters():
            value = getattr(settings, parameter.name)
            if parameter.high is not None and isinstance(value, int | float) and value > parameter.high:
                raise SettingsError(cls._message({"loc": [parameter.name], "input": value, "type": "less_than_equal"}))
        return settings

    @classmethod
    def from_cell(cls, namespace: Mapping[str, Any]) -> Self:
        """Read the settings from a notebook's `parameters` cell; call it with ``globals()`` in the next cell.

        The environment variable FTKIT_TIER overrides the tier. It is meant for tools that execute notebooks but cannot
        pass parameters, such as nbval. From then on the notebook shows dollar signs in tables of pandas as they are.

        Args:
            namespace: values by name of the setting; other names are ignored.

        Raises:
            SettingsError: as for ``at``, and if papermill was given an unknown name, or a value that was set again.
        """
        for name, value in _injected(namespace.get("In", [])).items():
            if name not in cls.model_fields:
                raise SettingsError(cls._unknown(name))
            if value is not ... and namespace.get(name) != value:
                raise SettingsError(
                    f"{name} was given as {value!r}, but it is {namespace.get(name)!r} here: set it in no other cell, "
                    "and tag only one cell `parameters`."
                )
        import pandas as pd  # takes half a second, which a terminal need not wait

        pd.options.display.html.use_mathjax = False  # the names of classes may have dollar signs
        given = {name: namespace.get(name) for name in cls.model_fields}
        return cls.at(**given | {"tier": os.environ.get("FTKIT_TIER", given["tier"])})

    def changed(self, **given: Any) -> Self:
        """Copy these settings with other values; unlike ``model_copy`` this checks them.

        Raises:
            SettingsError: as for ``at``.
        """
        return self._checked(self.model_dump() | given)

    def differing(self) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from the default of their tier, as name to (default, value)."""
        pairs = {p.name: (p.defaults[self.tier], getattr(self, p.name)) for p in self.parameters()[1:]}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """All settings, in the order of the `parameters` cell."""
        return [_parameter(cls, name) for name in cls.model_fields]

    @classmethod
    def parameters_cell(cls) -> str:
        """Source code of the notebook's `parameters` cell."""
        lines = ['tier: str = "cpu"  # smoke, cpu or gpu: picks the default of every parameter that is None']
        for parameter in cls.parameters()[1:]:
            line = f"{parameter.name}: {parameter.kind} | None = None  # {parameter.help}"
            default = parameter.defaults["cpu"]
            for note in (parameter.allowed, "" if default is None else f"at cpu {in_words(default)}"):
                line += f"; {note}" if note and len(f"{line}; {note}") <= _LINE_LENGTH else ""
            lines.append(line)
        return "\n".join(lines)

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> Self:
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(cls._message(error.errors()[0])) from None

    @classmethod
    def _message(cls, error: Mapping[str, Any]) -> str:
        """Turn one of pydantic's errors into a sentence."""
        if not error["loc"]:  # of a check of several settings at once
            return error["msg"].removeprefix("Value error, ")
        name, value = str(error["loc"][0]), error["input"]
        if error["type"] == "extra_forbidden":
            return cls._unknown(name)
        parameter = _parameter(cls, name)
        if error["type"] == "value_error":
            return f"{name}={value!r} is not allowed: {error['msg'].removeprefix('Value error, ')}."
        kind, allowed = parameter.kind, f"from {parameter.allowed}" if parameter.low is not None else ""
        if kind == "list":
            kind = f"a list such as {json.dumps(parameter.defaults['cpu'])}{', each item' if allowed else ''}"
        choices = parameter.choices if error["type"] == "literal_error" else ()
        return bad_value(name, value, parameter.help, kind=kind, allowed=allowed, choices=choices)

    @classmethod
    def _unknown(cls, name: str) -> str:
        return unknown_setting(cls.NOTEBOOK, name, list(cls.model_fields))


def in_words(value: Any) -> str:
    """Write a value as people do: thousands separated by commas, items of a list by commas and spaces."""
    if isinstance(value, bool | str) or value is None:
        return str(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _parameter(cls: type[NotebookSettings], name: str) -> Parameter:
    info = cls.model_fields[name]
    kind = info.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    kind = "str" if choices else (typing.get_origin(kind) or kind).__name__
    return Parameter(name, kind, info.description, choices=choices, **info.json_schema_extra)


def _injected(history: Sequence[str]) -> dict[str, Any]:
    """What papermill was given, by name, if it executes this notebook; ``...`` for a value that is not a literal."""
    given = {}
    for source in [source for source in history if re.match(r"# Parameters\n", source)][-1:]:
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Assign):
                try:
                    value = ast.literal_eval(statement.value)
                except ValueError:  # such as float("nan")
                    value = ...
                given[ast.unparse(statement.targets[0])] = value
    return given


def _known_model(name: str) -> str:
    return _named(name, registry.names("text-encoder") + registry.names("language-model"))


def _known_image_model(name: str) -> str:
    return _named(name, [*registry.names("image-encoder"), "small-vit"])


def _known_images(name: str) -> str:
    return _named(name, registry.names("images"))


def _named(name: str, known: list[str]) -> str:
    """Check that a name is one of the known names, a hub id or an existing folder."""
    if name in known or registry.HUB_ID.fullmatch(name) or (name and Path(name).is_dir()):
        return name
    raise ValueError(f"{_near(name, known, 'folder')} {', '.join(known)}, a folder or a hub id (owner/name)")


def _near(name: str, known: list[str], kind: str) -> str:
    """Begin a sentence on an unknown name: the name it resembles, unless it is the path of a file or folder."""
    if "/" in name or "\\" in name:
        return f"there is no such {kind}: give"
    return f"{did_you_mean(name, known)} Give"


def _known_dataset(name: str) -> str:
    known = registry.names("text-classification")
    if Path(name).is_file():
        raise ValueError("give a file of your own as `data`")
    if name not in known and not registry.HUB_ID.fullmatch(name):
        raise ValueError(f"{_near(name, known, 'file')} {', '.join(known)} or a hub id (owner/name)")
    return name


def _source(name: str) -> str:
    return name if Path(name).is_file() else _known_dataset(name)


def _existing_file(name: str) -> str:
    if not Path(name).is_file():
        raise ValueError("there is no such file, give an absolute path or one relative to the current folder")
    return name


Model = Annotated[str, AfterValidator(_known_model)]

Dataset = Annotated[str, AfterValidator(_known_dataset)]

OwnFile = Annotated[str, AfterValidator(_existing_file)]

Source = Annotated[str, AfterValidator(_source)]  # a data set or the reader's own file

ImageModel = Annotated[str, AfterValidator(_known_image_model)]

Images = Annotated[str, AfterValidator(_known_images)]  # images with captions
