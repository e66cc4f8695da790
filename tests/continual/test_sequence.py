"""Sequences of tiny tasks: what each strategy trains and preserves, and what a run records."""

import numpy as np
import pytest
import torch
from tiny_sequences import encode, make_model, make_sequence

from ftkit.continual.penalties import add_old_logits
from ftkit.continual.sequence import learn_sequence
from ftkit.continual.strategies import (
    STRATEGIES,
    EWCStrategy,
    Frozen,
    LowRate,
    LwF,
    Strategy,
    WiSEFT,
    make_strategy,
)
from ftkit.models.modules import snapshot, weight_distance
from ftkit.training.callbacks import Callback
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

SETTINGS = TrainSettings(lr=3e-3, num_epochs=2, batch_size=8, precision="fp32", keep_best=False)
KINDS = ("many_tasks", "many_domains", "growing")


def run_one(strategy, kind="many_tasks", settings=SETTINGS, **options):
    sequence = make_sequence(kind)
    model = make_model(sequence)
    return model, learn_sequence(model, encode(sequence), strategy, settings, **options)


def body(model):
    heads = model.head_parameters()
    return {name: weights for name, weights in snapshot(model).items() if name not in heads}


@pytest.mark.parametrize("kind", KINDS)
def test_naive_is_fit_on_one_task_after_the_other(kind):
    sequence = make_sequence(kind)
    tasks, model = encode(sequence), make_model(sequence)
    expected = []
    model.seen = 0
    for stage in range(4):
        if stage:
            model.seen = stage
            heads = model.heads_of(range(stage) if kind == "growing" else [stage - 1])
            model.requires_grad_(True)
            for name, head in model.head_parameters().items():
                model.get_parameter(name).requires_grad_(head in heads)
            fit(model, {"train": tasks[stage - 1]["train"]}, SETTINGS)
        unknown = range(stage, 3) if kind == "growing" else ()
        expected.append([0.0 if j in unknown else evaluate(model, tasks[j]["test"]).accuracy for j in range(3)])
    other, run = run_one(Strategy(), kind)
    matrix = run.matrix()
    assert np.vstack([matrix.b, matrix.R]) == pytest.approx(np.array(expected))
    assert all(torch.equal(weights, snapshot(other)[name]) for name, weights in snapshot(model).items())
    assert [len(history.steps) for history in run.histories] == [6, 6, 6]
    assert min(run.distances) > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_learns_every_kind_of_sequence(name):
    for kind in KINDS:
        if (name, kind) == ("lora_per_task", "growing"):
            with pytest.raises(ValueError, match="needs the task of each row, and a growing head does not know it"):
                run_one(make_strategy(name), kind)
            continue
        _, run = run_one(make_strategy(name), kind)
        matrix = run.matrix()
        assert matrix.R.shape == (3, 3)
        assert len(run.distances) == 3 and np.isfinite(run.distances).all()
        steps = [len(history.steps) for history in run.histories]
        assert steps == ([18, 0, 0] if name == "joint" else [6, 6, 6])


def test_nothing_is_forgotten_if_nothing_is_shared():
    for name in ("frozen", "lora_per_task"):
        _, run = run_one(make_strategy(name))
        for task in range(3):
            first, *later = (stage[task].predictions for stage in run.evaluations["test"][task + 1 :])
            assert all(np.array_equal(predictions, first) for predictions in later), name
        changed = [
            not np.array_equal(before.predictions, last.predictions)
            for before, last in zip(run.evaluations["test"][0], run.evaluations["test"][-1], strict=True)
        ]
        assert any(changed), name  # the model does learn


def test_heads_that_are_not_trained_stay_bitwise_the_same():
    sequence = make_sequence()
    model = make_model(sequence)
    start = snapshot(model)
    learn_sequence(model, encode(sequence), LowRate(1e-6), SETTINGS.model_copy(update={"weight_decay": 0.5}))
    # later heads barely change at their very low rate; the first head is frozen after its own task
    alone = make_model(sequence)
    first_task = {"train": encode(sequence)[0]["train"]}
    for name, head in alone.head_parameters().items():
        alone.get_parameter(name).requires_grad_(head == "head 0")
    fit(alone, first_task, SETTINGS.model_copy(update={"weight_decay": 0.5}))
    for name, head in model.head_parameters().items():
        if head == "head 0":
            assert torch.equal(model.get_parameter(name), alone.get_parameter(name))
        else:
            torch.testing.assert_close(model.get_parameter(name).detach(), start[name], atol=1e-4, rtol=1e-3)


def test_all_rows_of_the_joint_matrix_are_the_same():
    _, run = run_one(make_strategy("joint"))
    matrix = run.matrix()
    assert (matrix.R[1:] == matrix.R[0]).all()
    assert matrix.forgetting == 0 and matrix.learning_accuracy == pytest.approx(matrix.average_accuracy)


@pytest.mark.parametrize(
    ("weak", "strong"),
    [
        (lambda: LowRate(1.0), lambda: LowRate(0.01)),
        (lambda: make_strategy("l2sp", 0.0), lambda: make_strategy("l2sp", 10.0)),
        (lambda: EWCStrategy(0.0), lambda: EWCStrategy(1e6)),
        (lambda: WiSEFT(0.0), lambda: WiSEFT(0.9)),
    ],
)
def test_a_stronger_strategy_stays_closer_to_the_first_task(weak, strong):
    plain, naive = run_one(Strategy())
    none, _ = run_one(weak())
    for name, weights in body(plain).items():
        torch.testing.assert_close(body(none)[name], weights, atol=1e-5, rtol=1e-4)
    much, run = run_one(strong())
    assert run.distances[0] == pytest.approx(naive.distances[0])  # the first task is not penalised
    assert run.distances[-1] - run.distances[0] < 0.5 * (naive.distances[-1] - naive.distances[0])
    assert weight_distance(much, body(plain)) > 0


def old_head_on_new_rows(strength):
    """Measure how far the first head's probabilities on new rows move, on average, and whether its weights change."""
    sequence = make_sequence()
    tasks, model, probabilities, heads = encode(sequence), make_model(sequence, dropout=0), {}, {}

    class Watched(LwF):
        def before(self, stage):
            logits = [row["old_logits"][:2] for row in add_old_logits(stage.model, tasks[1]["train"])]
            probabilities[stage.index] = torch.tensor(np.array(logits)).softmax(-1)
            heads[stage.index] = snapshot(stage.model)
            super().before(stage)

    learn_sequence(model, tasks, Watched(strength), SETTINGS.model_copy(update={"num_epochs": 5}))
    name = next(name for name, head in model.head_parameters().items() if head == "head 0")
    return (probabilities[2] - probabilities[1]).abs().mean().item(), not torch.equal(heads[1][name], heads[2][name])


def test_distillation_preserves_predictions_of_old_heads_on_new_rows_and_trains_these_heads():
    free, _ = old_head_on_new_rows(0.0)
    held, trained = old_head_on_new_rows(10.0)
    assert held < 0.7 * free
    assert trained


def test_the_topmost_layer_groups_train_with_the_heads():
    sequence = make_sequence()
    for groups, moved in [(0, set()), (1, {"pooler"}), (2, {"pooler", "layer.1"})]:
        model = make_model(sequence)
        start = body(model)
        learn_sequence(model, encode(sequence), Frozen(groups), SETTINGS)
        changed = {name for name, weights in body(model).items() if not torch.equal(weights, start[name])}
        assert {part for part in ("embeddings", "layer.0", "layer.1", "pooler") for n in changed if part in n} == moved
    with pytest.raises(
        ValueError, match="has 4 layer groups, and 5 of them cannot be trained: give a number from 0 to 4"
    ):
        run_one(Frozen(5))


def test_an_interrupted_task_ends_the_sequence():
    class Interrupted(Strategy):
        def before(self, stage):
            super().before(stage)

            def interrupt(model, batch, outputs):
                raise KeyboardInterrupt

            stage.penalties.append(interrupt)

    with pytest.raises(KeyboardInterrupt):
        run_one(Interrupted())


def test_several_splits_are_evaluated():
    _, run = run_one(Strategy(), splits=("validation", "test"))
    assert [len(part.labels) for part in run.evaluations["validation"][0]] == [8, 8, 8]
    assert [len(part.labels) for part in run.evaluations["test"][0]] == [12, 12, 12]
    assert run.matrix("validation").names == ["task 0", "task 1", "task 2"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_model_is_evaluated_on_all_tasks_together(kind):
    model, run = run_one(Strategy(), kind)
    together = run.evaluation()
    assert together.accuracy == pytest.approx(run.matrix().average_accuracy)  # all tasks have equally many rows
    assert len(together.labels) == 36
    expected = evaluate(model, [row for task in encode(make_sequence(kind)) for row in task["test"]])
    assert np.array_equal(together.labels, expected.labels)
    assert np.allclose(together.probabilities, expected.probabilities, atol=1e-6)
    assert together.loss == pytest.approx(expected.loss, abs=1e-5)


def test_histories_are_joined_into_one_and_callbacks_see_each_task():
    class Counter(Callback):
        starts = steps = 0

        def on_start(self, run):
            self.starts += 1

        def on_step(self, run):
            self.steps += 1

    counter = Counter()
    _, run = run_one(Strategy(), callbacks=[counter])
    assert (counter.starts, counter.steps) == (3, 18)
    assert [step["step"] for step in run.history.steps] == list(range(1, 19))
    assert [epoch["epoch"] for epoch in run.history.epochs] == list(range(1, 7))
    assert run.history.steps[6]["loss"] == run.histories[1].steps[0]["loss"]
    assert run.history.seconds == sum(history.seconds for history in run.histories) > 0
    assert run.history.ended == "finished"


def test_invalid_tasks_settings_and_strategies_are_refused():
    sequence = make_sequence()
    tasks = encode(sequence)
    with pytest.raises(ValueError, match="is for 3 tasks, not 2"):
        learn_sequence(make_model(sequence), tasks[:2], Strategy(), SETTINGS)
    with pytest.raises(ValueError, match="task 0 has no rows in the split 'dev'"):
        run_one(Strategy(), splits=("dev",))
    with pytest.raises(ValueError, match="label_smoothing"):
        run_one(Strategy(), settings=SETTINGS.model_copy(update={"label_smoothing": 0.1}))
    with pytest.raises(ValueError, match="no strategy 'ewk': choose from naive, joint"):
        make_strategy("ewk")
    with pytest.raises(ValueError, match="naive has no strength"):
        make_strategy("naive", 1.0)
    with pytest.raises(ValueError, match="factor on the learning rate is 0: give"):
        LowRate(0)
