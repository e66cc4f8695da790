"""A drawing of a network: its layers from input to output, what is frozen, what trains, and what was added where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import FancyBboxPatch, Patch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.errors import FreezingError
from ftkit.models.architecture import Group, layer_groups
from ftkit.plots import COLOURS, STYLE, Figure

_FROZEN, _TRAINS, _ADDED = "0.88", COLOURS[0], COLOURS[4]

_METHODS = {"lora": "LoRA", "ia3": "IA³"}  # by peft's module

_MAX_BLOCKS = 8  # in a deeper network, one row stands for several blocks that are alike

_UNUSED = ".original_module."  # peft keeps the head that it has replaced; no input runs through it

_LABEL, _BOX, _COLUMN, _ROW = 1.0, 3.4, 0.9, 0.44  # inches: names, boxes, numbers, height


@dataclass(frozen=True)
class _Cell:
    """A part of a layer; the weights that a method added to it are not counted.

    Attributes:
        name: as in the drawing.
        weights, trains: how many it has, and how many of them train.
        added: what was added to it, with its place: "LoRA (query, value)"; empty if nothing was.
        added_trains: whether that trains.
        before: whether what was added stands in front of the part, not in it.
    """

    name: str
    weights: int
    trains: int
    added: str = ""
    added_trains: bool = False
    before: bool = False


@dataclass
class _Row:
    """A layer, or several that are alike.

    Attributes:
        name: as in the drawing.
        weights, trains: how many each of the layers has, with those that were added, and how many of them train.
        cells: its parts.
        alike: number of layers that the row stands for.
    """

    name: str
    weights: int
    trains: int
    cells: list[_Cell] = field(default_factory=list)
    alike: int = 1

    def __str__(self) -> str:
        each = " each" if self.alike > 1 else ""
        state = "frozen" if not self.trains else "all train" if self.trains == self.weights else None
        text = f"{self.name}: {self.weights:,} weights{each}, {state or f'of which {self.trains:,} train'}"
        added = [
            f"{cell.added} {'in front of' if cell.before else 'in'} {cell.name}" for cell in self.cells if cell.added
        ]
        return f"{text} ({', '.join(added)})" if added else text


def network(model: nn.Module, *, title: str | None = None) -> Figure:
    """Draw the layers of a network from input to output, with their numbers of weights.

    What is frozen is grey, what trains is blue, and what a method has added and trains is orange, at its place: LoRA,
    IA³ and bottleneck adapters in the attention or feed-forward part of a block, a prefix in front of the attention,
    a soft prompt in front of the embeddings. All of it is read from the model: ``requires_grad``, the layers of peft
    and the adapters. The head that peft has replaced by a copy is not counted, since no input runs through it.

    Args:
        model: a model that ``layer_groups`` can read, with or without adapters, or two towers such as ``TwoTowers``; a
            tower that can't be read layer by layer is one box.
        title: the first words above the drawing; None is the name of the network's class.

    Raises:
        FreezingError: the model can't be read layer by layer.
    """
    towers = all(hasattr(model, name) for name in ("text", "image", "text_head", "image_head"))
    stacks = _tower_stacks(model) if towers else {"": _rows(model)}
    title = title or type(model if towers else _network(model)[1]).__name__
    every = [row for rows in stacks.values() for row in rows]
    weights, trains = _count(p for name, p in model.named_parameters() if _UNUSED not in name)
    summary = f"{trains:,} of {weights:,} weights train ({_share(trains, weights)})"
    beside = weights - sum(row.weights * row.alike for row in every)
    if beside:  # the temperature of two towers
        summary += f"; {beside:,} outside the boxes"

    columns = ("weights",) if towers else ("weights", "train")  # beside two towers there is no room for more
    box = 1.3 if towers else _BOX
    width = _LABEL + box + len(columns) * _COLUMN
    deepest = max(map(len, stacks.values()))
    height = (deepest + 1.0) * _ROW
    total = height + 0.75
    with plt.rc_context({**STYLE, "axes.grid": False}):
        drawn = plt.figure(figsize=(width * len(stacks), total))
        for i, (name, rows) in enumerate(stacks.items()):
            ax = drawn.add_axes((i / len(stacks), 0.35 / total, 1 / len(stacks), height / total))
            ax.set(xlim=(0, width), ylim=(-0.5, deepest + 0.5))
            ax.set_axis_off()
            _draw_stack(ax, name, rows, box, columns)
        drawn.text(0.5, 1 - 0.15 / total, f"{title}: {summary}", ha="center", va="center", fontsize=10)
        legend = {"loc": "lower center", "ncols": 4, "frameon": False, "fontsize": 9, "borderaxespad": 0.2}
        drawn.legend(handles=_legend(every), **legend)
    layers = "; ".join(
        (f"{name}: " if name else "") + "; ".join(map(str, _merge_alike(rows))) for name, rows in stacks.items()
    )
    table = [
        {"tower": tower, "layer": row.name, "weights": row.weights * row.alike, "train": row.trains * row.alike}
        | {"added": ", ".join(cell.added for cell in row.cells if cell.added)}
        for tower, rows in stacks.items()
        for row in rows
    ]
    table = pd.DataFrame(table).set_index("layer").drop(columns="added" if towers else "tower")
    return Figure(drawn, f"{title}, layers from input to output. {layers}. In all, {summary}.", table)


def _share(part: int, whole: int) -> str:
    """A share as text that is never rounded to nothing or to all."""
    percent = 100 * part / max(whole, 1)
    return f"{percent:.0f} %" if part in (0, whole) else f"{percent:.2g} %" if percent < 99 else f"{percent:.4g} %"


# What is in the model -----------------------------------------------------------------------------------------


def _tower_stacks(model: nn.Module) -> dict[str, list[_Row]]:
    stacks = {}
    for name in ("text", "image"):
        tower, head = getattr(model, name), getattr(model, f"{name}_head")
        try:
            rows = [_Row(row.name, row.weights, row.trains, alike=row.alike) for row in _rows(tower)]
        except FreezingError:
            rows = [_Row("encoder", *_count(tower.parameters()))]
        stacks[f"{name} tower"] = [*rows, _Row("head", *_count(head.parameters()))]
    return stacks


def _rows(model: nn.Module) -> list[_Row]:
    """The layers from input to output; of a deep network, layers in a row that are alike are one."""
    groups = layer_groups(model)
    added, prompt = _added_weights(model), _VirtualTokens.of(model)
    num_blocks = sum(group.block is not None for group in groups)
    rows = []
    for group in groups:
        weights = {
            name: p for name, p in group.parameters.items() if _UNUSED not in name and name not in prompt.weights
        }
        if group.block is not None:
            parts, here = _block_parts(group, weights), prompt.of_block(num_blocks)
        elif group.name == "head":
            parts, here = _head_parts(model, weights), (0, 0)
        else:
            tied = " (also output layer)" if _is_output_layer(model, weights) else ""
            parts, here = {f"embeddings{tied}": weights}, prompt.of_embeddings()
        cells = [_make_cell(name, part, added) for name, part in parts.items()]
        if here[0]:
            cells[0] = replace(cells[0], added=prompt.name, added_trains=here[1] > 0, before=True)
        count, trains = (a + b for a, b in zip(_count(weights.values()), here, strict=True))
        if count:
            uses = f", run {group.uses} times" if group.uses > 1 else ""
            rows.append(_Row(f"{group.name}{uses}", count, trains, cells))
    return _merge_alike(rows) if num_blocks > _MAX_BLOCKS else rows


def _merge_alike(rows: Sequence[_Row]) -> list[_Row]:
    """Make one row of several in a row that differ in nothing but their names, which end with a number."""
    runs: list[list[_Row]] = []
    for row in rows:
        if runs and (row.weights, row.trains, row.cells) == (
            runs[-1][0].weights,
            runs[-1][0].trains,
            runs[-1][0].cells,
        ):
            runs[-1].append(row)
        else:
            runs.append([row])
    merged = []
    for run in runs:
        first, last = run[0], run[-1]
        name = f"{first.name.replace('layer', 'layers')} to {last.name.split()[-1]}" if len(run) > 1 else first.name
        merged.append(_Row(name, first.weights, first.trains, first.cells, sum(row.alike for row in run)))
    return merged


def _count(parameters: Any) -> tuple[int, int]:
    """Numbers of weights and of those that train."""
    parameters = list(parameters)
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _added_weights(model: nn.Module) -> dict[str, tuple[str, str]]:
    """For each weight that was added to a linear layer, the method and the layer's own name."""
    added = {}
    for path, module in model.named_modules():
        base = f"{path}.base_layer."
        if isinstance(module, BaseTunerLayer):
            kind = type(module).__module__.split(".")[2]
            names = [name for name, _ in module.named_parameters(path) if not name.startswith(base)]
            added |= dict.fromkeys(names, (_METHODS.get(kind, kind), path.rpartition(".")[2]))
        elif isinstance(module, nn.Linear | Conv1D):
            for child, part in module.named_children():
                names = [name for name, _ in part.named_parameters(f"{path}.{child}")]
                added |= dict.fromkeys(names, (child, ""))
    return added


def _make_cell(name: str, weights: Mapping[str, nn.Parameter], added: Mapping[str, tuple[str, str]]) -> _Cell:
    extra = [weight for weight in weights if weight in added]
    places: dict[str, list[str]] = {}
    for method, layer in dict.fromkeys(added[weight] for weight in extra):
        places.setdefault(method, []).extend([layer] if layer else [])
    text = " and ".join(f"{method} ({', '.join(layers)})" if layers else method for method, layers in places.items())
    own = _count(p for weight, p in weights.items() if weight not in added)
    return _Cell(name, *own, text, any(weights[weight].requires_grad for weight in extra))


def _block_parts(group: Group, weights: dict[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
    """Attention and feed-forward part of a block; what is neither is counted with the latter."""
    parts: dict[str, dict[str, nn.Parameter]] = {"attention": {}, "feed-forward": {}}
    for name, parameter in weights.items():
        inside = name.removeprefix(f"{group.block}.").lower()
        parts["attention" if "attn" in inside or "attention" in inside else "feed-forward"][name] = parameter
    return parts if all(parts.values()) else {"block": weights}


def _head_parts(model: nn.Module, weights: dict[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
    """The modules of the head by their own names."""
    path, found = _network(model)
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in weights.items():
        inside = name.removeprefix(f"{path}.").removeprefix(f"{found.base_model_prefix}.")
        parts.setdefault(inside.split(".")[0].replace("_", " "), {})[name] = parameter
    return parts


def _network(model: nn.Module) -> tuple[str, nn.Module]:
    """The network of transformers in a module, with its path; the module itself if there is none."""
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel))
    return next(found, ("", model))


def _is_output_layer(model: nn.Module, weights: dict[str, nn.Parameter]) -> bool:
    """Whether the output layer of a language model has one of these weights."""
    output = _network(model)[1].get_output_embeddings()
    return output is not None and any(getattr(output, "weight", None) is p for p in weights.values())


@dataclass(frozen=True)
class _VirtualTokens:
    """A soft prompt or a prefix.

    Attributes:
        weights: what was added, by full name; empty if nothing was.
        name: as in the drawing.
        in_blocks: whether it stands in front of the attention of each block, as a prefix does.
    """

    weights: Mapping[str, nn.Parameter] = field(default_factory=dict)
    name: str = ""
    in_blocks: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "_VirtualTokens":
        tuned = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
        if tuned is None or not tuned.active_peft_config.is_prompt_learning:
            return cls()
        config, weights = tuned.active_peft_config, dict(model.named_parameters())
        is_prefix = config.peft_type == PeftType.PREFIX_TUNING
        name = f"{'prefix' if is_prefix else 'soft prompt'} ({config.num_virtual_tokens} virtual tokens)"
        return cls({name: p for name, p in weights.items() if "prompt_encoder." in name}, name, is_prefix)

    def of_block(self, num_blocks: int) -> tuple[int, int]:
        """Numbers of weights, and of those that train, in front of each of the blocks."""
        weights, trains = _count(self.weights.values()) if self.in_blocks else (0, 0)
        return weights // num_blocks, trains // num_blocks

    def of_embeddings(self) -> tuple[int, int]:
        """The same in front of the embeddings."""
        return (0, 0) if self.in_blocks else _count(self.weights.values())


# The drawing --------------------------------------------------------------------------------------------------


def _draw_stack(ax: plt.Axes, name: str, rows: Sequence[_Row], box: float, columns: Sequence[str]) -> None:
    """Draw one stack, the input at the bottom; a row is 1 high, and x is in inches."""
    left, right, top = _LABEL, _LABEL + box, len(rows)
    style = {"va": "center", "fontsize": 9}
    for column, head in enumerate(columns):
        ax.text(right + (column + 1) * _COLUMN, top + 0.2, head, ha="right", color="0.35", **style)
    ax.text(left + box / 2, top + 0.2, name or "output", ha="center", color="0.35", **style)
    ax.text(left + box / 2, -0.25, f"{name.split()[0]}s" if name else "input", ha="center", color="0.35", **style)
    for y, row in enumerate(rows):
        label = f"{row.name},\neach" if row.alike > 1 else row.name.replace(", ", ",\n")
        ax.text(left - 0.1, y + 0.5, label, ha="right", linespacing=1, **style)
        numbers = (f"{row.weights:,}", f"{row.trains:,}" if row.trains else "frozen")
        for column, number in enumerate(numbers[: len(columns)]):
            bold = column and row.trains
            ax.text(
                right + (column + 1) * _COLUMN, y + 0.5, number, ha="right", weight="bold" if bold else None, **style
            )
        cells, gap = row.cells or [_Cell("", row.weights, row.trains)], 0.06
        width = (box - gap * (len(cells) - 1)) / len(cells)
        for i, cell in enumerate(cells):
            _draw_cell(ax, cell, left + i * (width + gap), y, width)


def _draw_cell(ax: plt.Axes, cell: _Cell, x: float, y: float, width: float) -> None:
    _box(ax, x, y + 0.08, width, 0.84, _face(cell), hatch=_in_part(cell))
    colour = "white" if _face(cell) == _TRAINS else "black"
    if not cell.added:
        _text(ax, x + width / 2, y + 0.5, cell.name, colour, _in_part(cell))
        return
    plug = (0.55 if cell.before else 0.48) * width  # the part of the box that shows what was added
    rest = width - plug
    start = x + 0.04 if cell.before else x + rest - 0.04
    centre = x + (plug + rest / 2 if cell.before else rest / 2)
    _text(ax, centre, y + 0.5, cell.name.replace(" (", "\n("), colour, _in_part(cell), size=8.5)
    face = _ADDED if cell.added_trains else _FROZEN
    _box(ax, start, y + 0.16, plug, 0.68, face)
    what, _, where = cell.added.partition(" (")
    layers = where.rstrip(")").split(", ")
    where = f"{len(layers)} layers" if len(layers) > 2 else where.rstrip(")")
    _text(ax, start + plug / 2, y + 0.5, f"{what}\n{where}".strip(), "black", size=7.5)


def _box(ax: plt.Axes, x: float, y: float, width: float, height: float, face: str, hatch: bool = False) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", fc=face, ec="0.4", lw=0.8)
    ax.add_patch(shape)
    if hatch:
        lines = {"fill": False, "hatch": "////", "ec": _TRAINS, "lw": 0.8}
        ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", **lines))


def _text(ax: plt.Axes, x: float, y: float, text: str, colour: str, backed: bool = False, size: float = 9) -> None:
    back = {"bbox": {"fc": _FROZEN, "ec": "none", "pad": 1.5}} if backed else {}
    ax.text(x, y, text, color=colour, ha="center", va="center", fontsize=size, linespacing=0.95, **back)


def _in_part(cell: _Cell) -> bool:
    return 0 < cell.trains < cell.weights


def _face(cell: _Cell) -> str:
    return _TRAINS if cell.trains and cell.trains == cell.weights else _FROZEN


def _legend(rows: Sequence[_Row]) -> list[Patch]:
    """Entries for what the drawing has."""
    cells = [cell for row in rows for cell in row.cells or [_Cell("", row.weights, row.trains)]]
    entries = {
        "frozen": ({"fc": _FROZEN, "ec": "0.4"}, any(not cell.trains for cell in cells)),
        "trains": ({"fc": _TRAINS, "ec": "0.4"}, any(_face(cell) == _TRAINS for cell in cells)),
        "trains in part": ({"fc": _FROZEN, "ec": _TRAINS, "hatch": "////"}, any(map(_in_part, cells))),
        "added, trains": ({"fc": _ADDED, "ec": "0.4"}, any(cell.added_trains for cell in cells)),
    }
    return [Patch(label=label, **style) for label, (style, there) in entries.items() if there]
