from pathlib import Path

import pytest

from ftkit import TIERS
from ftkit.runs import default_parameters
from ftkit.settings import FullFineTuning, NotebookSettings

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_has_all_its_defaults_within_bounds(tier: str) -> None:
    assert isinstance(FullFineTuning.at(tier), NotebookSettings)


def test_a_value_that_is_given_wins_and_none_is_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTKIT_TIER", raising=False)
    settings = FullFineTuning.at("cpu", lr=3e-4, rows=None)
    assert settings.lr == 3e-4
    assert settings.rows == FullFineTuning.DEFAULTS["cpu"]["rows"]


def test_the_environment_overrides_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_TIER", "smoke")
    assert FullFineTuning.at("cpu") == FullFineTuning(tier="smoke", **FullFineTuning.DEFAULTS["smoke"])
    monkeypatch.setenv("FTKIT_TIER", "tpu")
    with pytest.raises(ValueError, match="no tier 'tpu': it can be smoke, cpu, gpu"):
        FullFineTuning.at("cpu")


@pytest.mark.parametrize("wrong", [{"lr": 7}, {"seeds": []}, {"seeds": [0, 0]}, {"row": 10}, {"rows": "many"}])
def test_what_is_unknown_or_out_of_bounds_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FullFineTuning.at("cpu", **wrong)


def test_the_parameters_cell_names_settings_and_leaves_the_defaults_to_the_tier() -> None:
    parameters = default_parameters(NOTEBOOKS / "01_full_fine_tuning.ipynb")
    assert parameters.pop("tier") == "cpu"
    assert set(parameters) <= set(FullFineTuning.model_fields)
    assert set(parameters.values()) == {None}
