"""A network and rows so small that training takes a second."""

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY = 60

torch.set_num_threads(1)  # faster for a tiny network, and leaves the other cores free


def make_tiny_bert(dropout: float = 0.1, num_labels: int = 2, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=num_labels,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def make_rows(num_rows: int, seed: int = 0) -> list[dict[str, object]]:
    """Sequences of 3 to 20 tokens; the label says whether the second token is in the upper half of the vocabulary."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        ids = [1, *rng.integers(5, VOCABULARY, size=rng.integers(2, 20)).tolist()]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(ids[1] > VOCABULARY // 2)})
    return rows
