"""ftkit's ``fit`` against transformers' ``Trainer``: the same model, rows, steps and seed, runs in alternation.

Three arms, each in a process of its own so that peak memory is its own: ``fit``; Trainer on rows padded to 128
tokens, as tutorials do; Trainer with its own grouping by length. Medians over the rounds. About 3 minutes a round.

    python benchmarks/fit_vs_trainer.py [--rounds 3] [--rows 640]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

ARMS = ("fit", "padded", "grouped")
BATCH_SIZE, LR, MAX_LENGTH, SEED = 16, 1e-4, 128, 0


def train(arm: str, num_rows: int) -> dict[str, float]:
    """One epoch of one arm; the seconds and the peak memory are of training, loading excluded."""
    from ftkit.data.text import encode, load_text
    from ftkit.models.loading import load_classifier
    from ftkit.training.loop import fit
    from ftkit.training.monitor import Meter
    from ftkit.training.state import TrainSettings

    splits = load_text("movie-sentiment", train=num_rows, validation=16, test=16)
    model, tokenizer = load_classifier("minilm", splits["train"].features["label"].names, seed=SEED)
    rows = encode(splits, tokenizer, max_length=MAX_LENGTH)["train"]
    if arm == "fit":
        how = TrainSettings(lr=LR, num_epochs=1, batch_size=BATCH_SIZE, weight_decay=0, warmup=0, seed=SEED)
        with Meter() as meter:
            history = fit(model, {"train": rows}, how)
        steps, loss = len(history.steps), sum(step["loss"] for step in history.steps) / len(history.steps)
    else:
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

        grouping = {"train_sampling_strategy": "group_by_length"} if arm == "grouped" else {}
        padding = {"padding": "max_length", "max_length": MAX_LENGTH} if arm == "padded" else {"padding": "longest"}
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
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # one run, in a process of its own
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(train(arguments.arm, arguments.rows)))
        return
    results = {arm: [] for arm in ARMS}
    for turn in range(arguments.rounds):
        for arm in ARMS[turn % 3 :] + ARMS[: turn % 3]:  # no arm always comes first on a cool machine
            command = [sys.executable, __file__, "--arm", arm, "--rows", str(arguments.rows)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1} {arm:>8}: {results[arm][-1]}", flush=True)

    def paired(arm: str, key: str) -> float:
        """Median over rounds of theirs divided by ours."""
        return statistics.median(t[key] / o[key] for t, o in zip(results[arm], results["fit"], strict=True))

    print(
        json.dumps(
            {
                "speedup_vs_padded": round(paired("padded", "seconds"), 3),
                "speedup_vs_grouped": round(paired("grouped", "seconds"), 3),
                "peak_memory_ratio": round(1 / min(paired(arm, "peak_rss_mib") for arm in ("padded", "grouped")), 3),
                **{f"{arm}_seconds": round(statistics.median(r["seconds"] for r in results[arm]), 2) for arm in ARMS},
                **{f"{arm}_mib": round(statistics.median(r["peak_rss_mib"] for r in results[arm])) for arm in ARMS},
                "steps": results["fit"][0]["steps"],
                "rounds": arguments.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
