import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bert import make_rows, make_tiny_bert
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from ftkit.errors import SettingsError, TrainingError
from ftkit.metrics import Evaluation
from ftkit.training import loop
from ftkit.training.batching import make_batch, row_lengths, training_batches
from ftkit.training.callbacks import Callback, Checkpoint, EarlyStopping
from ftkit.training.loop import backward, evaluate, fit, lr_factor, prepare
from ftkit.training.losses import make_class_weights
from ftkit.training.state import TrainingRun, TrainSettings

FAST = {"lr": 1e-3, "num_epochs": 2, "batch_size": 8}


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# The loop against transformers ------------------------------------------------------------------------------


def test_losses_equal_those_of_transformers_trainer(tmp_path: Path) -> None:
    """The same 20 steps, with warm-up, clipping that bites, weight decay, dropout and accumulation 4."""
    rows = make_rows(158)  # 20 batches, the last of them small; 5 steps an epoch
    settings = TrainSettings(
        lr=2e-3, num_epochs=4, batch_size=8, accumulation=4, warmup=0.2, max_grad_norm=0.5, weight_decay=0.1, seed=3
    )
    ours = make_tiny_bert()
    history = fit(ours, {"train": rows}, settings)

    theirs = make_tiny_bert()
    batches = [
        make_batch(theirs, rows, indices, torch.device("cpu"))
        for epoch in range(4)
        for indices in training_batches(row_lengths(rows), 8, settings.seed, epoch)
    ]

    class SameBatches(Trainer):
        def get_train_dataloader(self) -> list[dict[str, torch.Tensor]]:
            return batches  # no DataLoader: it would draw a number, and dropout would drop other units than ours

    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=2e-3, max_steps=20, gradient_accumulation_steps=4, warmup_steps=0.2,
        max_grad_norm=0.5, weight_decay=0.1, seed=3, use_cpu=True, report_to="none", logging_steps=1,
        logging_nan_inf_filter=False, save_strategy="no", disable_tqdm=True, lr_scheduler_type="linear",
    )  # fmt: skip

    # BertForSequenceClassification takes the Trainer's num_items_in_batch and ignores it (transformers 5.23), so that
    # accumulated gradients would be 4 times too large: the Trainer gets transformers' own loss that heeds it.
    def loss(outputs, labels, num_items_in_batch):
        return ForSequenceClassificationLoss(
            labels, outputs.logits, theirs.config, num_items_in_batch=num_items_in_batch
        )

    trainer = SameBatches(model=theirs, args=args, train_dataset=batches, compute_loss_func=loss)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]

    assert len(history.steps) == len(logs) == 20
    assert max(step["grad_norm"] for step in history.steps) > 0.5  # clipping was at work
    np.testing.assert_allclose([step["loss"] for step in history.steps], [log["loss"] for log in logs], atol=1e-5)
    np.testing.assert_allclose([s["grad_norm"] for s in history.steps], [log["grad_norm"] for log in logs], rtol=1e-4)
    np.testing.assert_allclose(weights_of(ours), weights_of(theirs), atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_equals_that_of_transformers(schedule: str) -> None:
    settings = TrainSettings(schedule=schedule, warmup=0.15)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=math.ceil(0.15 * 47), num_training_steps=47)
    for step in range(47):
        assert lr_factor(step, 47, settings) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


# Accumulation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_weights", [None, (0.3, 1.7)])
def test_accumulated_batches_give_the_gradient_of_the_large_one(class_weights: tuple[float, float] | None) -> None:
    rows, settings = make_rows(19), TrainSettings(label_smoothing=0.1, class_weights=class_weights)

    def gradient(group: list[np.ndarray]) -> tuple[float, torch.Tensor]:
        model = make_tiny_bert(dropout=0).double()
        penalty = [lambda model, batch, outputs: outputs.logits.square().mean()]
        run = prepare(model, {"train": rows}, settings, penalty)
        loss = backward(run, group)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    large_loss, large = gradient([np.arange(19)])
    small_loss, small = gradient([np.arange(8), np.arange(8, 16), np.arange(16, 19)])
    assert small_loss == pytest.approx(large_loss, abs=1e-6)
    assert (small - large).abs().max() < 1e-6


TWO_PROCESSES = """
import sys, torch
sys.path.insert(0, {tests!r})
from tiny_bert import make_rows, make_tiny_bert
from ftkit.training.state import TrainSettings
from ftkit.training.loop import fit
model = make_tiny_bert(dropout=0)
fit(model, {{"train": make_rows(69)}}, TrainSettings(lr=1e-3, num_epochs=2, batch_size=8, accumulation={accumulation}))
if int(__import__("os").environ.get("RANK", 0)) == 0:
    torch.save(model.state_dict(), {out!r})
if torch.distributed.is_initialized():  # or a thread that still runs may abort the process at its end
    torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    """69 rows are 9 batches: the last step has one batch for two processes, and that one is small."""
    results = []
    for processes, accumulation in ((1, 2), (2, 1)):
        out = str(tmp_path / f"{processes}.pt")
        script = tmp_path / f"{processes}.py"
        script.write_text(
            TWO_PROCESSES.format(tests=str(Path(__file__).parents[1]), accumulation=accumulation, out=out)
        )
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
        command, env = [sys.executable, *launch, str(script)], os.environ | {"ACCELERATE_USE_CPU": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out, weights_only=True))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], atol=2e-6, rtol=0)


def test_balanced_class_weights_equal_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 7 + [1] * 2 + [2] * 11
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(make_class_weights("balanced", labels, 3), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="has 2 values for 3 classes: give one for each"):
        make_class_weights((1.0, 2.0), labels, 3)
    assert make_class_weights("balanced", [0, 0, 2], 4).tolist() == pytest.approx([3 / 8, 0, 3 / 4, 0])


# What is inherited, one step, epochs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
        ("ACCELERATE_USE_FSDP", "true"),
    ],
)
def test_what_a_launcher_left_in_the_environment_changes_nothing(
    tiny_data: dict, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    settings = TrainSettings(**FAST, precision="fp32")
    plain, inherited = make_tiny_bert(), make_tiny_bert()
    expected = fit(plain, tiny_data, settings).steps
    monkeypatch.setenv(name, value)
    assert fit(inherited, tiny_data, settings).steps == expected
    assert torch.equal(weights_of(plain), weights_of(inherited))
    assert os.environ[name] == value


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_single_step_trains_at_the_peak_rate(schedule: str) -> None:
    model = make_tiny_bert()
    before = weights_of(model)
    history = fit(model, {"train": make_rows(8)}, TrainSettings(lr=1e-3, num_epochs=1, batch_size=8, schedule=schedule))
    assert [step["lr"] for step in history.steps] == [1e-3]
    assert not torch.equal(before, weights_of(model))
    two = [lr_factor(step, 2, TrainSettings(schedule=schedule)) for step in range(2)]
    assert two == [0, 1]  # longer runs keep their schedule


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows() -> None:
    """65 rows are a step of 64 and a step of 1, which counts as 1 row of 65."""
    rows, model = make_rows(65), make_tiny_bert(dropout=0)
    expected = evaluate(model, rows).loss
    history = fit(model, {"train": rows}, TrainSettings(lr=1e-12, num_epochs=2, batch_size=64))
    losses = [step["loss"] for step in history.steps]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert [epoch["train_loss"] for epoch in history.epochs] == pytest.approx([expected] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "score", "best"),
    [
        ({}, "accuracy", 1),
        ({"best_by": "macro_f1"}, "macro_f1", 3),
        ({"best_by": "balanced_accuracy"}, "balanced_accuracy", 2),
        ({"class_weights": "balanced"}, "balanced_accuracy", 2),
        ({"class_weights": (1.0, 5.0)}, "balanced_accuracy", 2),
        ({"class_weights": "balanced", "best_by": "accuracy"}, "accuracy", 1),
    ],
)
def test_the_best_epoch_is_that_of_the_score_asked_for(
    monkeypatch: pytest.MonkeyPatch, settings: dict, score: str, best: int
) -> None:
    """On 16 rows of a common class and 4 of a rare one, each epoch is the best by another score."""
    found = iter([(16, 0), (8, 4), (14, 2)])  # rows of each class that the epoch gets right
    labels = np.repeat([0, 1], [16, 4])

    def measured(model: torch.nn.Module, rows: list) -> Evaluation:
        common, rare = next(found)
        predictions = np.repeat([0, 1, 1, 0], [common, 16 - common, rare, 4 - rare])
        return Evaluation(labels, np.eye(2)[predictions], loss=0.5)

    monkeypatch.setattr(loop, "evaluate", measured)
    data = {"train": make_rows(16), "validation": make_rows(20, seed=1)}
    history = fit(make_tiny_bert(), data, TrainSettings(lr=1e-3, num_epochs=3, batch_size=8, **settings))
    assert history.best_epoch == best
    assert [epoch["validation_accuracy"] for epoch in history.epochs] == [0.8, 0.6, 0.8]
    expected = {"epoch", "train_loss", "validation_loss", "validation_accuracy", f"validation_{score}"}
    assert set(history.epochs[0]) == expected


# Chance, checkpoints, interruption ----------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_and_another_seed_others(tiny_data: dict) -> None:
    def train(seed: int) -> torch.Tensor:
        torch.rand(1)  # what was drawn before does not matter
        model = make_tiny_bert()
        fit(model, tiny_data, TrainSettings(**FAST, seed=seed))
        return weights_of(model)

    first = train(0)
    assert torch.equal(first, train(0))
    assert not torch.equal(first, train(1))


RESUMABLE = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from tiny_bert import make_rows, make_tiny_bert
from ftkit.training.callbacks import Callback, Checkpoint
from ftkit.training.state import TrainSettings
from ftkit.training.loop import fit

class Slow(Callback):
    steers = False

    def on_step(self, run):
        print("step", run.step, flush=True)
        time.sleep({pause})

torch.set_num_threads(1)
model = make_tiny_bert()
data = {{"train": make_rows(90), "validation": make_rows(40, seed=1)}}
settings = TrainSettings(lr=1e-3, num_epochs=4, batch_size=8, accumulation=2)
history = fit(model, data, settings, callbacks=[Checkpoint({checkpoint!r}, every=3), Slow()])
torch.save([model.state_dict(), history.epochs, history.steps], {out!r})
"""


def test_killed_at_random_steps_and_resumed_a_run_ends_with_bit_identical_weights(tmp_path: Path) -> None:
    def script(name: str, pause: float) -> list[str]:
        path = tmp_path / f"{name}.py"
        path.write_text(
            RESUMABLE.format(
                tests=str(Path(__file__).parents[1]),
                pause=pause,
                checkpoint=str(tmp_path / f"{name}.ckpt"),
                out=str(tmp_path / f"{name}.pt"),
            )
        )
        return [sys.executable, str(path)]

    subprocess.run(script("whole", 0), check=True, capture_output=True, timeout=120)
    rng, kills = random.Random(time.time_ns()), []
    for steps_more in (rng.randint(2, 7), rng.randint(4, 9)):
        process = subprocess.Popen(script("killed", 0.05), stdout=subprocess.PIPE, text=True)
        seen = [line for line, _ in zip((s for s in process.stdout if s.startswith("step")), range(steps_more))]  # noqa: B905
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append(seen[-1].strip())
    ended = subprocess.run(script("killed", 0), check=True, capture_output=True, text=True, timeout=120)
    assert "Resumed at step" in ended.stdout

    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole[1:] == killed[1:], kills
    assert all(torch.equal(whole[0][name], killed[0][name]) for name in whole[0]), kills
    assert not list(tmp_path.glob("*.partial")) or kills  # a partial file may be left by a kill, never read


def test_a_checkpoint_of_other_settings_or_rows_is_refused(tmp_path: Path, tiny_data: dict) -> None:
    fit(make_tiny_bert(), tiny_data, TrainSettings(**FAST), callbacks=[Checkpoint(tmp_path / "run.ckpt")])
    with pytest.raises(ValueError, match=r"of a run with lr=0\.001, but this run has 0\.002"):
        other = TrainSettings(**FAST | {"lr": 2e-3})
        fit(make_tiny_bert(), tiny_data, other, callbacks=[Checkpoint(tmp_path / "run.ckpt")])
    with pytest.raises(ValueError, match="of a run with training rows="):
        rows = {"train": make_rows(90, seed=5), "validation": tiny_data["validation"]}
        fit(make_tiny_bert(), rows, TrainSettings(**FAST), callbacks=[Checkpoint(tmp_path / "run.ckpt")])


class SignalAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: TrainingRun) -> None:
        if run.step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_returns_the_history_and_a_usable_model(tiny_data: dict, capsys: pytest.CaptureFixture) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    model = make_tiny_bert()
    history = fit(model, tiny_data, TrainSettings(**FAST), callbacks=[SignalAt(5)])
    assert history.ended == "interrupted"
    assert len(history.steps) == 5
    assert "Interrupted after step 5 of 24" in capsys.readouterr().out
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert np.isfinite(evaluate(model, tiny_data["validation"]).loss)


# What goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr": 5}, "lr=5 is not allowed: give a number above 0, up to 1 (peak learning rate of AdamW)."),
        ({"lr": float("nan")}, "lr=nan is not allowed: give a number above 0, up to 1 (peak"),
        ({"num_epochs": 0}, "num_epochs=0 is not allowed: give a whole number from 1 to 1,000 (passes over"),
        ({"warmup": 1}, "warmup=1 is not allowed: give a number from 0, below 1 (share of"),
        ({"max_grad_norm": 0}, "max_grad_norm=0 is not allowed: give a number above 0 (larger"),
        ({"keep_best": "maybe"}, "keep_best='maybe' is not allowed: give true or false (end with"),
        ({"schedule": "linaer"}, "schedule='linaer' is not allowed: did you mean 'linear'? Give one of linear, cosine"),
        ({"best_by": "accurcy"}, "best_by='accurcy' is not allowed: did you mean 'accuracy'? Give one of accuracy, "),
        (
            {"class_weights": (1, "a")},
            "class_weights=(1, 'a') is not allowed: give 'balanced', a number for each class",
        ),
        ({"epochs": 3, "lr": 1e-3}, "TrainSettings has no parameter 'epochs': did you mean 'num_epochs'? It has lr, "),
        ({"lr": 5, "num_epochs": 0}, "lr=5 is not allowed"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused_in_a_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        TrainSettings(**given)
    assert type(refused.value) is SettingsError
    assert str(refused.value).startswith(said)
    assert re.fullmatch(r"[^\n]+\.", str(refused.value))


def test_a_loss_that_is_not_finite_names_step_rows_and_cause(tiny_data: dict) -> None:
    class Poison(Callback):
        def on_step(self, run: TrainingRun) -> None:
            if run.step == 2:
                run.model.classifier.weight.data.fill_(torch.inf)

    with pytest.raises(TrainingError, match=r"loss is nan at step 3 of 24 \(training rows .*try lr=0\.0001"):
        fit(make_tiny_bert(), tiny_data, TrainSettings(**FAST), callbacks=[Poison()])

    broken = make_tiny_bert()
    broken.classifier.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"at step 1 .*starting weights"):
        fit(broken, tiny_data, TrainSettings(**FAST))


def test_out_of_memory_says_which_batch_size_to_try(tiny_data: dict) -> None:
    model = make_tiny_bert()
    model.register_forward_pre_hook(lambda *_: torch.empty(2**60))  # the allocator's own refusal
    with pytest.raises(TrainingError, match="with batches of 8 rows: try batch_size=4 with accumulation=2"):
        fit(model, tiny_data, TrainSettings(**FAST))


def test_nothing_to_train_is_refused(tiny_data: dict) -> None:
    with pytest.raises(TrainingError, match="all parameters are frozen"):
        fit(make_tiny_bert().requires_grad_(False), tiny_data, TrainSettings(**FAST))


@pytest.mark.parametrize("bad", [{"lr": 0}, {"lr": 2}, {"warmup": 1}, {"batch_size": 0}, {"learning_rate": 1e-3}])
def test_settings_refuse_what_is_out_of_bounds_or_unknown(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainSettings(**bad)


# What fit leaves ----------------------------------------------------------------------------------------------


def test_it_learns_and_ends_with_the_best_epoch() -> None:
    data = {"train": make_rows(400), "validation": make_rows(200, seed=1)}
    model = make_tiny_bert()
    before = evaluate(model, data["validation"])
    assert before.loss == pytest.approx(math.log(2), abs=0.1)
    history = fit(model, data, TrainSettings(lr=3e-3, num_epochs=8, batch_size=16, schedule="constant"))
    after = evaluate(model, data["validation"])
    scores = [epoch["validation_accuracy"] for epoch in history.epochs]
    assert after.accuracy == max(scores) > 0.9
    assert history.best_epoch == 1 + scores.index(max(scores))
    assert history.trainable_parameters == sum(p.numel() for p in model.parameters())


def test_early_stopping_ends_a_run_that_does_not_improve() -> None:
    data = {"train": make_rows(40), "validation": make_rows(40, seed=1)}
    settings = TrainSettings(lr=1e-6, num_epochs=30, batch_size=8)
    history = fit(make_tiny_bert(dropout=0), data, settings, callbacks=[EarlyStopping(patience=2)])
    assert history.ended == "stopped"
    assert len(history.epochs) == history.best_epoch + 2
    with pytest.raises(ValueError, match="watches the validation rows"):
        fit(make_tiny_bert(), {"train": make_rows(8)}, settings, callbacks=[EarlyStopping()])


def test_frozen_parameters_stay(tiny_data: dict) -> None:
    model = make_tiny_bert()
    model.bert.requires_grad_(False)
    before = weights_of(model.bert).clone()
    history = fit(model, tiny_data, TrainSettings(**FAST))
    assert torch.equal(before, weights_of(model.bert))
    assert history.trainable_parameters == 2 * 32 + 2


def test_mixed_precision_leaves_a_plain_model(tiny_data: dict) -> None:
    """bf16 runs, trains nearly as fp32 does, and neither the model nor the next run keeps it."""
    losses = {}
    for precision in ("fp32", "bf16", "fp32"):
        model = make_tiny_bert(dropout=0)
        losses.setdefault(precision, []).append(
            [step["loss"] for step in fit(model, tiny_data, TrainSettings(**FAST, precision=precision)).steps]
        )
        assert not hasattr(model, "_original_forward")
        assert model(input_ids=torch.tensor([[1, 7]])).logits.dtype == torch.float32
    assert losses["fp32"][0] == losses["fp32"][1] != losses["bf16"][0]
    np.testing.assert_allclose(losses["bf16"][0], losses["fp32"][0], atol=0.05)


def test_evaluate_gives_what_a_plain_forward_gives_in_the_order_of_the_rows() -> None:
    model, rows = make_tiny_bert().train(), make_rows(37)
    evaluation = evaluate(model, rows, batch_size=8)
    assert model.training
    model.eval()
    for row, probabilities in zip(rows, evaluation.probabilities, strict=True):
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        np.testing.assert_allclose(logits.softmax(-1).detach()[0], probabilities, atol=1e-6)
    assert evaluation.labels.tolist() == [row["labels"] for row in rows]
    nll = -np.log(evaluation.probabilities[np.arange(37), evaluation.labels]).mean()
    assert evaluation.loss == pytest.approx(nll, abs=1e-6)


def test_batches_hold_each_row_once_and_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, size=1003)
    first, second = (training_batches(lengths, 16, seed=0, epoch=epoch) for epoch in (0, 1))
    assert sorted(np.concatenate(first)) == list(range(1003))
    assert not np.array_equal(first[0], second[0])
    padded = sum(len(batch) * lengths[batch].max() for batch in first)
    assert padded < 1.05 * lengths.sum()
