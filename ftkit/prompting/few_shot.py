"""Which solved examples stand in a prompt.

The pool is the training split: with test rows in it the prompts would hold the answers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftkit.models.loading import load_classifier
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths

Rows = Any  # a datasets.Dataset or a sequence of dicts


def random_examples(pool: Rows, k: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Draw k different rows of the pool, in random order; the seed alone decides.

    Raises:
        ValueError: the pool has fewer than k rows.
    """
    _require_rows(pool, k)
    return [dict(pool[int(i)]) for i in np.random.default_rng(seed).permutation(len(pool))[:k]]


def balanced_examples(pool: Rows, k: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Draw k different rows, as many of each label as of any other, or one more; in random order, by the seed alone.

    Args:
        pool: labelled rows, the label in the column ``label``.

    Raises:
        ValueError: the pool has fewer than k rows, or too few of a label.
    """
    _require_rows(pool, k)
    rng = np.random.default_rng(seed)
    labels = np.array([row["label"] for row in pool])
    names = rng.permutation(np.unique(labels))  # those that get one more are drawn too
    chosen: list[int] = []
    for place, name in enumerate(names):
        wanted = k // len(names) + (place < k % len(names))
        rows = np.flatnonzero(labels == name)
        if len(rows) < wanted:
            raise ValueError(
                f"The pool has {len(rows)} rows of label {name}, not {wanted}: give more rows, or lower k."
            )
        chosen += rng.permutation(rows)[:wanted].tolist()
    return [dict(pool[int(i)]) for i in rng.permutation(chosen)]


def nearest_examples(pool: Rows, rows: Rows, k: int, *, column: str = "text") -> list[list[dict[str, Any]]]:
    """For each row the k rows of the pool most like it, the most alike last, next to the question (Liu et al., 2022).

    Alike is the cosine of two texts' embeddings by ``minilm``. A row of the pool with the very same text is left out.

    Args:
        pool: labelled rows to choose from.
        rows: N rows to choose for.
        column: of the texts.

    Returns:
        N lists of k rows, for ``encode_prompts``.

    Raises:
        ValueError: the pool has fewer than k rows of other texts.
    """
    _require_rows(pool, k)
    texts, asked = ([row[column] for row in some] for some in (pool, rows))
    likeness = embed(asked) @ embed(texts).T
    likeness[np.array(asked, dtype=object)[:, None] == np.array(texts, dtype=object)] = -np.inf
    order = np.argsort(likeness, axis=1, kind="stable")[:, -k:]
    if not np.isfinite(np.take_along_axis(likeness, order, axis=1)).all():
        raise ValueError(f"The pool has fewer than {k} rows that are not the row in question: give more, or lower k.")
    return [[dict(pool[int(i)]) for i in chosen] for chosen in order]


@torch.inference_mode()
def embed(texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
    """Embeddings by ``minilm`` (Reimers and Gurevych, 2019): the mean over the tokens, of length 1, shape (N, 384).

    A text of more tokens than the model reads, 512, counts by its beginning.
    """
    model, tokenizer = load_classifier("minilm", 2)
    body = model.base_model  # below the head, which is new
    columns = tokenizer(list(texts), truncation=True, return_token_type_ids=False)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    embeddings = np.empty((len(rows), model.config.hidden_size), dtype=np.float32)
    for indices in evaluation_batches(row_lengths(rows), batch_size):
        batch = make_batch(body, rows, indices, body.device)
        mask = batch["attention_mask"][..., None]
        mean = (body(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        embeddings[indices] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return embeddings


def _require_rows(pool: Rows, k: int) -> None:
    if not 1 <= k <= len(pool):
        raise ValueError(f"{k} examples can't be chosen from a pool of {len(pool)} rows: give 1 to {len(pool)}.")
