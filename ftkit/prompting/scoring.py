"""A language model as a classifier: labels scored by their words; calibration."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ftkit.metrics import Evaluation
from ftkit.models.causal_lm import next_token_logits, require_language_model
from ftkit.models.kv_cache import SharedStart, can_share_start, run_shared_start
from ftkit.models.modules import eval_mode
from ftkit.training.batching import collate, evaluation_batches, row_lengths

Words = Sequence[Sequence[tuple[int, ...]]]  # for each label, for each of its words, the token ids after the prompt

LogProbs = dict[tuple[int, ...], Tensor]  # of the last of some tokens that follow the prompt, shape (B,)


@torch.inference_mode()
def score(
    model: PreTrainedModel | PeftModel,
    rows: Any,
    words: Words,
    *,
    length_normalised: bool = False,
    batch_size: int = 32,
) -> NDArray[np.float64]:
    """Score every label after every prompt, by what a causal language model expects to follow it.

    A word's score is the sum of its tokens' log-probabilities; a label's is the log of the sum over its words of
    exp(score). What all prompts begin with (an instruction, examples) is run once, and its keys and values are used
    again for every row; so are each row's own for every word. The scores are those of each whole text run by itself,
    up to the rounding of float32. A model whose cache can't be shared (a recurrent state, a soft prompt) runs each text
    whole, and a line says so.

    Args:
        model: a causal language model, with or without an adapter.
        rows: N rows with ``input_ids``, as ``encode_prompts`` makes them.
        words: for each of C labels, for each of its words, the token ids that follow the prompt.
        length_normalised: a word's score is the mean over its tokens instead.
        batch_size: rows a forward pass; it changes memory and time, not the result.

    Returns:
        The labels' log-scores, in nats, shape (N, C). ``to_evaluation`` makes them probabilities.

    Raises:
        ValueError: no causal language model, no rows, an empty prompt, or a text longer than the model's window.
    """
    require_language_model(model)
    lengths = row_lengths(rows)
    prompts = list(rows["input_ids"]) if hasattr(rows, "column_names") else [row["input_ids"] for row in rows]
    if not lengths.min():
        raise ValueError(f"The prompt of row {lengths.argmin()} is empty: give each row at least one token.")
    longest = int(lengths.max()) + max(len(word) for label in words for word in label)
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window is not None and longest > window:
        raise ValueError(
            f"Row {lengths.argmax()} has {longest:,} tokens with its longest word, more than the model's window of "
            f"{window:,}: give fewer or shorter examples, or shorten the text."
        )
    shared = shared_tokens(prompts)
    scores = np.empty((len(prompts), len(words)))
    with eval_mode(model):
        prefix = None
        if can_share_start(model, longest):
            prefix = run_shared_start(model, prompts[0][:shared])
        else:
            print(f"{type(model).__name__}: rows can't share a cache, each prompt is run whole for each word")
        for indices in evaluation_batches(lengths, batch_size):
            chosen = [prompts[i] for i in indices]
            if prefix is None:
                found = _run_whole(model, chosen, words)
            else:
                found = _run_behind(model, prefix, [ids[shared:] for ids in chosen], words)
            scores[indices] = _label_scores(found, words, length_normalised)
    return scores


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left to be run."""
    first, last = min(prompts), max(prompts)  # in the order of a dictionary all others lie between these
    most = min(len(ids) for ids in prompts) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def to_evaluation(scores: ArrayLike, labels: ArrayLike) -> Evaluation:
    """Judge scores against the labels, as ``ftkit.training.evaluate`` judges a classifier.

    Args:
        scores: log-scores, shape (N, C); they become probabilities by a softmax over the labels.
        labels: the right classes, integers in [0, C), shape (N,).
    """
    labels = np.asarray(labels, dtype=np.int64)
    log_probs = _normalise(scores)
    return Evaluation(labels, np.exp(log_probs), float(-log_probs[np.arange(len(labels)), labels].mean()))


def calibrate(scores: ArrayLike, content_free: ArrayLike) -> NDArray[np.float64]:
    """Take out what the prompt alone makes of the labels: contextual calibration (Zhao et al., 2021).

    The probabilities over the labels are divided by their mean over inputs that say nothing, and sum to 1 again.

    Args:
        scores: log-scores of the rows, shape (N, C).
        content_free: log-scores of inputs that say nothing in the same prompt, shape (M, C), see ``content_free_rows``.

    Returns:
        Log-probabilities, shape (N, C).
    """
    bias = np.log(np.exp(_normalise(content_free)).mean(axis=0))
    return _normalise(_normalise(scores) - bias)


def _normalise(scores: ArrayLike) -> NDArray[np.float64]:
    """Log-scores as log-probabilities over the labels."""
    scores = np.asarray(scores, dtype=np.float64)
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


def _run_behind(
    model: PreTrainedModel | PeftModel, prefix: list[DynamicLayer], texts: list[list[int]], words: Words
) -> LogProbs:
    """Run what follows the shared beginning in each row, then each word behind the row's own keys and values."""
    cache = Cache(layers=[SharedStart(layer) for layer in prefix])
    start = cache.get_seq_length()
    batch = collate([{"ids": ids, "mask": [1] * len(ids)} for ids in texts], {})
    ids, mask = (batch[name].to(model.device) for name in ("ids", "mask"))
    ends = mask.sum(1, keepdim=True)  # (B, 1)
    mask = torch.cat([mask.new_ones(len(mask), start), mask], dim=1)

    def run(ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """Float32 logits, shape (B, K, V), at those K places of the ids."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits.float()

    places = torch.arange(start, start + ids.shape[1], device=ids.device)
    found = _read(run(ids, mask, places.expand_as(ids), ends - 1), (), words)
    for beginning in _beginnings(words):
        size = len(beginning)
        # behind a padded row there is a gap in the cache, which the mask hides; its position goes on from its text
        steps = torch.arange(size, device=ids.device).expand(len(ids), size)
        logits = run(
            torch.tensor(beginning, device=ids.device).expand(len(ids), size),
            torch.cat([mask, mask.new_ones(len(ids), size)], dim=1),
            start + ends + steps,
            steps,
        )
        found |= _read(logits, beginning, words)
        cache.crop(-size)
    return found


def _run_whole(model: PreTrainedModel | PeftModel, prompts: list[list[int]], words: Words) -> LogProbs:
    """Run each prompt anew for each word, without a cache."""
    found: LogProbs = {}
    for beginning in _beginnings(words) or [()]:
        batch = collate([{"ids": [*ids, *beginning], "mask": [1] * (len(ids) + len(beginning))} for ids in prompts], {})
        ids, mask = (batch[name].to(model.device) for name in ("ids", "mask"))
        steps = torch.arange(len(beginning) + 1, device=ids.device)
        positions = mask.sum(1, keepdim=True) - 1 - len(beginning) + steps
        logits = next_token_logits(model, ids, mask, positions)
        found |= _read(logits[:, :1], (), words) | _read(logits[:, 1:], beginning, words)
    return found


def _beginnings(words: Words) -> list[tuple[int, ...]]:
    """What has to follow a prompt for every token of every word to be read; none for words of one token."""
    every = {word[:-1] for label in words for word in label if len(word) > 1}
    return sorted(one for one in every if not any(one == other[: len(one)] for other in every - {one}))


def _read(logits: Tensor, beginning: tuple[int, ...], words: Words) -> LogProbs:
    """Log-probabilities of the words' next tokens from the logits, shape (B, K, V).

    With no beginning K is 1, after the prompt; else it is the beginning's length, one place after each of its tokens.
    """
    found: LogProbs = {}
    normaliser = logits.logsumexp(-1)
    for place in range(logits.shape[1]):
        before = beginning[: place + 1]
        for word in (word for label in words for word in label):
            if word[: len(before)] == before and len(word) > len(before):
                token = word[len(before)]
                found[(*before, token)] = logits[:, place, token] - normaliser[:, place]
    return found


def _label_scores(found: LogProbs, words: Words, length_normalised: bool) -> NDArray[np.float64]:
    """Scores of the labels, shape (B, C)."""

    def of_word(word: tuple[int, ...]) -> Tensor:
        total = sum(found[word[: i + 1]].double() for i in range(len(word)))
        return total / len(word) if length_normalised else total

    labels: Iterable[Tensor] = (torch.stack([of_word(word) for word in label]).logsumexp(0) for label in words)
    return torch.stack(list(labels), dim=1).cpu().numpy()
