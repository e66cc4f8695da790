"""The memory: what it keeps, how evenly, and how much room it takes."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny_bert import make_rows, make_tiny_bert

from ftkit.continual.replay import ReplayBuffer, mix
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings


def numbered(start: int, stop: int, label: int = 0) -> list[dict[str, int]]:
    return [{"number": i, "labels": label} for i in range(start, stop)]


def numbers(rows) -> list[int]:
    return [int(row["number"]) for row in rows]


def test_a_reservoir_keeps_each_row_with_the_same_probability():
    kept = np.zeros(40, dtype=int)
    for seed in range(1500):
        memory = ReplayBuffer(8, seed=seed)
        memory.add(numbered(0, 15))
        memory.add(numbered(15, 40))  # in how many parts they come does not matter
        chosen = numbers(memory.rows)
        assert len(set(chosen)) == 8
        kept[chosen] += 1
    assert kept.sum() == 8 * 1500
    assert chisquare(kept).pvalue > 0.001


def test_a_memory_that_has_room_keeps_all():
    for kind in ("reservoir", "balanced"):
        memory = ReplayBuffer(10, kind)
        memory.add(numbered(0, 7))
        assert numbers(memory.rows) == list(range(7))


def test_a_balanced_memory_holds_the_classes_evenly_however_they_come():
    rng = np.random.default_rng(0)
    labels = [*rng.choice([0, 1], 300, p=[0.9, 0.1]), *rng.choice([0, 2, 3], 300, p=[0.8, 0.1, 0.1])]
    memory, reservoir = ReplayBuffer(40, "balanced"), ReplayBuffer(40)
    for one in (memory, reservoir):
        one.add({"number": i, "labels": int(label)} for i, label in enumerate(labels))
    counts = Counter(int(row["labels"]) for row in memory.rows)
    assert [counts[label] for label in range(4)] == [10, 10, 10, 10]
    assert Counter(int(row["labels"]) for row in reservoir.rows)[0] > 25
    assert all(labels[int(row["number"])] == row["labels"] for row in memory.rows)
    assert len(set(numbers(memory.rows))) == 40


def test_a_balanced_memory_keeps_a_scarce_class_whole():
    memory = ReplayBuffer(20, "balanced")
    memory.add(numbered(0, 100, 0))
    memory.add(numbered(100, 103, 1))
    memory.add(numbered(200, 300, 2))
    counts = Counter(int(row["labels"]) for row in memory.rows)
    assert counts[1] == 3
    assert sorted(counts.values()) == [3, 8, 9]


def test_rows_of_a_class_are_kept_evenly_in_a_balanced_memory():
    kept = np.zeros(30, dtype=int)
    for seed in range(1500):
        memory = ReplayBuffer(6, "balanced", seed=seed)
        memory.add(numbered(0, 30))
        kept[numbers(memory.rows)] += 1
    assert chisquare(kept).pvalue > 0.001


def test_it_says_what_its_rows_take_and_gives_them_back_whole():
    rows = [{"input_ids": [1, 300, 2], "attention_mask": [1, 1, 1], "labels": 1, "score": 0.1}]
    memory = ReplayBuffer(5)
    memory.add(rows)
    assert memory.nbytes == 3 * 2 + 3 * 1 + 1 + 8
    assert {name: value.tolist() for name, value in memory.rows[0].items()} == rows[0]
    signed = ReplayBuffer(1)
    signed.add([{"labels": 0, "x": [-1, 70_000]}])
    assert signed.rows[0]["x"].tolist() == [-1, 70_000]


@pytest.mark.parametrize(("new", "old", "times"), [(10, 5, {2}), (10, 4, {2, 3}), (10, 30, {0, 1}), (3, 3, {1})])
def test_a_mix_has_as_many_old_rows_as_new_ones(new, old, times):
    mixed = mix(numbered(0, new), numbered(100, 100 + old))
    chosen = numbers(mixed)
    assert chosen[:new] == list(range(new)) and len(mixed) == 2 * new
    counts = Counter(chosen[new:])
    assert {counts[100 + i] for i in range(old)} == times
    assert numbers(mix(numbered(0, new), numbered(100, 100 + old))) == chosen
    if len(times) > 1:
        assert numbers(mix(numbered(0, new), numbered(100, 100 + old), seed=1)) != chosen


def test_a_mix_trains_with_fit():
    memory = ReplayBuffer(16)
    memory.add(make_rows(64))
    model = make_tiny_bert()
    settings = TrainSettings(lr=1e-3, num_epochs=1, batch_size=8, accumulation=2, precision="fp32")
    history = fit(model, {"train": mix(make_rows(32, seed=1), memory.rows)}, settings)
    assert len(history.steps) == 4  # as many as the new rows alone would take
    assert evaluate(model, memory.rows).probabilities.shape == (16, 2)


def test_what_is_no_memory_is_refused():
    with pytest.raises(ValueError, match="0 rows holds nothing"):
        ReplayBuffer(0)
    with pytest.raises(ValueError, match="no memory of kind 'ring'"):
        ReplayBuffer(5, "ring")
    with pytest.raises(ValueError, match="memory is empty"):
        mix(numbered(0, 3), [])
