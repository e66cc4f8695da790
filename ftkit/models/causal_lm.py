"""What a causal language model needs around it: logits of the next token, chat text, its window."""

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ftkit.errors import PromptError


def require_language_model(model: nn.Module) -> None:
    """Refuse what is no causal language model.

    Args:
        model: a transformer, or a peft model around one.

    Raises:
        ValueError: it is an encoder, or has a classification head.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(base).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"{type(base).__name__} is no causal language model, which predicts the next token: load one, as smollm2."
        )


def refuse_checkpointing(model: nn.Module) -> None:
    """Refuse gradient checkpointing, which drops the keys and values of prefix tuning with no more than a log line.

    Raises:
        ValueError: it is on.
    """
    if model.is_activation_checkpointing:
        raise ValueError(
            "Gradient checkpointing drops the prefix of prefix tuning: call model.activation_checkpointing_disable()."
        )


def next_token_logits(lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """The logits of what follows some of the tokens; no other position goes through the output layer.

    Positions are counted in the text: the virtual tokens of a soft prompt, which prompt tuning and P-tuning put in
    front of it, are taken into account here.

    Args:
        lm: a causal language model, or a peft model around one.
        input_ids, attention_mask: a batch padded at the end, shape (B, T).
        positions: numbers of tokens, int64 of shape (B, P), or a mask of them, bool of shape (B, T).

    Returns:
        float32, of shape (B, P, V); for a mask of N tokens in all (N, V), row by row.

    Raises:
        ValueError: padding in front or a row without a token, more tokens than the model's window has, prefix tuning
            with gradient checkpointing.
    """
    lengths = attention_mask.sum(1, keepdim=True)
    text = torch.arange(attention_mask.shape[1], device=attention_mask.device) < lengths
    if not torch.equal(attention_mask.bool(), text) or (positions < 0).any():
        raise ValueError(
            "Each row must begin with its first token and be padded at its end, for a soft prompt stands next to the "
            "text: set tokenizer.padding_side = 'right', and leave out empty rows."
        )
    virtual, in_logits = _virtual_tokens(lm)
    window = getattr(lm.config, "max_position_embeddings", None)
    if window is not None and input_ids.shape[1] + virtual > window:
        raise ValueError(
            f"A row has {input_ids.shape[1]} tokens{f' and {virtual} virtual ones' if virtual else ''}, and the "
            f"model's window {window}: shorten the texts, or leave out examples."
        )
    shift = virtual if in_logits else 0
    kept = F.pad(positions, (shift, 0)) if positions.dtype == torch.bool else positions + shift
    outputs = lm(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=kept, use_cache=False)
    return outputs.logits.float()


def _virtual_tokens(lm: nn.Module) -> tuple[int, bool]:
    """How many virtual tokens stand in front of a text, and whether they have logits: those of prefix tuning do not."""
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
    """Token ids of texts that something follows: the token for the beginning, where the model has one, and no end.

    Args:
        chat: whether a chat template made the texts, which holds every special token itself.
    """
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    begins = not chat and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return [[tokenizer.bos_token_id, *row] if begins else row for row in ids]


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """The turns of a conversation, {"role": …, "content": …}, as the model was trained to read them; its turn is next.

    Raises:
        PromptError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise PromptError("The tokenizer has no chat template: use a plain prompt, or a model tuned to instructions.")
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def require_window(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], more: int) -> None:
    """Refuse an empty prompt, and one that with ``more`` tokens after it is longer than the model's window."""
    for number, ids in enumerate(prompts):
        if not len(ids):
            raise PromptError(f"The prompt of row {number} is empty: put some fixed text into the template.")
        if len(ids) + more > tokenizer.model_max_length:
            raise PromptError(
                f"The prompt of row {number} has {len(ids):,} tokens and {more:,} are to follow, more than the model's "
                f"window of {tokenizer.model_max_length:,}: give fewer or shorter examples, or a shorter text."
            )
