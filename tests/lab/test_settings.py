"""The schema and the settings of every notebook: one sentence refuses a wrong value, wherever it comes from."""

from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from ftkit import TIERS
from ftkit.errors import SettingsError
from ftkit.lab import settings
from ftkit.lab.runs.notebooks import default_parameters
from ftkit.lab.schema import NotebookSettings
from ftkit.lab.settings import Contrastive, FullFineTuning, settings_of

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


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


def test_a_notebook_outside_the_kit_has_no_settings() -> None:
    assert settings_of("my_own.ipynb") is None
    assert settings_of(Path("elsewhere") / "01_full_fine_tuning.ipynb") is FullFineTuning


def test_a_given_value_wins_and_none_is_the_default_of_the_tier() -> None:
    chosen = FullFineTuning.at("smoke", lr=3e-4, rows=None, seed=2, num_seeds=3)
    assert (chosen.lr, chosen.rows, chosen.seeds) == (3e-4, 64, [2, 3, 4])
    assert chosen.differing() == {"lr": (1e-4, 3e-4), "seed": (0, 2), "num_seeds": (1, 3)}
    assert chosen.changed(lr=1e-4, seed=0, num_seeds=1).differing() == {}


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
    ({"live_rows": 3}, "give a list such as [200], each item from 2 to 1,000,000"),
    ({"live_rows": [200, "x"]}, "live_rows='x' is not allowed: give a list such as [200], each item from"),
    ({"live_rates": [0.1, 7]}, "7 is outside 1e-07 to 1"),
    ({"dataset": "reuter8"}, "did you mean 'reuters8'?"),
    ({"dataset": __file__}, "give a file of your own as `data`"),
    ({"far_domains": ["tweet-sentimnt"]}, "did you mean 'tweet-sentiment'?"),
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


@pytest.mark.parametrize("good", [{"dataset": "owner/name"}, {"model": "owner/name"}, {"label": 1}, {"data": __file__}])
def test_hub_ids_files_and_numbers_as_column_names_are_accepted(good: dict) -> None:
    assert FullFineTuning.at("cpu", **good)


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
