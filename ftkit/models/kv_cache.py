"""Keys and values of the shared start of several prompts, computed once."""

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class SharedStart(DynamicLayer):
    """The cache of one attention layer for a batch of rows with a shared start.

    The keys and values of the shared start are held once for all rows and all batches, in front of each row's own.

    Args:
        start: the layer's cache after a forward pass over the shared start alone, for one row.
    """

    def __init__(self, start: DynamicLayer) -> None:
        super().__init__()
        self.start = start

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values, shape (B, heads, T, D), and return all, those of the shared start first."""
        own = super().update(key_states, value_states)
        if not self.start.get_seq_length():
            return own
        shared = (self.start.keys, self.start.values)
        return tuple(
            torch.cat([front.expand(len(back), -1, -1, -1), back], dim=-2)
            for front, back in zip(shared, own, strict=True)
        )

    def get_seq_length(self) -> int:
        return self.start.get_seq_length() + super().get_seq_length()


def takes_cache(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a text can be run piece by piece, with the cached keys and values of the pieces before.

    This does not work with a soft prompt, since peft puts its virtual tokens in front of each piece.
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return False
        model = model.get_base_model()
    return {"past_key_values", "position_ids"} <= set(inspect.signature(model.forward).parameters)


def can_share_start(model: PreTrainedModel | PeftModel, num_tokens: int) -> bool:
    """Whether rows of up to ``num_tokens`` tokens can use the cache of their shared start without a change of results.

    They can if keys and values of each token are all that a layer keeps of a text: not if it has a recurrent state, or
    a sliding window that is shorter than the rows.
    """
    if not takes_cache(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and num_tokens < layer.sliding_window)
        for layer in layers
    )


def run_shared_start(model: PreTrainedModel | PeftModel, ids: list[int]) -> list[DynamicLayer]:
    """Compute the keys and values of each layer for the shared start; empty caches if it has no tokens."""
    cache = DynamicCache(config=model.config)
    if ids:
        inputs = {"input_ids": torch.tensor([ids], device=model.device), "logits_to_keep": 1}
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache.layers
