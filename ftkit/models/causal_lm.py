"""Helpers for causal language models: logits of the next token, token ids, chat text and the context window."""

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ftkit.errors import PromptError


def require_language_model(model: nn.Module) -> None:
    """Refuse a model that is not a causal language model.

    Args:
        model: a transformer, or a peft model around one.

    Raises:
        ValueError: the model is an encoder, or has a classification head.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(base).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"{type(base).__name__} is not a causal language model and does not predict the next token: "
            "load one such as smollm2."
        )


def refuse_checkpointing(model: nn.Module) -> None:
    """Refuse gradient checkpointing, which drops the keys and values of prefix tuning and only logs a line about it.

    Raises:
        ValueError: gradient checkpointing is on.
    """
    if model.is_activation_checkpointing:
        raise ValueError(
            "Gradient checkpointing drops the prefix of prefix tuning: call model.activation_checkpointing_disable()."
        )


def next_token_logits(lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Compute the logits of the next token at chosen positions; only these go through the output layer.

    Positions are counted in the text. Virtual tokens that prompt tuning or P-tuning puts in front of the text are
    added to them here.

    Args:
        lm: a causal language model, or a peft model around one.
        input_ids, attention_mask: a batch padded at the end, int64 of shape (B, T).
        positions: indices of tokens, int64 of shape (B, P), or a mask over the tokens, bool of shape (B, T).

    Returns:
        float32 logits of shape (B, P, V); for a mask that selects N tokens in all (N, V), row by row.

    Raises:
        ValueError: a row is padded in front or empty, a row is longer than the model's window, or the model combines
            prefix tuning with gradient checkpointing.
    """
    lengths = attention_mask.sum(1, keepdim=True)
    text = torch.arange(attention_mask.shape[1], device=attention_mask.device) < lengths
    if not torch.equal(attention_mask.bool(), text) or (positions < 0).any():
        raise ValueError(
            "Each row must begin with a token and be padded at its end, so that a soft prompt stands directly before "
            "the text: set tokenizer.padding_side = 'right', and leave out empty rows."
        )
    virtual, in_logits = _virtual_tokens(lm)
    window = getattr(lm.config, "max_position_embeddings", None)
    if window is not None and input_ids.shape[1] + virtual > window:
        raise ValueError(
            f"A row has {input_ids.shape[1]} tokens{f' and {virtual} virtual ones' if virtual else ''}, but the "
            f"model's window is {window}: shorten the texts, or leave out examples."
        )
    shift = virtual if in_logits else 0
    kept = F.pad(positions, (shift, 0)) if positions.dtype == torch.bool else positions + shift
    outputs = lm(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=kept, use_cache=False)
    return outputs.logits.float()


def _virtual_tokens(lm: nn.Module) -> tuple[int, bool]:
    """Number of virtual tokens in front of a text, and whether they have logits; those of prefix tuning do not."""
    if not isinstance(lm, PeftModel) or not lm.active_peft_config.is_prompt_learning:
        return 0, False
    if not lm.has_active_enabled_adapter:  # under lm.disable_adapter()
        return 0, False
    config = lm.active_peft_config
    if config.peft_type == PeftType.PREFIX_TUNING:
        refuse_checkpointing(lm.get_base_model())
        return config.num_virtual_tokens, False
    return config.num_virtual_tokens, True


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
    """Encode texts that are to be continued: with the model's beginning token if it has one, without an end token.

    Args:
        tokenizer: the model's tokenizer.
        texts: N texts.
        chat: True if a chat template made the texts, since it already contains the special tokens.

    Returns:
        N lists of token ids.
    """
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    begins = not chat and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return [[tokenizer.bos_token_id, *row] if begins else row for row in ids]


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation in the model's chat format, up to where the model's answer begins.

    Args:
        tokenizer: the model's tokenizer.
        messages: turns of the conversation, each ``{"role": "user", "content": "…"}``.

    Raises:
        PromptError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise PromptError("The tokenizer has no chat template: use a plain prompt, or a model trained for chat.")
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def require_window(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], more: int) -> None:
    """Refuse an empty prompt, and a prompt that exceeds the model's window when ``more`` tokens follow it."""
    for number, ids in enumerate(prompts):
        if not len(ids):
            raise PromptError(f"The prompt of row {number} is empty: put some fixed text into the template.")
        if len(ids) + more > tokenizer.model_max_length:
            raise PromptError(
                f"The prompt of row {number} has {len(ids):,} tokens and {more:,} are to follow, more than the model's "
                f"window of {tokenizer.model_max_length:,}: give fewer or shorter examples, or a shorter text."
            )
