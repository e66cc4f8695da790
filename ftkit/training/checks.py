"""What is checked where model, rows and settings meet, before anything is computed."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from ftkit.data.text import folded
from ftkit.errors import DataError, ModelError, TrainingError, in_brief
from ftkit.models.loading import class_names
from ftkit.training.batching import IGNORED, flat_column, has_token_labels, peek, row_labels, row_lengths
from ftkit.training.losses import ModelWithLoss
from ftkit.training.state import TrainSettings

_POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")

# a classifier of these families reads a row at its end mark, and fails if the rows of a batch differ in their number
_READ_AT_END_MARK = ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")


def require_settings(model: nn.Module, rows: Any, settings: TrainSettings) -> None:
    """Refuse settings that do not suit the model or the rows.

    Raises:
        TrainingError: a setting is for classes and losses that are not there.
    """
    by_class = settings.best_by not in (None, "accuracy")
    if isinstance(model, ModelWithLoss):
        if settings.label_smoothing or settings.class_weights is not None:
            raise TrainingError(
                f"{type(model).__name__} computes its own loss: set label_smoothing to 0 and class_weights to None."
            )
        if by_class:
            raise TrainingError(f"{type(model).__name__} has no {settings.best_by}: set best_by to None.")
    elif has_token_labels(rows):
        for needing, value in (("class_weights need", settings.class_weights), ("best_by needs", settings.best_by)):
            if value is not None:
                raise TrainingError(f"{needing} one class per row, and these have token labels: set it to None.")


def match_rows(model: nn.Module, rows: Any) -> Any:
    """Check that a model can read rows, and number their classes as the model does.

    Where both name their classes, the names decide. Rows name them by a ClassLabel, a model in its config. If the model
    knows every name of the rows, their labels are changed to its numbers, and a line says so; otherwise the rows are
    refused. Names that differ only in case, blanks or the form of a number (1 and 1.0) count as one, unless one side
    has both. Names that are only numbers (LABEL_0, as transformers gives by default, class 0, 0) count as none, unless
    the other side has them too.

    Args:
        model: as for ``fit``.
        rows: one split, N rows.

    Returns:
        The rows, unchanged if their classes have the model's numbers already.

    Raises:
        DataError: a label is not the number of one of the model's classes, the model does not know the name of a class,
            a row is longer than the model reads or has no token, or a token is unknown to the model, or is not where
            its head needs it.
        ModelError: the model has no embedding for its padding token.
    """
    if not _is_stored(rows):  # to look at rows that are made when they are read would make them all once more
        return rows
    lengths, first = row_lengths(rows), peek(rows)
    network = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if "input_ids" in first and network is not None and (words := _word_embeddings(network)) is not None:
        _require_length(model, network, lengths)
        if not isinstance(model, ModelWithLoss):  # pads its rows as it likes
            _require_tokens(model, network, words.num_embeddings, rows)
    if isinstance(model, ModelWithLoss):  # what its labels mean is its own affair
        return rows
    if "labels" not in first:
        raise DataError("The rows have no column 'labels': encode them with their labels.")
    num_classes, names = _classes(model, network)
    if has_token_labels(rows):
        _require_token_labels(rows, num_classes, type(network or model).__name__)
        return rows
    return _match_labels(rows, num_classes, names, type(network or model).__name__)


def _is_stored(rows: Any) -> bool:
    """Whether rows are kept in memory or on disk, instead of being made (decoded, augmented) at each reading."""
    if isinstance(rows, datasets.Dataset):
        return rows.format["type"] != "custom"
    return isinstance(rows, list | tuple) or hasattr(rows, "lengths")


def _word_embeddings(network: PreTrainedModel) -> nn.Embedding | None:
    """The embeddings of the tokens; None for a network for images, or one whose embeddings a cache replaces."""
    try:
        table = network.get_input_embeddings()
    except NotImplementedError:
        return None
    table = getattr(table, "base_layer", table)  # peft wraps what it adapts
    return table if isinstance(table, nn.Embedding) else None


def _require_length(model: nn.Module, network: PreTrainedModel, lengths: NDArray[np.int64]) -> None:
    """Refuse empty rows, and rows beyond the table of positions or, for a language model, beyond its window."""
    if not lengths.all():
        raise DataError(f"Row {lengths.argmin()} has no token: leave out rows without text.")
    limits = []
    for name, table in network.named_modules():
        if name.split(".")[-1] in _POSITION_TABLES and isinstance(table, nn.Embedding) and "vis" not in name:
            before = 0 if table.padding_idx is None else table.padding_idx + 1  # as in RoBERTa
            limits.append(table.num_embeddings - before - getattr(table, "offset", 0))
            row = getattr(network.get_submodule(name.rpartition(".")[0]), "position_ids", None)
            limits += [] if row is None else [row.shape[-1]]  # Nystromformer's table has two more than a row
    window = getattr(network.config.get_text_config(decoder=True), "max_position_embeddings", None) or 0
    if network.get_output_embeddings() is not None and window > 0:  # XLNet has -1, for no limit
        limits.append(window)
    prompt = getattr(getattr(model, "lm", model), "active_peft_config", None)  # a soft prompt takes positions too
    limit = min(limits, default=lengths.max()) - (getattr(prompt, "num_virtual_tokens", 0) if limits else 0)
    longest = lengths.argmax()
    if lengths[longest] > limit:
        raise DataError(
            f"Row {longest} has {lengths[longest]:,} tokens, and {type(network).__name__} can read {limit:,} at most: "
            f"encode the texts with max_length={limit}."
        )


def _require_tokens(model: nn.Module, network: PreTrainedModel, num_words: int, rows: Any) -> None:
    """Refuse tokens and a padding token without embeddings, and rows without the one end mark that their head reads."""
    ids, lengths = flat_column(rows, "input_ids")
    kind = type(network).__name__
    if ids.min() < 0 or ids.max() >= num_words:
        unknown = np.flatnonzero((ids < 0) | (ids >= num_words))
        row = np.searchsorted(np.cumsum(lengths), unknown[0], side="right")
        raise DataError(
            f"Row {row} has the token {ids[unknown[0]]}, and {kind} has embeddings for the tokens 0 to "
            f"{num_words - 1}: use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))."
        )
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if padding is not None and not 0 <= padding < num_words and lengths.min() < lengths.max():
        raise ModelError(
            f"The padding token is {padding}, and {kind} has embeddings for the tokens 0 to {num_words - 1}: set "
            "model.config.pad_token_id to one of these, or call model.resize_token_embeddings(len(tokenizer))."
        )
    if network.config.model_type in _READ_AT_END_MARK and kind.endswith("ForSequenceClassification"):
        end = network.config.eos_token_id
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        marks = np.bincount(row_of[ids == end], minlength=len(lengths))
        usual = max(1, int(np.bincount(marks).argmax()))  # 3 in a pair of sentences for BART
        if (marks != usual).any():
            row = (marks != usual).argmax()
            needed = "exactly once" if usual == 1 else f"{usual} times, as in the other rows"
            raise DataError(
                f"Row {row} has the end mark (token {end}) {marks[row]} times, and {kind} needs it {needed}: encode "
                "with the model's own tokenizer, and take the mark out of the text."
            )


def _classes(model: nn.Module, network: PreTrainedModel | None) -> tuple[int | None, list[str] | None]:
    """Number and names of the classes that a model tells apart; None where they are not known.

    A config says nothing of them if it is that of a body without head inside somebody's own classifier. A language
    model tells the tokens apart.
    """
    config = getattr(model, "config", None)
    if network is not None and network.base_model is network:
        return None, None
    if network is not None and network.get_output_embeddings() is not None and config == network.config:
        return network.get_output_embeddings().weight.shape[0], None
    num_classes = getattr(config, "num_labels", None)
    several_adapters = len(getattr(model, "peft_config", ())) > 1  # they share one config, which names one's classes
    named = num_classes is not None and hasattr(config, "id2label") and not several_adapters
    return num_classes, class_names(config) if named else None


def _require_token_labels(rows: Any, num_classes: int | None, kind: str) -> None:
    labels, _ = flat_column(rows, "labels")
    if labels.dtype.kind not in "iu":
        raise DataError(f"The token labels are of the type {labels.dtype}: give whole numbers, {IGNORED} for no label.")
    labels = labels[labels != IGNORED]
    wrong = labels[(labels < 0) | (labels >= (num_classes or np.inf))]
    if len(wrong):
        most = f"0 to {num_classes - 1}" if num_classes else "from 0"
        raise DataError(f"A token has the label {wrong[0]}, and those of {kind} are {most}: use its own tokenizer.")


def _match_labels(rows: Any, num_classes: int | None, names: list[str] | None, kind: str) -> Any:
    labels = row_labels(rows)
    wrong = next((i for i, label in enumerate(labels) if type(label) is not int or label < 0), None)
    if wrong is not None:
        raise DataError(
            f"The label of row {wrong} is {labels[wrong]!r}, and a classifier needs the number of a class, from 0: "
            "leave out rows without a class, and number classes that have names with class_encode_column('label')."
        )
    feature = rows.features.get("labels") if isinstance(rows, datasets.Dataset) else None
    if names is not None and isinstance(feature, datasets.ClassLabel):
        present = sorted(set(labels))  # a class without rows does not matter
        ours = [feature.names[i] for i in present]
        numbers = _model_numbers(ours, names, feature.names)
        if numbers is not None and (numbers != present or [names[number] for number in numbers] != ours):
            number_of = dict(zip(present, numbers, strict=True))
            print(
                f"{len(rows):,} rows: their classes are matched to the model's by name{_matches(ours, numbers, names)}"
            )
            rows = rows.remove_columns("labels")
            return rows.add_column("labels", [number_of[i] for i in labels], feature=datasets.ClassLabel(names=names))
    most = int(np.argmax(labels))
    if num_classes is not None and labels[most] >= num_classes:
        raise DataError(
            f"The label of row {most} is {labels[most]}, and {kind} has {num_classes} classes, 0 to {num_classes - 1}: "
            "load it with load_classifier for all classes of the rows."
        )
    return rows


def numbers_by_name(names: Iterable[str], models: Sequence[str]) -> dict[str, list[int]]:
    """Find the classes of a model that some names may mean.

    Args:
        names: names of classes, as rows or a file have them.
        models: the classes of the model.

    Returns:
        By name, the number of the model's class of this very name, else the numbers of all that differ from it only in
        case, blanks or the form of a number; an empty list for a name that the model does not know.
    """
    alike = defaultdict(list)
    for number, name in enumerate(models):
        alike[folded(name)].append(number)
    return {name: [models.index(name)] if name in models else alike[folded(name)] for name in names}


def _model_numbers(ours: Sequence[str], models: Sequence[str], declared: Sequence[str]) -> list[int] | None:
    """The model's number for each class of the rows; None if one side has no names.

    Args:
        ours: the classes that have rows.
        models: the classes of the model.
        declared: all classes that the rows declare, in the order of their numbers.
    """
    found = numbers_by_name(ours, models)
    if not any(found.values()) and (unnamed(declared) or unnamed(models)):
        return None
    if unknown := [name for name in ours if not found[name]]:
        raise DataError(
            f"The rows have classes that the model does not know, {_some(unknown)}, and the model's are "
            f"{_some(models)}: load it with load_classifier for the classes of the rows, or rename these if they mean "
            "the same."
        )
    numbers = [found[name][0] for name in ours]
    for name, number in zip(ours, numbers, strict=True):
        if len(found[name]) > 1:
            either = " or ".join(repr(models[i]) for i in found[name])
            raise DataError(
                f"The class {name!r} of the rows may be the model's {either}, which differ only in case, blanks or the "
                "form of a number: write it as the model does."
            )
        if numbers.count(number) > 1:
            both = " and ".join(repr(other) for other in ours if found[other] == [number])
            raise DataError(
                f"The classes {both} of the rows differ only in case, blanks or the form of a number, and the model "
                f"has one such class, {models[number]!r}: make them one, or load the model with load_classifier for "
                "the classes of the rows."
            )
    return numbers


def _matches(ours: Sequence[str], numbers: Sequence[int], models: Sequence[str]) -> str:
    """End the line on matched classes: the number of each, and the model's name where it is written in another way."""
    pairs = list(zip(ours, numbers, strict=True))
    if all(models[number] == name for name, number in pairs):
        return ": " + in_brief([f"{name} is {number}" for name, number in pairs], 8)
    notes = ["" if models[number] == name else f" ({models[number]!r})" for name, number in pairs]
    said = [f"{name!r} is {number}{note}" for (name, number), note in zip(pairs, notes, strict=True)]
    return ", whatever their case and blanks: " + in_brief(said, 8)


def unnamed(names: Sequence[str]) -> bool:
    """Whether the names of classes are only their numbers."""
    return all(name in (f"LABEL_{i}", f"class {i}", str(i)) for i, name in enumerate(names))


def _some(names: Sequence[str]) -> str:
    return in_brief([*map(repr, names)], 8)
