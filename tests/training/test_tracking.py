"""Tracking with tensorboard: its event files hold what the history holds; nothing else changes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_bert import make_tiny_bert

from ftkit import cli
from ftkit.errors import TrainingError
from ftkit.lab.results import save_metrics
from ftkit.training import tracking
from ftkit.training.callbacks import Callback, Checkpoint
from ftkit.training.loop import fit
from ftkit.training.state import History, TrainingRun, TrainSettings

SETTINGS = TrainSettings(num_epochs=2, batch_size=16, lr=1e-3, seed=5)
ENTRY = {"trainable_parameters": 12, "seconds": 1.5, "peak_rss_mib": None, "split": "test"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of a run that tensorboard tracks."""
    monkeypatch.setenv("FTKIT_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("FTKIT_TRACK", "tensorboard")
    monkeypatch.setattr(tracking, "_fits", iter(range(1, 100)))
    return tmp_path


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in one folder of event files: steps and values by name."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def curves_of(history: History) -> dict[str, list[tuple[int, Any]]]:
    steps = len(history.steps) // len(history.epochs)
    expected = {
        f"step/{name}": [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in history.steps]
        for name in ("loss", "lr", "grad_norm")
    }
    for name in ("train_loss", "validation_loss", "validation_accuracy"):
        curve = [(row["epoch"] * steps, pytest.approx(row[name], rel=1e-6)) for row in history.epochs]
        expected[f"epoch/{name}"] = curve
    return expected


def test_every_step_and_epoch_of_each_fit_is_recorded(
    folder: Path, tiny_data: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    histories = [fit(make_tiny_bert(), tiny_data, SETTINGS.model_copy(update={"seed": seed})) for seed in (5, 6)]
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in (folder / "tracking").iterdir()} == {"fit 01, seed 5", "fit 02, seed 6"}
    for name, history in zip(("fit 01, seed 5", "fit 02, seed 6"), histories, strict=True):
        assert read(folder / "tracking" / name) == curves_of(history)
        assert len(history.steps) == 12


def test_the_settings_are_the_hyperparameters(folder: Path, tiny_data: dict[str, Any]) -> None:
    fit(make_tiny_bert(), tiny_data, SETTINGS)
    found = {}
    for file in (folder / "tracking").rglob("events*"):
        about = EventAccumulator(str(file)).Reload().summary_metadata.get("_hparams_/session_start_info")
        if about:
            given = HParamsPluginData.FromString(about.plugin_data.content).session_start_info.hparams
            found |= {name: getattr(value, value.WhichOneof("kind")) for name, value in given.items()}
    assert (found["lr"], found["seed"], found["schedule"], found["best_by"]) == (1e-3, 5, "linear", "None")
    assert set(found) == set(TrainSettings.model_fields)


def test_tracking_changes_neither_weights_nor_history(
    folder: Path, tiny_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked, plain = make_tiny_bert(), make_tiny_bert()
    first = fit(tracked, tiny_data, SETTINGS)
    monkeypatch.setenv("FTKIT_TRACK", "")
    second = fit(plain, tiny_data, SETTINGS)
    assert first.steps == second.steps
    assert all(torch.equal(a, b) for a, b in zip(tracked.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("missing", ["FTKIT_TRACK", "FTKIT_RUN_DIR"])
def test_nothing_is_tracked_unless_a_run_asks_for_it(
    folder: Path, tiny_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    seen = []

    class Look(Callback):
        def on_start(self, run: TrainingRun) -> None:
            seen.append(run)

    monkeypatch.delenv(missing)
    monkeypatch.setattr(tracking, "_opened", None)  # would fail if it were called
    monkeypatch.chdir(folder)
    fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Look()])
    with tracking.tracked(seen[0]) as trackers:
        assert trackers == []
    save_metrics({}, {"full": {"accuracy": 0.5}})
    assert not list(folder.rglob("events*"))


def test_a_run_that_fails_leaves_the_steps_it_took(folder: Path, tiny_data: dict[str, Any]) -> None:
    class Break(Callback):
        def on_step(self, run: TrainingRun) -> None:
            if run.step == 4:
                run.model.classifier.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="at step 5"):
        fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Break()])
    assert [step for step, _ in read(folder / "tracking" / "fit 01, seed 5")["step/loss"]] == [1, 2, 3, 4]


def test_a_resumed_run_has_the_steps_before_it(folder: Path, tiny_data: dict[str, Any]) -> None:
    class Stop(Callback):
        steers = False

        def on_step(self, run: TrainingRun) -> None:
            run.stop = run.step == 4

    fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Checkpoint(folder / "run.pt", every=4), Stop()])
    history = fit(make_tiny_bert(), tiny_data, SETTINGS, callbacks=[Checkpoint(folder / "run.pt")])
    assert len(history.steps) == 12
    assert read(folder / "tracking" / "fit 02, seed 5") == curves_of(history)


def test_the_scores_of_every_method_and_seed_are_recorded(folder: Path) -> None:
    metrics = {
        "full": ENTRY | {"accuracy": 0.7, "ci95": [0.6, 0.8], "seeds": [5, 6], "by_seed": [0.65, 0.75]},
        "LoRA (r=8)": ENTRY | {"accuracy": 0.5, "seeds": [6], "by_seed": [0.5], "macro_f1_by_seed": [0.25]},
        "majority": {"accuracy": None, "ci95": None},
    }
    save_metrics({"lr": 1e-4, "text": None, "live_rows": [200]}, metrics)
    assert json.loads((folder / "metrics.json").read_text())["metrics"] == metrics
    close = pytest.approx
    assert read(folder / "tracking" / "scores") == {
        "full/accuracy by seed": [(5, close(0.65)), (6, close(0.75))],
        "LoRA _r_8_/accuracy by seed": [(6, 0.5)],
        "LoRA _r_8_/macro_f1 by seed": [(6, 0.25)],
        "full/accuracy": [(6, close(0.7))],
        "full/low": [(6, close(0.6))],
        "full/high": [(6, close(0.8))],
        "full/trainable_parameters": [(6, 12)],
        "full/seconds": [(6, 1.5)],
        "LoRA _r_8_/accuracy": [(6, 0.5)],
        "LoRA _r_8_/trainable_parameters": [(6, 12)],
        "LoRA _r_8_/seconds": [(6, 1.5)],
    }
    save_metrics({}, metrics, folder=folder / "other")  # not the results of the run
    assert len(list((folder / "tracking" / "scores").glob("events*"))) == 1


def test_the_command_tracks_a_notebook_without_a_word_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [
        "tier: str = 'cpu'\nx: int = 1",
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from tiny_bert import make_rows, make_tiny_bert\nfrom ftkit.training import TrainSettings, fit\n"
        "history = fit(make_tiny_bert(), {'train': make_rows(30)}, TrainSettings(num_epochs=1, batch_size=8, seed=7))\n"
        "from ftkit.lab import save_metrics\n"
        "path = save_metrics({'x': x, 'tier': tier}, {'full': {'accuracy': 0.5, 'seeds': [7], 'by_seed': [0.5]}})",
    ]
    made = [nbformat.v4.new_code_cell(source) for source in cells]
    made[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=made), "tiny.ipynb")
    monkeypatch.setenv("FTKIT_TRACK", "wandb")  # only the option counts
    assert cli.main(["run", "tiny", "--out", "off"]) == 0
    assert not list(tmp_path.glob("off/*/tracking"))
    assert cli.main(["run", "tiny", "-p", "x=1,2", "--track", "tensorboard", "--out", "on"]) == 0
    folders = sorted(tmp_path.glob("on/*/tracking"))
    assert len(folders) == 2
    for folder in folders:
        assert len(read(folder / "fit 01, seed 7")["step/loss"]) == 4
        assert read(folder / "scores")["full/accuracy by seed"] == [(7, 0.5)]
        executed = nbformat.read(folder.parent / "notebook.ipynb", as_version=4)
        assert [output for cell in executed.cells for output in cell.get("outputs", [])] == []


@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        ("tensorbord", "There is no tracker 'tensorbord': did you mean 'tensorboard'? The trackers are"),
        ("trackio", "The tracker trackio is not installed: run `pip install trackio`, or leave --track out."),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tracker: str, words: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["run", "01_full_fine_tuning", "--track", tracker, "--out", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
