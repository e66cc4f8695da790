"""Choice of the few-shot examples in a prompt.

Choose from the training split: with test rows in the pool, the prompts would contain the answers.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ftkit.models.encoders import load_text_encoder
from ftkit.prompting.templates import Row
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths


def random_examples(pool: Sequence[Row] | datasets.Dataset, k: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Draw k different rows at random, in random order.

    Args:
        pool: rows to choose from.
        k: number of examples.
        seed: seed of the draw; the global random state is neither used nor changed.

    Raises:
        ValueError: the pool has fewer than k rows.
    """
    _require_rows(pool, k)
    return [dict(pool[int(i)]) for i in np.random.default_rng(seed).permutation(len(pool))[:k]]


def balanced_examples(pool: Sequence[Row] | datasets.Dataset, k: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Draw k different rows at random, equally many of each label, in random order.

    If k is not a multiple of the number of labels, some labels, drawn at random too, get one more row.

    Args:
        pool: labelled rows to choose from, with the column ``label``.
        k: number of examples.
        seed: seed of the draw; the global random state is neither used nor changed.

    Raises:
        ValueError: the pool has fewer than k rows, or too few rows of a label.
    """
    _require_rows(pool, k)
    rng = np.random.default_rng(seed)
    labels = np.array([row["label"] for row in pool])
    names = rng.permutation(np.unique(labels))  # the first ones get one more
    chosen: list[int] = []
    for place, name in enumerate(names):
        wanted = k // len(names) + (place < k % len(names))
        rows = np.flatnonzero(labels == name)
        if len(rows) < wanted:
            raise ValueError(
                f"The pool has {len(rows)} rows with the label {name}, but {wanted} are needed: add rows or lower k."
            )
        chosen += rng.permutation(rows)[:wanted].tolist()
    return [dict(pool[int(i)]) for i in rng.permutation(chosen)]


def nearest_examples(
    pool: Sequence[Row] | datasets.Dataset, rows: Sequence[Row] | datasets.Dataset, k: int, *, column: str = "text"
) -> list[list[dict[str, Any]]]:
    """Choose for each row the k most similar rows of the pool, the most similar one last (Liu et al., 2022).

    Similarity is the cosine between the texts' embeddings by ``minilm``. Rows of the pool with exactly the same text
    as the row in question are left out.

    Args:
        pool: labelled rows to choose from.
        rows: N rows to choose examples for.
        k: number of examples for each row.
        column: column with the texts.

    Returns:
        N lists of k rows, for ``encode_prompts``.

    Raises:
        ValueError: the pool has fewer than k rows with a different text.
    """
    _require_rows(pool, k)
    pool_texts, texts = ([row[column] for row in some] for some in (pool, rows))
    cosines = _embed(texts) @ _embed(pool_texts).T
    cosines[np.array(texts, dtype=object)[:, None] == np.array(pool_texts, dtype=object)] = -np.inf
    order = np.argsort(cosines, axis=1, kind="stable")[:, -k:]
    if not np.isfinite(np.take_along_axis(cosines, order, axis=1)).all():
        raise ValueError(f"The pool has fewer than {k} rows whose text differs from a given row: add rows or lower k.")
    return [[dict(pool[int(i)]) for i in chosen] for chosen in order]


@torch.inference_mode()
def _embed(texts: list[str]) -> NDArray[np.float32]:
    """Embed texts with ``minilm``, normalised to length 1, shape (N, 384); texts are cut after 512 tokens."""
    encoder = load_text_encoder("minilm")
    rows = datasets.Dataset.from_dict(encoder.tokenize(texts, max_length=512))
    embeddings = np.empty((len(rows), encoder.width), dtype=np.float32)
    for indices in evaluation_batches(row_lengths(rows), batch_size=32):
        batch = make_batch(encoder.network, rows, indices, encoder.network.device)
        embeddings[indices] = F.normalize(encoder(**batch), dim=-1).cpu().numpy()
    return embeddings


def _require_rows(pool: Sequence[Row] | datasets.Dataset, k: int) -> None:
    if not 1 <= k <= len(pool):
        raise ValueError(f"A pool of {len(pool)} rows cannot give {k} examples: choose k from 1 to {len(pool)}.")
