"""Cost of what surrounds a kept model: ``ftkit predict``, and a run on a cluster.

``ftkit predict`` is compared with a plain transformers ``pipeline`` with batches of 32. Both classify the texts of the
same file with the same kept model (minilm with a new head) and write a CSV file with the text, the predicted class and
the probability of each class. The texts are of mixed length, up to the 512 tokens that the model reads: equally many
sentences of film reviews, tweets, news wires and news articles, in random order. The time is from the file to the CSV
file; loading the model is not timed. In each round the two run one after the other in this process; the figure is the
median over the rounds of the ratio within a round. Probabilities that differ by more than 1e-5 end the script.

A run on a cluster is compared with one with ``--jobs``.

Leave the machine idle. Takes about 6 minutes.

    python benchmarks/kept_model.py [--rounds 3] [--rows 400]
"""

import argparse
import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_notebook

SOURCES = ("movie-sentiment", "airline-tweets", "reuters8", "bbc-topics")
NAMES = ("negative", "positive")
MAX_TOKENS, BATCH_SIZE, SEED = 512, 32, 0
TOLERANCE = 1e-5

CLUSTER_ROUNDS = 3
RUNS = 4  # of a grid
AT_A_TIME = 2

PARAMETERS = 'seed: int = 0\ntier: str = "cpu"'
SCORES = """
from ftkit.lab.results import save_metrics
path = save_metrics({"seed": seed}, {"full": {"accuracy": 0.5, "ci95": [0.4, 0.6], "seeds": [seed]}})
"""


def keep_model(folder: Path) -> None:
    """Save minilm with a new head, whose weights are large enough for probabilities that differ."""
    import torch

    from ftkit.models.loading import load_classifier, save

    model, tokenizer = load_classifier("minilm", NAMES, seed=SEED)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    tokenizer.model_max_length = MAX_TOKENS
    save(model, tokenizer, folder)


def write_texts(path: Path, num_rows: int) -> None:
    """Write a CSV file of texts: a quarter from each source, in random order."""
    from ftkit.data.text_readers import read_asset

    rng = np.random.default_rng(SEED)
    texts = []
    for name in SOURCES:
        all_texts = read_asset(name)[0]["text"].str.strip()
        texts += all_texts[all_texts != ""].sample(num_rows // len(SOURCES), random_state=SEED).tolist()
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([texts[i]] for i in rng.permutation(len(texts)))])


def with_ftkit(model: Any, source: Path, out: Path) -> None:
    from ftkit.lab.kept import predicting

    predicting.load_kept = lambda folder: model  # loading is not timed
    with contextlib.redirect_stderr(io.StringIO()):
        predicting.predict_file("", source, out)


def with_pipeline(classify: Any, source: Path, out: Path) -> None:
    with source.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    found = classify(texts, batch_size=BATCH_SIZE, truncation=True, top_k=None)
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "predicted", *(f"p({name})" for name in NAMES)])
        for text, scores in zip(texts, found, strict=True):
            by_name = {score["label"]: score["score"] for score in scores}
            writer.writerow([text, scores[0]["label"], *(by_name[name] for name in NAMES)])


def probabilities(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8", newline="") as file:
        return np.array([[float(row[f"p({name})"]) for name in NAMES] for row in csv.DictReader(file)])


def predict_rows(num_rows: int, rounds: int) -> dict[str, float]:
    """Rows per second of both, and their ratio."""
    from transformers import pipeline
    from transformers.utils import logging

    from ftkit.lab.kept.loading import load_kept

    logging.set_verbosity_error()  # the pipeline recommends a Dataset, which batches in the same order
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keep_model(folder / "model")
        write_texts(folder / "texts.csv", num_rows)
        model = load_kept(folder / "model")
        classify = pipeline("text-classification", model=str(folder / "model"), device=model.model.device)
        runs: dict[str, Callable[[], None]] = {
            "ftkit": lambda: with_ftkit(model, folder / "texts.csv", folder / "ftkit.csv"),
            "pipeline": lambda: with_pipeline(classify, folder / "texts.csv", folder / "pipeline.csv"),
        }
        model.probabilities(["a film"] * 8)
        classify(["a film"] * 8)
        speeds: dict[str, list[float]] = {variant: [] for variant in runs}
        for turn in range(rounds):
            for variant in list(runs) if turn % 2 == 0 else reversed(runs):  # so that neither always has a cool machine
                start = time.perf_counter()
                runs[variant]()
                speeds[variant].append(num_rows / (time.perf_counter() - start))
                print(f"{variant:>8}: {speeds[variant][-1]:.1f} rows per second", flush=True)
        difference = float(np.abs(probabilities(folder / "ftkit.csv") - probabilities(folder / "pipeline.csv")).max())
    if not difference <= TOLERANCE:
        raise SystemExit(
            f"The probabilities differ by {difference:.1e}, more than {TOLERANCE:g}: ftkit and transformers do not "
            "compute the same, so their times cannot be compared."
        )
    ratios = [ours / theirs for ours, theirs in zip(speeds["ftkit"], speeds["pipeline"], strict=True)]
    return {
        "predict_rows_ratio": round(median(ratios), 2),
        "predict_rows_per_second": round(median(speeds["ftkit"]), 1),
        "pipeline_rows_per_second": round(median(speeds["pipeline"]), 1),
        "probability_difference": difference,
    }


@contextlib.contextmanager
def local_cluster(folder: Path) -> Iterator[str]:
    """A scheduler and as many workers as runs go at a time, each a process of its own; gives the address."""
    from distributed import Client

    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    file = folder / "scheduler.json"
    listening = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    processes = [subprocess.Popen([*dask, "scheduler", *listening], **quiet)]
    try:
        while not file.exists():
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        worker = [*dask, "worker", address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(folder)]
        processes += [subprocess.Popen(worker, **quiet) for _ in range(AT_A_TIME)]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(AT_A_TIME)
        yield address
    finally:
        for process in processes:
            process.terminate()  # a worker takes its own processes with it
        for process in processes:
            process.wait()


def grid_seconds(notebook: Path, out: Path, *where: str) -> float:
    """Seconds that a grid of runs takes which do nothing, with the start of the command."""
    command = [sys.executable, "-m", "ftkit.cli", "run", str(notebook), "-p", f"seed=1..{RUNS}", "--out", str(out)]
    start = time.perf_counter()
    subprocess.run([*command, *where], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def cluster_overhead_seconds(folder: Path) -> float:
    """Median over rounds of the seconds by which a run on a cluster takes longer than one with ``--jobs``.

    Both run the same grid, equally many runs at a time, on this machine.
    """
    notebook = folder / "trivial.ipynb"
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[parameters, new_code_cell(SCORES)]), notebook)
    overheads = []
    with local_cluster(folder) as address:
        options = {"cluster": ("--scheduler", address), "jobs": ("--jobs", str(AT_A_TIME))}
        for i in range(CLUSTER_ROUNDS):
            order = sorted(options, reverse=bool(i % 2))
            seconds = {name: grid_seconds(notebook, folder / f"{i}-{name}", *options[name]) for name in order}
            print(
                f"{RUNS} runs: {seconds['cluster']:.1f} s on a cluster, {seconds['jobs']:.1f} s with --jobs", flush=True
            )
            overheads.append((seconds["cluster"] - seconds["jobs"]) / RUNS)
    return median(overheads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400)
    arguments = parser.parse_args()
    if os.getloadavg()[0] > 0.5:
        print("The machine is not idle: these figures will be wrong.", file=sys.stderr)
    figures = predict_rows(arguments.rows, arguments.rounds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        figures["cluster_overhead_seconds"] = round(cluster_overhead_seconds(Path(folder)), 3)
    print(json.dumps({**figures, "rows": arguments.rows, "rounds": arguments.rounds}))


if __name__ == "__main__":
    main()
