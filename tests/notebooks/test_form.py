"""The committed notebooks: their form, their exercises, and the results in their outputs."""

import ast
import importlib.util
import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from ftkit.data.assets import registry
from ftkit.lab.course.exercises import all_exercises
from ftkit.lab.runs.notebooks import default_parameters
from ftkit.lab.runs.report import ABSOLUTE_PATH

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.parent.name == "notebooks"]
SECOND_EDITION = [path for path in NOTEBOOKS if path.stem.startswith("01_")]  # those that hold to the new limits
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION.*?### END SOLUTION", re.DOTALL | re.MULTILINE)
# a folder of somebody's machine, a point in time
PRIVATE = re.compile(rf"{ABSOLUTE_PATH.pattern}|\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d")

# Wrong answers that students give, and the words in which the check names the mistake. Those of lesson 01 stand with
# its exercises, in ftkit/lab/course/lessons, and tests/lab/test_course.py tries them.
WRONG = {
    ("02_freezing", "layer-rate"): {
        "return lr * decay**group": "upside down",
        "return lr * decay ** (last - group + 1)": "the head has the full rate",
        "return lr if group == last else lr * decay": "applies twice",
        "return lr * (1 - decay) ** (last - group)": "expected",
        "return lr * decay ** (3 - group)": "count from `last`",
        "pass": "return the rate",
    },
    ("02_freezing", "unfrozen"): {
        "return list(range(min(count, epoch + 1)))": "the top group trains first",
        "return list(range(max(0, count - epoch), count))": "one group trains already",
        "return [max(0, count - 1 - epoch)]": "stays so",
        "return list(range(count - 1 - epoch, count))": "none to add",
        "return list(range(max(0, 2 - epoch), 3))": "more than three groups",
        "pass": "return the groups",
    },
    ("02_freezing", "freeze-blocks"): {
        "for number, block in enumerate(blocks):\n    block.train(number >= k)\n"
        "    block.requires_grad = number >= k": "does nothing",
        "for block in blocks[:k]:\n    block.requires_grad_(False)": "dropout still fires",
        "for block in blocks[:k]:\n    block.eval()": "still train",
        "blocks.eval()\nblocks[:k].requires_grad_(False)": "stays in train mode",
        "blocks.requires_grad_(False)\nblocks[:k].eval()": "the last block is to train",
        "pass": "still train",
    },
    ("03_lora_and_adapters", "lora-weights"): {
        "return sum(rank * inputs * outputs for inputs, outputs in shapes)": "own weights",
        "return sum(rank * inputs for inputs, outputs in shapes)": "A alone",
        "return sum(rank * outputs for inputs, outputs in shapes)": "B alone",
        "return rank * sum(shapes[0])": "every layer",
        "pass": "return the number",
    },
    ("03_lora_and_adapters", "merge"): {
        "return W + B @ A": "scaled",
        "return W + alpha * B @ A": "not alpha",
        "return W + alpha / len(A) * A.T @ B.T": "transposed",
        "return alpha / len(A) * B @ A": "added to W",
        "return W + alpha * len(A) * B @ A": "not the weight",
        "pass": "return the weight",
    },
    ("03_lora_and_adapters", "bottleneck"): {
        "return up(torch.relu(down(x)))": "x itself is missing",
        "return x + up(down(x))": "without the relu",
        "return x + torch.relu(up(down(x)))": "in the middle",
        "pass": "return the output",
    },
    ("03_lora_and_adapters", "share-kept"): {
        "return method / full": "commonest class",
        "return method - majority": "not points",
        "return (full - method) / (full - majority)": "lost",
        "return (full - method) / (full - majority) * 2": "expected",
        "pass": "return the share",
    },
    ("04_prompt_learning", "word-score"): {
        "p = logits.softmax(-1)[torch.arange(len(tokens)), tokens]\nreturn p.sum()": "not probabilities",
        "return logits.softmax(-1)[torch.arange(len(tokens)), tokens].prod()": "its log",
        "return logits[torch.arange(len(tokens)), tokens].sum()": "not yet log-probabilities",
        "return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]": "one number",
        "return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].sum()": "number of tokens",
        "pass": "return the score",
    },
    ("04_prompt_learning", "calibrated"): {
        "return p / p_nothing": "sum to 1",
        "q = p * p_nothing\nreturn q / q.sum(axis=1, keepdims=True)": "divide",
        "return p - p_nothing": "subtracted",
        "q = p / p_nothing\nreturn q / q.sum(axis=1)": "keepdims",
        "q = p / p_nothing\nreturn q / q.sum(axis=0)": "not each column",
        "return p": "expected",
        "pass": "return the probabilities",
    },
    ("04_prompt_learning", "answer-labels"): {
        "return [-100] * len(prompt) + answer": "shift by one",
        "return prompt[1:] + answer + [-100]": "own tokens",
        "return [-100] * (len(prompt) - 1) + answer": "one label for each",
        "return [-100] * len(prompt) + answer[1:] + [-100]": "first token of the answer",
        "return [-100] * (len(prompt) - 1) + answer + [0]": "expected",
        "return [-100] * len(answer) + answer + [-100]": "of a prompt of one token",
        "pass": "return the labels",
    },
    ("04_prompt_learning", "shared-tokens"): {
        "n = 0\nwhile all(len(ids) > n for ids in prompts) and len({ids[n] for ids in prompts}) == 1:\n    n += 1\n"
        "return n": "still to be run",
        "return min(map(len, prompts)) - 1": "first difference",
        "return 2": "still to be run",
        "return sum(len(set(column)) == 1 for column in zip(*[ids[:-1] for ids in prompts]))": "does not count",
        "n, (a, b) = 0, prompts[:2]\nwhile a[n] == b[n] and n < min(len(a), len(b)) - 1:\n    n += 1\nreturn n": "all",
        "pass": "return the number",
    },
    ("05_catastrophic_forgetting", "matrix-metrics"): {
        "return R.mean(), 0, 0, 0": "last row only",
        "return R[-1].mean(), R[-1].mean(), 0, 0": "the diagonal",
        "f = (R.diagonal() - R[-1])[:-1].mean()\nreturn R[-1].mean(), R.diagonal().mean(), f, -f": "from the best",
        "f = (R.max(axis=0) - R[-1]).mean()\nreturn R[-1].mean(), R.diagonal().mean(), f, 0": "can't be forgotten",
        "f = (R.max(axis=0) - R[-1])[:-1].mean()\nreturn R[-1].mean(), R.diagonal().mean(), f, 0": "not among them",
        "f = (R[:-1].max(axis=0) - R[-1])[:-1].sum() / len(R)\n"
        "return R[-1].mean(), R.diagonal().mean(), f, 0": "T - 1, the last task",
        "return R[-1].mean(), R.diagonal().mean(), 0.1, 0": "expected 0.175, got 0.100",
        "f = (R[:-1, :-1].max(axis=0) - R[-1, :-1]).mean()\n"
        "return R[-1].mean(), R.diagonal().mean(), f, (R[-1] - R.diagonal()).mean()": "always 0",
        "f = (R[:-1, :-1].max(axis=0) - R[-1, :-1]).mean()\n"
        "return R[-1].mean(), R.diagonal().mean(), f, (R.diagonal() - R[-1])[:-1].mean()": "negative where",
        "f = (R[:-1, :-1].max(axis=0) - R[-1, :-1]).mean()\n"
        "return R[-1].mean(), R.diagonal().mean(), f, -f": "expected -0.125",
        "pass": "return four numbers",
    },
    ("05_catastrophic_forgetting", "ewc-penalty"): {
        "return strength / 2 * sum(((weights[n] - old[n]) ** 2).sum() for n in old)": "Fisher information",
        "return strength * sum((fisher[n] * (weights[n] - old[n]) ** 2).sum() for n in old)": "half of it",
        "return strength / 2 * sum((fisher[n] * (weights[n] - old[n]) ** 2).mean() for n in old)": "no mean",
        "return strength / 2 * sum((fisher[n] * (weights[n] - old[n])).sum() for n in old)": "square the differences",
        "return strength / 2 * sum(((fisher[n] * (weights[n] - old[n])) ** 2).sum() for n in old)": "not squared again",
        "return strength / 2 * (fisher['a'] * (weights['a'] - old['a']) ** 2).sum()": "expected 17.5",
        "return sum((fisher[n] * (weights[n] - old[n]) ** 2).sum() for n in old) / 2": "multiply by the strength",
        "pass": "return the penalty",
    },
    ("05_catastrophic_forgetting", "fisher"): {
        "return torch.autograd.grad(torch.nn.functional.cross_entropy(X @ W.T, y), W)[0] ** 2": "bug is still there",
        "loss = torch.nn.functional.cross_entropy(X @ W.T, y, reduction='sum')\n"
        "return torch.autograd.grad(loss, W)[0] ** 2": "same bug",
        "p = (X @ W.T).softmax(-1) - torch.eye(len(W))[y]\n"
        "return ((p[:, :, None] * X[:, None]) ** 2).sum(0)": "not their sum",
        "p = (X @ W.T).softmax(-1) - torch.eye(len(W))[y]\n"
        "return (p[:, :, None] * X[:, None]).abs().mean(0)": "squared gradients",
        "return torch.zeros(3)": "one number a weight",
        "pass": "return the Fisher information",
    },
    ("05_catastrophic_forgetting", "reservoir"): {
        "return rng.integers(n)": "there are the places 0 to 4",
        "return n - 1 if n <= size else None": "first rows stay",
        "return n - 1 if n <= size else rng.integers(size)": "last row is always kept",
        "return n - 1 if n <= size else (rng.integers(size) if rng.random() < 0.5 else None)": "all should be 25 %",
        "return n - 1 if n < size else None": "all 5 places are taken",
        "pass": "nothing was kept",
    },
    ("06_clip_loss", "clip-loss"): {
        "t, v = F.normalize(text, dim=1), F.normalize(image, dim=1)\n"
        "return F.cross_entropy(s.exp() * t @ v.T, torch.arange(len(t)))": "must find its text",
        "t, v = F.normalize(text, dim=1), F.normalize(image, dim=1)\n"
        "return F.cross_entropy(s.exp() * v @ t.T, torch.arange(len(t)))": "must find its image",
        "z = s.exp() * F.normalize(text, dim=1) @ F.normalize(image, dim=1).T\ni = torch.arange(len(z))\n"
        "return F.cross_entropy(z, i) + F.cross_entropy(z.T, i)": "not their sum",
        "z = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T\ni = torch.arange(len(z))\n"
        "return (F.cross_entropy(z, i) + F.cross_entropy(z.T, i)) / 2": "multiply the cosines",
        "z = s * F.normalize(text, dim=1) @ F.normalize(image, dim=1).T\ni = torch.arange(len(z))\n"
        "return (F.cross_entropy(z, i) + F.cross_entropy(z.T, i)) / 2": "not s",
        "z = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T / s.exp()\ni = torch.arange(len(z))\n"
        "return (F.cross_entropy(z, i) + F.cross_entropy(z.T, i)) / 2": "do not divide",
        "z = s.exp() * text @ image.T\ni = torch.arange(len(z))\n"
        "return (F.cross_entropy(z, i) + F.cross_entropy(z.T, i)) / 2": "longest vector",
        "z = s.exp() * F.normalize(text, dim=0) @ F.normalize(image, dim=0).T\ni = torch.arange(len(z))\n"
        "return (F.cross_entropy(z, i) + F.cross_entropy(z.T, i)) / 2": "compare with the equation",
        "return F.cross_entropy(text @ image.T, torch.arange(len(text)), reduction='none')": "one number",
        "z = s.exp() * F.normalize(text, dim=1) @ F.normalize(image, dim=1).T\n"
        "return -(z.log_softmax(0) + z.log_softmax(1)).diagonal().sum() / 2": "not the sum",
        "return F.cross_entropy(text @ image.T, torch.arange(len(text))).item()": "return a tensor",
        "pass": "return the loss",
    },
    ("06_clip_loss", "recall-at-k"): {
        "own = similarities.diagonal()[:, None]\nreturn ((similarities > own).sum(1) < k).sum()": "not a count",
        "own = similarities.diagonal()[:, None]\nreturn ((similarities.T > own).sum(1) < k).mean()": "turn it around",
        "own = similarities.diagonal()[:, None]\nreturn (1 + (similarities > own).sum(1) < k).mean()": "first place",
        "own = similarities.diagonal()[:, None]\nreturn ((similarities < own).sum(1) < k).mean()": "from high to low",
        "own = similarities.diagonal()[:, None]\nreturn ((similarities > own).sum(1) <= k).mean()": "counted from 0",
        "return 0.5": "expected 0.25, 0.75",
        "pass": "return the share",
    },
    ("06_clip_loss", "class-vector"): {
        "return F.normalize(texts.mean(0), dim=0)": "a long one counts more",
        "return F.normalize(texts, dim=1).mean(0)": "has length 1",
        "return F.normalize(texts, dim=1).sum(0)": "a sum is too long",
        "return texts.mean(0)": "before the mean and after it",
        "return F.normalize(texts, dim=1)": "one vector",
        "return F.normalize(texts[0], dim=0)": "expected",
        "pass": "return the vector",
    },
    ("06_clip_loss", "false-negatives"): {
        "return logits.masked_fill(same, -torch.inf)": "it must stay",
        "return logits": "still a negative",
        "return logits.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), 0.0)": "it must be -inf",
        "return logits.masked_fill_(same & ~torch.eye(len(same), dtype=torch.bool), -torch.inf)": "work on a copy",
        "return logits.masked_fill(~torch.eye(len(same), dtype=torch.bool), -torch.inf)": "must stay as they were",
        "return logits.masked_fill((same & ~torch.eye(len(same), dtype=torch.bool)).triu(), -torch.inf)": "at all",
        "return logits[0]": "shape",
        "pass": "return the logits",
    },
}
# Right answers of another kind than the solution, which the check must take
RIGHT = {
    ("01_full_fine_tuning", "cross-entropy"): ["return F.nll_loss(logits.log_softmax(-1), labels)"],
    ("02_freezing", "unfrozen"): ["return [g for g in range(count) if g >= count - 1 - epoch][::-1]"],
    ("03_lora_and_adapters", "bottleneck"): ["return up(down(x).clamp(min=0)) + x"],
    ("04_prompt_learning", "calibrated"): ["return np.stack([row / row.sum() for row in p / p_nothing])"],
    ("04_prompt_learning", "word-score"): [
        "every = [float(row.log_softmax(-1)[t]) for row, t in zip(logits, tokens)]\n"
        "return sum(every) / (len(every) if normalise else 1)"
    ],
    ("04_prompt_learning", "answer-labels"): ["return tuple([-100] * (len(prompt) - 1) + list(answer) + [-100])"],
    ("05_catastrophic_forgetting", "fisher"): [
        "p = (X @ W.T).softmax(-1) - torch.eye(len(W))[y]\nreturn ((p[:, :, None] * X[:, None]) ** 2).mean(0)"
    ],
    ("05_catastrophic_forgetting", "reservoir"): [
        "if n <= size:\n    return n - 1\nreturn rng.integers(size) if rng.random() < size / n else None"
    ],
    ("06_clip_loss", "clip-loss"): [
        "t, v = (x / x.norm(dim=1, keepdim=True) for x in (text, image))\nz = s.exp() * t @ v.T\n"
        "return -(z.log_softmax(0).diagonal() + z.log_softmax(1).diagonal()).mean() / 2"
    ],
    ("06_clip_loss", "recall-at-k"): [
        "best = np.argsort(-similarities, axis=1)[:, :k]\nreturn np.mean([i in line for i, line in enumerate(best)])"
    ],
    ("06_clip_loss", "false-negatives"): [
        "return logits - torch.where(same & ~torch.eye(len(same), dtype=torch.bool), 1e9, 0.0)"
    ],
    ("01_rows_and_domains", "accumulation"): ["return float(np.average(mean_losses, weights=sizes))"],
}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def form_errors(notebook: nbformat.NotebookNode) -> list[str]:
    """What keeps an executed notebook from being committed."""
    errors = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if "widgets" in notebook.metadata:
        errors.append("metadata.widgets: remove it")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        errors.append("not executed once from top to bottom: python benchmarks/notebooks.py --write")
    for number, cell in enumerate(code, 1):
        if cell.source.count("\n") >= 30:
            errors.append(f"code cell {number} has over 30 lines")
        if cell.metadata.pop("jupyter", {"source_hidden": True}) != {"source_hidden": True}:
            errors.append(f"code cell {number} hides more than its source")
        if extra := set(cell.metadata) - {"tags", "nbgrader"}:
            errors.append(f"code cell {number} has metadata {sorted(extra)}")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                errors.append(f"code cell {number} printed an error or a warning")
            data = output.get("data", {})
            shown = "".join([output.get("text", ""), *(str(v) for k, v in data.items() if k.startswith("text/"))])
            page = BeautifulSoup(shown, "html.parser")
            if any(not image.get("alt") for image in page.select("img")) or any(k.startswith("image/") for k in data):
                errors.append(f"code cell {number} shows an image without alt text: use ftkit.plots")
            if match := PRIVATE.search(page.get_text()):
                errors.append(f"code cell {number} shows a path or a time: {match.group()!r}")
            if "widget-view" in str(list(data)):
                errors.append(f"code cell {number} shows a widget")
    if re.search(r"<!-- needs -->\s*<!-- /needs -->", notebook.cells[0].source):
        errors.append("no measured time and memory in the header: python benchmarks/notebooks.py --write")
    return errors


def exercises(notebook: nbformat.NotebookNode) -> dict[str, tuple[str, str]]:
    """Solution and check of each exercise, by its grade_id."""
    graded = {
        c.metadata.nbgrader.grade_id: c for c in notebook.cells if "nbgrader" in c.metadata and c.cell_type == "code"
    }
    solutions = {name: cell for name, cell in graded.items() if cell.metadata.nbgrader.solution}
    assert all(graded[f"{name}-check"].metadata.nbgrader.grade for name in solutions)
    return {name: (cell.source, graded[f"{name}-check"].source) for name, cell in solutions.items()}


def with_body(solution: str, body: str) -> str:
    """The solution cell with another answer in it."""
    cell, replaced = SOLUTION.subn(lambda match: "\n".join(match[1] + line for line in body.split("\n")), solution)
    assert replaced == 1
    return cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path: Path) -> None:
    notebook = read(path)
    assert form_errors(notebook) == []
    judgements = [c for c in notebook.cells if c.cell_type == "markdown" and "nbgrader" in c.metadata]
    assert len(exercises(notebook)) + len(judgements) >= 3
    assert "tier" in default_parameters(path)
    assert set(notebook.metadata.ftkit.assets) <= set(registry.names())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_header_and_outputs_are_those_of_the_last_measured_run(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("measure_notebooks", ROOT / "benchmarks" / "notebooks.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    notebook, measured = read(path), json.loads(script.MEASURED.read_text(encoding="utf-8"))[path.stem]
    assert script.needs_table(measured) in notebook.cells[0].source
    assert script.digests(notebook) == {name: measured[name] for name in ("code", "outputs")}
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.source += "\n# edited since"
    assert script.digests(notebook)["code"] != measured["code"]


@pytest.mark.parametrize("path", SECOND_EDITION, ids=lambda path: path.stem)
def test_a_lesson_fits_into_an_evening(path: Path) -> None:
    """Cells, words of prose, lines of code; the first result stands within three visible cells."""
    notebook = read(path)
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"<!-- needs -->.*?<!-- /needs -->|\$\$.*?\$\$", " ", prose, flags=re.DOTALL)
    code = [
        line
        for cell in notebook.cells
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
        for line in cell.source.splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert (len(notebook.cells) <= 50, len(prose.split()) <= 1500, len(code) <= 300) == (True,) * 3
    visible = [cell for cell in notebook.cells if not cell.metadata.get("jupyter", {}).get("source_hidden")]
    first = next(i for i, cell in enumerate(visible) if cell.get("outputs") and i)
    assert first < 3
    assert [cell.metadata.tags for cell in notebook.cells if cell.metadata.get("tags") == ["predict"]]
    assert any("nbgrader" in cell.metadata for cell in notebook.cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", SECOND_EDITION, ids=lambda path: path.stem)
def test_an_exercise_states_the_minutes_of_the_catalogue(path: Path) -> None:
    known = {exercise.name: exercise.minutes for found in all_exercises().values() for exercise in found}
    cells = read(path).cells
    for above, cell in pairwise(cells):
        if (name := cell.metadata.get("nbgrader", {}).get("grade_id")) in known:
            assert f"({known[name]} minutes" in above.source, name


def test_form_finds_what_is_wrong() -> None:
    notebook = read(NOTEBOOKS[0])
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.metadata["widgets"] = {}
    code[0].execution_count = 7
    code[1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="a warning")]
    code[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text="saved to /home/somebody/x")]
    code[3].outputs = [nbformat.v4.new_output("display_data", data={"text/html": "<img src='data:,'>"})]
    code[4].source += "\n" * 30
    code[6].outputs = [nbformat.v4.new_output("stream", name="stdout", text="saved to C:\\Users\\x")]
    code[7].outputs = [nbformat.v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})]
    code[8].outputs = [nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0K"})]
    code[5].metadata["papermill"] = {}
    notebook.cells[0].source = "# Title <!-- needs --> <!-- /needs -->"
    assert len(form_errors(notebook)) == 11


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_pass_the_solution_and_fail_the_stub(path: Path) -> None:
    notebook = read(path)
    imports = "\n".join(
        ast.unparse(statement)
        for cell in notebook.cells
        if cell.cell_type == "code"
        for statement in ast.parse(cell.source).body
        if isinstance(statement, ast.Import | ast.ImportFrom)
    )
    for name, (solution, check) in exercises(notebook).items():
        answers = {} if "grade(" in check else WRONG[path.stem, name]
        namespace: dict[str, object] = {}
        exec(imports, namespace)
        exec(solution, namespace)
        exec(check, namespace)
        for body in RIGHT.get((path.stem, name), []):
            exec(with_body(solution, body), namespace)
            exec(check, namespace)
        for body, words in {"raise NotImplementedError": None, **answers}.items():
            exec(with_body(solution, body), namespace)
            with pytest.raises((AssertionError, NotImplementedError), match=words):
                exec(check, namespace)


def committed_tables(path: Path, source: str = "") -> list[dict[str, dict[str, str]]]:
    """Tables in the outputs of the cells whose source has that text: by row, the text under each heading."""
    pages = [
        BeautifulSoup(output.data["text/html"], "html.parser")
        for cell in read(path).cells
        if cell.cell_type == "code" and source in cell.source
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    tables = []
    for page in pages:
        columns = [heading.get_text().replace("_", " ") for heading in page.select("thead tr:first-child th")][1:]
        lines = [(line.th, [cell.get_text() for cell in line.select("td")]) for line in page.select("tbody tr")]
        tables.append(
            {
                name.get_text(): dict(zip(columns, cells, strict=True))
                for name, cells in lines
                if name is not None and len(cells) == len(columns)  # rows under several headings are none of ours
            }
        )
    return tables


def test_full_fine_tuning_beats_its_rivals_in_the_committed_run() -> None:
    """The conclusion of notebook 01, read off its committed outputs: the intervals do not overlap."""
    rows = committed_tables(ROOT / "notebooks" / "01_full_fine_tuning.ipynb", "results_table(")[0]
    low, _ = map(float, rows["full"]["95 % interval"].split(" to "))
    assert float(rows["full"]["accuracy"]) == pytest.approx(0.81, abs=0.04)
    for rival in ("majority", "bag of words", "from scratch"):
        assert float(rows[rival]["95 % interval"].split(" to ")[1]) < low


def test_the_readme_shows_the_results_of_the_committed_notebook() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- results -->")[2]
    lines = [line.strip("| ").split(" | ") for line in readme.partition("<!-- /results -->")[0].strip().splitlines()]
    shown = {name: dict(zip(lines[0][1:], cells, strict=True)) for name, *cells in lines[2:]}
    assert shown == committed_tables(ROOT / "notebooks" / "01_full_fine_tuning.ipynb", "results_table(")[0]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_committed_results_lie_within_the_bands_of_the_cpu_tier(path: Path) -> None:
    declared = tomllib.loads((ROOT / "tests" / "notebooks" / "bands.toml").read_text(encoding="utf-8"))[path.stem][
        "cpu"
    ]
    table = committed_tables(path, "results_table(")[0]
    column = declared["score"].replace("_", " ")
    shown = {name.replace(" ", "_"): row[column] for name, row in table.items() if "(on record)" not in name}
    assert set(shown) - set(declared["bands"]) in ({"majority"}, {"guessing"})
    for name, band in declared["bands"].items():
        assert band["low"] <= float(shown[name]) <= band["high"], name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_live_slices_fall_within_the_recorded_studies(path: Path) -> None:
    """Where a table has recorded and live scores side by side; the live runs have seeds that the study has not."""
    compared = 0
    for table in committed_tables(path):
        for row in table.values():
            if row.get("live", "") not in ("", "NaN"):
                assert float(row["run low"]) <= float(row["live"]) <= float(row["run high"]), row
                compared += 1
    assert compared >= 2
