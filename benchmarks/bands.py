"""Measure the bands of tests/notebooks/bands.toml: where the score of seed 5 lies with a probability of 99 %.

Each notebook is run with the seeds 0 to 5, or more, at each tier of that file and with the parameters given there. The
band of a method is the prediction interval of Student's t for one more run, from the seeds other than 5, widened to
allow for rounding on other machines; the more seeds, the narrower it is. A method that trains nothing depends on the
seed only through the rows drawn, so its band lies around the score of seed 5. If a notebook's entry names another
``score`` than the accuracy, the band is of that score.

    python benchmarks/bands.py [smoke|cpu …] [--notebook NAME] [--num-seeds 6] [--write]
"""

import argparse
import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ftkit.lab.runs.notebooks import run_notebook

FILE = Path(__file__).parents[1] / "tests" / "notebooks" / "bands.toml"
FURTHER_SEED = 5
LEVEL = 0.99
ROUNDING = 0.01  # a machine that adds in another order classifies a few rows differently


def band(scores: list[float], trained: bool) -> tuple[float, float]:
    """Range in which the score of seed 5 is expected; ``scores`` are those of the seeds 0, 1, …"""
    others = scores[:FURTHER_SEED] + scores[FURTHER_SEED + 1 :]
    if not trained:
        return scores[FURTHER_SEED] - ROUNDING, scores[FURTHER_SEED] + ROUNDING
    n = len(others)
    reach = stats.t.ppf(0.5 + LEVEL / 2, n - 1) * np.std(others, ddof=1) * np.sqrt(1 + 1 / n) + ROUNDING
    return float(np.mean(others) - reach), float(np.mean(others) + reach)


def measure(notebook: str, tier: str, entry: dict[str, Any], num_seeds: int) -> dict[str, dict[str, Any]]:
    """The band of each method that was run: not of the majority, of guessing, or of methods taken from a study."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = {"seed": 0, "num_seeds": num_seeds}
        run = run_notebook(notebook, entry["parameters"] | seeds, tier=tier, out=folder)
    if run.error:
        raise SystemExit(f"{notebook} at the {tier} tier: {run.error}")
    bands = {}
    for name, method in run.metrics.items():
        if name not in ("majority", "guessing") and not method.get("recorded"):
            by_seed = method["by_seed" if entry["score"] == "accuracy" else f"{entry['score']}_by_seed"]
            low, high = band(by_seed, trained=method["trainable_parameters"] > 0)
            bands[name] = {"low": low, "high": high, "by_seed": by_seed}
    return bands


def as_toml(declared: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Text of the file; lists, strings and numbers are written in TOML as in JSON."""
    lines = [FILE.read_text(encoding="utf-8").partition("\n[")[0].rstrip()]
    for notebook, tiers in declared.items():
        for tier, entry in tiers.items():
            lines += ["", f"[{notebook}.{tier}]"]
            lines += [f"{name} = {json.dumps(entry[name])}" for name in ("score", "learn_nothing")]
            lines += ["", f"[{notebook}.{tier}.parameters]"]
            lines += [f"{name} = {json.dumps(value)}" for name, value in entry["parameters"].items()]
            for method, found in entry["bands"].items():
                lines += ["", f"[{notebook}.{tier}.bands.{method}]"]
                lines += [f"low = {found['low']:.4f}", f"high = {found['high']:.4f}"]
                lines += [f"by_seed = {json.dumps(found['by_seed'])}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiers", nargs="*", help="all tiers by default")
    parser.add_argument("--notebook", help="all notebooks by default")
    least = FURTHER_SEED + 1
    parser.add_argument("--num-seeds", type=int, default=least, help=f"number of seeds, from 0 on; {least} or more")
    parser.add_argument("--write", action="store_true", help="replace the bands in tests/notebooks/bands.toml")
    arguments = parser.parse_args()
    if arguments.num_seeds < least:
        parser.error(f"--num-seeds {arguments.num_seeds} leaves out seed {FURTHER_SEED}: give {least} or more.")
    declared = tomllib.loads(FILE.read_text(encoding="utf-8"))
    for notebook, tiers in declared.items():
        for tier, entry in tiers.items():
            entry.setdefault("bands", {})
            if tier in (arguments.tiers or tiers) and notebook == (arguments.notebook or notebook):
                entry["bands"] = measure(notebook, tier, entry, arguments.num_seeds)
    if arguments.write:
        FILE.write_text(as_toml(declared), encoding="utf-8")
    measured = {
        f"{notebook}/{tier}": {method: (found["low"], found["high"]) for method, found in entry["bands"].items()}
        for notebook, tiers in declared.items()
        for tier, entry in tiers.items()
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
