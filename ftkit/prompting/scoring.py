"""Classification with a language model: scores of the labels by their words, and calibration."""

from collections.abc import Sequence
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
from ftkit.prompting.templates import Words
from ftkit.training.batching import collate, evaluation_batches, row_lengths

# by tokens that follow the prompt: the log-probability of the last one, given the prompt and the others, shape (B,)
_LogProbs = dict[tuple[int, ...], Tensor]


@torch.inference_mode()
def score(
    model: PreTrainedModel | PeftModel,
    rows: Any,
    words: Words,
    *,
    length_normalised: bool = False,
    batch_size: int = 32,
) -> NDArray[np.float64]:
    """Score every label after every prompt with a causal language model.

    The score of a word is the sum of its tokens' log-probabilities; the score of a label is the log of the sum of
    exp(score) over its words. The shared start of all prompts (an instruction, examples) runs only once, and its keys
    and values are reused for every row; likewise, the keys and values of each row are reused for every word. The scores
    equal those of running each whole text alone, up to float32 rounding. If a model's cache cannot be shared (a
    recurrent state, a soft prompt), each text runs in full, and a printed line says so.

    Args:
        model: a causal language model, with or without an adapter.
        rows: N rows with ``input_ids``, from ``encode_prompts``.
        words: for each of C labels and each of its words, the token ids that follow the prompt.
        length_normalised: whether the score of a word is the mean over its tokens, not the sum.
        batch_size: rows per forward pass; it changes memory and time, not the result.

    Returns:
        The log-scores of the labels in nats, shape (N, C). ``to_evaluation`` turns them into probabilities.

    Raises:
        ValueError: the model is not a causal language model, there are no rows, a prompt is empty, or a text is longer
            than the model's window.
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
            f"Row {lengths.argmax()} has {longest:,} tokens with the longest word, more than the model's window of "
            f"{window:,}: use fewer or shorter examples, or shorten the text."
        )
    num_shared = shared_tokens(prompts)
    scores = np.empty((len(prompts), len(words)))
    with eval_mode(model):
        shared_start = None
        if can_share_start(model, longest):
            shared_start = run_shared_start(model, prompts[0][:num_shared])
        else:
            print(f"{type(model).__name__} cannot share a cache between rows: each prompt runs in full for each word.")
        for indices in evaluation_batches(lengths, batch_size):
            chosen = [prompts[i] for i in indices]
            if shared_start is None:
                log_probs = _run_in_full(model, chosen, words)
            else:
                log_probs = _run_after_start(model, shared_start, [ids[num_shared:] for ids in chosen], words)
            scores[indices] = _label_scores(log_probs, words, length_normalised)
    return scores


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all prompts have in common at their start, leaving at least one token of each prompt."""
    first, last = min(prompts), max(prompts)  # in lexicographic order: all others lie between these two
    most = min(len(ids) for ids in prompts) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def to_evaluation(scores: ArrayLike, labels: ArrayLike) -> Evaluation:
    """Compare scores with the true labels, as ``ftkit.training.evaluate`` does for a classifier.

    Args:
        scores: log-scores, shape (N, C); a softmax over the labels turns them into probabilities.
        labels: the true classes, integers in [0, C), shape (N,).
    """
    labels = np.asarray(labels, dtype=np.int64)
    log_probs = _normalise(scores)
    return Evaluation(labels, np.exp(log_probs), float(-log_probs[np.arange(len(labels)), labels].mean()))


def calibrate(scores: ArrayLike, content_free: ArrayLike) -> NDArray[np.float64]:
    """Remove the bias of the prompt itself towards some labels: contextual calibration (Zhao et al., 2021).

    The probabilities of the labels are divided by their mean over content-free inputs and normalised again.

    Args:
        scores: log-scores of the rows, shape (N, C).
        content_free: log-scores of content-free inputs in the same prompt, shape (M, C); see ``content_free_rows``.

    Returns:
        Log-probabilities, shape (N, C).
    """
    bias = np.log(np.exp(_normalise(content_free)).mean(axis=0))
    return _normalise(_normalise(scores) - bias)


def _normalise(scores: ArrayLike) -> NDArray[np.float64]:
    """Turn log-scores into log-probabilities over the labels."""
    scores = np.asarray(scores, dtype=np.float64)
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


def _run_after_start(
    model: PreTrainedModel | PeftModel, shared_start: list[DynamicLayer], texts: list[list[int]], words: Words
) -> _LogProbs:
    """Run the rest of each prompt after the shared start, then each word after the keys and values of its row."""
    cache = Cache(layers=[SharedStart(layer) for layer in shared_start])
    start = cache.get_seq_length()
    batch = collate([{"ids": ids, "mask": [1] * len(ids)} for ids in texts], {})
    ids, mask = (batch[name].to(model.device) for name in ("ids", "mask"))
    ends = mask.sum(1, keepdim=True)  # (B, 1)
    mask = torch.cat([mask.new_ones(len(mask), start), mask], dim=1)

    def run(ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """Compute the float32 logits at K places of the ids, shape (B, K, V)."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits.float()

    positions = torch.arange(start, start + ids.shape[1], device=ids.device)
    log_probs = _read(run(ids, mask, positions.expand_as(ids), ends - 1), (), words)
    for word_start in filter(None, word_starts(words)):
        size = len(word_start)
        # padding leaves a gap in the cache after a short row: the mask hides it, and positions continue from the text
        steps = torch.arange(size, device=ids.device).expand(len(ids), size)
        logits = run(
            torch.tensor(word_start, device=ids.device).expand(len(ids), size),
            torch.cat([mask, mask.new_ones(len(ids), size)], dim=1),
            start + ends + steps,
            steps,
        )
        log_probs |= _read(logits, word_start, words)
        cache.crop(-size)
    return log_probs


def _run_in_full(model: PreTrainedModel | PeftModel, prompts: list[list[int]], words: Words) -> _LogProbs:
    """Run each whole prompt again for each word, without a cache."""
    log_probs: _LogProbs = {}
    for start in word_starts(words):
        batch = collate([{"ids": [*ids, *start], "mask": [1] * (len(ids) + len(start))} for ids in prompts], {})
        ids, mask = (batch[name].to(model.device) for name in ("ids", "mask"))
        steps = torch.arange(len(start) + 1, device=ids.device)
        positions = mask.sum(1, keepdim=True) - 1 - len(start) + steps
        logits = next_token_logits(model, ids, mask, positions)
        log_probs |= _read(logits[:, :1], (), words) | _read(logits[:, 1:], start, words)
    return log_probs


def word_starts(words: Words) -> list[tuple[int, ...]]:
    """List the token sequences to append to a prompt so that every token of every word gets a logit, sorted.

    These are the words without their last token, except those that are the start of another one. If all words have one
    token, the only sequence is the empty one.
    """
    starts = {word[:-1] for label in words for word in label}
    return sorted(one for one in starts if not any(one == other[: len(one)] for other in starts - {one}))


def _read(logits: Tensor, start: tuple[int, ...], words: Words) -> _LogProbs:
    """Look up the log-probabilities of the words' next tokens in the logits, shape (B, K, V).

    Without a start, K is 1: the place after the prompt. Otherwise K is the length of the start: the place after each of
    its tokens.
    """
    log_probs: _LogProbs = {}
    normaliser = logits.logsumexp(-1)
    for place in range(logits.shape[1]):
        before = start[: place + 1]
        for word in (word for label in words for word in label):
            if word[: len(before)] == before and len(word) > len(before):
                token = word[len(before)]
                log_probs[(*before, token)] = logits[:, place, token] - normaliser[:, place]
    return log_probs


def _label_scores(log_probs: _LogProbs, words: Words, length_normalised: bool) -> NDArray[np.float64]:
    """Add up the log-probabilities to scores of the labels, shape (B, C)."""

    def word_score(word: tuple[int, ...]) -> Tensor:
        total = sum(log_probs[word[: i + 1]].double() for i in range(len(word)))
        return total / len(word) if length_normalised else total

    scores = [torch.stack([word_score(word) for word in label]).logsumexp(0) for label in words]
    return torch.stack(scores, dim=1).cpu().numpy()
