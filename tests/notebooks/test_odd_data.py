"""Valid but odd data and networks: a lesson leaves out what cannot run, says so, and goes on to its end."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoTokenizer,
    MPNetConfig,
    MPNetForSequenceClassification,
    MptConfig,
    MptForCausalLM,
)

from ftkit.data.assets import registry
from ftkit.lab.runs.notebooks import Run, run_notebook

EMOJI = "😀😁😂🤣😃😄😅😆😉😊😋😎😍😘🥰😗😙😚🙂🤗🤩🤔😐😑😶🙄😏😣😥😮😯😪😫😴😌😛😜"
SMALL = {"num_seeds": 1}


def write_csv(path: Path, *rows: tuple[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def run(notebook: str, folder: Path, **parameters: object) -> Run:
    return run_notebook(notebook, SMALL | parameters, tier="smoke", out=folder, progress=False)


def printed(done: Run) -> str:
    notebook = json.loads(done.executed.read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def test_texts_of_emoji_only_have_no_bag_of_words(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = {"".join(draw.choices(EMOJI, k=draw.randint(3, 6))) for _ in range(150)}
    rows = [(text, draw.choice(["happy", "sad"])) for text in sorted(texts)]
    data = write_csv(tmp_path / "emoji.csv", ("text", "label"), *rows)
    done = run("01_full_fine_tuning", tmp_path, data=str(data), rows=20, test_rows=20)
    assert done.error is None
    assert "bag_of_words is left out: empty vocabulary" in printed(done)
    assert set(done.metrics) == {"majority", "frozen_probe", "from_scratch", "full"}


def test_a_class_of_one_row_in_a_hundred_may_be_missing_from_the_training_rows(tmp_path: Path) -> None:
    rows = [(f"a film of {i} minutes", "rare" if i % 100 == 0 else "usual") for i in range(500)]
    data = write_csv(tmp_path / "rare.csv", ("text", "label"), *rows)
    done = run("01_full_fine_tuning", tmp_path, data=str(data), rows=8, test_rows=100, seed=1)
    assert done.error is None
    assert done.metrics["majority"]["accuracy"] == pytest.approx(0.99)


def test_a_network_that_refuses_a_method_is_adapted_by_the_others(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(registry.fetch("minilm", progress=False))
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = MPNetConfig(vocab_size=len(tokenizer), max_position_embeddings=514, **size)
    MPNetForSequenceClassification(config).save_pretrained(tmp_path / "mpnet")
    tokenizer.save_pretrained(tmp_path / "mpnet")
    done = run("03_lora_and_adapters", tmp_path, model=str(tmp_path / "mpnet"))
    assert done.error is None
    assert "adapter is left out: " in printed(done)
    assert set(done.metrics) == {"majority", "bitfit", "lora", "full"}


def test_a_small_folder_whose_captions_repeat_across_splits(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    colours = {
        "a red thing": (200, 30, 30),
        "a green field": (30, 160, 30),
        "a blue sky": (60, 60, 220),
        "snow": (250,) * 3,
    }
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        caption = list(colours)[i % 4]
        pixels = np.clip(np.array(colours[caption]) + rng.integers(-30, 30, (24, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append((f"{i}.png", caption))
    captions = write_csv(folder / "captions.csv", ("file", "caption"), *rows)
    write_csv(folder / "earlier.csv", ("file", "caption"), *rows[:3])  # two files: one has to be named
    done = run("06_clip_loss", tmp_path, images=str(folder), captions=str(captions))
    assert done.error is None
    assert done.settings["rows"] == 9 and done.settings["test_rows"] == 2


def test_prompts_for_a_small_file_and_a_network_that_refuses_a_method(tmp_path: Path) -> None:
    """The file has fewer rows than the lesson takes, and peft cannot put a soft prompt before an MPT."""
    draw = random.Random(0)
    rows = [(f"{draw.choice(['calm', 'loud', 'odd'])} film number {i}", "good" if i % 3 else "bad") for i in range(60)]
    data = write_csv(tmp_path / "few.csv", ("text", "label"), *rows)
    tokenizer = AutoTokenizer.from_pretrained(registry.fetch("smollm2", progress=False))
    size = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 512, "vocab_size": len(tokenizer)}
    MptForCausalLM(MptConfig(**size, pad_token_id=tokenizer.pad_token_id)).save_pretrained(tmp_path / "mpt")
    tokenizer.save_pretrained(tmp_path / "mpt")
    done = run("04_prompt_learning", tmp_path, model=str(tmp_path / "mpt"), data=str(data), rows=1000, steps=1)
    assert done.error is None
    assert "prompt_tuning is left out: MptForCausalLM" in printed(done)
    assert "lora" in done.metrics and "prompt_tuning" not in done.metrics
    assert done.settings["rows"] < 60
