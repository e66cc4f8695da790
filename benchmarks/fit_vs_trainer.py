"""Compare ``fit`` with the ``Trainer`` of transformers: same model, rows, number of steps and seed.

There are three variants, each in its own process so that its peak memory can be measured: ``fit``; Trainer on rows
padded to 128 tokens, as in tutorials; Trainer with its own grouping by length. They run in alternation, and the figures
are medians over the rounds. About 3 minutes per round.

    python benchmarks/fit_vs_trainer.py [--rounds 3] [--rows 640]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

VARIANTS = ("fit", "padded", "grouped")
BATCH_SIZE, LR, MAX_LENGTH, SEED = 16, 1e-4, 128, 0


def train(variant: str, num_rows: int) -> dict[str, float]:
    """Seconds and peak memory of one epoch of a variant, without loading; number of steps and mean loss."""
    from ftkit.data.text import encode, load_text
    from ftkit.models.loading import load_classifier
    from ftkit.training.loop import fit
    from ftkit.training.monitor import Meter
    from ftkit.training.state import TrainSettings

    splits = load_text("movie-sentiment", train=num_rows, validation=16, test=16)
    model, tokenizer = load_classifier("minilm", splits["train"].features["label"].names, seed=SEED)
    rows = encode(splits, tokenizer, max_length=MAX_LENGTH)["train"]
    if variant == "fit":
        how = TrainSettings(lr=LR, num_epochs=1, batch_size=BATCH_SIZE, weight_decay=0, warmup=0, seed=SEED)
        with Meter() as meter:
            history = fit(model, {"train": rows}, how)
        steps, loss = len(history.steps), sum(step["loss"] for step in history.steps) / len(history.steps)
    else:
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

        grouping = {"train_sampling_strategy": "group_by_length"} if variant == "grouped" else {}
        padding = {"padding": "max_length", "max_length": MAX_LENGTH} if variant == "padded" else {"padding": "longest"}
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, learning_rate=LR, num_train_epochs=1, per_device_train_batch_size=BATCH_SIZE, seed=SEED,
                report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, **grouping,
            )  # fmt: skip
            collator = DataCollatorWithPadding(tokenizer, **padding)
            trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collator)
            with Meter() as meter:
                result = trainer.train()
            steps, loss = result.global_step, result.training_loss
    return {"seconds": meter.seconds, "peak_rss_mib": meter.peak_rss_mib, "steps": steps, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # one run
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(train(arguments.variant, arguments.rows)))
        return
    results = {variant: [] for variant in VARIANTS}
    for turn in range(arguments.rounds):
        for variant in VARIANTS[turn % 3 :] + VARIANTS[: turn % 3]:  # so that no variant always has a cool machine
            command = [sys.executable, __file__, "--variant", variant, "--rows", str(arguments.rows)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1} {variant:>8}: {results[variant][-1]}", flush=True)

    def paired(variant: str, key: str) -> float:
        """Median over rounds of the figure of a variant of Trainer, divided by that of ``fit``."""
        return statistics.median(t[key] / o[key] for t, o in zip(results[variant], results["fit"], strict=True))

    print(
        json.dumps(
            {
                "speedup_vs_padded": round(paired("padded", "seconds"), 3),
                "speedup_vs_grouped": round(paired("grouped", "seconds"), 3),
                "peak_memory_ratio": round(1 / min(paired(v, "peak_rss_mib") for v in ("padded", "grouped")), 3),
                **{f"{v}_seconds": round(statistics.median(r["seconds"] for r in results[v]), 2) for v in VARIANTS},
                **{f"{v}_mib": round(statistics.median(r["peak_rss_mib"] for r in results[v])) for v in VARIANTS},
                "steps": results["fit"][0]["steps"],
                "rounds": arguments.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
