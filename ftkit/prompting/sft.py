"""Supervised fine-tuning of a language model, with the loss on completions only."""

from collections.abc import Sequence

import datasets
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from ftkit.errors import DataError
from ftkit.models.causal_lm import next_token_logits, require_language_model
from ftkit.training.batching import IGNORED


def encode_completions(
    prompts: Sequence[str], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """Tokenise prompts with their answers, so that the loss is on the answer and on the token that ends it.

    The label stands where it is predicted, one place before its token: the loop shifts nothing. What the model reads
    ends before the last token of all, from which nothing is predicted.

    Args:
        prompts: N texts, with all that stands before an answer.
        answers: N texts, as they go on: where the prompt ends without a space, the answer begins with one.
        tokenizer: of the model that will learn them, with a token that ends a text.

    Returns:
        N rows: `input_ids`; `attention_mask`; `answer_mask`, true where the next token is one of the answer; `labels`,
        the next token there, and IGNORED (-100) elsewhere.

    Raises:
        DataError: not an answer for each prompt, a prompt without a token, an answer that begins inside of the
            prompt's last token, a text longer than the tokenizer's limit, a tokenizer without an end token.
    """
    if len(prompts) != len(answers):
        raise DataError(f"There are {len(prompts):,} prompts and {len(answers):,} answers: give an answer for each.")
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("The tokenizer has no token that ends a text, eos_token: set it, or no answer would ever end.")
    rows = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, ids = (tokenizer(text, verbose=False)["input_ids"] for text in (prompt, prompt + answer))
        if not start or ids[: len(start)] != start:
            raise DataError(
                f"Pair {i} has no border between tokens where its answer {answer[:20]!r} begins: end the prompt "
                "without a space and begin the answer with one."
            )
        if len(ids) > tokenizer.model_max_length:
            raise DataError(
                f"Pair {i} has {len(ids):,} tokens, and the model reads {tokenizer.model_max_length:,}: shorten it."
            )
        answered = [*ids[len(start) :], end]
        before = len(start) - 1
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "answer_mask": [False] * before + [True] * len(answered),
                "labels": [IGNORED] * before + answered,
            }
        )
    return datasets.Dataset.from_list(rows)


class CompletionModel(nn.Module):
    """A causal language model as ``fit`` trains it on the rows of ``encode_completions``; all that it lets train does.

    Only the places where a token of an answer is predicted go through the output layer, the largest of all.

    Args:
        lm: a causal language model, or a peft model around one; it is shared, not copied.

    Attributes:
        lm: as given: what to save, and to generate with, is ``model.lm``.
        config: the language model's.

    Raises:
        ValueError: no causal language model.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        require_language_model(lm)
        self.lm, self.config = lm, lm.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> CausalLMOutput:
        """Logits (N, V) of the N tokens of the answers of a batch, row by row; all arguments have shape (B, T)."""
        return CausalLMOutput(logits=next_token_logits(self.lm, input_ids, attention_mask, answer_mask))
