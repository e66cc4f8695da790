"""`ftkit serve`: the end point, what it refuses, and the page as a reader uses it.

Screenshots of the page are written to ``build/``.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient
from tiny_kept import NAMES, make_checkpoint, make_trained, write_kept
from tiny_towers import make_towers

from ftkit.cli import main
from ftkit.lab.kept.loading import load_kept
from ftkit.lab.kept.serving import MAX_BYTES, MAX_TEXTS, make_app

BUILD = Path(__file__).parents[2] / "build"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    classifier, tokenizer = make_trained("full", make_checkpoint(folder / "checkpoint"))
    return write_kept(classifier, folder / "model", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def client(folder: Path) -> TestClient:
    return TestClient(make_app(load_kept(folder), "model"), base_url="http://127.0.0.1:8000")


def test_the_end_point_gives_the_probabilities_of_the_model(client: TestClient, folder: Path) -> None:
    texts = ["w3 w4", " w5 w6 w7 ", "<b>w8</b>", ""]
    answer = client.post("/predict", json={"texts": texts})
    assert answer.status_code == 200
    predictions = answer.json()["predictions"]
    expected = load_kept(folder).probabilities([text.strip() for text in texts[:3]])
    assert [prediction["text"] for prediction in predictions] == texts
    for prediction, row in zip(predictions, expected, strict=False):
        assert prediction["probabilities"] == pytest.approx(dict(zip(NAMES, map(float, row), strict=True)), abs=1e-6)
        assert prediction["predicted"] == NAMES[row.argmax()]
    assert predictions[3] == {"text": "", "predicted": None, "probabilities": None}


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "said"),
    [
        (b'{"texts": ["w3"', JSON, 400, "The body is no JSON"),
        (b"", JSON, 422, "send {"),
        (b"[1]", JSON, 422, "send {"),
        (b"{}", JSON, 422, "body.texts: Field required"),
        (b'{"texts": "w3"}', JSON, 422, "body.texts"),
        (b'{"texts": [3]}', JSON, 422, "body.texts.0"),
        (b'{"texts": []}', JSON, 422, "at least 1"),
        (json.dumps({"texts": ["w3"] * (MAX_TEXTS + 1)}).encode(), JSON, 422, f"at most {MAX_TEXTS}"),
        (json.dumps({"texts": ["w" * MAX_BYTES]}).encode(), JSON, 413, "larger than 1,048,576 bytes"),
        (b'{"texts": ["\xff"]}', JSON, 400, "no JSON"),
        (b'{"texts": ["w3"]}', {"content-type": "text/plain"}, 415, "not application/json"),
        (b'{"texts": ["w3"]}', JSON | {"host": "elsewhere.org"}, 400, "not called 'elsewhere.org'"),
    ],
)
def test_a_bad_request_is_refused_with_a_sentence(
    content: bytes, headers: dict[str, str], status: int, said: str, client: TestClient
) -> None:
    answer = client.post("/predict", content=content, headers=headers)
    assert answer.status_code == status
    assert said in answer.json()["error"]
    assert answer.json()["error"].endswith(".")


def test_a_body_that_tells_no_length_is_bounded_too(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**16

    assert client.post("/predict", content=endless(), headers=JSON).status_code == 413


def test_the_page_needs_nothing_from_elsewhere_and_escapes_names(folder: Path) -> None:
    page = TestClient(make_app(load_kept(folder), "<i>mine</i>"), base_url="http://localhost").get("/")
    assert page.status_code == 200
    assert "http" not in page.text
    assert "//" not in page.text.replace("// every text", "")
    assert "&lt;i&gt;mine&lt;/i&gt;" in page.text
    assert "<i>mine" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    client = TestClient(make_app(load_kept(folder), "m"), base_url="http://localhost")
    for path in ("/docs", "/redoc", "/openapi.json"):  # these would load scripts from a CDN
        assert client.get(path).status_code == 404


def test_towers_a_port_in_use_and_no_model_are_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    towers = write_kept(make_towers(), tmp_path / "towers", names=None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = str(taken.getsockname()[1])
        capsys.readouterr()
        for arguments, said in (
            ([str(towers), "--port", "0"], "only classifiers of texts are served"),
            ([str(tmp_path / "none"), "--port", "0"], "no kept model"),
            ([str(folder), "--port", used], f"Port {used} of 127.0.0.1 cannot be used (Address already in use)"),
            ([str(folder), "--port", "99999"], "no port 99999"),
        ):
            assert main(["serve", *arguments]) == 1
            out, err = capsys.readouterr()
            assert out == ""
            assert said in err
            assert len(err.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to another process")
def test_ctrl_c_ends_the_server(folder: Path) -> None:
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ftkit.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        assert "on http://127.0.0.1:" in said
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "Stopped.\n")


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    config = uvicorn.Config(make_app(load_kept(folder), "model"), port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.mark.alone
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_reader_classifies_a_text(address: str, folder: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        BUILD.mkdir(exist_ok=True)
        asked, problems = [], []
        for width, colours in ((1000, "light"), (360, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colours)
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(address)
            page.get_by_label("Text").fill("<b>w3</b> w4")
            page.get_by_role("button", name="Classify").click()
            table = page.get_by_role("table", name="Probability of each class")
            expect(table.get_by_role("row")).to_have_count(len(NAMES))
            row = load_kept(folder).probabilities(["<b>w3</b> w4"])[0]
            first = table.get_by_role("row").first
            expect(first).to_contain_text(NAMES[row.argmax()])
            expect(first).to_contain_text(f"{row.max():.3f}")
            expect(page.get_by_role("region", name="Result")).to_contain_text(f"Predicted: {NAMES[row.argmax()]}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=BUILD / f"serve-{colours}.png")
        page.get_by_label("Text").fill("w3")
        page.route("**/predict", lambda route: route.abort())
        page.get_by_label("Text").press("Control+Enter")
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        browser.close()
    assert {url.removesuffix("predict") for url in asked if not url.startswith("data:")} == {address}
    assert [problem for problem in problems if "ERR_FAILED" not in problem] == []
