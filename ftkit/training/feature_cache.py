"""Feature cache: the output of frozen lower layers, computed once for every row."""

import copy
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from ftkit.errors import FeatureCacheError, first_line
from ftkit.models.architecture import Group, layer_groups
from ftkit.models.modules import eval_mode
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths
from ftkit.training.checks import match_rows

STATES = "frozen_states"  # the column of the cached activations


class CachedRows(Sequence):
    """Rows with the activations (T, H) of the frozen layers, in the form that ``fit`` and ``evaluate`` read.

    Attributes:
        lengths: number of tokens of each row before it was cached, so that batches are the same as without a cache.
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
    """An array for the activations; on disk it has its own folder, which CachedRows removes when it is deleted.

    Raises:
        FeatureCacheError: there is not enough free space on the disk.
    """
    if not on_disk:
        return np.empty(shape, dtype=np.float32)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    own = tempfile.mkdtemp(prefix="features-", dir=folder)
    need, free = math.prod(shape) * 4, shutil.disk_usage(own).free
    if need > free:  # writing to a memory map on a full disk would kill the process
        shutil.rmtree(own)
        raise FeatureCacheError(
            f"The activations need {need / 2**20:.0f} MiB; {free / 2**20:.0f} MiB are free: set folder to another disk."
        )
    return np.memmap(Path(own) / "states", dtype=np.float32, mode="w+", shape=shape)


class UpperLayers(nn.Module):
    """The trainable layers above the cached ones. It shares its parameters with the whole model, which learns with it.

    Called with a batch of CachedRows, it returns what the whole model would return.
    """

    def __init__(self, model: nn.Module, frozen: Sequence[Group], above: Group, forms: Mapping[str, int]) -> None:
        super().__init__()
        groups = layer_groups(model)
        # copy the modules but share their parameters and buffers
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        self.model = copy.deepcopy(model, shared)
        self._whole = (model,)  # in a tuple: not a part of this module
        self.config = model.config
        body = frozen_body(model)
        self._frozen = (
            [p for group in frozen for p in group.parameters.values()] if body is None else [*body.parameters()]
        )
        self._states: Tensor | None = None
        for path, outputs in forms.items():  # need not run, because the cache replaces their outputs
            module = self.model.get_submodule(path)
            embedding = isinstance(module, nn.Embedding)
            self.model.set_submodule(path, _NoEmbedding(module.weight) if embedding else _NoBlock(module, outputs))
        if body is not None:
            self.model.base_model.forward = self._give_body
        elif above.block is None:  # the head reads the output of the last frozen block
            self.model.get_submodule(frozen[-1].block).register_forward_hook(self._give)
        else:
            self.model.get_submodule(above.block).register_forward_pre_hook(self._substitute, with_kwargs=True)
        kept = {id(p) for p in self.parameters()}
        self.own_groups = [  # read off the whole model, since this one runs only with cached states
            replace(group, parameters={f"model.{name}": p for name, p in group.parameters.items() if id(p) in kept})
            for group in groups
        ]

    @property
    def whole(self) -> nn.Module:
        """The whole model, which learns with these layers."""
        return self._whole[0]

    def forward(self, **batch: Tensor) -> Any:
        """The output of the whole model, with logits of shape (B, C).

        Raises:
            FeatureCacheError: a cached layer has become trainable.
        """
        if any(p.requires_grad for p in self._frozen):
            raise FeatureCacheError(
                "Some cached layers are trainable now: call cache_frozen_layers again, or train the whole model."
            )
        self._states = batch.pop(STATES).to(self._frozen[0].dtype)
        try:
            return self.model(**batch)
        finally:
            self._states = None

    def _give_body(self, *args: Any, **kwargs: Any) -> "_BodyOutput":
        return _BodyOutput(last_hidden_state=self._states, pooler_output=self._states[:, 0])

    def _give(self, block: "_NoBlock", args: tuple, output: Any) -> Tensor | tuple:
        return block.wrap(self._states)

    def _substitute(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._states is None:  # a shared block runs several times, and only its first run reads the cache
            return None
        states, self._states = self._states, None
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


class _BodyOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """The output of a body, with None for what only some bodies return, such as the ``mems`` of XLNet."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _NoEmbedding(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.width, self.dtype = weight.shape[1], weight.dtype

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


class _NoBlock(nn.Module):
    """Returns its input in the form of the block's output: a tensor (outputs=0) or a tuple of that many.

    It keeps the plain attributes of the block, because models read some of them, such as the kind of attention.
    """

    def __init__(self, block: nn.Module, outputs: int) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(block).items() if name not in {*vars(self), "forward"}})
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple:
        return self.wrap(hidden_states)

    def wrap(self, hidden_states: Tensor) -> Tensor | tuple:
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states


def frozen_body(model: nn.Module) -> nn.Module | None:
    """The base model if all of it is frozen: its output (pooled, if it pools) is then all that the head reads."""
    body = getattr(model, "base_model", None)
    if not isinstance(model, PreTrainedModel) or body is model or any(p.requires_grad for p in body.parameters()):
        return None
    return body


_TOLERANCE = 1e-4  # of the logits, relative to the largest: float32 sums in another order


def cache_frozen_layers(
    model: PreTrainedModel,
    data: Mapping[str, Any],
    *,
    max_memory_mib: float = 1024,
    folder: str | Path | None = None,
    batch_size: int = 32,
) -> tuple[UpperLayers, dict[str, CachedRows]]:
    """Run the frozen lowest layers once over every row, so that training repeats only the layers that train.

    Train the upper layers with ``fit(upper, data, …)``. The model shares their weights, and is saved as usual. If only
    the head trains and it reads one token, only the activation of that token is kept. Dropout works as usual in the
    upper layers, but not between the embeddings and the first block (GPT-2 has such a dropout).

    Args:
        model: a transformer for token ids whose lowest layer groups are frozen, see ``freeze``.
        data: rows by split, as ``encode`` makes them.
        max_memory_mib: larger activations, in MiB, are kept on disk and memory-mapped.
        folder: where on disk; by default the temporary folder of the system. The files are deleted with the rows.
        batch_size: rows per forward pass.

    Returns:
        The upper layers, and the rows of each split with their activations, float32 of shape (T, H), or
        (1, H) if the head reads one token.

    Raises:
        FeatureCacheError: the lowest layers train, or no layer does; the rows change from one reading to the next; the
            architecture does not allow it; or the disk is too full.
        FreezingError: the layers of the model cannot be told apart.
    """
    frozen, above = _split_groups(model)
    _require_fixed_rows(data)
    data = {split: match_rows(model, rows) for split, rows in data.items()}  # the cache forgets the names of classes
    lengths = {split: row_lengths(rows) for split, rows in data.items()}
    with eval_mode(model), torch.no_grad():
        split = next(iter(data))
        order = np.argsort(lengths[split], kind="stable")  # rows of several lengths, to see which token the head reads
        sample = order[np.unique(np.linspace(0, len(order) - 1, 8).astype(int))]
        batch = _batch(model, data[split], sample)
        upper, states, logits = _split_model(model, frozen, above, batch)
        reads = slice(None)
        if above.block is None and not _end_in_padding(model, data):
            reads = _tokens_read(upper, states, batch, lengths[split][sample])

        kept = {name: n if reads == slice(None) else np.ones_like(n) for name, n in lengths.items()}
        width = states.shape[-1]
        on_disk = sum(int(n.sum()) for n in kept.values()) * width * 4 > max_memory_mib * 2**20
        cached = {}
        for name, rows in data.items():
            ends = np.cumsum(kept[name])
            columns = [_cut_row(dict(rows[i]), int(n), reads) for i, n in enumerate(lengths[name])]
            store = make_storage((int(ends[-1]), width), on_disk, folder)
            cached[name] = CachedRows(columns, store, ends, lengths[name])
            for indices in evaluation_batches(lengths[name], batch_size):
                states = _run_frozen(model, frozen, above, _batch(model, rows, indices)).float().cpu().numpy()
                if states.shape[1] not in (1, lengths[name][indices].max()):
                    raise FeatureCacheError(
                        f"The frozen layers give {states.shape[1]} positions for {lengths[name][indices].max()} "
                        "tokens, because there are virtual tokens or the layers change the length: train the whole "
                        "model instead."
                    )
                for row, i in zip(states, indices, strict=True):
                    store[ends[i] - kept[name][i] : ends[i]] = row[: lengths[name][i]][reads]
        _require_equal(upper, upper(**_batch(upper, cached[split], sample)).logits, logits)
    return upper, cached


def _split_model(
    model: PreTrainedModel, frozen: Sequence[Group], above: Group, batch: Mapping[str, Tensor]
) -> tuple[UpperLayers, Tensor, Tensor]:
    """The upper layers; for a batch the output of the frozen ones, shape (B, T, H), and the logits, shape (B, C).

    Raises:
        FeatureCacheError: the upper layers do not give these logits from that output.
    """
    with _output_forms(model, frozen) as forms:
        logits = model(**batch).logits
    blocks = {path: form for path, form in forms.items() if not isinstance(model.get_submodule(path), nn.Embedding)}
    reason = None
    for replaced in (forms, blocks):  # the blocks of MPNet read one of the embeddings again
        try:
            states = _run_frozen(model, frozen, above, batch)
            upper = UpperLayers(model, frozen, above, replaced).eval()
            _require_equal(upper, upper(**{STATES: states}, **batch).logits, logits)
            return upper, states, logits
        except FeatureCacheError as error:
            reason = error
        except Exception as error:  # whatever the code of a model raises without its lowest layers
            reason = FeatureCacheError(
                f"The upper layers of {type(model).__name__} do not run without the frozen ones "
                f"({first_line(error)}): train the whole model instead."
            )
    raise reason


def _split_groups(model: nn.Module) -> tuple[list[Group], Group]:
    """The frozen lowest groups, and the group above them."""
    groups = layer_groups(model)
    if any(group.name.startswith("decoder ") for group in groups):
        raise FeatureCacheError("The layers of an encoder-decoder cannot be cached: train the whole model.")
    trains = [any(p.requires_grad for p in group.parameters.values()) for group in groups]
    if not any(trains):
        raise FeatureCacheError(
            "There is nothing to train, since all parameters are frozen: call freeze(model, train=1) or more."
        )
    if trains[0]:
        names = [name for name, p in groups[0].parameters.items() if p.requires_grad]
        raise FeatureCacheError(
            f"The embeddings train ({names[0]}), so there is nothing fixed to cache: freeze the lowest layers first."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise FeatureCacheError(
            "Gradient checkpointing runs the layers twice: call model.gradient_checkpointing_disable()."
        )
    first = trains.index(True)
    return groups[:first], groups[first]


def _require_fixed_rows(data: Mapping[str, Any]) -> None:
    """Refuse rows that change at each reading (augmentation), judged by the first three of each split."""
    for split, rows in data.items():
        for i in range(min(3, len(rows))):
            once, again = dict(rows[i]), dict(rows[i])
            if "input_ids" not in once:
                raise FeatureCacheError(f"The rows of {split!r} have no input_ids: give rows of token ids.")
            changed = [key for key in once if not np.array_equal(np.asarray(once[key]), np.asarray(again[key]))]
            if changed or getattr(rows, "format", {}).get("type") == "custom":
                raise FeatureCacheError(
                    f"The rows of {split!r} change at each reading (augmentation), and a cache would keep one version: "
                    "train the whole model, or fix the rows."
                )


def _batch(model: nn.Module, rows: Any, indices: NDArray[np.int64]) -> dict[str, Tensor]:
    batch = make_batch(model, rows, indices, next(model.parameters()).device)
    return {name: value for name, value in batch.items() if name != "labels"}


@contextmanager
def _output_forms(model: nn.Module, frozen: Sequence[Group]) -> Iterator[dict[str, int]]:
    """While the model runs, note the output of each frozen block and embedding: 0 for a tensor, or the tuple's length.

    Embeddings that are not called, such as DeBERTa's table of relative positions, are left out. If no block is frozen,
    all are, because DeBERTa reads the embeddings again beside the first block.
    """
    forms: dict[str, int] = {}

    def look(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(module, nn.Embedding):
                shape = (*args[0].shape, module.embedding_dim) if args and isinstance(args[0], Tensor) else None
                if output.shape != shape:  # such as the positions of RoFormer
                    return
            forms[path] = len(output) if isinstance(output, tuple) else 0

        return hook

    paths = [group.block for group in frozen if group.block is not None]
    owners = {name.rpartition(".")[0] for name in frozen[0].parameters} if paths else set()
    paths += [path for path in sorted(owners) if isinstance(model.get_submodule(path), nn.Embedding)]
    hooks = [model.get_submodule(path).register_forward_hook(look(path)) for path in paths]
    try:
        yield forms
    finally:
        for hook in hooks:
            hook.remove()


class _ReachedError(Exception):
    """The frozen layers have run; the rest of the forward pass is not needed."""


def _run_frozen(model: nn.Module, frozen: Sequence[Group], above: Group, batch: Mapping[str, Tensor]) -> Tensor:
    """The output of the frozen layers for a batch, shape (B, T, H)."""
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
    elif above.block is None:  # a shared block runs several times, and its last output counts
        hook = model.get_submodule(frozen[-1].block).register_forward_hook(after)
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
def _tokens_read(upper: UpperLayers, states: Tensor, batch: Mapping[str, Tensor], lengths: NDArray[np.int64]) -> slice:
    """Which tokens of a row the head reads, judged by its gradient: only the first, only the last, or all."""
    states = states.detach().requires_grad_()
    logits = upper(**{STATES: states}, **batch).logits
    weights = torch.linspace(1, 2, logits.shape[-1], device=logits.device)  # equal ones might cancel
    (gradient,) = torch.autograd.grad((logits * weights).sum(), states)
    read = (gradient != 0).any(-1).cpu().numpy()
    for tokens, position in ((slice(0, 1), np.zeros_like(lengths)), (slice(-1, None), lengths - 1)):
        if np.array_equal(read, np.arange(read.shape[1]) == position[:, None]):
            return tokens
    return slice(None)


def _end_in_padding(model: nn.Module, data: Mapping[str, Any]) -> bool:
    """Whether any row ends in the padding token: the head of a decoder would take an earlier token for the last."""
    padding = getattr(model.config, "pad_token_id", None)
    return any(len(row["input_ids"]) and int(row["input_ids"][-1]) == padding for rows in data.values() for row in rows)


def _cut_row(row: dict[str, Any], length: int, reads: slice) -> dict[str, Any]:
    """The columns of a row, cut to the tokens that are kept."""
    return {key: value[reads] if np.ndim(value) and len(value) == length else value for key, value in row.items()}


def _require_equal(upper: UpperLayers, ours: Tensor, logits: Tensor) -> None:
    """Refuse upper layers whose logits differ from those of the whole model."""
    difference, size = float((ours - logits).abs().max()), float(logits.abs().max())
    if not difference <= max(_TOLERANCE * size, 1e-5):
        raise FeatureCacheError(
            f"With cached layers the logits of {type(upper.model).__name__}, up to {size:.1e} in size, differ by "
            f"{difference:.1e}, because its layers do not form a chain or read the padding: train the whole model "
            "instead."
        )
