"""Supervised fine-tuning of a causal language model, with the loss on completions only."""

from collections.abc import Sequence

import datasets
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from ftkit.errors import DataError
from ftkit.models.causal_lm import next_token_logits, require_language_model, token_ids
from ftkit.training.batching import IGNORED


def encode_completions(
    prompts: Sequence[str], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """Tokenise prompts with their answers, so that the loss covers only the answer and the end token after it.

    A label stands at the position where it is predicted, one before its own token, so the loop does not shift labels.
    The last token of all is only a label: nothing is predicted after it, so it is not part of the input.

    Args:
        prompts: N texts that stand before the answers.
        answers: N texts that continue the prompts; if a prompt ends without a space, its answer begins with one.
        tokenizer: tokenizer of the model to train, with an end token (``eos_token``).

    Returns:
        A dataset of N rows with ``input_ids``; ``attention_mask``; ``answer_mask``, True where the next token belongs
        to the answer; and ``labels``, the next token at these positions and IGNORED (-100) elsewhere.

    Raises:
        DataError: there are not as many answers as prompts, a prompt has no token, an answer begins inside the last
            token of its prompt, a text is longer than the tokenizer's limit, or the tokenizer has no end token.
    """
    if len(prompts) != len(answers):
        raise DataError(
            f"There are {len(prompts):,} prompts and {len(answers):,} answers: give one answer for each prompt."
        )
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("The tokenizer has no end token: set tokenizer.eos_token, so that answers can end.")
    for i, pair in enumerate(zip(prompts, answers, strict=True)):
        if not all(isinstance(text, str) for text in pair):
            raise DataError(f"Pair {i} is {pair}, and not two texts: leave it out, or give an empty answer as ''.")
    starts = token_ids(tokenizer, prompts)  # without the end mark that some tokenizers add
    whole = token_ids(tokenizer, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    rows = []
    for i, (start, ids, answer) in enumerate(zip(starts, whole, answers, strict=True)):
        if not start or ids[: len(start)] != start:
            raise DataError(
                f"In pair {i}, no token begins where the answer {answer[:20]!r} begins: end the prompt without a space "
                "and begin the answer with one."
            )
        if len(ids) > tokenizer.model_max_length:
            raise DataError(
                f"Pair {i} has {len(ids):,} tokens, more than the model's limit of {tokenizer.model_max_length:,}: "
                "shorten it."
            )
        targets = [*ids[len(start) :], end]
        before = len(start) - 1
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "answer_mask": [False] * before + [True] * len(targets),
                "labels": [IGNORED] * before + targets,
            }
        )
    return datasets.Dataset.from_list(rows)


class CompletionModel(nn.Module):
    """A causal language model that ``fit`` trains on the rows of ``encode_completions``.

    Training changes whatever is trainable in the language model. Only the positions where a token of the answer is
    predicted go through the output layer, the largest layer of all.

    Args:
        lm: a causal language model, or a peft model around one; it is shared, not copied.

    Attributes:
        lm: the language model as given; save ``model.lm``, and generate with it.
        config: the language model's config.

    Raises:
        ValueError: ``lm`` is not a causal language model.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        require_language_model(lm)
        self.lm, self.config = lm, lm.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> CausalLMOutput:
        """Predict the answers of a batch.

        Args:
            input_ids, attention_mask: B rows padded at the end, shape (B, T).
            answer_mask: True where a token of the answer is predicted, shape (B, T).

        Returns:
            The logits of the N answer tokens of the batch, row by row, shape (N, V).
        """
        return CausalLMOutput(logits=next_token_logits(self.lm, input_ids, attention_mask, answer_mask))
