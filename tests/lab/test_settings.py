"""The schema and the settings of every notebook: one sentence refuses a wrong value, wherever it comes from."""

import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import nbformat
import pandas as pd
import papermill
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_notebook

from ftkit import TIERS
from ftkit.errors import SettingsError
from ftkit.lab import settings
from ftkit.lab.runs.notebooks import default_parameters
from ftkit.lab.schema import NotebookSettings
from ftkit.lab.settings import Adapters, Contrastive, Freezing, FullFineTuning, Prompting, RowsAndDomains, settings_of
from ftkit.lab.studies.declaration import read_declaration
from ftkit.plots import NO_MATH
from ftkit.training.state import TrainSettings

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").rglob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_parameters_cell_matches_the_settings_class(path: Path) -> None:
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    schema = settings_of(path)
    assert cells == [schema.parameters_cell()], f"paste what {schema.__name__}.parameters_cell() returns"
    assert list(default_parameters(path)) == list(schema.model_fields)
    assert set(schema.PANEL) <= set(schema.model_fields)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_defaults_of_a_tier_are_within_bounds(path: Path, tier: str) -> None:
    chosen = settings_of(path).at(tier)
    assert chosen.differing() == {}
    assert chosen.tier == tier


class BuiltError(Exception):
    """A function of a notebook has built the settings of a training run."""


def build(**given: object) -> None:
    TrainSettings(**given)
    raise BuiltError


class Stubs(dict):
    """Globals of a notebook in which every name that is not known is a stub."""

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name):
            raise KeyError(name)
        return self.setdefault(name, MagicMock())


def training_functions(path: Path) -> Stubs:
    """The functions of a notebook that train, up to the point where they have built their ``TrainSettings``."""
    found = Stubs(TrainSettings=build, KNOBS={}, prepare=MagicMock(return_value=(0, 0, 0)))
    for pair in ("load", "load_classifier", "cache_frozen_layers"):
        found[pair] = MagicMock(return_value=(0, 0))
    for cell in nbformat.read(path, as_version=4).cells:
        tree = ast.parse(cell.source if cell.cell_type == "code" else "")
        tree.body = [
            node for node in tree.body if isinstance(node, ast.FunctionDef) and "TrainSettings(" in ast.unparse(node)
        ]
        exec(compile(tree, str(path), "exec"), found)
    return found


def rates_of(study: str) -> list[float]:
    """All rates of a study; the best of a method is one of them."""
    declared = read_declaration(study)
    return sorted({row["lr"] for row in declared.rows})


# What the lessons train, besides the panel: (name of the function, the settings that it gets)
TRAINED = {
    "01_full_fine_tuning": lambda s: [
        ("tune", s), ("tune", s.changed(lr=s.scratch_lr, pretrained=False)),
        *(("tune", s.changed(lr=rate)) for rate in s.live_rates),
        ("tune", s.changed(rows=s.few_rows, num_epochs=s.many_epochs)),
    ],
    "01_rows_and_domains": lambda s: [
        ("tune", s), *(("tune", s.changed(rows=rows)) for rows in s.live_rows),
    ],
    "02_freezing": lambda s: [
        ("train", s), *(("train", s.changed(lr=rate * s.lr_scale)) for rate in rates_of("freezing")),
    ],
    "03_lora_and_adapters": lambda s: [
        ("tune", s), *(("tune", s.changed(lr=rate * s.lr_scale)) for rate in rates_of("adapters")),
    ],
    "04_prompt_learning": lambda s: [("tune", s), ("tune", s.changed(method="encoder_full"))],
    "05_catastrophic_forgetting": lambda s: [("learn", s)],
    "06_clip_loss": lambda s: [
        ("learn", s), ("learn", s.changed(method="heads_only", batch_size=1024, num_epochs=4 * s.num_epochs)),
    ],
}  # fmt: skip


def ends_of(path: Path) -> list[tuple[str, float]]:
    """The smallest and largest allowed value of each numeric setting."""
    bounded = [parameter for parameter in settings_of(path).parameters() if parameter.low is not None]
    return [(parameter.name, end) for parameter in bounded for end in (parameter.low, parameter.high)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_fit_takes_both_ends_of_every_setting(path: Path) -> None:
    schema, notebook = settings_of(path), training_functions(path)
    refused = []
    for name, end in ends_of(path):
        is_list = isinstance(schema.at("smoke").model_dump()[name], list)
        kind = int if float(end).is_integer() else float
        try:
            chosen = schema.at("smoke", **{name: [kind(end)] if is_list else kind(end)})
        except SettingsError as error:  # at the start, in one sentence
            assert re.fullmatch(r"[^\n]+\.", str(error))
            refused.append((name, end))
            continue
        notebook["Dataset"] = MagicMock()
        notebook["Dataset"].from_list.return_value = range(getattr(chosen, "rows", None) or 1000)
        for function, given in TRAINED[path.stem](chosen):
            with pytest.raises(BuiltError):
                notebook[function](given, 0)
    assert refused == ([("steps", 100_000)] if path.stem == "04_prompt_learning" else [])


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        (Contrastive, {"batch_size": 65536}), (Contrastive, {"num_epochs": 300}), (Contrastive, {"rows": 16}),
        (Freezing, {"lr_scale": 100}), (Adapters, {"lr_scale": 40}),
        (Prompting, {"steps": 20_000}), (Prompting, {"batch_size": 1024, "rows": 2}),
    ],
)  # fmt: skip
def test_what_fit_would_refuse_is_refused_at_the_start(schema: type[NotebookSettings], given: dict) -> None:
    with pytest.raises(SettingsError) as refused:
        schema.at("cpu", **given)
    first, value = next(iter(given.items()))
    assert f"{first}={value}" in str(refused.value)
    assert re.fullmatch(r"[^\n]+\.", str(refused.value))


def test_more_rows_allow_more_steps() -> None:
    assert Prompting.at("cpu", steps=20_000, rows=640).steps == 20_000
    with pytest.raises(SettingsError, match=r"rows=500 .* 1,280 times, and 1,000 is the most: give fewer steps"):
        Prompting.at("cpu", steps=20_000, rows=640).changed(rows=500)


def test_settings_are_checked_without_torch() -> None:
    """`ftkit run` refuses a value at once, instead of after the seconds that torch takes."""
    code = (
        "import sys; from ftkit.lab import Prompting; Prompting.at('cpu', steps=20); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_lesson_may_set_a_multiple_of_what_the_reader_may() -> None:
    largest = Contrastive.at("cpu", num_epochs=250)
    assert largest.changed(num_epochs=1000).num_epochs == 1000
    with pytest.raises(SettingsError, match=r"num_epochs=251 is not allowed: give a whole number from 1 to 250"):
        Contrastive.at("cpu", num_epochs=251)
    with pytest.raises(SettingsError, match=r"num_epochs=1001 is not allowed"):
        largest.changed(num_epochs=1001)


def test_a_notebook_outside_the_kit_has_no_settings() -> None:
    assert settings_of("my_own.ipynb") is None
    assert settings_of(Path("elsewhere") / "01_full_fine_tuning.ipynb") is FullFineTuning


def test_a_given_value_wins_and_none_is_the_default_of_the_tier() -> None:
    chosen = FullFineTuning.at("smoke", lr=3e-4, rows=None, seed=2, num_seeds=3)
    assert (chosen.lr, chosen.rows, chosen.seeds) == (3e-4, 64, [2, 3, 4])
    assert chosen.differing() == {"lr": (1e-4, 3e-4), "seed": (5, 2), "num_seeds": (1, 3)}
    assert chosen.changed(lr=1e-4, seed=5, num_seeds=1).differing() == {}


def test_the_environment_overrides_the_tier_of_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"tier": "cpu", "lr": 0.5, "an import": settings}
    monkeypatch.setenv("FTKIT_TIER", "smoke")
    assert FullFineTuning.from_cell(cell) == FullFineTuning.at("smoke", lr=0.5)
    monkeypatch.setenv("FTKIT_TIER", "smok")
    with pytest.raises(
        SettingsError, match=r"There is no tier 'smok': did you mean 'smoke'\? The tiers are smoke, cpu, gpu\."
    ):
        FullFineTuning.from_cell(cell)


REFUSED = [
    ({"lr": 7}, "lr=7 is not allowed: give a number from 1e-07 to 1 (peak learning rate"),
    ({"lr": float("nan")}, "1e-07 to 1"),
    ({"rows": "many"}, "rows='many' is not allowed: give a whole number from 2 to 1,000,000"),
    ({"rows": 1}, "2 to 1,000,000"),
    ({"row": 100}, "no parameter 'row': did you mean 'rows'?"),
    ({"schedule": "cosin"}, "did you mean 'cosine'? Give one of linear, cosine, constant"),
    ({"keep_best": "maybe"}, "keep_best='maybe' is not allowed: give true or false ("),
    ({"live_rates": [0.1, 7]}, "7 is outside 1e-07 to 1"),
    ({"dataset": "reuter8"}, "did you mean 'reuters8'?"),
    ({"dataset": __file__}, "give a file of your own as `data`"),
    ({"model": "minlm"}, "did you mean 'minilm'?"),
    ({"model": ""}, "model='' is not allowed"),
    ({"data": "no-such.csv"}, "no such file"),
]


@pytest.mark.parametrize(("wrong", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_wrong_value_is_refused_in_one_line(wrong: dict, words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        FullFineTuning.at("cpu", **wrong)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"live_rows": 3}, "give a list such as [100, 500], each item from 2 to 1,000,000"),
        ({"live_rows": [200, "x"]}, "live_rows='x' is not allowed: give a list such as [100, 500], each item from"),
        ({"far_domains": ["tweet-sentimnt"]}, "did you mean 'tweet-sentiment'?"),
    ],
)
def test_a_wrong_item_of_a_list_is_refused_in_one_line(wrong: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        RowsAndDomains.at("cpu", **wrong)


@pytest.mark.parametrize("good", [{"dataset": "owner/name"}, {"model": "owner/name"}, {"label": 1}, {"data": __file__}])
def test_hub_ids_files_and_numbers_as_column_names_are_accepted(good: dict) -> None:
    assert FullFineTuning.at("cpu", **good)


@pytest.mark.parametrize("name", ["/nothere", "./nothere", "~/pictures", "a/b/c", "owner/", "C:\\pictures"])
def test_a_path_of_nothing_is_not_taken_for_a_hub_id(name: str) -> None:
    for schema, setting in [(Contrastive, "images"), (Contrastive, "image_model"), (FullFineTuning, "model")]:
        with pytest.raises(SettingsError, match=r"is not allowed: there is no such folder: give [^\n]+\.$"):
            schema.at("cpu", **{setting: name})
    with pytest.raises(SettingsError, match=r"is not allowed: there is no such file: give [^\n]+\.$"):
        FullFineTuning.at("cpu", dataset=name)


@pytest.mark.parametrize(
    "set_again", [FullFineTuning.parameters_cell(), "lr = 1e-4"], ids=["second parameters cell", "assignment"]
)
def test_a_value_that_is_set_again_is_refused(set_again: str) -> None:
    injected = "# Parameters\nlr = 0.003\nrows = None\n"
    cells = [FullFineTuning.parameters_cell(), injected]
    namespace: dict = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    assert FullFineTuning.from_cell(namespace).lr == 0.003
    exec(set_again, namespace)
    with pytest.raises(SettingsError, match=r"^lr was given as 0\.003, but it is (None|0\.0001) here: [^\n]+\.$"):
        FullFineTuning.from_cell(namespace)


def test_a_notebook_shows_dollar_signs_in_tables_as_they_are() -> None:
    """Jupyter sets what stands between two of them as a formula, except in elements of these classes."""
    table = pd.DataFrame({"rows": [3, 4]}, index=["$5 to $9", "$$"])
    with pd.option_context("display.html.use_mathjax", True):
        FullFineTuning.from_cell({"In": []} | dict.fromkeys(FullFineTuning.model_fields) | {"tier": "smoke"})
        (shown,) = BeautifulSoup(table._repr_html_(), "html.parser").select("table")
    assert set(NO_MATH.split()) <= set(shown["class"])
    assert [heading.get_text() for heading in shown.select("tbody th")] == ["$5 to $9", "$$"]


@pytest.mark.parametrize(("given", "words"), [({"lrr": 1e-3}, "did you mean 'lr'"), ({"lr": 9}, "1e-07 to 1")])
def test_papermill_without_ftkit_run_is_refused_too(tmp_path: Path, given: dict, words: str) -> None:
    setup = "from ftkit.lab.settings import FullFineTuning\nlrx = 1\nsettings = FullFineTuning.from_cell(globals())"
    cells = [
        new_code_cell(FullFineTuning.parameters_cell(), metadata={"tags": ["parameters"]}),
        new_code_cell(setup),
        new_code_cell("print(settings.lr)"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "lesson.ipynb")
    run = {"kernel_name": "python3", "language": "python", "progress_bar": False}
    papermill.execute_notebook(tmp_path / "lesson.ipynb", tmp_path / "good.ipynb", {"lr": 1e-3}, **run)
    assert "0.001" in (tmp_path / "good.ipynb").read_text(encoding="utf-8")
    with pytest.raises(papermill.PapermillExecutionError, match=words) as refused:
        papermill.execute_notebook(tmp_path / "lesson.ipynb", tmp_path / "bad.ipynb", given, **run)
    assert refused.value.ename == "SettingsError"


def test_every_parameter_is_described() -> None:
    for schema in (settings_of(path) for path in NOTEBOOKS):
        assert issubclass(schema, NotebookSettings)
        for parameter in schema.parameters():
            assert parameter.help
            assert parameter.kind in {"float", "int", "bool", "str", "list"}
            assert set(parameter.defaults) == set(TIERS)


def test_images_and_image_models_are_known_names_folders_or_hub_ids(tmp_path: Path) -> None:
    given = {"images": str(tmp_path), "image_model": "owner/vision"}
    assert Contrastive.at("cpu", **given).changed(image_model="small-vit").images == str(tmp_path)
    with pytest.raises(
        SettingsError, match=r"images='emojis' is not allowed: did you mean 'emoji'\? Give emoji, a folder"
    ):
        Contrastive.at("cpu", images="emojis")
    with pytest.raises(
        SettingsError, match=r"image_model='minilm' is not allowed: .* Give efficientnet-lite0, small-vit"
    ):
        Contrastive.at("cpu", image_model="minilm")
