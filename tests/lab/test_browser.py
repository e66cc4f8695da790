"""The control panel of notebook 01 as a reader uses it: JupyterLab, a headless Chromium, keys and clicks.

Screenshots are written to ``build/``.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from ftkit.data.assets import registry
from ftkit.lab.results import read_ledger
from ftkit.lab.runs.notebooks import assets_of

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_full_fine_tuning.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        CHROMIUM is None, reason="Chromium is not installed: on Debian `apt-get install chromium`, as .ci/run does"
    ),
]


def needed_by_panel(cell: nbformat.NotebookNode) -> bool:
    """Whether it is the cell of the panel, or defines the settings, the data or the training."""
    tags = set(cell.metadata.get("tags", []))
    return cell.cell_type == "code" and (bool(tags & {"parameters", "study"}) or "\npanel(" in cell.source)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a JupyterLab server, with its token, and the folder that it serves."""
    for name in assets_of(NOTEBOOK):
        registry.fetch(name, progress=False)
    folder = tmp_path_factory.mktemp("lab")
    rate = '"lr: float | None = '
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if needed_by_panel(cell)]  # other tests run the whole notebook
    source = nbformat.writes(notebook)
    assert source.count(f"{rate}None") == 1
    (folder / NOTEBOOK.name).write_text(source.replace(f"{rate}None", f"{rate}1.2e-4"), encoding="utf-8")
    tracker = {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}  # render all cells at once
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    settings = folder / ".settings"
    settings.mkdir()
    (settings / "overrides.json").write_text(json.dumps(tracker | quiet), encoding="utf-8")
    token = secrets.token_hex(8)
    env = os.environ | {"FTKIT_OFFLINE": "1", "FTKIT_TIER": "smoke", "JUPYTERLAB_SETTINGS_DIR": str(settings)}
    env |= {"JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces")}
    env |= {"JUPYTER_RUNTIME_DIR": str(folder / ".runtime")}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={token}"]
    options += [f"--LabApp.app_settings_dir={settings}", "--LabApp.news_url="]
    command = [sys.executable, "-m", "jupyterlab", *options]
    with (folder / "lab.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        yield f"{_address(folder / '.runtime')}lab/tree/{NOTEBOOK.name}?reset&token={token}", folder
    finally:
        server.terminate()
        server.wait(timeout=30)


def _address(runtime: Path) -> str:
    """Wait for the server and return its address."""
    for _ in range(300):
        for file in runtime.glob("jpserver-*.json"):
            try:
                address = json.loads(file.read_text(encoding="utf-8"))["url"]
                urllib.request.urlopen(f"{address}api", timeout=5)
            except (json.JSONDecodeError, urllib.error.URLError):  # the file is incomplete or the server not ready yet
                break
            return address
        time.sleep(0.2)
    raise TimeoutError("JupyterLab did not start within a minute.")


def test_a_reader_changes_settings_trains_and_stops(lab: tuple[str, Path]) -> None:
    from playwright.sync_api import expect, sync_playwright

    address, folder = lab
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1100})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.goto(address)
        expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
        train = page.get_by_role("button", name="Train", exact=True)
        stop = page.get_by_role("button", name="Stop", exact=True)
        expect(train).to_be_enabled(timeout=240_000)
        expect(page.locator(".jp-InputPrompt", has_text="*")).to_have_count(0, timeout=120_000)  # all cells have run
        panel = page.locator(".jp-OutputArea-output", has=train)
        rows = panel.locator("table.ftkit-runs tbody tr")
        train.scroll_into_view_if_needed()

        rate = panel.get_by_role("slider").first
        shown = panel.locator(".widget-readout").first
        expect(shown).to_have_text("0.00012")  # not moved to the nearest step
        rate.focus()
        page.keyboard.press("ArrowRight")
        expect(shown).to_have_text("0.00015")

        panel.get_by_label("rows").fill("200")
        panel.get_by_label("rows").press("Enter")
        epochs = panel.locator(".widget-hslider", has_text="num_epochs")
        epochs.get_by_role("slider").focus()
        for number in ("2", "3"):
            page.keyboard.press("ArrowRight")
            expect(epochs.locator(".widget-readout")).to_have_text(number)

        train.click()
        expect(stop).to_be_enabled()
        expect(rows).to_have_count(1, timeout=120_000)
        drawn = re.compile(r"loss \d+\.\d+ at step 39 of 39, validation accuracy \d")
        expect(panel.locator("img")).to_have_attribute("alt", drawn)
        expect(train).to_be_enabled()

        epochs.locator(".widget-readout").fill("8")
        page.keyboard.press("Enter")
        train.click()
        expect(panel.get_by_text(re.compile(r"step [3-9]\d of 104")).first).to_be_visible(timeout=120_000)
        page.screenshot(path=build / "panel_running.png")
        stop.click()
        expect(rows).to_have_count(2, timeout=30_000)
        expect(rows.nth(1)).to_contain_text("stopped")
        panel.screenshot(path=build / "panel.png")
        browser.close()
    first, second = read_ledger(folder / "runs" / "ledger.jsonl")
    assert first["parameters"]["lr"] == 1.5e-4
    assert (first["settings"]["rows"], first["settings"]["num_epochs"]) == (200, 3)
    assert (first["error"], second["ended"]) == (None, "stopped")
