"""A tiny two-tower model, and pairs of an image in one colour and a caption that names the colour."""

import copy

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tiny_models import CONFIGS, make_word_tokenizer
from transformers import BertModel, ViTModel

from ftkit.contrastive.towers import TwoTowers
from ftkit.data.pairs import Pairs
from ftkit.models.encoders import ImageEncoder, TextEncoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make_towers(dropout: float = 0.0, **settings: object) -> TwoTowers:
    """Make a two-tower model from two transformers of width 16 with 3 layers."""
    torch.manual_seed(0)
    networks = []
    for kind, family, options in ((BertModel, "bert", {}), (ViTModel, "vit", {"add_pooling_layer": False})):
        config = copy.deepcopy(CONFIGS[family])
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        networks.append(kind(config, **options))
    text, image = TextEncoder(networks[0], make_word_tokenizer()), ImageEncoder(networks[1], size=8, mean=MEAN, std=STD)
    return TwoTowers(text, image, **{"dim": 8, **settings})


def make_pairs(number: int, seed: int = 0) -> Pairs:
    """Make pairs of an image in one colour and a caption of 3 to 5 words that names it; all captions are distinct."""
    rng = np.random.default_rng(seed)
    colours = rng.choice(512, size=number, replace=False)
    levels = np.stack([colours // 64, colours // 8 % 8, colours % 8], axis=1)
    images = np.broadcast_to((levels * 36)[:, None, None, :], (number, 8, 8, 3)).astype(np.uint8)
    captions = [f"w{3 + r} w{13 + g} w{23 + b}" + " w50" * int(r % 3) for r, g, b in levels]
    return Pairs(images, captions, pd.DataFrame({"colour": colours}))


def brighten(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Augment an image by a random change of its brightness."""
    return (image // 2 + rng.integers(0, 100)).astype(np.uint8)
