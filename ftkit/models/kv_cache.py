"""Keys and values of the shared start of several prompts, computed once."""

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class SharedStart(DynamicLayer):
    """The cache of one attention layer for a batch whose rows begin alike.

    The beginning's keys and values are held once for all rows and all batches; each row's own stand behind them.

    Args:
        prefix: of one row, as a forward pass over the beginning leaves it.
    """

    def __init__(self, prefix: DynamicLayer) -> None:
        super().__init__()
        self.prefix = prefix

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new keys and values, shape (B, heads, T, D); returns all of them, the beginning's in front."""
        own = super().update(key_states, value_states)
        if not self.prefix.get_seq_length():
            return own
        shared = (self.prefix.keys, self.prefix.values)
        return tuple(
            torch.cat([front.expand(len(back), -1, -1, -1), back], dim=-2)
            for front, back in zip(shared, own, strict=True)
        )

    def get_seq_length(self) -> int:
        return self.prefix.get_seq_length() + super().get_seq_length()


def takes_cache(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a text can be run piece by piece, each piece with the keys and values of those before it.

    Not with a soft prompt, whose virtual tokens peft puts in front of each piece.
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return False
        model = model.get_base_model()
    return {"past_key_values", "position_ids"} <= set(inspect.signature(model.forward).parameters)


def can_share_start(model: PreTrainedModel | PeftModel, num_tokens: int) -> bool:
    """Whether the cache of a beginning can stand before many rows, of up to ``num_tokens`` in all, with equal results.

    It can where keys and values of each token are all that a layer keeps of a text: not with a recurrent state, nor
    beyond a sliding window.
    """
    if not takes_cache(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and num_tokens < layer.sliding_window)
        for layer in layers
    )


def run_shared_start(model: PreTrainedModel | PeftModel, ids: list[int]) -> list[DynamicLayer]:
    """The keys and values that each layer computes for the beginning of a text."""
    cache = DynamicCache(config=model.config)
    if ids:  # else it is empty
        inputs = {"input_ids": torch.tensor([ids], device=model.device), "logits_to_keep": 1}
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache.layers
