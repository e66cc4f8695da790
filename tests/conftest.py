"""Fixtures that tests of several rooms share."""

import pytest
from tiny_bert import make_rows


@pytest.fixture
def tiny_data() -> dict[str, list[dict[str, object]]]:
    """90 rows to train on and 40 to validate on."""
    return {"train": make_rows(90), "validation": make_rows(40, seed=1)}
