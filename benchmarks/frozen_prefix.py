"""What a frozen network costs: ``freeze``, ``cache_frozen_layers`` and ``fit`` against transformers' ``Trainer``.

Both train the same layers of the same network on the same rows for as many steps, in batches of 16 grouped by length,
and evaluate after each epoch. Every run is really made, in a process of its own, so that its peak memory is its own;
the time to cache the prefix counts, loading does not. A round runs the two one after the other for each task; the
figures are medians over the rounds of their ratio. Before that, without dropout and on the same batches, the losses of
each step are compared: a difference above 1e-4 ends the script. Leave the machine idle; about 7 minutes a round.

    python benchmarks/frozen_prefix.py [--rounds 3] [--rows 1000]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

ARMS = ("ftkit", "Trainer")
# what trains (3 groups: the last two blocks and the head), peak learning rate, epochs
TASKS = {
    "linear_probe_3_epochs": ("classifier.*", 1e-2, 3),
    "linear_probe_20_epochs": ("classifier.*", 1e-2, 20),
    "last_2": (3, 1e-4, 4),
}
BATCH_SIZE, EVAL_BATCH_SIZE, MAX_LENGTH, VALIDATION_ROWS, SEED = 16, 64, 64, 200, 0
LOSS_TOLERANCE = 1e-4


def prepare(train: int | str, num_rows: int, dropout: float | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """The network with all frozen but ``train``, its tokenizer, and the rows by split."""
    from ftkit.data.text import encode, load_text
    from ftkit.models.loading import load_classifier
    from ftkit.training.freezing import freeze

    splits = load_text("movie-sentiment", train=num_rows, validation=VALIDATION_ROWS, test=1)
    names = splits["train"].features["label"].names
    model, tokenizer = load_classifier("minilm", names, dropout=dropout, seed=SEED)
    rows = encode(splits, tokenizer, max_length=MAX_LENGTH)
    return freeze(model, train), tokenizer, {split: rows[split] for split in ("train", "validation")}


def make_settings(lr: float, num_epochs: int) -> Any:
    """As Trainer does by default: no warm-up, no weight decay; gradients are clipped at norm 1, the rate falls to 0."""
    from ftkit.training.state import TrainSettings

    return TrainSettings(lr=lr, num_epochs=num_epochs, batch_size=BATCH_SIZE, weight_decay=0, warmup=0, seed=SEED)


def make_arguments(folder: str, lr: float, num_epochs: int, **options: Any) -> Any:
    """Trainer's for the same run; ``options`` are further ones."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder, learning_rate=lr, num_train_epochs=num_epochs, per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=EVAL_BATCH_SIZE, seed=SEED, report_to="none", save_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip


def run(arm: str, task: str, num_rows: int) -> dict[str, float]:
    """One task in one arm: seconds and peak memory of the whole, and the median seconds of an epoch after the first."""
    from ftkit.training.monitor import Meter

    train, lr, num_epochs = TASKS[task]
    model, tokenizer, rows = prepare(train, num_rows)
    ends: list[float] = []  # of the epochs, their evaluation included
    if arm == "ftkit":
        from ftkit.training.callbacks import Callback
        from ftkit.training.feature_cache import cache_frozen_layers
        from ftkit.training.loop import fit

        class Clock(Callback):
            def on_epoch(self, run: Any) -> None:
                ends.append(time.perf_counter())

        with Meter() as meter:
            rest, cached = cache_frozen_layers(model, rows)
            history = fit(rest, cached, make_settings(lr, num_epochs), callbacks=[Clock()])
        steps, accuracy = len(history.steps), history.epochs[-1]["validation_accuracy"]
    else:
        from transformers import DataCollatorWithPadding, Trainer, TrainerCallback

        class Clock(TrainerCallback):
            def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
                ends.append(time.perf_counter())

        def metrics(prediction: Any) -> dict[str, float]:
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        with tempfile.TemporaryDirectory() as folder:
            options = {"train_sampling_strategy": "group_by_length", "eval_strategy": "epoch", "logging_strategy": "no"}
            trainer = Trainer(
                model=model,
                args=make_arguments(folder, lr, num_epochs, **options),
                data_collator=DataCollatorWithPadding(tokenizer),
                train_dataset=rows["train"],
                eval_dataset=rows["validation"],
                compute_metrics=metrics,
                callbacks=[Clock()],
            )
            with Meter() as meter:
                steps = trainer.train().global_step
            accuracy = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]["eval_accuracy"]
    return {
        "seconds": meter.seconds,
        "later_epoch_seconds": statistics.median(end - start for start, end in pairwise(ends)),
        "peak_rss_mib": meter.peak_rss_mib,
        "steps": steps,
        "accuracy": accuracy,
    }


def loss_difference(train: int | str, lr: float, num_rows: int, num_epochs: int = 3) -> float:
    """The largest difference between the two arms' losses of a step, without dropout and on the same batches."""
    import torch
    from transformers import Trainer

    from ftkit.training.batching import make_batch, row_lengths, training_batches
    from ftkit.training.feature_cache import cache_frozen_layers
    from ftkit.training.loop import fit

    model, _, rows = prepare(train, num_rows, dropout=0)
    history = fit(*cache_frozen_layers(model, rows), make_settings(lr, num_epochs))
    ours = [step["loss"] for step in history.steps]

    model, _, rows = prepare(train, num_rows, dropout=0)
    lengths = row_lengths(rows["train"])
    batches = [
        make_batch(model, rows["train"], indices, torch.device("cpu"))
        for epoch in range(num_epochs)
        for indices in training_batches(lengths, BATCH_SIZE, SEED, epoch)
    ]

    class SameBatches(Trainer):
        def get_train_dataloader(self) -> list[dict[str, torch.Tensor]]:
            return batches

    with tempfile.TemporaryDirectory() as folder:
        arguments = make_arguments(folder, lr, 1, logging_steps=1, use_cpu=True)  # one epoch of all the batches
        trainer = SameBatches(model=model, args=arguments, train_dataset=rows["train"])
        trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(np.abs(np.subtract(ours, theirs)).max())


def in_a_process(arguments: Sequence[str]) -> dict[str, float]:
    """What this script prints last when it is called so."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--arm", choices=[*ARMS, "losses"], help=argparse.SUPPRESS)  # one run, in a process of its own
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm == "losses":
        train, lr, _ = TASKS[arguments.task]
        print(json.dumps({"loss_difference": loss_difference(train, lr, arguments.rows)}))
        return
    if arguments.arm:
        print(json.dumps(run(arguments.arm, arguments.task, arguments.rows)))
        return

    def call(arm: str, task: str) -> dict[str, float]:
        result = in_a_process(["--arm", arm, "--task", task, "--rows", str(arguments.rows)])
        print(f"{task:>22} {arm:>7}: {result}", flush=True)
        return result

    differences = [call("losses", task)["loss_difference"] for task in ("linear_probe_3_epochs", "last_2")]
    difference = float(np.max(differences))
    if not difference <= LOSS_TOLERANCE:
        raise SystemExit(
            f"A step's losses differ by {difference:.1e}, more than {LOSS_TOLERANCE:g}: "
            "ftkit and Trainer do not train the same, and their times can't be compared."
        )
    results: dict[tuple[str, str], list[dict[str, float]]] = {(arm, task): [] for arm in ARMS for task in TASKS}
    for turn in range(arguments.rounds):
        for task in TASKS:
            for arm in ARMS if turn % 2 == 0 else reversed(ARMS):  # neither always comes first on a cool machine
                results[arm, task].append(call(arm, task))

    def paired(task: str, key: str) -> float:
        """Median over rounds of theirs divided by ours."""
        pairs = zip(results["Trainer", task], results["ftkit", task], strict=True)
        return statistics.median(theirs[key] / ours[key] for theirs, ours in pairs)

    def typical(arm: str, task: str, key: str) -> float:
        return round(statistics.median(result[key] for result in results[arm, task]), 3)

    figures = {
        "linear_probe_speedup_3_epochs": round(paired("linear_probe_3_epochs", "seconds"), 2),
        "linear_probe_speedup_20_epochs": round(paired("linear_probe_20_epochs", "seconds"), 2),
        "linear_probe_later_epoch_speedup": round(paired("linear_probe_20_epochs", "later_epoch_seconds"), 2),
        "last_2_later_epoch_speedup": round(paired("last_2", "later_epoch_seconds"), 2),
        "peak_memory_ratio": round(1 / min(paired(task, "peak_rss_mib") for task in TASKS), 3),  # of the worst task
        "loss_difference": difference,
    }
    for arm in ARMS:
        for task in TASKS:
            for key in ("seconds", "later_epoch_seconds", "peak_rss_mib"):
                figures[f"{arm.lower()}_{task}_{key}"] = typical(arm, task, key)
    print(json.dumps({**figures, "steps_an_epoch": -(-arguments.rows // BATCH_SIZE), "rounds": arguments.rounds}))


if __name__ == "__main__":
    main()
