"""The replay buffer: what it keeps, how evenly, and how many bytes it takes."""

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
        buffer = ReplayBuffer(8, seed=seed)
        buffer.add(numbered(0, 15))
        buffer.add(numbered(15, 40))  # it does not matter that they come in parts
        chosen = numbers(buffer.rows)
        assert len(set(chosen)) == 8
        kept[chosen] += 1
    assert kept.sum() == 8 * 1500
    assert chisquare(kept).pvalue > 0.001


def test_a_buffer_with_room_keeps_all_rows():
    for kind in ("reservoir", "balanced"):
        buffer = ReplayBuffer(10, kind)
        buffer.add(numbered(0, 7))
        assert numbers(buffer.rows) == list(range(7))


def test_a_balanced_buffer_keeps_the_classes_balanced_in_whatever_order_rows_come():
    rng = np.random.default_rng(0)
    labels = [*rng.choice([0, 1], 300, p=[0.9, 0.1]), *rng.choice([0, 2, 3], 300, p=[0.8, 0.1, 0.1])]
    buffer, reservoir = ReplayBuffer(40, "balanced"), ReplayBuffer(40)
    for one in (buffer, reservoir):
        one.add({"number": i, "labels": int(label)} for i, label in enumerate(labels))
    counts = Counter(int(row["labels"]) for row in buffer.rows)
    assert [counts[label] for label in range(4)] == [10, 10, 10, 10]
    assert Counter(int(row["labels"]) for row in reservoir.rows)[0] > 25
    assert all(labels[int(row["number"])] == row["labels"] for row in buffer.rows)
    assert len(set(numbers(buffer.rows))) == 40


def test_a_balanced_buffer_keeps_all_rows_of_a_rare_class():
    buffer = ReplayBuffer(20, "balanced")
    buffer.add(numbered(0, 100, 0))
    buffer.add(numbered(100, 103, 1))
    buffer.add(numbered(200, 300, 2))
    counts = Counter(int(row["labels"]) for row in buffer.rows)
    assert counts[1] == 3
    assert sorted(counts.values()) == [3, 8, 9]


def test_a_balanced_buffer_keeps_the_rows_of_a_class_with_the_same_probability():
    kept = np.zeros(30, dtype=int)
    for seed in range(1500):
        buffer = ReplayBuffer(6, "balanced", seed=seed)
        buffer.add(numbered(0, 30))
        kept[numbers(buffer.rows)] += 1
    assert chisquare(kept).pvalue > 0.001


def test_rows_are_stored_compactly_and_without_loss():
    rows = [{"input_ids": [1, 300, 2], "attention_mask": [1, 1, 1], "labels": 1, "score": 0.1}]
    buffer = ReplayBuffer(5)
    buffer.add(rows)
    assert buffer.nbytes == 3 * 2 + 3 * 1 + 1 + 8
    assert {name: value.tolist() for name, value in buffer.rows[0].items()} == rows[0]
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
    buffer = ReplayBuffer(16)
    buffer.add(make_rows(64))
    model = make_tiny_bert()
    settings = TrainSettings(lr=1e-3, num_epochs=1, batch_size=8, accumulation=2, precision="fp32")
    history = fit(model, {"train": mix(make_rows(32, seed=1), buffer.rows)}, settings)
    assert len(history.steps) == 4  # as many as with the new rows alone
    assert evaluate(model, buffer.rows).probabilities.shape == (16, 2)


def test_invalid_sizes_kinds_and_empty_buffers_are_refused():
    with pytest.raises(ValueError, match="A replay buffer of 0 rows is empty"):
        ReplayBuffer(0)
    with pytest.raises(ValueError, match="no replay buffer of kind 'ring'"):
        ReplayBuffer(5, "ring")
    with pytest.raises(ValueError, match="The replay buffer is empty"):
        mix(numbered(0, 3), [])
