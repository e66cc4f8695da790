"""A classifier made of a language model, a template and a verbalizer, which ``fit`` trains."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from ftkit.models.causal_lm import next_token_logits, require_language_model
from ftkit.models.loading import name_classes


class PromptClassifier(nn.Module):
    """Score labels by their words (a verbalizer; Schick and Schütze, 2021), so that ``fit`` and ``evaluate`` take it.

    The score of a label is the log of the summed probabilities of its words after the prompt; a word's log-probability
    is the sum over its tokens. Cross-entropy over the scores compares the labels with one another, whatever else the
    model might say. All that the language model lets train, a soft prompt or LoRA or all of it, is what trains here.

    Words of one token cost one pass over the prompt. For longer ones the prompt is run once for each beginning
    (a word without its last token) that is not itself the beginning of another.

    Args:
        lm: a causal language model, or a peft model around one; it is shared, not copied.
        words: for each label its words, each as the token ids that follow the prompt.
        names: of the labels, in the same order.
        length_normalised: a word's log-probability is the mean over its tokens instead, so that long words do not lose.

    Attributes:
        lm: as given: what to save is ``model.lm``.
        config: a copy of the language model's, with the labels as classes.

    Raises:
        ValueError: no causal language model, a number of labels that won't do, a label without words, a word that
            stands for two labels.
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
        spelled = _check(words, names)
        self.lm, self.length_normalised = lm, length_normalised
        self.config = copy.deepcopy(lm.config)
        name_classes(self.config, names)
        self._words_a_label = [len(of_label) for of_label in words]

        beginnings = {word[:-1] for word in spelled}
        longest = [one for one in beginnings if not any(one == other[: len(one)] for other in beginnings - {one})]
        longest.sort()
        run = [next(i for i, one in enumerate(longest) if word[:-1] == one[: len(word) - 1]) for word in spelled]
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(word) for word in spelled], batch_first=True)
        width = tokens.shape[1]  # of the longest word
        inside = torch.arange(width) < torch.tensor([[len(word)] for word in spelled])
        appended = torch.tensor([[*one, *[0] * (width - 1 - len(one))] for one in longest], dtype=torch.int64)
        for name, value in {
            "_appended": appended,  # (K, L): what the prompt is continued with in each of its K runs
            "_num_appended": torch.tensor([len(one) for one in longest]),  # (K,)
            "_run": torch.tensor(run),  # (W,): in which run each of the W words is read
            "_tokens": tokens,  # (W, L + 1)
            "_inside": inside,  # (W, L + 1): whether a place of _tokens belongs to the word
        }.items():
            # beside the model, with which it moves, and not saved
            self.register_buffer(name, value.to(next(lm.parameters()).device), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Scores of the labels, in ``logits`` of shape (B, C), for prompts padded at the end, of shape (B, T)."""
        lengths = attention_mask.sum(1)[:, None, None]
        ids, mask = self._continue(input_ids, attention_mask, lengths)
        places = torch.arange(self._tokens.shape[1], device=input_ids.device)
        # a word's tokens follow the prompt's last one, then each one appended
        positions = lengths - 1 + torch.minimum(places, self._num_appended[:, None])
        runs = (batch.flatten(0, 1) for batch in (ids, mask, positions))
        logits = next_token_logits(self.lm, *runs).unflatten(0, positions.shape[:2])  # (B, K, L + 1, V)
        of_tokens = logits[:, self._run[:, None], places, self._tokens]  # (B, W, L + 1)
        log_probs = of_tokens - logits.logsumexp(-1)[:, self._run[:, None], places]
        of_words = log_probs.masked_fill(~self._inside, 0).sum(-1)
        if self.length_normalised:
            of_words = of_words / self._inside.sum(-1)
        of_labels = [words.logsumexp(-1) for words in of_words.split(self._words_a_label, dim=1)]
        return SequenceClassifierOutput(logits=torch.stack(of_labels, dim=1))

    def _continue(self, input_ids: Tensor, attention_mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Each prompt with what is appended to it in each run, and its mask, both of shape (B, K, T + L)."""
        shape = (len(input_ids), *self._appended.shape)
        ids, mask = (F.pad(part, (0, shape[2]))[:, None].repeat(1, shape[1], 1) for part in (input_ids, attention_mask))
        width = torch.arange(shape[2], device=input_ids.device)
        places = (lengths + width).expand(shape)
        ids.scatter_(2, places, self._appended.expand(shape))
        mask.scatter_(2, places, (width < self._num_appended[:, None]).to(mask.dtype).expand(shape))
        return ids, mask


def _check(words: Sequence[Sequence[Sequence[int]]], names: Sequence[str]) -> list[tuple[int, ...]]:
    """All words of all labels in their order, if they can tell the labels apart."""
    if len(words) != len(names) or len(set(names)) < max(len(names), 2):
        raise ValueError(
            f"There are words for {len(words)} labels and the names {list(names)}: give 2 or more different names, "
            "and words for each."
        )
    owner: dict[tuple[int, ...], str] = {}
    for name, of_label in zip(names, words, strict=True):
        if not of_label or not all(len(word) for word in of_label):
            raise ValueError(f"The label {name!r} has no words, or one without a token: give each label a word.")
        for word in map(tuple, of_label):
            if word in owner:
                raise ValueError(
                    f"The tokens {list(word)} are a word of {owner[word]!r} and of {name!r}: give each label words "
                    "of its own, each once."
                )
            owner[word] = name
    return list(owner)
