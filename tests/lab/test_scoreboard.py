"""Scores of several methods by seed, from this run and from a record."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ftkit.lab.scoreboard import Scoreboard
from ftkit.metrics import Evaluation, compare

COST = SimpleNamespace(seconds=2.0, peak_rss_mib=100.0)


def evaluation(share: float, rows: int = 200) -> Evaluation:
    labels = np.zeros(rows, dtype=int)
    right = np.arange(rows) < share * rows
    return Evaluation(labels, np.stack([right, ~right], axis=1).astype(float), 0.5)


@pytest.fixture
def board() -> Scoreboard:
    board = Scoreboard([5, 6])
    for seed, better, worse in ((5, 0.8, 0.7), (6, 0.82, 0.71)):
        board.note("full", seed, evaluation(better), COST, 1000)
        board.note("probe", seed, evaluation(worse), COST, 10)
    return board


def test_entries_are_of_the_seeds_of_this_run_in_the_order_asked_for(board: Scoreboard) -> None:
    board.note("probe", 0, evaluation(0.1), COST, 12)
    entries = board.metrics(("majority", "probe"))
    assert list(entries) == ["probe", "full"]
    assert entries["probe"]["seeds"] == [5, 6]
    assert entries["probe"]["accuracy"] == pytest.approx(0.705)
    assert entries["probe"]["trainable_parameters"] == 12
    assert entries["full"]["seconds"] == 2.0


def test_without_a_record_rows_and_seeds_are_compared(board: Scoreboard) -> None:
    both = ([evaluation(share).correct for share in shares] for shares in ((0.8, 0.82), (0.7, 0.71)))
    assert board.compare("full", "probe") == compare(*both)
    assert board.verdict("full", "probe") == board.compare("full", "probe").sentence("full", "probe")


def test_recorded_seeds_join_those_of_this_run(board: Scoreboard) -> None:
    board.add_record("full", pd.DataFrame({"seed": [0, 1, 2], "test_accuracy": [0.79, 0.8, 0.81]}))
    for seed, share in ((0, 0.72), (1, 0.7)):
        board.note("probe", seed, evaluation(share), COST, 10)
    paired = board.compare("full", "probe")  # seed 2 is the record's alone
    assert paired == compare([0.79, 0.8, 0.8, 0.82], [0.72, 0.7, 0.7, 0.71], by="seed")
    assert board.compare("full", "probe", rows=True).num_rows == 200
    assert board.pooled()["full"]["by_seed"] == [0.79, 0.8, 0.81, 0.8, 0.82]
    assert board.metrics()["full"]["by_seed"] == [0.8, 0.82]


def test_methods_without_a_common_seed_are_not_compared(board: Scoreboard) -> None:
    board.note("other", 9, evaluation(0.5), COST, 0)
    with pytest.raises(ValueError, match="full and other have no seed in common"):
        board.compare("full", "other")
