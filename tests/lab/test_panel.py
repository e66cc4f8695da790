"""Every panel without a browser: all bounds and choices of its controls, finished, stopped and failed runs, comparison.

Tests of what a kernel displays start real kernels.
"""

import json
import logging
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from tiny_bert import make_rows, make_tiny_bert
from tiny_models import make_word_tokenizer
from transformers import AutoModelForSequenceClassification

from ftkit import TIERS, cli
from ftkit.errors import SettingsError
from ftkit.lab import settings
from ftkit.lab.results import Outcome, read_ledger
from ftkit.lab.schema import NotebookSettings, Parameter, setting
from ftkit.lab.settings import FullFineTuning
from ftkit.lab.settings_file import read_settings
from ftkit.lab.widgets.controls import StaticPanel, make_controls
from ftkit.lab.widgets.panel import Panel, panel
from ftkit.metrics import Evaluation
from ftkit.training.callbacks import Callback
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import History, TrainingRun, TrainSettings

SCHEMAS = [item for item in vars(settings).values() if isinstance(item, type) and getattr(item, "PANEL", ())]
LABELS = np.arange(40) % 2


class EveryKind(NotebookSettings):
    """Settings of the kinds that no notebook uses yet, without a seed."""

    NOTEBOOK: ClassVar = "99_every_kind"
    PANEL: ClassVar = ("share", "name", "count", "rates", "layers")

    share: float = setting("a share", 0.5, between=(0, 1))
    name: str | None = setting("a text that may be missing", None)
    count: int | None = setting("a whole number that may be missing", None, between=(1, 9))
    rates: list[float] = setting("some numbers", [0.1, 1e-5])
    layers: int = setting("on a slider", 3, between=(0, 12), unit="layers")


def evaluation(wrong: int = 0, rows: int = len(LABELS)) -> Evaluation:
    """Evaluation of ``rows`` rows of which the first ``wrong`` are misclassified."""
    labels = LABELS[:rows]
    answers = np.where(np.arange(rows) < wrong, 1 - labels, labels)
    return Evaluation(labels, np.eye(2)[answers], loss=0.5)


def fake_train(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
    """Training function that returns at once, without a step."""
    history = History(trainable_parameters=1234, seconds=0.5, peak_rss_mib=100.0)
    return Outcome(seed, history, {"test": evaluation(wrong=4)})


def tiny_train(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
    """Training function that trains a tiny network, with 12 steps per epoch."""
    network, rows = make_tiny_bert(), {"train": make_rows(90), "validation": make_rows(40, seed=1)}
    how = TrainSettings(lr=settings.lr, num_epochs=settings.num_epochs, batch_size=8, seed=seed)
    history = fit(network, rows, how, callbacks=callbacks)
    return Outcome(seed, history, {"validation": evaluate(network, rows["validation"])})


def train(panel: Panel) -> None:
    """Press Train and wait until the run has ended."""
    panel.train_button.click()
    panel.thread.join(timeout=60)
    assert not panel.thread.is_alive()
    assert not panel.train_button.disabled
    assert panel.stop_button.disabled


def text_of(widget: ipywidgets.HTML) -> str:
    return BeautifulSoup(widget.value, "html.parser").get_text(" ")


def role(panel: Panel) -> str | None:
    return BeautifulSoup(panel.curve.status.value, "html.parser").div.get("role")


def rows_of(panel: Panel) -> list[dict[str, str]]:
    """The rows of the table, each as a dictionary by column."""
    table = BeautifulSoup(panel.table.value, "html.parser").table
    if table is None:
        return []
    heads = [cell.text for cell in table.select("thead th")]
    rows = [[cell.text for cell in row.select("th, td")] for row in table.select("tbody tr")]
    return [dict(zip(heads, row, strict=True)) for row in rows]


@pytest.fixture(autouse=True)
def _strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A separate folder; fail on an exception in an event handler or a thread, which would only be logged."""
    monkeypatch.chdir(tmp_path)
    lost: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lost.append)
    yield
    assert not lost
    assert not [record.message for record in caplog.get_records("call") if record.levelno >= logging.WARNING]


def ends_and_choices(parameter: Parameter, widget: ipywidgets.ValueWidget) -> list[tuple[Any, Any]]:
    """Values to try in a control, each with the value that the settings should have then."""
    low, high = parameter.low, parameter.high
    if isinstance(widget, ipywidgets.Dropdown):
        return [(choice, choice) for choice in parameter.choices]
    if isinstance(widget, ipywidgets.Checkbox):
        return [(True, True), (False, False)]
    if isinstance(widget, ipywidgets.SelectionSlider):
        positions = [position for _, position in widget.options]
        assert positions[0] == low < positions[-1] == high
        assert positions == sorted(positions)
        assert len(positions) >= 12
        return [(position, position) for position in positions[:: len(positions) - 1] + positions[3:12:4]]
    if isinstance(widget, ipywidgets.Text):
        return [(text, text.split(", ") if parameter.kind == "list" else text) for text in ("0.25, 4", "5", "five")]
    assert isinstance(widget, ipywidgets.IntSlider | ipywidgets.BoundedIntText)
    return [(widget.min, low), (widget.max, high)]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("schema", [*SCHEMAS, EveryKind], ids=lambda schema: schema.NOTEBOOK)
def test_every_control_of_every_panel_takes_its_bounds_and_choices(schema: type[NotebookSettings], tier: str) -> None:
    start = schema.at(tier)
    panel = Panel(start, fake_train)
    assert list(panel.controls) == list(schema.PANEL)
    for name, control in panel.controls.items():
        widget, parameter = control.widget, control.parameter
        assert widget.description == name
        assert {
            parameter.help in widget.tooltip,
            parameter.allowed in widget.tooltip,
            parameter.unit in widget.tooltip,
        } == {True}
        for shown, value in ends_and_choices(parameter, widget):
            widget.value = shown
            already = len(panel.runs)
            try:
                expected = start.changed(**{name: value})
            except SettingsError as refusal:  # a text that is not allowed here
                panel.train_button.click()
                assert (text_of(panel.curve.status), role(panel)) == (str(refusal), "alert")
                assert len(panel.runs) == already
            else:
                train(panel)
                assert panel.runs[-1].settings == expected
                assert [row["run"] for row in rows_of(panel)] == [str(i + 1) for i in range(already + 1)]
        panel.reset_button.click()
    train(panel)
    assert panel.runs[-1].settings == start


def test_the_settings_of_the_notebooks_are_found() -> None:
    assert FullFineTuning in SCHEMAS


def test_a_start_value_keeps_all_its_digits() -> None:
    start = FullFineTuning.at("smoke", lr=1.2345e-4, warmup=1 / 3)
    panel = Panel(start, fake_train)
    train(panel)
    assert panel.runs[0].settings == start
    for name in ("lr", "warmup"):
        widget = panel.controls[name].widget
        assert [value for _, value in widget.options].count(widget.value) == 1
        widget.value = 0.1
    panel.reset_button.click()
    train(panel)
    assert panel.runs[1].settings == start


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.NOTEBOOK)
def test_a_browser_does_not_move_a_slider_from_its_start(schema: type[NotebookSettings]) -> None:
    """A browser sends the slider's nearest step back as soon as it is drawn; the index of an option is such a step."""
    for control in make_controls(schema.at("cpu")).values():
        widget = control.widget
        assert not isinstance(widget, ipywidgets.FloatSlider | ipywidgets.FloatLogSlider)
        if isinstance(widget, ipywidgets.SelectionSlider):
            widget.set_state({"index": widget.index})
            assert control.value == getattr(schema.at("cpu"), control.parameter.name)


def test_text_controls_take_lists_and_empty_text() -> None:
    controls = make_controls(EveryKind.at("cpu", name="x"))
    assert controls["rates"].widget.value == "0.1, 1e-05"
    assert controls["count"].value is None
    controls["name"].widget.value = " "
    controls["rates"].widget.value = "3,"
    assert controls["name"].value is None
    assert controls["rates"].value == ["3"]


def test_a_run_appears_in_curve_table_and_ledger(tmp_path: Path) -> None:
    start = FullFineTuning.at("smoke", num_seeds=2, num_epochs=2, seed=3)
    panel = Panel(start, tiny_train)
    assert "No run yet" in text_of(panel.table)
    panel.controls["lr"].widget.value = 1e-3
    train(panel)

    image = BeautifulSoup(panel.curve.image.value, "html.parser").img
    assert image["src"].startswith("data:image/png;base64,")
    assert re.search(r"seed 4 \(2 of 2\): loss \d\.\d{3} at step 24 of 24, validation accuracy \d\.\d{3}", image["alt"])
    assert (text_of(panel.curve.status), role(panel)) == ("Run 1 finished.", "status")

    run = panel.runs[0]
    (row,) = rows_of(panel)
    low, high = run.entry["ci95"]
    assert row["settings"] == "lr 0.001"
    assert row["accuracy on validation"] == f"{np.mean([e.accuracy for e in run.evaluations]):.3f}"
    assert row["95 % interval"] == f"{low:.3f} to {high:.3f}"
    assert row["trainable parameters"] == f"{run.outcomes[0].history.trainable_parameters:,}"
    assert float(row["seconds per seed"]) > 0
    assert (row["seeds"], row["ended"]) == ("2", "finished")

    (entry,) = read_ledger(tmp_path / "runs" / "ledger.jsonl")
    assert entry["parameters"] == {"lr": 1e-3, "num_epochs": 2, "seed": 3, "num_seeds": 2}
    assert entry["settings"] == run.settings.model_dump()
    assert entry["metrics"]["panel"] == json.loads(json.dumps(run.entry)) | {"split": "validation"}
    assert (entry["source"], entry["notebook"], entry["tier"]) == ("panel", FullFineTuning.NOTEBOOK, "smoke")
    assert (entry["error"], entry["ended"]) == (None, "finished")
    assert entry["seconds"] > 0
    assert entry["peak_rss_mib"] > 100
    assert re.search(r"[+-]\d\d:\d\d$", entry["started"])


class Press(Callback):
    """Press Stop after a step (0: before the first step) of the n-th seed, as a reader would."""

    def __init__(self, panel: Panel, step: int, nth: int = 1) -> None:
        self.panel, self.step, self.nth, self.seeds = panel, step, nth, 0

    def on_start(self, run: TrainingRun) -> None:
        self.seeds += 1
        if self.step == 0:
            self.on_step(run)

    def on_step(self, run: TrainingRun) -> None:
        if (self.seeds, run.step) == (self.nth, self.step):
            self.panel.stop_button.click()


@pytest.mark.parametrize(
    ("step", "nth", "taken", "ended"),
    [
        (5, 1, [5], "stopped at step 5 of 24, seed 1 of 3"),
        (12, 2, [24, 12], "stopped at step 12 of 24, seed 2 of 3"),
        (24, 1, [24], "stopped after 1 of 3 seeds"),
        (0, 2, [24], "stopped after 1 of 3 seeds"),
    ],
)
def test_stop_ends_within_one_step_and_keeps_the_run(
    tmp_path: Path, step: int, nth: int, taken: list[int], ended: str
) -> None:
    def pressed(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        return tiny_train(settings, seed, [press, *callbacks])

    panel = Panel(FullFineTuning.at("smoke", num_epochs=2, num_seeds=3), pressed)
    press = Press(panel, step, nth)
    train(panel)
    assert [len(outcome.history.steps) for outcome in panel.runs[0].outcomes] == taken
    assert rows_of(panel)[0]["ended"] == ended
    assert rows_of(panel)[0]["seeds"] == str(len(taken))
    assert text_of(panel.curve.status) == f"Run 1 {ended}."
    (entry,) = read_ledger(tmp_path / "runs" / "ledger.jsonl")
    assert (entry["ended"], entry["error"]) == ("stopped", None)
    assert len(entry["metrics"]["panel"]["by_seed"]) == len(taken)

    press.step = -1
    train(panel)
    assert rows_of(panel)[1]["ended"] == "finished"


def test_stop_before_the_first_step_keeps_no_run(tmp_path: Path) -> None:
    def pressed(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        panel.stop_button.click()
        return tiny_train(settings, seed, callbacks)

    panel = Panel(FullFineTuning.at("smoke", num_seeds=3), pressed)
    train(panel)
    assert "no result to keep" in text_of(panel.curve.status)
    assert rows_of(panel) == panel.runs == read_ledger(tmp_path / "runs" / "ledger.jsonl") == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("The loss is <nan>; try lr=1e-5.\nmore"), "The loss is <nan>; try lr=1e-5."),
        (ValueError("can't be"), "can't be"),
        (KeyError("labels"), "KeyError: 'labels'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failed_run_shows_one_line_and_the_panel_still_works(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def failing(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        if seed == 1 + len(panel.runs):
            raise error
        return fake_train(settings, seed, callbacks)

    panel = Panel(FullFineTuning.at("smoke", seed=1, num_seeds=2), failing)
    train(panel)
    assert (text_of(panel.curve.status), role(panel), panel.runs) == (line, "alert", [])
    panel.controls["seed"].widget.value = 0
    train(panel)  # fails with its second seed: the result of the first is kept
    assert text_of(panel.curve.status) == line
    assert rows_of(panel)[0]["ended"] == f"failed after 1 of 2 seeds: {line}"
    train(panel)
    assert rows_of(panel)[1]["ended"] == "finished"
    entries = read_ledger(tmp_path / "runs" / "ledger.jsonl")
    assert [(entry["error"], entry["ended"]) for entry in entries] == [(line, "failed")] * 2 + [(None, "finished")]
    assert entries[0]["metrics"] == {}
    assert entries[1]["metrics"]["panel"]["seeds"] == [0]
    assert capfd.readouterr() == ("", "")


def test_a_run_is_kept_if_the_ledger_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be", encoding="utf-8")
    panel = Panel(FullFineTuning.at("smoke"), fake_train)
    train(panel)
    assert len(rows_of(panel)) == 1
    assert role(panel) == "alert"
    assert "runs" in text_of(panel.curve.status)


def keeping(settings: NotebookSettings) -> Panel:
    """A panel that trains a tiny network and knows a tokenizer to keep with it."""
    return Panel(settings, tiny_train, how=lambda settings: {"tokenizer": make_word_tokenizer()})


def test_the_model_of_the_last_run_is_kept(tmp_path: Path) -> None:
    networks = []

    class Remember(Callback):
        def on_start(self, run: TrainingRun) -> None:
            networks.append(run.model)

    panel = keeping(FullFineTuning.at("smoke", num_seeds=2, num_epochs=1, seed=3))
    panel.train = lambda settings, seed, callbacks: tiny_train(settings, seed, [*callbacks, Remember()])
    assert panel.keep_button.disabled
    train(panel)
    assert not panel.keep_button.disabled
    panel.keep_button.click()
    panel.thread.join(60)
    (folder,) = (tmp_path / "runs" / "kept").iterdir()
    assert re.fullmatch(r"01_full_fine_tuning-\d{8}-\d{6}", folder.name)
    said = f"The model of run 1, seed 4, its last, is in runs/kept/{folder.name}."
    assert (text_of(panel.curve.status), role(panel)) == (said, "status")
    about = json.loads((folder / "ftkit.json").read_text(encoding="utf-8"))
    assert (about["kind"], about["method"], about["seed"]) == ("classifier", "full", 4)
    kept = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    trained = networks[-1].state_dict()
    assert all(torch.equal(kept[name], trained[name]) for name in trained)
    assert not panel.keep_button.disabled and not panel.train_button.disabled
    train(panel)
    assert len(panel.runs) == 2


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    panel = Panel(FullFineTuning.at("smoke", num_epochs=1), tiny_train, how=lambda settings: {"names": ["one"]})
    train(panel)
    panel.keep_button.click()
    panel.thread.join(60)
    assert "there are 1 names" in text_of(panel.curve.status)
    assert role(panel) == "alert"
    assert not panel.keep_button.disabled
    panel.how = keeping(panel.settings).how
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "kept").write_text("a file where the folder should be", encoding="utf-8")
    panel.keep_button.click()
    panel.thread.join(60)
    assert "cannot be written" in text_of(panel.curve.status)
    assert role(panel) == "alert"


@pytest.mark.parametrize("ended", ["failed", "stopped before a step", "untrained"])
def test_a_run_without_a_model_cannot_be_kept(ended: str) -> None:
    def train_once(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        if not panel.runs:
            return tiny_train(settings, seed, callbacks)
        if ended == "untrained":
            return fake_train(settings, seed, callbacks)
        if ended == "stopped before a step":
            panel.stop_button.click()
        outcome = tiny_train(settings, seed, callbacks)
        assert ended != "failed", "no result"
        return outcome

    panel = Panel(FullFineTuning.at("smoke", num_epochs=1), train_once)
    train(panel)
    assert not panel.keep_button.disabled
    train(panel)
    assert panel.keep_button.disabled


def test_a_seed_that_took_no_step_is_not_what_is_kept() -> None:
    def second_stopped(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        if seed == 1:
            panel.stop_button.click()
        return tiny_train(settings, seed, callbacks)

    panel = Panel(FullFineTuning.at("smoke", num_epochs=1, seed=0, num_seeds=3), second_stopped)
    train(panel)
    assert panel.runs[0].ended == "stopped after 1 of 3 seeds"
    rows = make_rows(40, seed=1)
    assert evaluate(panel._trained, rows).loss == pytest.approx(panel.runs[0].evaluations[0].loss)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.NOTEBOOK)
def test_lessons_that_keep_a_model_have_the_button(schema: type[NotebookSettings]) -> None:
    panel = Panel(schema.at("smoke"), fake_train)
    assert (panel.keep_button in _descendants(panel._box)) == ("keep" in schema.model_fields)


def _descendants(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    children = getattr(widget, "children", ())
    return [*children, *(below for child in children for below in _descendants(child))]


def test_what_is_set_can_be_copied_as_command_and_file(tmp_path: Path) -> None:
    panel = Panel(FullFineTuning.at("smoke", num_seeds=2, data=__file__), fake_train)
    panel.controls["lr"].widget.value = 1e-3
    panel.controls["schedule"].widget.value = "cosine"
    command, file = (pre.text for pre in BeautifulSoup(panel.copy.value, "html.parser").select("pre"))
    given = {"data": __file__, "num_seeds": 2, "lr": 1e-3, "schedule": "cosine"}
    options = cli._parser().parse_args(shlex.split(command)[1:])
    assert (options.notebook, options.tier) == (FullFineTuning.NOTEBOOK, "smoke")
    assert dict(options.parameter) == {name: [value] for name, value in given.items()}
    (tmp_path / "settings.yaml").write_text(file, encoding="utf-8")
    read = read_settings("settings.yaml")
    assert (read.notebook, read.tier, read.parameters) == (FullFineTuning.NOTEBOOK, "smoke", given)
    panel.reset_button.click()
    command, _ = (pre.text for pre in BeautifulSoup(panel.copy.value, "html.parser").select("pre"))
    assert command == f"ftkit run 01_full_fine_tuning --tier smoke -p data={__file__} -p num_seeds=2"


def test_a_value_that_is_not_allowed_is_no_command() -> None:
    panel = Panel(EveryKind.at("smoke"), fake_train)
    panel.controls["rates"].widget.value = "five $"
    assert not BeautifulSoup(panel.copy.value, "html.parser").select("pre")
    assert "rates=" in text_of(panel.copy)


def test_two_panels_do_not_train_at_once() -> None:
    started, proceed = threading.Event(), threading.Event()

    def waiting(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        started.set()
        assert proceed.wait(60)
        return tiny_train(settings, seed, callbacks)

    one, other = (Panel(FullFineTuning.at("smoke", num_seeds=2), waiting) for _ in range(2))
    one.train_button.click()
    assert started.wait(60)
    assert one.train_button.disabled
    assert not one.stop_button.disabled
    other.train_button.click()
    assert (role(other), other.thread) == ("alert", None)
    other.stop_button.click()  # the reader may no longer see the first panel
    proceed.set()
    one.thread.join(60)
    assert "no result to keep" in text_of(one.curve.status)
    train(other)
    assert len(other.runs) == 1


def test_further_figures_have_columns_with_their_means_over_the_seeds() -> None:
    def measuring(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        figures = {"weight_distance": 0.25 + seed} if settings.num_epochs == 2 else {}
        return Outcome(seed, History(), {"test": evaluation()}, figures)

    panel = Panel(FullFineTuning.at("smoke", seed=0, num_seeds=2), measuring)
    for num_epochs in (1, 2):
        panel.controls["num_epochs"].widget.value = num_epochs
        train(panel)
    assert [row["weight distance"] for row in rows_of(panel)] == ["–", "0.750"]
    assert panel.runs[1].entry["weight_distance"] == 0.75


def test_a_seed_may_have_several_training_runs() -> None:
    def two_tasks(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        tiny_train(settings, seed, callbacks)
        return tiny_train(settings, seed, callbacks)

    panel = Panel(FullFineTuning.at("smoke"), two_tasks)
    messages = []
    panel.curve.status.observe(lambda change: messages.append(text_of(panel.curve.status)), "value")
    train(panel)
    assert panel.curve.total_steps == 24
    assert any("step 12 of 12" in text for text in messages)
    assert any("step 24 of 24" in text for text in messages)
    train(panel)
    assert panel.curve.total_steps == 24  # counted from the start again


def test_two_runs_are_compared() -> None:
    def scoring(settings: NotebookSettings, seed: int, callbacks: Sequence[Callback]) -> Outcome:
        wrong = {1: 30, 2: 2, 3: 2}.get(settings.num_epochs, 10)
        return Outcome(seed, History(), {"test": evaluation(wrong, rows=settings.batch_size)})

    panel = Panel(FullFineTuning.at("smoke", num_seeds=2, batch_size=40), scoring)

    def run(**changes: Any) -> None:
        for name, value in changes.items():
            panel.controls[name].widget.value = value
        train(panel)

    run()
    assert panel._pair.layout.display == "none"
    run(num_epochs=2)
    assert panel._pair.layout.display != "none"
    assert panel.first.options == (("1: num_epochs 1", 0), ("2: num_epochs 2", 1))
    assert (panel.first.description, panel.second.description) == ("compare run", "with run")
    assert "Run 2 has num_epochs 2; run 1 has num_epochs 1." in text_of(panel.comparison)
    sentence = r"Run 2 is better than run 1 by 0\.70 \[0\.5\d, 0\.8\d\] \(accuracy on test; "
    assert re.search(sentence + ".* over rows and 2 seeds", text_of(panel.comparison)), text_of(panel.comparison)
    panel.first.value, panel.second.value = 0, 1
    assert "Run 1 is worse than run 2 by 0.70 [" in text_of(panel.comparison)

    run(num_epochs=3)  # the new run is compared with the chosen one
    assert (panel.first.value, panel.second.value) == (2, 1)
    assert "Run 3 and run 2 can't be told apart: +0.000 [" in text_of(panel.comparison)
    assert [row["settings"] for row in rows_of(panel)] == [f"num_epochs {n}" for n in (1, 2, 3)]

    run(num_seeds=1)
    assert text_of(panel.comparison).endswith("cannot be paired: the number of seeds is 1 in run 4 and 2 in run 2.")
    run(num_seeds=2, batch_size=20)
    assert "different rows" in text_of(panel.comparison)
    run()
    panel.second.value = 4
    assert "No setting differs." in text_of(panel.comparison)
    panel.second.value = 5
    assert text_of(panel.comparison) == "Choose two different runs."


def test_no_character_of_a_value_or_message_has_a_meaning() -> None:
    value = "$1 or $2 <i>&amp;"
    panel = Panel(EveryKind.at("smoke"), fake_train)
    for name in (value, "other"):
        panel.controls["name"].widget.value = name
        train(panel)
    panel.curve.say(f"no {value}", "alert")
    panel.controls["name"].widget.value = value
    static = StaticPanel(EveryKind.at("smoke", name=value))._repr_html_()
    for page in (panel.table.value, panel.comparison.value, panel.curve.status.value, panel.copy.value, static):
        found = [text for text in BeautifulSoup(page, "html.parser").find_all(string=True) if value in text]
        assert found
        for text in found:
            assert any("mathjax_ignore" in parent.get("class", []) for parent in text.parents)


CELLS = (
    """
from ftkit.training.state import History
from ftkit.lab.results import Outcome
from ftkit.lab.settings import FullFineTuning
from ftkit.lab.widgets.panel import panel
settings = FullFineTuning.at("smoke")
panel(settings, None)
""",
    "print(6 * 7)",
)


def check_preview(outputs: list[Any]) -> None:
    """Check that the output is a static preview, which needs no widget."""
    (output,) = outputs
    assert set(output["data"]) == {"text/plain", "text/html"}
    assert output["data"]["text/plain"].startswith("[control panel: lr 0.0001, pretrained True, schedule linear, ")
    table = BeautifulSoup(output["data"]["text/html"], "html.parser").table
    rows = {row.th.text: [cell.text for cell in row.select("td")] for row in table.select("tbody tr")}
    assert list(rows) == list(FullFineTuning.PANEL)
    assert rows["rows"] == ["64", "2 to 1,000,000 rows", "training rows of each seed"]
    assert rows["schedule"][1] == "linear, cosine, constant"
    assert "JupyterLab" in table.caption.text


def test_a_notebook_executed_by_a_tool_shows_a_static_preview() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert "widgets" not in notebook.metadata
    check_preview(notebook.cells[0].outputs)
    assert notebook.cells[1].outputs[0].text == "42\n"


def test_nbval_compares_the_static_preview(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    nbformat.write(notebook, tmp_path / "with_panel.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", "with_panel.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout


def test_a_person_gets_the_panel_and_the_kernel_stays_free_while_it_trains() -> None:
    train = """
import threading, time
proceed = threading.Event()
def train(settings, seed, callbacks):
    proceed.wait(60)
    raise RuntimeError("enough")
shown = panel(settings, train)
shown
"""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        shown: list[dict[str, Any]] = []

        def run(cell: str) -> str:
            """Run a cell as JupyterLab does; returns the text that it printed."""
            shown.clear()
            answer = client.execute_interactive(cell, allow_stdin=True, timeout=120, output_hook=shown.append)
            assert answer["content"]["status"] == "ok", answer["content"]
            assert not [message for message in shown if message["content"].get("name") == "stderr"]
            return "".join(message["content"].get("text", "") for message in shown)

        run(CELLS[0])
        run(train)
        (result,) = [message["content"]["data"] for message in shown if message["msg_type"] == "execute_result"]
        assert "application/vnd.jupyter.widget-view+json" in result
        run("shown.train_button.click()")
        assert run("print(shown.thread.is_alive())") == "True\n"
        assert run("proceed.set(); shown.thread.join(); print(shown.curve.status.value)").count("enough") == 1
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_without_a_kernel_there_is_a_static_preview() -> None:
    assert "lr" in repr(panel(FullFineTuning.at("smoke"), fake_train))
