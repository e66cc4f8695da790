"""The diagonal Fisher information, from the gradient of each row.

It is the mean over rows of the squared gradient of log p(y|x) of each single row. A common mistake is to square the
gradient of a whole batch: the rows' gradients cancel before they are squared, and the result is many times too small.
"""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ftkit.models.modules import eval_mode
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths

_KINDS = ("exact", "sampled", "empirical")

# differences that rounding explains: a share of the tensor's norm, and of the largest tensor's norm
_TOLERANCE, _ROUNDING = 1e-3, 1e-9


def diagonal_fisher(
    model: nn.Module,
    rows: Any,
    kind: Literal["exact", "sampled", "empirical"] = "exact",
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Compute the mean over rows of the squared gradient of log p(y|x), in eval mode.

    If all trainable parameters are in linear layers, layer norms and embeddings, each used once in a forward pass, then
    one backward pass per batch gives the gradients of all its rows, layer by layer: for a linear layer, the gradient of
    a row is the sum over its tokens of (gradient of the output) x (input). Other networks need a backward pass for each
    row. Which way to go is tried out on the longest and the shortest row.

    Args:
        model: as for ``fit``; its train or eval mode and its gradients are left unchanged.
        rows: N rows of one split, from ``encode``.
        kind: where y comes from (Kunstner et al., 2019, explain the difference). "exact" is the true Fisher
            information: the expectation over all classes under the model's own probabilities, with one backward pass
            per class. "sampled" draws one y per row from these probabilities. "empirical" takes the row's label.
        batch_size: rows per pass; it changes memory and time, not the result.
        seed: seed of the draws of "sampled".

    Returns:
        For each trainable parameter, by name, a tensor of its shape.

    Raises:
        ValueError: there is no such kind, no parameter is trainable, or there are no rows.
    """
    if kind not in _KINDS:
        raise ValueError(f"There is no Fisher information of kind {kind!r}: choose from {', '.join(_KINDS)}.")
    totals = {p: torch.zeros_like(p) for p in model.parameters() if p.requires_grad}
    if not totals:
        raise ValueError("All parameters are frozen and have no Fisher information: set requires_grad on some of them.")
    rng, lengths = torch.Generator().manual_seed(seed), row_lengths(rows)
    with eval_mode(model), torch.enable_grad():
        by_layer = _can_go_by_layer(model, rows, lengths, totals)
        for indices in evaluation_batches(lengths, batch_size):
            if not (by_layer and _add_batch(totals, model, rows, indices, kind, rng, by_layer=True)):
                for index in indices:
                    _add_batch(totals, model, rows, index[None], kind, rng, by_layer=False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: total / len(lengths) for parameter, total in totals.items()}


def _add_batch(
    totals: dict[nn.Parameter, Tensor],
    model: nn.Module,
    rows: Any,
    indices: NDArray[np.int64],
    kind: str,
    rng: torch.Generator,
    by_layer: bool,
) -> bool:
    """Add the squared gradients of a batch, layer by layer; or of one row, as it is.

    Returns:
        False, having added nothing, if the batch cannot go layer by layer: a pass does not use each parameter exactly
        once, in a layer of a known type whose output has all rows.
    """
    batch = make_batch(model, rows, indices, next(model.parameters()).device)
    labels = batch.pop("labels")
    with _Recorder(model, totals, len(indices)) as recorder:
        log_p = model(**batch).logits.float().log_softmax(-1)
    if by_layer:
        used = [id(p) for layer, _, _ in recorder.calls for p in layer.parameters(recurse=False) if p in totals]
        whole = all(len(output) == len(indices) and output.requires_grad for _, _, output in recorder.calls)
        if sorted(used) != sorted(map(id, totals)) or not whole:
            return False
    wanted = [output for _, _, output in recorder.calls] if by_layer else list(totals)
    targets = _targets(log_p.detach().exp(), labels, kind, rng)
    for left, (classes, weights) in zip(reversed(range(len(targets))), targets, strict=True):
        scores = log_p.gather(1, classes[:, None]).squeeze(1)
        # masked classes (score -inf) have weight 0; the root of a weight is squared together with the gradient
        objective = (weights.sqrt() * scores.where(weights > 0, 0.0)).sum()
        grads = torch.autograd.grad(objective, wanted, retain_graph=left > 0, materialize_grads=True)
        if by_layer:
            for (layer, inputs, _), grad in zip(recorder.calls, grads, strict=True):
                _add_squares[type(layer)](totals, layer, inputs, grad)
        else:
            for total, grad in zip(totals.values(), grads, strict=True):
                total.addcmul_(grad, grad)
    return True


def _targets(p: Tensor, labels: Tensor, kind: str, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Choose for each backward pass a class for each row and the weight of its squared gradient, both of shape (N,)."""
    if kind == "exact":
        return [(torch.full_like(labels, c), p[:, c]) for c in range(p.shape[1]) if (p[:, c] > 0).any()]
    if kind == "unlikely":  # of all classes, the one whose gradient is largest
        labels = p.where(p > 0, torch.inf).argmin(-1)
    if kind == "sampled":
        labels = torch.multinomial(p.cpu(), 1, generator=rng).squeeze(1).to(p.device)
    return [(labels, torch.ones_like(p[:, 0]))]


class _Recorder:
    """Record, during one forward pass, the input and output of every layer that has one of the parameters."""

    def __init__(self, model: nn.Module, parameters: dict[nn.Parameter, Tensor], num_rows: int) -> None:
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._layers = [m for m in model.modules() if any(p in parameters for p in m.parameters(recurse=False))]
        self._num_rows, self._hooks = num_rows, list[RemovableHandle]()

    def __enter__(self) -> "_Recorder":
        # before other hooks, which may change the output, as a bottleneck adapter's does
        self._hooks = [layer.register_forward_hook(self._record, prepend=True) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if type(layer) not in _add_squares or not inputs:
            return output
        x = inputs[0].detach()
        if isinstance(layer, nn.Embedding) and len(output) == 1 < self._num_rows:  # of positions, the same for all rows
            x, output = (tensor.expand(self._num_rows, *tensor.shape[1:]) for tensor in (x, output))
        self.calls.append((layer, x, output))
        return output


def _can_go_by_layer(
    model: nn.Module, rows: Any, lengths: NDArray[np.int64], parameters: Iterable[nn.Parameter]
) -> bool:
    """Tell whether the longest and the shortest row give, layer by layer, what they give one by one.

    They differ if a layer's weights are also used outside of it, if the first dimension of its output is not the rows,
    or if padding changes a row's result.
    """
    probe, rng = np.argsort(-lengths, kind="stable")[[0, -1]], torch.Generator()
    together, alone = ({p: torch.zeros_like(p) for p in parameters} for _ in range(2))
    if not _add_batch(together, model, rows, probe, "unlikely", rng, by_layer=True):
        return False
    for index in probe:
        _add_batch(alone, model, rows, index[None], "unlikely", rng, by_layer=False)
    least = _ROUNDING * max(total.norm().item() for total in alone.values())  # the value for the bias of a key is zero
    return all(
        (together[p] - total).norm().item() <= max(_TOLERANCE * total.norm().item(), least)
        for p, total in alone.items()
    )


def _by_row(tensor: Tensor) -> Tensor:
    """Reshape to (N, T, H), with T = 1 if rows have no tokens."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _add_linear(totals: dict[nn.Parameter, Tensor], layer: nn.Linear, x: Tensor, grad: Tensor) -> None:
    x, grad = _by_row(x), _by_row(grad)
    if layer.weight in totals:
        for row_x, row_grad in zip(x, grad, strict=True):  # row by row, so that the gradient is still in the CPU cache
            gradient = row_grad.T @ row_x
            totals[layer.weight].addcmul_(gradient, gradient)
    if layer.bias in totals:
        totals[layer.bias] += grad.sum(1).square().sum(0)


def _add_norm(totals: dict[nn.Parameter, Tensor], layer: nn.LayerNorm, x: Tensor, grad: Tensor) -> None:
    x, grad = _by_row(F.layer_norm(x, layer.normalized_shape, eps=layer.eps)), _by_row(grad)
    if layer.weight in totals:
        totals[layer.weight] += (grad * x).sum(1).square().sum(0)
    if layer.bias in totals:
        totals[layer.bias] += grad.sum(1).square().sum(0)


def _add_embedding(totals: dict[nn.Parameter, Tensor], layer: nn.Embedding, x: Tensor, grad: Tensor) -> None:
    x, grad = x.reshape(len(x), -1), _by_row(grad)
    pairs = x + layer.num_embeddings * torch.arange(len(x), device=x.device)[:, None]  # one number per row and token
    tokens, place = pairs.unique(return_inverse=True)
    gradient = grad.new_zeros(len(tokens), grad.shape[-1]).index_add_(0, place.flatten(), grad.flatten(0, 1))
    tokens = tokens % layer.num_embeddings
    if layer.padding_idx is not None:  # PyTorch does not train the embedding of padding
        gradient[tokens == layer.padding_idx] = 0
    totals[layer.weight].index_add_(0, tokens, gradient.square())


_add_squares = {nn.Linear: _add_linear, nn.LayerNorm: _add_norm, nn.Embedding: _add_embedding}
