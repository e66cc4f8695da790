"""What a newcomer installs and reads first: versions that agree, imports that are declared, documents that are true.

Each check takes a folder and returns the problems it finds, so that it is tried on damaged copies too.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import ftkit

ROOT = Path(__file__).parents[1]
CUDA = re.compile(r"(nvidia|cuda|triton)\b")  # brought by torch's CUDA build, which fits them to itself
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def read(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


def declared(folder: Path, *extras: str) -> list[Requirement]:
    project = tomllib.loads(read(folder, "pyproject.toml"))["project"]
    optional = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in project["dependencies"] + optional]


def pins(folder: Path) -> dict[str, Version]:
    """What the lock installs on this Python and system."""
    lines = map(Requirement, read(folder, "requirements.lock").splitlines())
    here = [line for line in lines if line.marker is None or line.marker.evaluate()]
    return {canonicalize_name(line.name): Version(str(line.specifier).removeprefix("==")) for line in here}


def needs(name: str, extra: str) -> list[Requirement]:
    """What an installed distribution requires here, for one of its extras or (extra "") without any."""
    found = map(Requirement, metadata.requires(name) or [])
    return [line for line in found if line.marker is None or line.marker.evaluate({"extra": extra})]


def check_lock(folder: Path) -> list[str]:
    """The lock pins, within their ranges, what pyproject.toml declares and all that it needs in turn; nothing else."""
    pinned, problems, seen = pins(folder), [], set()
    queue = [("pyproject.toml", line) for line in declared(folder, "dev")]
    while queue:
        user, line = queue.pop()
        name = canonicalize_name(line.name)
        if CUDA.match(name):
            continue
        if name not in pinned:
            problems.append(f"{user} needs {name}, which is not pinned")
            continue
        if not line.specifier.contains(pinned[name], prereleases=True):
            problems.append(f"{user} needs {name}{line.specifier}, but {pinned[name]} is pinned")
        for extra in {"", *line.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += [(name, line) for line in needs(name, extra)]
    reached = {name for name, _ in seen}
    problems += [f"{name} is pinned, but nothing needs it" for name in sorted(pinned.keys() - reached)]
    problems += [f"{name} must not be needed" for name in ("torchaudio", "torchvision") if name in reached]
    return problems + ([] if pinned["torch"] == Version("2.13.0") else [f"torch is pinned at {pinned['torch']}"])


def check_environment(folder: Path) -> list[str]:
    """environment.yml takes a Python that will do and pip from conda, and everything else from the lock."""
    *from_conda, from_pip = yaml.safe_load(read(folder, "environment.yml"))["dependencies"]
    wanted = SpecifierSet(tomllib.loads(read(folder, "pyproject.toml"))["project"]["requires-python"])
    version = dict(line.partition("=")[::2] for line in from_conda).get("python", "")
    problems = [] if version and wanted.contains(version) else [f"Python {version or 'of any version'}, not {wanted}"]
    if [line.partition("=")[0] for line in from_conda] != ["python", "pip"]:
        problems.append(f"conda installs {from_conda}")
    if from_pip != {"pip": ["-r requirements.lock", "-e ."]}:
        problems.append(f"pip installs {from_pip}")
    return problems


def check_imports(folder: Path) -> list[str]:
    """Every import of the package, also those inside functions, is of the standard library or of what is declared."""
    providers = metadata.packages_distributions()
    optional = tomllib.loads(read(folder, "pyproject.toml"))["project"]["optional-dependencies"].keys() - {"dev"}
    dependencies = {canonicalize_name(line.name) for line in declared(folder, *optional)}
    problems = []
    for path in sorted((folder / "ftkit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"ftkit"}:
                if not dependencies & {canonicalize_name(name) for name in providers.get(module, [])}:
                    problems.append(f"{path.name}, line {node.lineno}: {module} is not declared in pyproject.toml")
    return problems


def check_citation(folder: Path) -> list[str]:
    citation = yaml.safe_load(read(folder, "CITATION.cff"))
    project = tomllib.loads(read(folder, "pyproject.toml"))["project"]
    facts = {
        "cff-version": "1.2.0",
        "version": ftkit.__version__,
        "license": project["license"],
        "authors": project["authors"],
    }
    problems = [f"{key} is {citation.get(key)}, not {fact}" for key, fact in facts.items() if citation.get(key) != fact]
    return problems + [f"{key} is missing" for key in ("message", "title") if not citation.get(key)]


def code_of(folder: Path) -> str:
    """All that the documents set as code, inline or in blocks."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", "\n".join(read(folder, name) for name in DOCUMENTS), re.DOTALL))


def check_documents(folder: Path) -> list[str]:
    """Links lead somewhere; the README names every notebook and room; targets, variables and imports exist."""
    links = {name: set(re.findall(r"\]\((?!https?:|#)([^)#]+)", read(folder, name))) for name in DOCUMENTS}
    problems = [f"{name} links to {link}" for name in DOCUMENTS for link in links[name] if not (folder / link).exists()]
    for path in folder.glob("notebooks/*.ipynb"):
        if path.relative_to(folder).as_posix() not in links["README.md"]:
            problems.append(f"README.md does not link to {path.name}")
    tree = read(folder, "README.md").partition("```\nftkit/\n")[2].partition("```")[0]
    rooms = [path.parent for path in folder.glob("ftkit/*/__init__.py")]
    problems += [f"the tree of README.md lacks {room.name}/" for room in rooms if f" {room.name}/" not in tree]
    code = code_of(folder)
    targets = re.findall(r"^([a-z]+):", read(folder, "Makefile"), re.MULTILINE)
    problems += [f"there is no make {name}" for name in re.findall(r"\bmake ([a-z]+)", code) if name not in targets]
    source = "".join(path.read_text(encoding="utf-8") for path in (folder / "ftkit").rglob("*.py"))
    problems += [f"nothing reads {name}" for name in re.findall(r"FTKIT_\w+", code) if f'"{name}"' not in source]
    for statement in re.findall(r"^from ftkit.*", code, re.MULTILINE):
        try:
            exec(statement, {})
        except ImportError as error:
            problems.append(str(error))
    return problems


def check_commands(folder: Path) -> list[str]:
    """Each sub-command of ftkit that the documents name exists, and has the options that they give it."""
    problems = []
    used = re.findall(r"\bftkit +([a-z]+)([^`\n#;]*)", code_of(folder))
    for name in sorted({name for name, _ in used}):
        command = [sys.executable, "-m", "ftkit.cli", name, "--help"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if not answer.startswith(f"usage: ftkit {name}"):
            problems.append(f"there is no ftkit {name}")
        options = {option for other, rest in used if other == name for option in re.findall(r"(?<=\s)--?[a-z]+", rest)}
        problems += [f"ftkit {name} has no {o}" for o in sorted(options) if not re.search(rf"(?<!\S){o}\b", answer)]
    return problems


CHECKS = (check_lock, check_environment, check_imports, check_citation, check_documents, check_commands)
DAMAGES = [
    (check_lock, "requirements.lock", "tokenizers==0.", "unneeded==0.", "transformers needs tokenizers"),
    (check_lock, "requirements.lock", "tokenizers==0.", "unneeded==0.", "unneeded is pinned, but nothing needs it"),
    (check_lock, "requirements.lock", "peft==0.21", "peft==0.20", "pyproject.toml needs peft"),
    (check_lock, "requirements.lock", "ruff==", "ruff==0.0.", "pyproject.toml needs ruff"),
    (check_lock, "requirements.lock", "huggingface-hub==", "huggingface-hub==0.", "transformers needs huggingface-hub"),
    (check_lock, "requirements.lock", "torch==2.13.0", "torch==2.13.1", "torch is pinned at 2.13.1"),
    (check_lock, "pyproject.toml", '"psutil>=7"', '"torchvision"', "torchvision"),
    (check_lock, "pyproject.toml", '"psutil>=7"', '"psutil>=7000"', "needs psutil>=7000"),
    (check_environment, "environment.yml", "python=3.11", "python=3.10", "Python 3.10"),
    (check_environment, "environment.yml", "python=3.11", "python", "Python of any version"),
    (check_environment, "environment.yml", "  - pip\n", "  - pip\n  - numpy\n", "conda installs"),
    (check_environment, "environment.yml", "- -e .", "- -e .\n      - torchvision", "pip installs"),
    (check_imports, "pyproject.toml", '"psutil>=7"', '"emoji"', "psutil is not declared"),
    (check_imports, "ftkit/training/monitor.py", "import time\n", "import time, pytest\n", "line 8: pytest"),
    (check_imports, "ftkit/training/monitor.py", "return self", "from nowhere.at import all; return self", "nowhere"),
    (check_citation, "CITATION.cff", ftkit.__version__, "9.9", "version is 9.9"),
    (check_citation, "CITATION.cff", "message:", "note:", "message is missing"),
    (check_documents, "README.md", "(CONTRIBUTING.md)", "(HELPING.md)", "links to HELPING.md"),
    (check_documents, "README.md", "/02_freezing.ipynb)", "/02.ipynb)", "does not link to 02_freezing.ipynb"),
    (check_documents, "README.md", "  continual/", "  kontinual/", "lacks continual/"),
    (check_documents, "README.md", "make lab", "make cake", "no make cake"),
    (check_documents, "README.md", "FTKIT_OFFLINE", "FTKIT_OFFLIN", "nothing reads FTKIT_OFFLIN"),
    (check_documents, "README.md", "import load_classifier", "import load_pianist", "load_pianist"),
    (check_commands, "README.md", "ftkit assets ", "ftkit liabilities ", "no ftkit liabilities"),
    (check_commands, "README.md", "-p lr=3e-4", "--speed 3e-4", "ftkit run has no --speed"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_repository_has_no_problem(check: Callable[[Path], list[str]]) -> None:
    problems = check(ROOT)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("check", "file", "old", "new", "problem"), DAMAGES)
def test_check_notices_damage(
    tmp_path: Path, check: Callable[[Path], list[str]], file: str, old: str, new: str, problem: str
) -> None:
    for name in ("pyproject.toml", "requirements.lock", "environment.yml", "CITATION.cff", "Makefile", *DOCUMENTS):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "ftkit", tmp_path / "ftkit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "notebooks").mkdir()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        (tmp_path / "notebooks" / path.name).touch()
    assert old in read(tmp_path, file)
    (tmp_path / file).write_text(read(tmp_path, file).replace(old, new), encoding="utf-8")
    assert any(problem in found for found in check(tmp_path))
    assert not any(problem in found for found in check(ROOT))


@pytest.mark.parametrize(
    "code",
    ["import ftkit", "import contextlib, ftkit.cli\nwith contextlib.suppress(SystemExit): ftkit.cli.main(['-h'])"],
)
def test_import_and_help_load_no_torch(code: str) -> None:
    code += "\nimport sys; print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert "ftkit" in loaded
    assert not {"torch", "transformers", "datasets", "pandas", "numpy"} & set(loaded)
