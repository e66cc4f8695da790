from typing import Any

import numpy as np
import pytest
import torch
from tiny_bert import make_tiny_bert
from tiny_towers import make_pairs, make_towers
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from ftkit.contrastive.rows import encode_pairs
from ftkit.errors import TrainingError
from ftkit.metrics import Evaluation
from ftkit.training.loop import evaluate, fit
from ftkit.training.losses import ModelWithLoss
from ftkit.training.state import TrainSettings


class Line(ModelWithLoss):
    """y = w x with a squared error, so that each step can be had by hand."""

    def __init__(self, bound: float = np.inf) -> None:
        super().__init__()
        self.weight, self.dropout, self.bound = nn.Parameter(torch.zeros(1, 1)), nn.Dropout(0.5), bound
        self.steps: list[float] = []
        self.measured: list[tuple[int, bool]] = []

    def forward(self, x: Tensor, y: Tensor, labels: Tensor) -> ModelOutput:
        assert labels.shape == x.shape
        return ModelOutput(loss=(self.weight[0, 0] * x - y).square().mean())

    def measure(self, rows: Any, batch_size: int) -> Evaluation:
        self.measured.append((batch_size, self.training or self.dropout.training))
        right = np.array([abs(self.weight.item() * row["x"] - row["y"]) < 0.5 for row in rows])
        probabilities = np.stack([right, ~right], axis=1).astype(float)
        return Evaluation(np.zeros(len(rows), dtype=np.int64), probabilities, 0.25)

    def after_step(self) -> None:
        with torch.no_grad():
            self.weight.clamp_(max=self.bound)
        self.steps.append(self.weight.item())


def make_rows(number: int = 10) -> list[dict[str, float]]:
    xs = np.random.default_rng(0).normal(size=number)
    return [{"x": float(x), "y": float(2 * x), "labels": 0} for x in xs]


SETTINGS = TrainSettings(lr=0.1, num_epochs=2, batch_size=4, warmup=0, weight_decay=0, max_grad_norm=1e9)


def test_fit_takes_the_loss_of_the_model() -> None:
    rows = make_rows()
    history = fit(Line(), {"train": rows}, SETTINGS.model_copy(update={"batch_size": 10}))
    assert history.steps[0]["loss"] == pytest.approx(np.mean([row["y"] ** 2 for row in rows]), rel=1e-5)
    assert history.steps[0]["grad_norm"] == pytest.approx(abs(np.mean([2 * r["x"] * r["y"] for r in rows])), rel=1e-5)
    assert history.steps[1]["loss"] < history.steps[0]["loss"]


def test_accumulated_batches_are_one_large_batch() -> None:
    """10 rows are 4, 4 and 2: the small batch counts by its rows."""
    whole, parts = Line(), Line()
    one = fit(whole, {"train": make_rows()}, SETTINGS.model_copy(update={"batch_size": 10}))
    other = fit(parts, {"train": make_rows()}, SETTINGS.model_copy(update={"accumulation": 3}))
    assert len(one.steps) == len(other.steps) == 2
    assert [s["loss"] for s in other.steps] == pytest.approx([s["loss"] for s in one.steps], rel=1e-5)
    assert [s["grad_norm"] for s in other.steps] == pytest.approx([s["grad_norm"] for s in one.steps], rel=1e-5)
    assert parts.weight.item() == pytest.approx(whole.weight.item(), abs=1e-6)


def test_towers_accumulate_too() -> None:
    model = make_towers()
    rows = encode_pairs({"train": make_pairs(20)}, model)
    history = fit(model, rows, TrainSettings(lr=1e-3, num_epochs=1, batch_size=4, accumulation=2))
    assert len(history.steps) == 3
    # a batch of 4 knows 3 negatives, however many make a step
    single = fit(make_towers(), rows, TrainSettings(lr=1e-9, num_epochs=1, batch_size=4))
    double = fit(make_towers(), rows, TrainSettings(lr=1e-9, num_epochs=1, batch_size=4, accumulation=2))
    losses = [step["loss"] for step in single.steps]
    expected = [np.mean(losses[0:2]), np.mean(losses[2:4]), losses[4]]
    assert [step["loss"] for step in double.steps] == pytest.approx(expected, abs=1e-4)


def test_after_step_follows_each_step() -> None:
    model = Line(bound=0.15)
    history = fit(model, {"train": make_rows()}, SETTINGS)
    assert len(model.steps) == len(history.steps) == 6
    assert model.steps[0] == pytest.approx(0.1)  # of AdamW's first step, the learning rate
    assert model.steps[1:] == pytest.approx([0.15] * 5)


def test_after_step_does_nothing_unless_written() -> None:
    class Plain(Line):
        after_step = ModelWithLoss.after_step

    model = Plain()
    fit(model, {"train": make_rows()}, SETTINGS)
    assert model.weight.item() > 0.3


def test_evaluate_asks_the_model_in_eval_mode() -> None:
    model = Line().train()
    found = evaluate(model, make_rows(), batch_size=7)
    assert found.loss == 0.25
    assert model.measured == [(7, False)]
    assert model.training and model.dropout.training


def test_validation_is_what_the_model_measures() -> None:
    model, rows = Line(), make_rows(40)
    accuracies = []

    class Watch:
        def on_start(self, run: Any) -> None: ...
        def on_step(self, run: Any) -> None: ...
        def on_epoch(self, run: Any) -> None:
            accuracies.append(evaluate(run.model, rows).accuracy)

    settings = SETTINGS.model_copy(update={"num_epochs": 4, "batch_size": 20, "lr": 0.4})
    history = fit(model, {"train": rows, "validation": rows}, settings, callbacks=[Watch()])
    assert [epoch["validation_accuracy"] for epoch in history.epochs] == accuracies
    assert [epoch["validation_loss"] for epoch in history.epochs] == [0.25] * 4
    assert accuracies[-1] > accuracies[0]
    assert evaluate(model, rows).accuracy == max(accuracies)


def test_validation_of_towers_is_recall_at_1() -> None:
    model = make_towers()
    rows = encode_pairs({"train": make_pairs(16), "validation": make_pairs(8, seed=1)}, model)
    history = fit(model, rows, TrainSettings(lr=1e-3, num_epochs=1, batch_size=8))
    found = evaluate(model, rows["validation"])
    assert history.epochs[0]["validation_accuracy"] == found.recall(1) == (found.ranks == 1).mean()
    assert history.epochs[0]["validation_loss"] == pytest.approx(found.loss)


@pytest.mark.parametrize("wrong", [{"label_smoothing": 0.1}, {"class_weights": "balanced"}, {"class_weights": (1.0,)}])
def test_settings_of_classes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="its own loss: set label_smoothing to 0 and class_weights to None"):
        fit(Line(), {"train": make_rows()}, SETTINGS.model_copy(update=wrong))


def test_penalties_are_added() -> None:
    def penalty(model: nn.Module, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        assert outputs.loss.ndim == 0
        return 100 * (model.weight + 1).square().sum()  # draws the weight to -1

    model = Line()
    fit(model, {"train": make_rows()}, SETTINGS.model_copy(update={"num_epochs": 10}), penalties=[penalty])
    assert model.weight.item() < -0.5


def test_a_model_without_measure_can_not_be_made() -> None:
    class Half(ModelWithLoss):
        pass

    with pytest.raises(TypeError, match="measure"):
        Half()


def test_a_classifier_does_not_see_the_labels() -> None:
    model = make_tiny_bert()
    seen = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(set(given)), with_kwargs=True)
    rows = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(4)]
    fit(model, {"train": rows}, TrainSettings(num_epochs=1, batch_size=2))
    assert seen == [{"input_ids", "attention_mask"}] * 2
