"""The model card: read back by the hub's own library, its figures those of the evaluations, its code run."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from tiny_kept import ADD, NAMES, make_checkpoint, make_settings, make_trained, write_kept
from tiny_towers import make_pairs, make_towers

from ftkit.contrastive.rows import encode_pairs
from ftkit.lab.kept.card import model_card
from ftkit.lab.kept.keeping import Candidate, write_model
from ftkit.lab.kept.loading import load_kept
from ftkit.metrics import Evaluation
from ftkit.training.loop import evaluate

INFO = {
    "kind": "classifier", "notebook": "01_full_fine_tuning", "method": "full", "seed": 7, "base": "minilm",
    "labels": NAMES, "max_length": 48,
}  # fmt: skip
METRICS = {
    "majority": {"accuracy": 0.4321, "ci95": None, "seeds": [6, 7], "trainable_parameters": 0},
    "full": {"accuracy": 0.8765, "ci95": (0.8111, 0.9222), "seeds": [6, 7], "trainable_parameters": 1234567},
}
CANDIDATES = [Candidate("full", 6, 0.71), Candidate("full", 7, 0.73), Candidate("last_2", 6, 0.72)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "pretrained")


def make_evaluation(seed: int = 0, rows: int = 60) -> Evaluation:
    rng = np.random.default_rng(seed)
    labels, p = rng.integers(0, 3, rows), rng.dirichlet(np.ones(3), rows)
    return Evaluation(labels, p, float(-np.log(p[np.arange(rows), labels]).mean()))


def make_card(info: dict = INFO, settings: object = None, **how: object) -> ModelCard:
    return ModelCard(model_card(info, settings or make_settings(), **how))


def test_the_head_is_what_the_hub_reads() -> None:
    test = make_evaluation()
    data = make_card(test=test, metrics=METRICS, candidates=CANDIDATES).data
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert (data.license, data.language, data.metrics) == ("apache-2.0", ["en"], ["accuracy", "f1"])
    assert data.tags == ["ftkit", "full", "classifier"]
    found = {result.metric_name: result for result in data.eval_results}
    assert found["accuracy"].metric_value == round(test.accuracy, 4)
    assert found["macro-F1"].metric_value == round(test.macro_f1, 4)
    assert found["balanced accuracy"].metric_value == round(test.balanced_accuracy, 4)
    assert {(r.dataset_type, r.dataset_split) for r in found.values()} == {("movie-sentiment", "test")}
    again = eval_results_to_model_index(data.model_name, data.eval_results)
    assert again == ModelCard(str(make_card(test=test))).data.to_dict()["model-index"]


def test_every_figure_comes_from_the_arguments() -> None:
    test = make_evaluation()
    text = make_card(
        test=test,
        metrics=METRICS,
        candidates=CANDIDATES,
        domains={"tweet_sentiment": {"accuracy": 0.6543, "ci95": (0.6001, 0.7001)}},
    ).text
    assert "chosen by its score on validation rows, 0.730, out of 3 runs" in text
    assert "| last\\_2 |" not in text
    assert "| last 2 | 6 | 0.720 |" in text
    assert "| majority | 0.432 | – | 6, 7 | 0 |" in text
    assert "| full | 0.876 | 0.811 to 0.922 | 6, 7 | 1,234,567 |" in text
    assert f"on 60 test rows: accuracy {test.accuracy:.3f} (95 % interval {test.ci95[0]:.3f}" in text
    assert f"alone gives {test.majority:.3f}" in text
    assert "| tweet\\_sentiment | 0.654 | 0.600 to 0.700 |" in text
    assert "cut after 48 tokens" in text
    wrong = test.confusion * (1 - np.eye(3, dtype=int))
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    names = [name.replace("_", "\\_") for name in NAMES]
    first = text[text.index("confuses most") :].splitlines()[1]
    assert first == f"  - {names[i]} taken for {names[j]}: {wrong[i, j]} of {test.confusion[i].sum()} rows"
    other = make_card(test=make_evaluation(1), metrics=METRICS, candidates=CANDIDATES).text
    assert other != text


def test_an_own_file_appears_by_name_and_hash_only(tmp_path: Path) -> None:
    path = tmp_path / "my reviews.csv"
    path.write_text("text,label\nsecret words,so so\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    card = make_card(settings=make_settings(source=str(path)), test=make_evaluation())
    assert f"`my reviews.csv`, sha256 `{digest}`" in card.text
    assert "secret" not in str(card)
    assert str(tmp_path) not in str(card)
    assert (card.data.license, card.data.datasets) == (None, None)  # nobody knows the licence of the file
    assert card.data.eval_results[0].dataset_type == "custom"

    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"secret")
    texts = []
    for content in (b"secret", b"secret", b"other"):
        (folder / "a.png").write_bytes(content)
        texts.append(make_card(settings=make_settings(source=None, images=str(folder))).text)
    assert texts[0] == texts[1] != texts[2]
    assert "`pictures`, sha256 of its files `" in texts[0]


def test_the_licence_is_that_of_base_and_data() -> None:
    topics = make_card(settings=make_settings(source="bbc-topics")).data
    assert (topics.license, topics.license_name) == ("other", "apache-2.0-and-research-only")
    assert topics.datasets == ["SetFit/bbc-news"]
    hub = make_card({**INFO, "base": "owner/name"}, make_settings(source="other/data:config"))
    assert (hub.data.base_model, hub.data.datasets, hub.data.license) == ("owner/name", ["other/data"], None)
    own = make_card({**INFO, "base": None})
    assert (own.data.base_model, own.data.license) == (None, None)
    assert "own, or from random weights" in own.text


def test_names_cannot_break_the_card() -> None:
    names = ["a|b`c", "<b>x</b>\nline", "---\n*y*_$z$"]
    test = make_evaluation()
    card = make_card({**INFO, "labels": names, "method": "my|method\n---"}, make_settings(source=None), test=test)
    assert card.data.tags[1] == "my-method"
    assert "<b>" not in card.text.replace("\\<b\\>", "")
    assert "a\\|b\\`c" in card.text
    prompt = {**INFO, "kind": "prompt", "template": {"text": "{text}\nIs `it`?"}}
    prompt |= {"verbalizer": {"words": {"a": [" x"], "b": [" `y`"]}}, "labels": ["a", "b"]}
    assert "`` {text}\\nIs `it`? ``" in make_card(prompt).text


@pytest.mark.parametrize("method", ADD)
def test_the_code_on_the_card_runs(
    method: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = make_trained(method, checkpoint)
    folder = write_kept(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    found = run_code(folder)
    expected = load_kept(folder).probabilities(["A text."])[0]
    if "logits" in found:
        ours = found["logits"].softmax(-1)[0].tolist()
    elif "classify" in found:
        scores = {item["label"]: item["score"] for item in found["classify"]("A text.", truncation=True)[0]}
        ours = [scores[name] for name in NAMES]
    else:
        ours = found["kept"].probabilities(["A text."])[0]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def run_code(folder: Path) -> dict[str, object]:
    (code,) = re.findall(r"```python\n(.*?)```", ModelCard.load(folder / "README.md").text, re.DOTALL)
    found: dict[str, object] = {}
    with torch.inference_mode():
        exec(code, found)
    return found


def test_the_card_of_two_towers(tmp_path: Path) -> None:
    model, pairs = make_towers(), make_pairs(10)
    test = evaluate(model, encode_pairs({"test": pairs}, model)["test"])
    settings = make_settings(NOTEBOOK="06_clip_loss", source=None, images="emoji", max_length=None, rows=None)
    folder = write_model(model, tmp_path / "model", settings, method="heads_only", seed=1, test=test, metrics=METRICS)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("zero-shot-image-classification", "ftkit")
    recalls = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert recalls == {f"recall at {k}": round(test.recall(k), 4) for k in (1, 5, 10)}
    assert "10 captions and 10 images" in card.text
    assert "Guessing gives 0.100 at 1" in card.text
    assert "ftkit predict" not in card.text


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; it keeps what it is sent."""

    received: dict[str, dict[str, object]]

    def do_GET(self) -> None:
        self._answer({"id": "me/mine", "siblings": [], "name": "me", "type": "user"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/create"):
            self._answer({"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"})
        elif "validate-yaml" in self.path:
            self.received["card"] = json.loads(body)
            self._answer({"errors": [], "warnings": []})
        elif "preupload" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._answer({"files": modes})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            self.received["files"] = {x["value"]["path"]: x["value"] for x in lines if x["key"] == "file"}
            url = f"http://{self.headers['Host']}/me/mine/commit/{'0' * 40}"
            self._answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})

    def _answer(self, content: object) -> None:
        payload = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict]]:
    Hub.received = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Hub.received
    server.shutdown()
    server.server_close()


def test_the_folder_goes_to_a_hub_with_its_card(hub: tuple[str, dict], checkpoint: Path, tmp_path: Path) -> None:
    endpoint, received = hub
    model, _ = make_trained("lora", checkpoint)
    test = make_evaluation()
    folder = write_kept(model, tmp_path / "model", test=test, candidates=[Candidate("lora", 3, 0.5)])
    api = HfApi(endpoint=endpoint, token="hf_none")
    api.create_repo("me/mine", exist_ok=True)
    api.upload_folder(repo_id="me/mine", folder_path=folder)
    assert received["card"]["content"] == (folder / "README.md").read_text(encoding="utf-8")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {*received["files"]} == there
