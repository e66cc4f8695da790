"""Feature cache: the output of frozen lower layers, computed once for every row."""

import copy
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from ftkit.errors import FeatureCacheError
from ftkit.models.architecture import Group, layer_groups
from ftkit.models.modules import eval_mode
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths

STATES = "prefix_states"  # the column of the cached activations


class CachedRows(Sequence):
    """Rows with the activations (T, H) of the frozen prefix, as ``fit`` and ``evaluate`` read them.

    Attributes:
        lengths: tokens of each row before it was cached: batches are made by it, the same as without a cache.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        states: NDArray[np.float32],
        ends: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> None:
        self.lengths = lengths
        self._rows, self._states, self._ends = rows, np.asarray(states), ends
        if isinstance(states, np.memmap):
            weakref.finalize(self, shutil.rmtree, Path(states.filename).parent, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return {**self._rows[index], STATES: self._states[start : self._ends[index]]}


def make_storage(shape: tuple[int, int], on_disk: bool, folder: str | Path | None) -> NDArray[np.float32]:
    """Room for activations; on disk in a folder of its own, which CachedRows removes in the end.

    Raises:
        FeatureCacheError: the disk has not that much room.
    """
    if not on_disk:
        return np.empty(shape, dtype=np.float32)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    own = tempfile.mkdtemp(prefix="prefix-", dir=folder)
    need, free = math.prod(shape) * 4, shutil.disk_usage(own).free
    if need > free:  # writing to the map of a full disk would end the process
        shutil.rmtree(own)
        raise FeatureCacheError(
            f"The activations need {need / 2**20:.0f} MiB and {free / 2**20:.0f} are free: give another folder=."
        )
    return np.memmap(Path(own) / "states", dtype=np.float32, mode="w+", shape=shape)


class UpperLayers(nn.Module):
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
            FeatureCacheError: something below trains since.
        """
        if any(p.requires_grad for p in self._frozen):
            raise FeatureCacheError(
                "Layers of the cached prefix train now: call cache_frozen_layers anew or train the whole model."
            )
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


TOLERANCE = 1e-4  # of the logits, relative to the largest: float32 in another order of summation


def cache_frozen_layers(
    model: PreTrainedModel,
    data: Mapping[str, Any],
    *,
    max_memory_mib: float = 1024,
    folder: str | Path | None = None,
    batch_size: int = 32,
) -> tuple[UpperLayers, dict[str, CachedRows]]:
    """Run the frozen lowest layers once over every row, so that training repeats only what trains.

    Train the rest with ``fit(rest, data, …)``; the model then has the trained weights, and saves as usual. Where the
    head alone trains and reads one token, that token's activation is all that is kept of a row. Dropout in the rest
    fires as ever; one between the embeddings and the first block that is part of neither (GPT-2 has it) does not.

    Args:
        model: a transformer for token ids whose lowest groups are frozen, see ``freeze``.
        data: rows by split, as ``encode`` makes them.
        max_memory_mib: activations of more MiB than this are kept on disk and mapped.
        folder: where on disk; the system's temporary folder by default. The files go when the rows go.
        batch_size: rows a forward pass.

    Returns:
        The rest, and the rows of each split with their activations, float32 of shape (T, H).

    Raises:
        FeatureCacheError: something trains below, nothing is frozen or nothing trains, the rows change from one
            reading to the next, the architecture does not allow it, or the disk is too full.
        FreezingError: the layers of the model can't be told apart.
    """
    prefix, above = _cut(model)
    _require_still(data)
    lengths = {split: row_lengths(rows) for split, rows in data.items()}
    with eval_mode(model), torch.no_grad():
        split = next(iter(data))
        order = np.argsort(lengths[split], kind="stable")  # rows of different lengths, to see what the head reads
        sample = order[np.unique(np.linspace(0, len(order) - 1, 8).astype(int))]
        batch = _batch(model, data[split], sample)
        with _output_forms(model, prefix) as forms:
            logits = model(**batch).logits
        rest = UpperLayers(model, prefix, above, forms).eval()
        reads = slice(None)
        if above.block is None and not _end_in_padding(model, data):
            reads = _tokens_read(rest, _run_prefix(model, prefix, above, batch), batch, lengths[split][sample])

        kept = {name: n if reads == slice(None) else np.ones_like(n) for name, n in lengths.items()}
        width = _run_prefix(model, prefix, above, batch).shape[-1]
        on_disk = sum(int(n.sum()) for n in kept.values()) * width * 4 > max_memory_mib * 2**20
        cached = {}
        for name, rows in data.items():
            ends = np.cumsum(kept[name])
            columns = [_cut_row(dict(rows[i]), int(n), reads) for i, n in enumerate(lengths[name])]
            store = make_storage((int(ends[-1]), width), on_disk, folder)
            cached[name] = CachedRows(columns, store, ends, lengths[name])
            for indices in evaluation_batches(lengths[name], batch_size):
                states = _run_prefix(model, prefix, above, _batch(model, rows, indices)).float().cpu().numpy()
                if states.shape[1] not in (1, lengths[name][indices].max()):
                    raise FeatureCacheError(
                        f"The prefix gives {states.shape[1]} positions for {lengths[name][indices].max()} tokens, "
                        "as with virtual tokens: train the whole model instead."
                    )
                for row, i in zip(states, indices, strict=True):
                    store[ends[i] - kept[name][i] : ends[i]] = row[: lengths[name][i]][reads]
        _require_equal(rest, cached[split], sample, logits)
    return rest, cached


def _cut(model: nn.Module) -> tuple[list[Group], Group]:
    """The frozen lowest groups, and the group above them."""
    groups = layer_groups(model)
    if any(group.name.startswith("decoder ") for group in groups):
        raise FeatureCacheError("An encoder-decoder has two inputs and no one prefix: train the whole model instead.")
    trains = [any(p.requires_grad for p in group.parameters.values()) for group in groups]
    if not any(trains):
        raise FeatureCacheError(
            "There is no rest to train, all parameters are frozen: call freeze(model, train=1) or more."
        )
    if trains[0]:
        names = [name for name, p in groups[0].parameters.items() if p.requires_grad]
        raise FeatureCacheError(
            f"The embeddings train ({names[0]}), so that nothing below is fixed: freeze the lowest layers first."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise FeatureCacheError(
            "Gradient checkpointing runs the layers twice: call model.gradient_checkpointing_disable()."
        )
    first = trains.index(True)
    return groups[:first], groups[first]


def _require_still(data: Mapping[str, Any]) -> None:
    """Rows that are drawn anew at each reading (augmentation) have no activations to keep."""
    for split, rows in data.items():
        for i in range(min(3, len(rows))):
            once, again = dict(rows[i]), dict(rows[i])
            if "input_ids" not in once:
                raise FeatureCacheError(f"The rows of {split!r} have no input_ids: only token ids can be cached.")
            changed = [key for key in once if not np.array_equal(np.asarray(once[key]), np.asarray(again[key]))]
            if changed or getattr(rows, "format", {}).get("type") == "custom":
                raise FeatureCacheError(
                    f"The rows of {split!r} are made anew at each reading (augmentation), and a cache would keep one "
                    "version for good: train the whole model, or fix the rows."
                )


def _batch(model: nn.Module, rows: Any, indices: NDArray[np.int64]) -> dict[str, Tensor]:
    batch = make_batch(model, rows, indices, next(model.parameters()).device)
    return {name: value for name, value in batch.items() if name != "labels"}


@contextmanager
def _output_forms(model: nn.Module, prefix: Sequence[Group]) -> Iterator[dict[str, int]]:
    """See, while the model runs, what each frozen block and embedding gives: a tensor (0) or a tuple of so many.

    An embedding that is not called, such as DeBERTa's table of relative positions, is not among them. None is where
    no block is frozen, for DeBERTa reads the embeddings again beside the first block.
    """
    forms: dict[str, int] = {}

    def look(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            forms[path] = len(output) if isinstance(output, tuple) else 0

        return hook

    paths = [group.block for group in prefix if group.block is not None]
    owners = {name.rpartition(".")[0] for name in prefix[0].parameters} if paths else set()
    paths += [path for path in sorted(owners) if isinstance(model.get_submodule(path), nn.Embedding)]
    hooks = [model.get_submodule(path).register_forward_hook(look(path)) for path in paths]
    try:
        yield forms
    finally:
        for hook in hooks:
            hook.remove()


class _ReachedError(Exception):
    """The prefix is done; what follows need not run."""


def _run_prefix(model: nn.Module, prefix: Sequence[Group], above: Group, batch: Mapping[str, Tensor]) -> Tensor:
    """What the frozen groups give for a batch, shape (B, T, H)."""
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    def after_body(module: nn.Module, args: tuple, output: Any) -> None:
        pooled = output.get("pooler_output")
        found.append(output.last_hidden_state if pooled is None else pooled[:, None])

    body = frozen_body(model)
    if body is not None:
        hook = body.register_forward_hook(after_body)
    elif above.block is None:  # a shared block is run several times: its last output counts
        hook = model.get_submodule(prefix[-1].block).register_forward_hook(after)
    else:
        hook = model.get_submodule(above.block).register_forward_pre_hook(before, with_kwargs=True)
    try:
        model(**batch)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[-1]


@torch.enable_grad()
def _tokens_read(rest: UpperLayers, states: Tensor, batch: Mapping[str, Tensor], lengths: NDArray[np.int64]) -> slice:
    """Which tokens of a row the head reads, by its gradient: the first, the last, or else all."""
    states = states.detach().requires_grad_()
    logits = rest(**{STATES: states}, **batch).logits
    weights = torch.linspace(1, 2, logits.shape[-1], device=logits.device)  # or the gradient of a sum might vanish
    (gradient,) = torch.autograd.grad((logits * weights).sum(), states)
    read = (gradient != 0).any(-1).cpu().numpy()
    for tokens, position in ((slice(0, 1), np.zeros_like(lengths)), (slice(-1, None), lengths - 1)):
        if np.array_equal(read, np.arange(read.shape[1]) == position[:, None]):
            return tokens
    return slice(None)


def _end_in_padding(model: nn.Module, data: Mapping[str, Any]) -> bool:
    """Whether some row's last token is the padding one, before which a decoder's head would look for the last."""
    padding = getattr(model.config, "pad_token_id", None)
    return any(len(row["input_ids"]) and int(row["input_ids"][-1]) == padding for rows in data.values() for row in rows)


def _cut_row(row: dict[str, Any], length: int, reads: slice) -> dict[str, Any]:
    """A row's own columns, cut to the tokens that are kept."""
    return {key: value[reads] if np.ndim(value) and len(value) == length else value for key, value in row.items()}


def _require_equal(rest: UpperLayers, rows: CachedRows, sample: NDArray[np.int64], logits: Tensor) -> None:
    """Refuse a cache that does not give what the whole model gives."""
    ours = rest(**_batch(rest, rows, sample)).logits
    difference = float((ours - logits).abs().max() / logits.abs().max().clamp(min=1))
    if not difference < TOLERANCE:
        raise FeatureCacheError(
            f"With a cached prefix the logits of {type(rest.model).__name__} differ by {difference:.1e}: "
            "its layers are not a chain; train the whole model instead."
        )
