"""Seconds and peak memory of each step from a file to scores, at 10,000, 100,000 and 1,000,000 rows.

The file is a CSV of texts of 10 to 40 words (25 on average): pieces of the real sentences of `movie-sentiment`, with a
class drawn at random. Each step runs in a process of its own, so that its peak memory (``ru_maxrss``) can be measured;
what a step needs from earlier ones is made in the same process, before the clock starts, and counts in its memory.

    load      ``load_text``: read, find duplicates, split
    encode    ``encode`` of all splits with the tokenizer of `minilm`, into files
    part      ``encode`` of 1,000 rows of the training split
    evaluate  ``evaluate`` of all training rows (about 62 % of the file) with the smallest honest network: a BERT of one
              block and 32 dimensions with random weights, because `minilm` itself would take an hour
    predict   ``predict_file`` of the whole file with the same network
    bare      the same tokenizer over the same texts in batches of 1,000, its columns thrown away

``encode_ratio`` is the median over rounds of the rows per second of `encode`, divided by those of `bare`, at
``--ratio-rows`` rows: both run in the same process, one after the other. ``growth_of_*_seconds`` is the time of a row
at the largest size divided by that at the size before: 1 is linear. Leave the machine idle; about 20 minutes.

    python benchmarks/scale.py [--sizes 10000 100000 1000000] [--ratio-rows 100000] [--rounds 3]
"""

import argparse
import contextlib
import csv
import io
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from processes import in_a_process

STEPS = ("load", "encode", "part", "evaluate", "predict", "bare")
MAX_LENGTH, BATCH, PART, SEED = 128, 1000, 1000, 0


def write_file(path: Path, num_rows: int) -> None:
    """Write the rows, the same ones for the same number."""
    from ftkit.data.text_readers import read_asset

    words = " ".join(read_asset("movie-sentiment")[0]["text"]).split()
    rng = random.Random(SEED)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for _ in range(num_rows):
            size = rng.randint(10, 40)
            start = rng.randrange(len(words) - size)
            rows.writerow([" ".join(words[start : start + size]), rng.choice(["negative", "positive"])])


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from ftkit.data.assets import registry

    return AutoTokenizer.from_pretrained(registry.fetch("minilm"))


def make_network(tokenizer: Any) -> Any:
    """A BERT of one block with random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        num_labels=2, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tokenize(tokenizer: Any, texts: Sequence[str]) -> None:
    for start in range(0, len(texts), BATCH):
        tokenizer(texts[start : start + BATCH], truncation=True, max_length=MAX_LENGTH)


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def run(step: str, path: Path) -> dict[str, float]:
    """Seconds, rows and peak memory of one step."""
    from ftkit.data.text import encode, load_text

    if step == "load":
        start = time.perf_counter()
        splits = load_text(path)
        seconds, rows = time.perf_counter() - start, sum(map(len, splits.values()))
    elif step == "bare":
        tokenizer = load_tokenizer()
        with path.open(newline="", encoding="utf-8") as file:
            texts = [row[0] for row in csv.reader(file)][1:]
        seconds, rows = seconds_of(tokenize, tokenizer, texts), len(texts)
    elif step == "predict":
        from ftkit.lab.kept.predicting import predict_file
        from ftkit.models.loading import save

        tokenizer = load_tokenizer()
        with tempfile.TemporaryDirectory() as folder:
            save(make_network(tokenizer), tokenizer, f"{folder}/model")
            start = time.perf_counter()
            rows = predict_file(f"{folder}/model", path, f"{folder}/predictions.csv")
            seconds = time.perf_counter() - start
    else:
        tokenizer, splits = load_tokenizer(), load_text(path)
        if step == "part":
            splits = {"train": splits["train"].take(PART)}
        start = time.perf_counter()
        encoded = encode(splits, tokenizer, max_length=MAX_LENGTH)
        seconds, rows = time.perf_counter() - start, sum(map(len, encoded.values()))
        if step == "evaluate":
            from ftkit.training.loop import evaluate

            network, splits, rows = make_network(tokenizer), None, len(encoded["train"])
            seconds = seconds_of(evaluate, network, encoded["train"])
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(seconds, 3),
        "rows": rows,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1),
    }


def encode_ratio(path: Path, rounds: int) -> dict[str, Any]:
    """Rows per second of ``encode`` divided by those of the bare tokenizer, in each round."""
    from ftkit.data.text import encode, load_text

    tokenizer, splits = load_tokenizer(), load_text(path)
    texts = [text for split in splits.values() for text in split["text"][:]]
    variants = {"encode": (encode, splits, tokenizer), "bare": (tokenize, tokenizer, texts)}
    encode({"train": splits["train"].take(PART)}, tokenizer)  # loads what is loaded at the first call
    ratios = []
    for turn in range(rounds):
        order = list(variants) if turn % 2 == 0 else list(variants)[::-1]  # neither always has a cool machine
        seconds = {name: seconds_of(*variants[name]) for name in order}
        ratios.append(seconds["bare"] / seconds["encode"])
    return {"encode_ratio": round(statistics.median(ratios), 3), "encode_ratios": [round(r, 3) for r in ratios]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--ratio-rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", choices=[*STEPS, "ratio"], help=argparse.SUPPRESS)  # one run
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        with contextlib.redirect_stdout(io.StringIO()):
            ratio = arguments.step == "ratio"
            result = encode_ratio(arguments.file, arguments.rounds) if ratio else run(arguments.step, arguments.file)
        print(json.dumps(result))
        return

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {size: Path(folder) / f"{size}.csv" for size in sorted({*arguments.sizes, arguments.ratio_rows})}
        for size, path in files.items():
            write_file(path, size)
        figures |= in_a_process(
            __file__, ["--step", "ratio", "--file", str(files[arguments.ratio_rows]), "--rounds", str(arguments.rounds)]
        )
        print(f"{'ratio':>9} {arguments.ratio_rows:>9,} rows: {figures}", flush=True)
        results = {}
        for size in arguments.sizes:
            for step in STEPS:
                results[step, size] = result = in_a_process(__file__, ["--step", step, "--file", str(files[size])])
                figures |= {f"{step}_{size}_seconds": result["seconds"], f"{step}_{size}_peak_mib": result["peak_mib"]}
                print(f"{step:>9} {size:>9,} rows: {result}", flush=True)
    largest = arguments.sizes[-1]
    peak = max(results[step, largest]["peak_mib"] for step in STEPS if step != "bare")
    figures["million_rows_peak_mib" if largest == 1_000_000 else "largest_peak_mib"] = peak
    for before in arguments.sizes[-2:-1]:
        for step in ("load", "encode", "evaluate", "predict"):
            small, large = results[step, before], results[step, largest]
            per_row = large["seconds"] / large["rows"] / (small["seconds"] / small["rows"])
            figures[f"growth_of_{step}_seconds"] = round(per_row, 2)
            figures[f"growth_of_{step}_memory"] = round(large["peak_mib"] / small["peak_mib"], 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
