"""Fixtures that tests of several rooms share, and the order in which tests run."""

import os
import re
import signal

import pytest
import torch
from tiny_bert import make_rows

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: more threads would slow each other down
    os.environ["OMP_NUM_THREADS"] = "1"  # for the kernels and processes that tests start
torch.set_num_threads(1)  # a tiny network is faster on one core
if hasattr(signal, "SIGHUP"):  # under nohup, the processes that tests start would ignore it, too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TRAINS = re.compile(
    r"\b(fit|learn_sequence|run_(notebook|study|grid)|NotebookClient|execute)\(|--nbval|autograde|sphinx\.cmd"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of files that train or build the site, and run the notebooks first, because they take longest."""
    for item in items:
        if TRAINS.search(item.path.read_text(encoding="utf-8")):
            item.add_marker("trains")
    items.sort(key=lambda item: item.path.parent.name != "notebooks")


@pytest.fixture
def tiny_data() -> dict[str, list[dict[str, object]]]:
    """90 rows to train on and 40 to validate on."""
    return {"train": make_rows(90), "validation": make_rows(40, seed=1)}
