"""Bands of tests/bands.toml, measured anew: where a further seed's score lies with 99 % probability.

Each notebook is run with the seeds 0 to 4 at each tier of that file, with the parameters that stand there, and the band of
a method is the prediction interval of Student's t for one more run, widened by what machines differ in rounding.

    python benchmarks/bands.py [smoke|cpu …] [--notebook NAME] [--write]
"""

import argparse
import json
import tempfile
import tomllib
from pathlib import Path

import numpy as np
from scipy import stats

from ftkit.runs import run_notebook

FILE = Path(__file__).parents[1] / "tests" / "bands.toml"
NUM_SEEDS = 5
LEVEL = 0.99
ROUNDING = 0.01  # a machine that sums in another order classifies a few rows differently


def band(accuracies: list[float]) -> tuple[float, float]:
    """Where one more seed's accuracy is expected, given those of n seeds."""
    n = len(accuracies)
    reach = stats.t.ppf(0.5 + LEVEL / 2, n - 1) * np.std(accuracies, ddof=1) * np.sqrt(1 + 1 / n) + ROUNDING
    return float(np.mean(accuracies) - reach), float(np.mean(accuracies) + reach)


def measure(notebook: str, tier: str, parameters: dict[str, object]) -> dict[str, list[float]]:
    """Accuracy of each method for each seed; the majority is no model, the tests work it out from the labels."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_notebook(notebook, parameters | {"seed": 0, "num_seeds": NUM_SEEDS}, tier=tier, out=folder)
    if run.error:
        raise SystemExit(f"{notebook} at the {tier} tier: {run.error}")
    return {name: method["by_seed"] for name, method in run.metrics.items() if name != "majority"}


def as_toml(declared: dict[str, dict[str, dict[str, object]]]) -> str:
    """The file's text; JSON's lists, strings and numbers are TOML's too."""
    lines = [FILE.read_text(encoding="utf-8").partition("\n[")[0].rstrip()]
    for notebook, tiers in declared.items():
        for tier, entry in tiers.items():
            lines += ["", f"[{notebook}.{tier}]", f"learn_nothing = {json.dumps(entry['learn_nothing'])}"]
            lines += ["", f"[{notebook}.{tier}.parameters]"]
            lines += [f"{name} = {json.dumps(value)}" for name, value in entry["parameters"].items()]
            for method, (low, high), by_seed in entry["bands"]:
                lines += ["", f"[{notebook}.{tier}.bands.{method}]", f"low = {low:.4f}", f"high = {high:.4f}"]
                lines += [f"by_seed = {json.dumps(by_seed)}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiers", nargs="*", help="all of them by default")
    parser.add_argument("--notebook", help="all of them by default")
    parser.add_argument("--write", action="store_true", help="replace the bands in tests/bands.toml")
    arguments = parser.parse_args()
    declared = tomllib.loads(FILE.read_text(encoding="utf-8"))
    for notebook, tiers in declared.items():
        for tier, entry in tiers.items():
            if tier not in (arguments.tiers or tiers) or notebook != (arguments.notebook or notebook):
                scores = {method: old["by_seed"] for method, old in entry.get("bands", {}).items()}
            else:
                scores = measure(notebook, tier, entry["parameters"])
            entry["bands"] = [(method, band(by_seed), by_seed) for method, by_seed in scores.items()]
    if arguments.write:
        FILE.write_text(as_toml(declared), encoding="utf-8")
    measured = {f"{n}/{t}": {m: ends for m, ends, _ in e["bands"]} for n, ts in declared.items() for t, e in ts.items()}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
