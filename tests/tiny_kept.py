"""Tiny classifiers by every method, as a notebook would have trained them, to be kept."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny_models import CONFIGS, disturb, make_word_tokenizer
from transformers import BertModel

from ftkit.adapters.bottleneck import add_adapters
from ftkit.adapters.lora import add_ia3, add_lora, bitfit
from ftkit.lab.kept.keeping import write_model
from ftkit.models.loading import load_classifier

NAMES = ["so so", "bad, very", "good_one"]
MAX_LENGTH = 12
ADD = {
    "full": lambda model: model,
    "bitfit": bitfit,
    "lora": lambda model: add_lora(model, rank=2),
    "dora": lambda model: add_lora(model, rank=2, dora=True, name="mine"),
    "ia3": add_ia3,
    "pfeiffer": lambda model: add_adapters(model, 4),
    "houlsby": lambda model: add_adapters(model, 4, kind="houlsby"),
}


def make_settings(**changed: object) -> SimpleNamespace:
    values = {"NOTEBOOK": "03_lora_and_adapters", "max_length": MAX_LENGTH, "rows": 40, "source": "movie-sentiment"}
    return SimpleNamespace(**{**values, "keep": True, "model": "minilm", "text": None, **changed})


def write_kept(model, folder: Path, **how: object) -> Path:
    return write_model(model, folder, make_settings(), **{"method": "lora", "seed": 3, "names": NAMES, **how})


def make_checkpoint(folder: Path) -> Path:
    """A pretrained network without a head, in a folder of the reader's."""
    torch.manual_seed(0)
    BertModel(copy.deepcopy(CONFIGS["bert"])).save_pretrained(folder)
    make_word_tokenizer().save_pretrained(folder)
    return folder


def make_trained(method: str, checkpoint: Path):
    model, tokenizer = load_classifier(checkpoint, NAMES)
    return disturb(ADD[method](model)), tokenizer
