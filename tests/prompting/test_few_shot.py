"""Few-shot examples chosen from small pools; similarity is measured with the real minilm."""

from collections.abc import Callable

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from ftkit.data.assets.registry import fetch
from ftkit.prompting.few_shot import _embed, balanced_examples, nearest_examples, random_examples

POOL = [{"text": f"text {i}", "label": int(i % 5 == 0)} for i in range(20)]  # 16 of label 0, 4 of label 1
FILMS = [
    {"text": "The acting was superb and the actors shone.", "label": 1},
    {"text": "My phone's battery died after an hour.", "label": 0},
    {"text": "The cast gave excellent performances.", "label": 1},
    {"text": "The pizza was cold when it arrived.", "label": 0},
]


@pytest.mark.parametrize("choose", [random_examples, balanced_examples])
def test_the_seed_alone_decides_on_the_rows_and_their_order(choose: Callable[..., list]) -> None:
    first = choose(POOL, 6, seed=3)
    assert choose(datasets.Dataset.from_list(POOL), 6, seed=3) == first
    assert len({row["text"] for row in first}) == 6
    orders = {tuple(row["text"] for row in choose(POOL, 6, seed=seed)) for seed in range(20)}
    assert len(orders) == 20


def test_every_row_can_be_drawn_in_every_place() -> None:
    places = {(row["text"], i) for seed in range(400) for i, row in enumerate(random_examples(POOL, 3, seed=seed))}
    assert len(places) == 20 * 3


def test_balanced_examples_have_equally_many_of_each_label() -> None:
    pool = [{"text": str(i), "label": label} for i, label in enumerate("aaaaaaaabbbcc")]
    counts = [[sum(row["label"] == name for row in balanced_examples(pool, k, seed=s)) for name in "abc"]
              for k in (3, 6) for s in range(5)]  # fmt: skip
    assert counts == [[1, 1, 1]] * 5 + [[2, 2, 2]] * 5
    fours = {tuple(sum(row["label"] == name for row in balanced_examples(pool, 4, seed=s)) for name in "abc")
             for s in range(30)}  # fmt: skip
    assert fours == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    orders = {"".join(row["label"] for row in balanced_examples(pool, 3, seed=s)) for s in range(60)}
    assert len(orders) == 6
    with pytest.raises(ValueError, match="The pool has 2 rows with the label c, but 3 are needed: add rows or lower k"):
        balanced_examples(pool, 9)


def test_embeddings_are_normalised_means_over_the_tokens() -> None:
    texts = ["good", "A much longer sentence about a film, 电影 and all.", "word " * 700]
    folder = fetch("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    expected = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, truncation=True, max_length=512, return_tensors="pt")).last_hidden_state
        expected.append(torch.nn.functional.normalize(states[0].mean(0), dim=0).numpy())
    np.testing.assert_allclose(_embed(texts), expected, atol=1e-5)


def test_the_nearest_rows_come_last_and_never_the_row_itself() -> None:
    rows = [{"text": "What wonderful actors!"}, {"text": FILMS[0]["text"]}, {"text": "The food was not warm."}]
    examples = nearest_examples(FILMS, rows, 2)
    assert {row["text"] for row in examples[0]} == {FILMS[0]["text"], FILMS[2]["text"]}
    assert examples[1][-1] == FILMS[2]
    assert FILMS[0] not in examples[1]
    assert examples[2][-1] == FILMS[3]
    cosines = _embed([row["text"] for row in examples[2]]) @ _embed([rows[2]["text"]])[0]
    assert cosines[0] < cosines[1]
    with pytest.raises(ValueError, match="fewer than 4 rows whose text differs from a given row"):
        nearest_examples(FILMS, rows, 4)


@pytest.mark.parametrize("k", [0, 21])
def test_a_pool_that_is_too_small_is_refused(k: int) -> None:
    for choose in (random_examples, balanced_examples, lambda pool, k: nearest_examples(pool, FILMS, k)):
        with pytest.raises(ValueError, match=f"A pool of 20 rows cannot give {k} examples: choose k from 1 to 20"):
            choose(POOL, k)
