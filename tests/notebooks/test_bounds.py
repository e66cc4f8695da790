"""Each lesson runs with every setting at the smallest value that is allowed.

The largest values, a million rows for one, would take hours: tests/lab/test_settings.py gives each of them to what the
lesson trains, up to the first step.
"""

from pathlib import Path
from typing import Any

import pytest

from ftkit.lab.runs.notebooks import find_notebook, run_notebook
from ftkit.lab.schema import NotebookSettings
from ftkit.lab.settings import settings_of

NOTEBOOKS = sorted(path.stem for path in find_notebook("01_full_fine_tuning").parent.rglob("*.ipynb"))


def smallest(schema: type[NotebookSettings]) -> dict[str, Any]:
    """The lower bound of each setting that has one; a list gets one item."""
    usual, lowest = schema.at("smoke").model_dump(), {}
    for parameter in schema.parameters():
        if parameter.low is not None:
            is_list = isinstance(usual[parameter.name], list)
            whole = parameter.kind == "int" or (is_list and isinstance(usual[parameter.name][0], int))
            low = int(parameter.low) if whole else parameter.low
            lowest[parameter.name] = [low] if is_list else low
    return lowest


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_lesson_runs_with_every_setting_at_its_lower_bound(notebook: str, tmp_path: Path) -> None:
    given = smallest(settings_of(notebook))
    done = run_notebook(notebook, given, tier="smoke", out=tmp_path, progress=False)
    assert done.error is None
    assert {name: done.settings[name] for name in given} == given
    assert len(done.metrics) > (1 if notebook == "01_rows_and_domains" else 4)
