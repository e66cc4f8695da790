"""A classifier that scores the words of its labels after a prompt, and that ``fit`` can train."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from ftkit.models.causal_lm import next_token_logits, require_language_model
from ftkit.models.loading import name_classes
from ftkit.prompting.scoring import word_starts


class PromptClassifier(nn.Module):
    """A classifier made of a causal language model and label words (Schick and Schütze, 2021).

    The score of a label is the log of the summed probabilities of its words after the prompt. The log-probability of a
    word is the sum over its tokens. Cross-entropy over these scores compares the labels only with one another,
    regardless of what else the model might predict. Training changes whatever is trainable in the language model: a
    soft prompt, LoRA weights, or all weights.

    Words of one token need one forward pass over the prompt. For longer words, the prompt runs once for each different
    word start (a word without its last token) that is not itself the start of a longer one.

    Args:
        lm: a causal language model, or a peft model around one; it is shared, not copied.
        words: for each of C labels its words, each given as the token ids that follow the prompt.
        names: names of the labels, in the same order.
        length_normalised: whether the log-probability of a word is the mean over its tokens, not the sum, so that long
            words are not at a disadvantage.

    Attributes:
        lm: the language model as given; save ``model.lm``.
        config: a copy of the language model's config, with the labels as classes.

    Raises:
        ValueError: ``lm`` is not a causal language model, there are fewer than two labels or not one name for each, a
            label has no words, or two labels share a word.
    """

    def __init__(
        self,
        lm: nn.Module,
        words: Sequence[Sequence[Sequence[int]]],
        names: Sequence[str],
        *,
        length_normalised: bool = False,
    ) -> None:
        super().__init__()
        require_language_model(lm)
        all_words = _flatten(words, names)
        self.lm, self.length_normalised = lm, length_normalised
        self.config = copy.deepcopy(lm.config)
        name_classes(self.config, names)
        self._words_per_label = [len(label_words) for label_words in words]

        starts = word_starts([all_words])
        run = [next(i for i, start in enumerate(starts) if word[:-1] == start[: len(word) - 1]) for word in all_words]
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(word) for word in all_words], batch_first=True)
        width = tokens.shape[1]  # of the longest word
        inside = torch.arange(width) < torch.tensor([[len(word)] for word in all_words])
        appended = torch.tensor([[*start, *[0] * (width - 1 - len(start))] for start in starts], dtype=torch.int64)
        for name, value in {
            "_appended": appended,  # (K, L): tokens appended to the prompt in each of its K runs, padded
            "_num_appended": torch.tensor([len(start) for start in starts]),  # (K,)
            "_run": torch.tensor(run),  # (W,): the run in which each of the W words is scored
            "_tokens": tokens,  # (W, L + 1), padded
            "_inside": inside,  # (W, L + 1): True where _tokens is not padding
        }.items():
            # buffers move with the model; these are not part of its saved state
            self.register_buffer(name, value.to(next(lm.parameters()).device), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Score the labels after each prompt.

        Args:
            input_ids, attention_mask: B prompts padded at the end, shape (B, T).

        Returns:
            The log-scores of the labels in ``logits``, shape (B, C).
        """
        lengths = attention_mask.sum(1)[:, None, None]
        ids, mask = self._append(input_ids, attention_mask, lengths)
        steps = torch.arange(self._tokens.shape[1], device=input_ids.device)
        # the first token of a word is predicted at the last token of the prompt, the next ones at the appended tokens
        positions = lengths - 1 + torch.minimum(steps, self._num_appended[:, None])
        runs = (batch.flatten(0, 1) for batch in (ids, mask, positions))
        logits = next_token_logits(self.lm, *runs).unflatten(0, positions.shape[:2])  # (B, K, L + 1, V)
        token_logits = logits[:, self._run[:, None], steps, self._tokens]  # (B, W, L + 1)
        log_probs = token_logits - logits.logsumexp(-1)[:, self._run[:, None], steps]
        word_scores = log_probs.masked_fill(~self._inside, 0).sum(-1)
        if self.length_normalised:
            word_scores = word_scores / self._inside.sum(-1)
        label_scores = [scores.logsumexp(-1) for scores in word_scores.split(self._words_per_label, dim=1)]
        return SequenceClassifierOutput(logits=torch.stack(label_scores, dim=1))

    def _append(self, input_ids: Tensor, attention_mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Append each run's tokens to each prompt; returns ids and mask, both of shape (B, K, T + L)."""
        shape = (len(input_ids), *self._appended.shape)
        ids, mask = (F.pad(part, (0, shape[2]))[:, None].repeat(1, shape[1], 1) for part in (input_ids, attention_mask))
        offsets = torch.arange(shape[2], device=input_ids.device)
        places = (lengths + offsets).expand(shape)
        ids.scatter_(2, places, self._appended.expand(shape))
        mask.scatter_(2, places, (offsets < self._num_appended[:, None]).to(mask.dtype).expand(shape))
        return ids, mask


def _flatten(words: Sequence[Sequence[Sequence[int]]], names: Sequence[str]) -> list[tuple[int, ...]]:
    """List the words of all labels in order, after checking that they can tell the labels apart."""
    if len(words) != len(names) or len(set(names)) < max(len(names), 2):
        raise ValueError(
            f"There are words for {len(words)} labels, and the names are {list(names)}: give two or more different "
            "names, and words for each."
        )
    owner: dict[tuple[int, ...], str] = {}
    for name, label_words in zip(names, words, strict=True):
        if not label_words or not all(len(word) for word in label_words):
            raise ValueError(f"The label {name!r} has no words, or a word without tokens: give it at least one word.")
        for word in map(tuple, label_words):
            if word in owner:
                raise ValueError(
                    f"The tokens {list(word)} are a word of {owner[word]!r} and of {name!r}: give each label words "
                    "of its own, each only once."
                )
            owner[word] = name
    return list(owner)
