"""Checkpoints know their run, and writing or reading one changes nothing."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bert import VOCABULARY, make_rows, make_tiny_bert
from tiny_towers import brighten, make_pairs, make_towers

from ftkit.adapters.lora import add_lora, bitfit
from ftkit.continual.penalties import L2SP
from ftkit.contrastive.feature_cache import cache_towers
from ftkit.contrastive.rows import encode_pairs
from ftkit.training.callbacks import Callback, Checkpoint, EarlyStopping
from ftkit.training.feature_cache import cache_frozen_layers
from ftkit.training.freezing import GradualUnfreezing, LayerwiseRates, freeze
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainingRun, TrainSettings

SETTINGS = TrainSettings(lr=1e-3, num_epochs=2, batch_size=8)


def other_texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same lengths and labels, but one other token in one row."""
    last = rows[-1]["input_ids"]
    return [*rows[:-1], {**rows[-1], "input_ids": [*last[:-1], 5 + (last[-1] - 4) % (VOCABULARY - 5)]}]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# What a checkpoint belongs to ---------------------------------------------------------------------------------


def test_a_checkpoint_of_other_texts_is_refused(tmp_path: Path, tiny_data: dict) -> None:
    fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Checkpoint(tmp_path / "run")])
    other = {**tiny_data, "train": other_texts(tiny_data["train"])}
    with pytest.raises(ValueError, match=r"of a run with training rows=\w+, but this run has \w+: use another file"):
        fit(make_tiny_bert(), other, SETTINGS, callbacks=[Checkpoint(tmp_path / "run")])


def test_a_checkpoint_of_other_validation_rows_or_penalties_is_refused(tmp_path: Path, tiny_data: dict) -> None:
    def train(data: dict[str, Any], *penalties: Any) -> None:
        fit(make_tiny_bert(), data, SETTINGS, penalties=penalties, callbacks=[Checkpoint(tmp_path / "run")])

    start = make_tiny_bert()
    train(tiny_data, L2SP(start, 0.5))
    train(tiny_data, L2SP(start, 0.5))
    with pytest.raises(ValueError, match=r"penalties=L2SP\(.*strength=0\.5.*, but this run has none"):
        train(tiny_data)
    with pytest.raises(ValueError, match=r"but this run has L2SP\(.*strength=0\.7"):
        train(tiny_data, L2SP(start, 0.7))
    with pytest.raises(ValueError, match="of a run with validation rows="):
        train({**tiny_data, "validation": other_texts(tiny_data["validation"])}, L2SP(start, 0.5))


def test_a_checkpoint_of_other_callbacks_is_refused(tmp_path: Path, tiny_data: dict) -> None:
    def train(*before: Callback, after: Sequence[Callback] = ()) -> None:
        callbacks = [*before, Checkpoint(tmp_path / "run"), *after]
        fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=callbacks)

    train(LayerwiseRates(0.5))
    train(LayerwiseRates(0.5), EarlyStopping(5))  # only ends the run
    for callbacks, after, has in (
        ([], [], "none"),
        ([LayerwiseRates(0.9)], [], r"LayerwiseRates\(factor=0\.9\)"),
        ([LayerwiseRates(0.5)], [GradualUnfreezing()], r"LayerwiseRates\(factor=0\.5\), GradualUnfreezing\(groups=1\)"),
        ([], [GradualUnfreezing(2)], r"GradualUnfreezing\(groups=2\)"),
    ):
        said = rf"of a run with callbacks=LayerwiseRates\(factor=0\.5\), but this run has {has}: use another file"
        with pytest.raises(ValueError, match=said):
            train(*callbacks, after=after)


class Noise(Callback):
    """A callback of somebody's own, which counts what it has done."""

    def __init__(self, kind: str) -> None:
        self.kind, self._steps = kind, 0

    def on_step(self, run: TrainingRun) -> None:
        self._steps += 1


def test_a_callback_of_ones_own_counts_by_what_it_was_given(tmp_path: Path, tiny_data: dict) -> None:
    own = Noise("normal")
    for _ in range(2):
        fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Checkpoint(tmp_path / "run"), own])
    with pytest.raises(ValueError, match=r"callbacks=Noise\(kind=normal\), but this run has Noise\(kind=uniform\)"):
        fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Checkpoint(tmp_path / "run"), Noise("uniform")])


def test_a_checkpoint_of_other_cached_texts_is_refused(tmp_path: Path) -> None:
    """Only the first token of each row is cached, and it is the same in every text."""

    def train(rows: list[dict[str, Any]]) -> None:
        model = make_tiny_bert()
        freeze(model, train=1)
        upper, cached = cache_frozen_layers(model, {"train": rows})
        assert cached["train"][0]["input_ids"] == [1]
        fit(upper, cached, SETTINGS, callbacks=[Checkpoint(tmp_path / "run")])

    rows = make_rows(20)
    train(rows)
    train(rows)
    with pytest.raises(ValueError, match="of a run with training rows="):
        train(other_texts(rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: make_tiny_bert(seed=1), "starting weights="),
        (lambda: bitfit(make_tiny_bert()), "trainable weights="),
        (lambda: add_lora(make_tiny_bert(), rank=2), "model=BertForSequenceClassification, but this run has Peft"),
        (lambda: make_tiny_bert(num_labels=3), "starting weights="),
    ],
)
def test_a_checkpoint_of_another_model_or_method_is_refused(
    tmp_path: Path, tiny_data: dict, change: Any, said: str
) -> None:
    fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Checkpoint(tmp_path / "run")])
    model = change()
    before = weights_of(model)
    with pytest.raises(ValueError, match=f"The checkpoint run is of a run with {said}"):
        fit(model, tiny_data, SETTINGS, callbacks=[Checkpoint(tmp_path / "run")])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "a tensor", "weights"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, tiny_data: dict, content: Any) -> None:
    path = tmp_path / "run"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(torch.zeros(3) if content == "a tensor" else make_tiny_bert().state_dict(), path)
    with pytest.raises(ValueError, match="is not a checkpoint, or is damaged: use another file, or delete it"):
        fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Checkpoint(path)])


class StopAt(Callback):
    steers = False

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: TrainingRun) -> None:
        if run.step == self.step:
            raise KeyboardInterrupt


def test_a_cell_can_be_run_again_after_ctrl_c(tmp_path: Path, tiny_data: dict) -> None:
    """The model then has the weights of a later step, and goes on from the checkpoint."""
    whole, again = make_tiny_bert(), make_tiny_bert()
    fit(whole, tiny_data, SETTINGS)
    first = fit(again, tiny_data, SETTINGS, callbacks=[Checkpoint(tmp_path / "run", every=4), StopAt(6)])
    assert first.ended == "interrupted"
    history = fit(again, tiny_data, SETTINGS, callbacks=[Checkpoint(tmp_path / "run", every=4)])
    assert history.ended == "finished"
    assert len(history.steps) == 24
    assert all(torch.equal(p, weights_of(again)[name]) for name, p in whole.named_parameters())


# Reading rows has no side effect --------------------------------------------------------------------------------


class Noisy(Sequence):
    """Rows that change at each reading, by the generators of torch, numpy and Python, or by one of their own."""

    def __init__(self, rows: list[dict[str, Any]], source: str) -> None:
        self.rows, self.source, self.own = rows, source, np.random.default_rng()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        draws = {
            "torch": lambda: float(torch.rand(())),
            "numpy": np.random.random,
            "python": random.random,
            "own": self.own.random,
        }
        token = 5 + int(draws[self.source]() * (VOCABULARY - 5))
        return {**row, "input_ids": [*row["input_ids"][:-1], token]}


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_a_checkpoint_beside_augmented_rows_changes_nothing(tmp_path: Path, source: str) -> None:
    data = {"train": Noisy(make_rows(20), source), "validation": Noisy(make_rows(10), source)}
    whole, beside = (
        fit(make_tiny_bert(), data, SETTINGS, callbacks=callbacks)
        for callbacks in ([], [Checkpoint(tmp_path / "run", every=2)])
    )
    assert whole.steps == beside.steps
    assert whole.epochs == beside.epochs


@pytest.mark.parametrize("cached", [False, True])
def test_a_checkpoint_beside_augmented_pairs_changes_nothing(tmp_path: Path, cached: bool) -> None:
    losses = []
    for callbacks in ([], [Checkpoint(tmp_path / "run", every=2)]):
        model = make_towers()
        rows = encode_pairs({"train": make_pairs(40)}, model, augment=brighten)
        if cached:
            rows = cache_towers(model.lock("image"), rows, views=3)
        losses.append(fit(model, rows, SETTINGS, callbacks=callbacks).steps)
    assert losses[0] == losses[1]


def test_rows_that_draw_from_a_generator_of_their_own_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for _ in range(2):
        data = {"train": Noisy(make_rows(20), "own")}
        fit(make_tiny_bert(), data, SETTINGS, callbacks=[Checkpoint(tmp_path / "run", every=2)])
    assert "Resumed at step 6 of 6" in capsys.readouterr().out


def test_evaluate_reads_each_row_once_as_far_as_the_generators_know() -> None:
    rows, model = Noisy(make_rows(6), "torch"), make_tiny_bert()
    torch.manual_seed(0)
    evaluate(model, rows)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(6)
    assert torch.equal(after, torch.rand(1))
