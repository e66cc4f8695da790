"""Cost of training on a feature cache: ``cache_frozen_layers`` and ``fit`` against the ``Trainer`` of transformers.

Both train the same layers of the same network on the same rows for the same number of steps, in batches of 16 of
similar length, and evaluate after each epoch. Each run is made in its own process, so that its peak memory can be
measured. Its time includes filling the cache, but not loading. In each round the two run one after the other on each
task; the figures are medians over the rounds of the ratio within a round. Before that, the losses of each step are
compared, without dropout and on the same batches: a difference above 1e-4 ends the script. Leave the machine idle;
about 7 minutes per round.

    python benchmarks/feature_cache.py [--rounds 3] [--rows 1000]
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import numpy as np
from processes import in_a_process

VARIANTS = ("ftkit", "Trainer")
# what trains (3 layer groups: the last two blocks and the head), peak learning rate, epochs
TASKS = {
    "linear_probe_3_epochs": ("classifier.*", 1e-2, 3),
    "linear_probe_20_epochs": ("classifier.*", 1e-2, 20),
    "last_2": (3, 1e-4, 4),
}
BATCH_SIZE, EVAL_BATCH_SIZE, MAX_LENGTH, VALIDATION_ROWS, SEED = 16, 64, 64, 200, 0
LOSS_TOLERANCE = 1e-4


def prepare(train: int | str, num_rows: int, dropout: float | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """The network, frozen except for ``train``, its tokenizer, and the rows by split."""
    from ftkit.data.text import encode, load_text
    from ftkit.models.loading import load_classifier
    from ftkit.training.freezing import freeze

    splits = load_text("movie-sentiment", train=num_rows, validation=VALIDATION_ROWS, test=1)
    names = splits["train"].features["label"].names
    model, tokenizer = load_classifier("minilm", names, dropout=dropout, seed=SEED)
    rows = encode(splits, tokenizer, max_length=MAX_LENGTH)
    return freeze(model, train), tokenizer, {split: rows[split] for split in ("train", "validation")}


def make_settings(lr: float, num_epochs: int) -> Any:
    """Settings equal to the defaults of Trainer: no warm-up, no weight decay, clipping at norm 1, linear decay to 0."""
    from ftkit.training.state import TrainSettings

    return TrainSettings(lr=lr, num_epochs=num_epochs, batch_size=BATCH_SIZE, weight_decay=0, warmup=0, seed=SEED)


def make_arguments(folder: str, lr: float, num_epochs: int, **options: Any) -> Any:
    """Arguments of Trainer for the same run, and further ``options``."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder, learning_rate=lr, num_train_epochs=num_epochs, per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=EVAL_BATCH_SIZE, seed=SEED, report_to="none", save_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip


def run(variant: str, task: str, num_rows: int) -> dict[str, float]:
    """Seconds and peak memory of one task in one variant, and the median seconds of an epoch after the first."""
    from ftkit.training.monitor import Meter

    train, lr, num_epochs = TASKS[task]
    model, tokenizer, rows = prepare(train, num_rows)
    ends: list[float] = []  # times at which an epoch and its evaluation ended
    if variant == "ftkit":
        from ftkit.training.callbacks import Callback
        from ftkit.training.feature_cache import cache_frozen_layers
        from ftkit.training.loop import fit

        class Clock(Callback):
            def on_epoch(self, run: Any) -> None:
                ends.append(time.perf_counter())

        with Meter() as meter:
            upper, cached = cache_frozen_layers(model, rows)
            history = fit(upper, cached, make_settings(lr, num_epochs), callbacks=[Clock()])
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
    """Largest difference between the two losses of a step, without dropout and on the same batches."""
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
        arguments = make_arguments(folder, lr, 1, logging_steps=1, use_cpu=True)  # the batches of all epochs
        trainer = SameBatches(model=model, args=arguments, train_dataset=rows["train"])
        trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(np.abs(np.subtract(ours, theirs)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--variant", choices=[*VARIANTS, "losses"], help=argparse.SUPPRESS)  # one run
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant == "losses":
        train, lr, _ = TASKS[arguments.task]
        print(json.dumps({"loss_difference": loss_difference(train, lr, arguments.rows)}))
        return
    if arguments.variant:
        print(json.dumps(run(arguments.variant, arguments.task, arguments.rows)))
        return

    def call(variant: str, task: str) -> dict[str, float]:
        result = in_a_process(__file__, ["--variant", variant, "--task", task, "--rows", str(arguments.rows)])
        print(f"{task:>22} {variant:>7}: {result}", flush=True)
        return result

    differences = [call("losses", task)["loss_difference"] for task in ("linear_probe_3_epochs", "last_2")]
    difference = float(np.max(differences))
    if not difference <= LOSS_TOLERANCE:
        raise SystemExit(
            f"The losses of a step differ by {difference:.1e}, more than {LOSS_TOLERANCE:g}: "
            "ftkit and Trainer do not compute the same, so their times cannot be compared."
        )
    results: dict[tuple[str, str], list[dict[str, float]]] = {(v, task): [] for v in VARIANTS for task in TASKS}
    for turn in range(arguments.rounds):
        for task in TASKS:
            for variant in VARIANTS if turn % 2 == 0 else reversed(VARIANTS):  # neither always has a cool machine
                results[variant, task].append(call(variant, task))

    def paired(task: str, key: str) -> float:
        """Median over rounds of the figure of Trainer, divided by that of ftkit."""
        pairs = zip(results["Trainer", task], results["ftkit", task], strict=True)
        return statistics.median(theirs[key] / ours[key] for theirs, ours in pairs)

    def typical(variant: str, task: str, key: str) -> float:
        return round(statistics.median(result[key] for result in results[variant, task]), 3)

    figures = {
        "linear_probe_speedup_3_epochs": round(paired("linear_probe_3_epochs", "seconds"), 2),
        "linear_probe_speedup_20_epochs": round(paired("linear_probe_20_epochs", "seconds"), 2),
        "linear_probe_later_epoch_speedup": round(paired("linear_probe_20_epochs", "later_epoch_seconds"), 2),
        "last_2_later_epoch_speedup": round(paired("last_2", "later_epoch_seconds"), 2),
        "peak_memory_ratio": round(1 / min(paired(task, "peak_rss_mib") for task in TASKS), 3),  # of the worst task
        "loss_difference": difference,
    }
    for variant in VARIANTS:
        for task in TASKS:
            for key in ("seconds", "later_epoch_seconds", "peak_rss_mib"):
                figures[f"{variant.lower()}_{task}_{key}"] = typical(variant, task, key)
    print(json.dumps({**figures, "steps_an_epoch": -(-arguments.rows // BATCH_SIZE), "rounds": arguments.rounds}))


if __name__ == "__main__":
    main()
