"""The layers above a cached prefix as a model of its own, which shares its weights with the whole."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from ftkit.cachedrows import STATES, PrefixError
from ftkit.freezing import Group


class Rest(nn.Module):
    """The trainable layers above a cached prefix; its parameters are those of the whole model, so is what they learn.

    Called with a batch of CachedRows, it gives what the whole model gives.
    """

    def __init__(self, model: nn.Module, prefix: Sequence[Group], above: Group, forms: Mapping[str, int]) -> None:
        super().__init__()
        # a copy of the structure alone: parameters and buffers are shared
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        self.model = copy.deepcopy(model, shared)
        self.config = model.config
        body = frozen_body(model)
        self._frozen = (
            [p for group in prefix for p in group.parameters.values()] if body is None else [*body.parameters()]
        )
        self._states: Tensor | None = None
        for path, outputs in forms.items():  # frozen and of no use: what they would give is replaced
            module = self.model.get_submodule(path)
            embedding = isinstance(module, nn.Embedding)
            _replace(self.model, path, _NoEmbedding(module.weight) if embedding else _NoBlock(module, outputs))
        if body is not None:
            self.model.base_model.forward = self._give_body
        elif above.block is None:  # the head follows: what the last frozen block gives is what it reads
            self.model.get_submodule(prefix[-1].block).register_forward_hook(self._give)
        else:
            self.model.get_submodule(above.block).register_forward_pre_hook(self._substitute, with_kwargs=True)

    def forward(self, **batch: Tensor) -> Any:
        """The whole model's output, with logits of shape (B, C).

        Raises:
            PrefixError: something below trains since.
        """
        if any(p.requires_grad for p in self._frozen):
            raise PrefixError("Layers of the cached prefix train now: call cache_prefix anew or train the whole model.")
        self._states = batch.pop(STATES).to(self._frozen[0].dtype)
        try:
            return self.model(**batch)
        finally:
            self._states = None

    def _give_body(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=self._states, pooler_output=self._states[:, 0]
        )

    def _give(self, block: "_NoBlock", args: tuple, output: Any) -> Tensor | tuple:
        return block.wrap(self._states)

    def _substitute(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._states is None:  # a shared block is run several times, and only the first reads the prefix
            return None
        states, self._states = self._states, None
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


class _NoEmbedding(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.width, self.dtype = weight.shape[1], weight.dtype

    def forward(self, ids: Tensor, *args: Any) -> Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


class _NoBlock(nn.Module):
    """Passes on what it is given, in the form of the block's output: a tensor (0) or a tuple of so many.

    It keeps the block's plain attributes, some of which models read (which kind of attention it has).
    """

    def __init__(self, block: nn.Module, outputs: int) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(block).items() if name not in {*vars(self), "forward"}})
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple:
        return self.wrap(hidden_states)

    def wrap(self, hidden_states: Tensor) -> Tensor | tuple:
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def frozen_body(model: nn.Module) -> nn.Module | None:
    """The base model if all of it is frozen: what it gives, pooled if it pools, is then all that the head reads."""
    body = getattr(model, "base_model", None)
    if not isinstance(model, PreTrainedModel) or body is model or any(p.requires_grad for p in body.parameters()):
        return None
    return body
