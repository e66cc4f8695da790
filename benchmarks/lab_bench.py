"""Cost of the lab: the panel around a training, `ftkit run` around a notebook, a second job at the same time.

Leave the machine idle. Takes about 15 minutes.

    python benchmarks/lab_bench.py
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import nbformat

ROUNDS = 3
NOTEBOOK = "01_full_fine_tuning"

# Run in its own process. As in the notebook, torch and the rest are imported already, but the widgets are not.
PANEL_SECONDS = """
import time
from ftkit import plots
from ftkit.data.text import load_text
from ftkit.lab.settings import FullFineTuning
from ftkit.training.loop import fit
settings = FullFineTuning.at("cpu")
start = time.perf_counter()
from ftkit.lab.widgets.panel import Panel
shown = Panel(settings, None)
shown._repr_mimebundle_()
print(time.perf_counter() - start)
"""


def panel_seconds() -> float:
    """Median seconds from the import of the panel until it can be sent to the browser."""
    command = [sys.executable, "-c", PANEL_SECONDS]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(ROUNDS)]
    return median(float(output.split()[-1]) for output in outputs)


def panel_overhead() -> float:
    """Median over rounds of the time of 100 steps in the panel, over that of the same `fit` without it.

    Both run as cells of an IPython shell. There is no kernel: messages to the browser are made, but not sent.
    """
    from IPython.core.interactiveshell import InteractiveShell

    from ftkit.data.text import encode, load_text
    from ftkit.lab.results import Outcome
    from ftkit.lab.settings import FullFineTuning
    from ftkit.lab.widgets.panel import Panel
    from ftkit.models.loading import load_classifier
    from ftkit.training.callbacks import Callback
    from ftkit.training.loop import evaluate, fit
    from ftkit.training.state import TrainSettings

    settings = FullFineTuning.at("cpu", rows=800, batch_size=16, num_epochs=2, num_seeds=1)
    splits = load_text(settings.dataset, train=settings.rows, validation=200, test=20)
    names = splits["train"].features["label"].names
    _, tokenizer = load_classifier(settings.model, names)
    encoded = encode(splits, tokenizer, max_length=settings.max_length)
    del encoded["test"]

    def train(settings: FullFineTuning, seed: int, callbacks: list[Callback]) -> Outcome:
        network, _ = load_classifier(settings.model, names, seed=seed)
        chosen = TrainSettings(lr=settings.lr, num_epochs=settings.num_epochs, batch_size=settings.batch_size)
        history = fit(network, encoded, chosen, callbacks=callbacks)
        return Outcome(seed, history, {"validation": evaluate(network, encoded["validation"])})

    shell = InteractiveShell.instance()
    panel = Panel(settings, train)

    def through_the_panel() -> float:
        panel.train_button.click()
        panel.thread.join()
        outcome = panel.runs[-1].outcomes[0]
        assert len(outcome.history.steps) == 100
        return outcome.history.seconds

    def alone() -> float:
        return train(settings, 0, []).history.seconds

    shell.push({"through_the_panel": through_the_panel, "alone": alone})
    ratios = []
    for i in range(ROUNDS):
        for run in ("through_the_panel", "alone") if i % 2 else ("alone", "through_the_panel"):
            shell.run_cell(f"{run}_seconds = {run}()").raise_error()
        with_panel, without = (shell.user_ns[f"{run}_seconds"] for run in ("through_the_panel", "alone"))
        ratios.append(with_panel / without)
        print(f"100 steps: {with_panel:.1f} s in the panel, {without:.1f} s without it", flush=True)
    return median(ratios)


def ftkit_run(out: Path, *options: str) -> float:
    """Seconds that one call of `ftkit run` takes at the smoke tier."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ftkit.cli", "run", NOTEBOOK, "--tier", "smoke", "--out", str(out), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def run_overhead_seconds(folder: Path) -> float:
    """Median seconds of `ftkit run --html`, without those in which a cell of the notebook is executed."""
    overheads = []
    for i in range(ROUNDS):
        total = ftkit_run(folder / str(i), "--html")
        executed = nbformat.read(next((folder / str(i)).glob("*/notebook.ipynb")), as_version=4)
        in_cells = sum(cell.metadata.papermill.get("duration") or 0 for cell in executed.cells)
        print(f"ftkit run: {total:.1f} s, {in_cells:.1f} s of them in cells", flush=True)
        overheads.append(total - in_cells)
    return median(overheads)


def two_jobs_throughput(folder: Path) -> float:
    """Median over rounds of the time of two runs one after the other, over that of two at the same time."""
    ratios = []
    for i in range(ROUNDS):
        order = (1, 2) if i % 2 else (2, 1)
        seconds = {n: ftkit_run(folder / f"{i}-{n}", "-p", "seed=0,1", "--jobs", str(n)) for n in order}
        print(f"two runs: {seconds[1]:.1f} s one after the other, {seconds[2]:.1f} s at the same time", flush=True)
        ratios.append(seconds[1] / seconds[2])
    return median(ratios)


def main() -> None:
    if os.getloadavg()[0] > 0.5:
        print("The machine is not idle: these figures will be wrong.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the panel writes its ledger there too
        figures = {
            "panel_seconds": panel_seconds(),
            "panel_overhead": panel_overhead(),
            "run_overhead_seconds": run_overhead_seconds(Path(folder) / "run"),
            "two_jobs_throughput": two_jobs_throughput(Path(folder) / "grid"),
        }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
