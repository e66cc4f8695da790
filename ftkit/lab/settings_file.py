"""Settings in a file, ``settings.yaml``: what ``ftkit run`` ran, and what it runs when the file is given back.

notebook: 01_full_fine_tuning
tier: cpu
parameters:
  rows: 500
grid:  # every combination is a run
  lr: [1e-4, 3e-4]
"""

import ast
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ftkit.errors import SettingsError, did_you_mean
from ftkit.lab.schema import NotebookSettings
from ftkit.lab.settings import settings_of

_KEYS = ("notebook", "tier", "parameters", "grid")

_HEADER = "# Run it with `ftkit run --settings THIS_FILE`; relative paths start at the current folder."
_DEFAULTS = '# A line that begins with "# " has a default: remove the "# " to set another value.'

# YAML 1.1, which many programs still read, takes these words for booleans
_AMBIGUOUS = re.compile(r"yes|no|on|off", re.IGNORECASE)


@dataclass(frozen=True)
class SettingsFile:
    """Content of a settings file.

    Attributes:
        path: the file.
        notebook: name or path of the notebook, None if the file has none.
        tier: smoke, cpu or gpu, None if the file has none.
        parameters: values by name.
        grid: for each parameter that varies its values, or one value or text that stands for them as with ``-p``.
    """

    path: Path
    notebook: str | None = None
    tier: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)


def read_settings(path: str | Path) -> SettingsFile:
    """Read a settings file; names and values of its parameters are checked later, as those of ``-p`` are.

    Args:
        path: the file. It is read as YAML 1.2 says, so ``1e-4`` is a number and ``2024-01-01`` is text.

    Raises:
        FileNotFoundError: there is no such file.
        SettingsError: it is no YAML, has a key twice, or is no settings file; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no settings file {path}: write one with `ftkit run NOTEBOOK --save {path.name}`."
        )
    content = _load(path)
    if not isinstance(content, dict) or not content:
        raise SettingsError(f"{path} has no settings: give notebook, tier and parameters, each with a colon after it.")
    for key in content:
        if key not in _KEYS:
            raise SettingsError(
                f"{path} has the key {key!r}: {did_you_mean(key, _KEYS)} Its keys are {', '.join(_KEYS)}; a parameter "
                "stands under parameters, or under grid if it has several values."
            )
    parts = {key: value for key, value in content.items() if value is not None}
    for key in ("parameters", "grid"):
        if not isinstance(parts.get(key, {}), dict):
            raise SettingsError(f"{path} has {key}: {_flow(parts[key])}: write NAME: VALUE below it, further in.")
    for key in ("notebook", "tier"):
        if not isinstance(parts.get(key, ""), str):
            raise SettingsError(f"{path} has {key}: {_flow(parts[key])}: give a name.")
    parameters, grid = parts.get("parameters", {}), parts.get("grid", {})
    for name in grid:
        if name in parameters:
            raise SettingsError(f"{path} has {name} under parameters and under grid: leave it in one of them.")
        if grid[name] in ([], {}, None):
            raise SettingsError(f"{path} has no value for {name} under grid: give a list of values, [A, B].")
    schema = settings_of(parts.get("notebook", ""))
    kinds = {parameter.name: parameter.kind for parameter in schema.parameters()} if schema else {}
    for name, value in parameters.items():
        if isinstance(value, list) and kinds.get(name, "list") != "list":
            raise SettingsError(f"{path} has several values for {name} under parameters: put them under grid.")
    if "tier" in parts and "tier" in {**parameters, **grid}:
        raise SettingsError(f"{path} has tier twice: leave one of them.")
    return SettingsFile(path, parts.get("notebook"), parts.get("tier"), parameters, grid)


def format_settings(
    notebook: str,
    tier: str | None,
    parameters: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    schema: type[NotebookSettings] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Write a settings file as text: what is given and, as a comment, every other known parameter with its default.

    Args:
        notebook: its name, or a path of the notebook.
        tier: smoke, cpu or gpu; None if it varies, as one of ``grid``.
        parameters: given values by name.
        grid: given values by name, for the parameters that vary.
        schema: settings class of the notebook, for help, bounds and defaults.
        defaults: the defaults by name of a notebook without a settings class.

    Returns:
        The text, which `read_settings` reads as what was given.
    """
    described = {parameter.name: parameter for parameter in schema.parameters()} if schema else {}
    if schema:
        defaults = {name: parameter.defaults[tier or "cpu"] for name, parameter in described.items()}
    lines = [_HEADER, *([_DEFAULTS] if defaults else [])]
    lines += [f"notebook: {_scalar(notebook)}", *([f"tier: {tier}"] if tier else [])]

    def entry(name: str, value: str, indent: str) -> str:
        line = f"{indent}{_scalar(name)}: {value}"
        if name not in described:
            return line
        about = described[name]
        return f"{line}  # {about.help}" + (f"; {about.allowed_units}" if about.allowed else "")

    lines.append("parameters:")
    for name in dict.fromkeys([*(defaults or {}), *parameters]):
        if name in parameters:
            lines.append(entry(name, _scalar(parameters[name]), "  "))
        elif name not in {"tier", *(grid or {})}:
            lines.append(entry(name, _scalar(defaults[name]), "  # "))
    if grid:
        lines += ["grid:", *(entry(name, _flow(list(values)), "  ") for name, values in grid.items())]
    return "\n".join(lines) + "\n"


def write_command(notebook: str, tier: str, parameters: Mapping[str, Any]) -> str:
    """Write the command ``ftkit run`` for given parameters, to be copied into a shell."""
    words = ["ftkit", "run", notebook, "--tier", tier]
    for name, value in parameters.items():
        words += ["-p", f"{name}={_argument(value)}"]
    return shlex.join(words)


def _argument(value: Any) -> str:
    """A value as ``-p`` reads it: plain where it stays one text or number, else as JSON."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if re.fullmatch(r"[A-Za-z/~][\w ./~:+-]*", value) and not _is_python(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _is_python(text: str) -> bool:
    """Whether ``-p`` would read a text as something else, such as true or None."""
    for read in (json.loads, ast.literal_eval):
        try:
            read(text)
        except (ValueError, SyntaxError):
            continue
        return True
    return False


def _scalar(value: Any) -> str:
    """A value in one line: a text plain if every version of YAML reads it as itself, everything else as JSON."""
    if isinstance(value, str) and re.fullmatch(r"[\w./~][\w ./~:+-]*", value):
        try:
            if all(yaml.load(f"x: {value}", loader) == {"x": value} for loader in (_Loader, yaml.SafeLoader)):
                return value
        except (yaml.YAMLError, ValueError):  # such as the date 2024-13-01
            pass
    return _flow(value)


def _flow(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, float):  # YAML 1.1 takes 1e-07, without a point, for a text
        return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))
    text = json.dumps(value, ensure_ascii=False, default=str)
    # what YAML does not take even inside quotes: other line ends, control characters, halves of a surrogate pair
    return re.sub(r"[^\t -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u2028\u2029\ufeff]", _escape, text)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


class _Loader(yaml.SafeLoader):
    """Reads the types of YAML 1.2 (which are those of JSON), and refuses keys that are given twice."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012, its base has it as a dictionary, too

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (place, _) in zip(keys, node.value, strict=True):
            if not isinstance(key, str):
                raise _problem(f"the key {key!r} is no name: give a name", place)
            if keys.count(key) > 1:
                raise _problem(f"{key} is given {keys.count(key)} times: leave one of them", place)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        if node.style is None and _AMBIGUOUS.fullmatch(node.value):
            means = "true" if node.value.lower() in ("yes", "on") else "false"
            raise _problem(f'{node.value} may mean {means} or the word: write {means} or "{node.value}"', node)
        return super().construct_scalar(node)


for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})\Z"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))


def _problem(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=text, problem_mark=node.start_mark)


def _load(path: Path) -> Any:
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
        json.dumps(content)
        return content
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        if isinstance(error, yaml.constructor.ConstructorError) and error.context is None and "tag" not in str(error):
            raise SettingsError(f"{where}: {error.problem}.") from None
        raise SettingsError(f"{where}, is not YAML ({error.problem}): write NAME: VALUE, one a line.") from None
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:  # or more than numbers, texts and lists
        reason = getattr(error, "reason", None) or str(error).partition("\n")[0]
        raise SettingsError(f"{path} is not YAML ({reason}): write NAME: VALUE, one a line.") from None
