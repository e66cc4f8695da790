"""The house: rooms of few modules, imports that only point down, and one home for each public name."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ftkit"
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
DOORS = [room for room in ROOMS if "lazy_loader" in (room / "__init__.py").read_text(encoding="utf-8")]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def public_names(path: Path) -> list[str]:
    """What a module defines at its top level without an underscore."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_holds_ten_modules_at_most(room: Path) -> None:
    assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= 10


def test_a_public_name_exists_once() -> None:
    homes = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            for name in set(public_names(path)):
                homes[name].append(module_name(path))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_a_public_name_is_offered_by_one_door_and_is_there() -> None:
    offered = defaultdict(list)
    for room in DOORS:
        door = importlib.import_module(module_name(room))
        for name in door.__all__:
            offered[name].append(room.name)
            assert getattr(door, name).__module__ if callable(getattr(door, name)) else True
    assert {name: doors for name, doors in offered.items() if len(doors) > 1} == {}


def test_imports_point_down_only() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "statement", "contract"),
    [
        ("training/losses.py", "from ftkit.adapters.lora import add_lora", "rooms BROKEN"),
        ("models/device.py", "from ftkit.lab import settings", "rooms BROKEN"),
        (
            "training/state.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ftkit.training.loop import fit",
            "no circles BROKEN",
        ),
        ("lab/schema.py", "from ftkit.lab.runs import notebooks", "lab BROKEN"),
    ],
)
def test_an_import_that_points_up_is_noticed(tmp_path: Path, file: str, statement: str, contract: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "ftkit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    module = tmp_path / "ftkit" / file
    module.write_text(module.read_text(encoding="utf-8") + f"\n{statement}\n", encoding="utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert contract in done.stdout
