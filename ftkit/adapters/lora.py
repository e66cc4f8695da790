"""LoRA (Hu et al., 2022) and IA3 (Liu et al., 2022) with peft, and BitFit (Ben Zaken et al., 2022)."""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.errors import ModelError, did_you_mean, first_line
from ftkit.models import architecture
from ftkit.models.loading import (
    ADAPTER_FILE,
    add_new_weights,
    check_dropout,
    class_names,
    name_classes,
    new_weights,
    report_random_weights,
)
from ftkit.models.modules import seeded

# peft 0.21 reads a property that transformers has renamed; a reader cannot change that
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

_LABELS_FILE = "labels.json"  # peft's own files do not name the classes

_PEFT_PREFIX = "base_model.model."  # of the names in peft's files


def add_lora(
    model: PreTrainedModel | PeftModel,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Literal["all-linear"] | Sequence[str] | None = None,
    rslora: bool = False,
    dora: bool = False,
    name: str = "default",
    seed: int = 0,
) -> PeftModel:
    """Add low-rank updates to linear layers, LoRA (Hu et al., 2022): h = W0 x + (alpha / rank) B A dropout(x).

    A starts at random and B at zero, so that the outputs are unchanged at first. The updates and the head train, all
    other weights are frozen. The model is changed in place. A model that already has an adapter gets another one,
    which becomes active and has its own head, a copy of the base model's; switch with ``model.set_adapter(name)``.

    Args:
        model: a transformer with a classification or language-model head, or a model that this function returned.
        rank: rank r of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout probability in [0, 1) on the input of the update.
        targets: full names of linear layers, or the last parts of their names. "all-linear" takes every linear layer
            below the head, None the query and value layers (with the key, where one layer computes all three).
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023).
        dora: train the length and the direction of each weight row separately (Liu et al., 2024).
        name: name of the adapter, without a dot.
        seed: seed of A; the global random state is left unchanged.

    Returns:
        The peft model, for ``fit`` and ``evaluate``.

    Raises:
        ValueError: a number is out of range, no layer has that name, or the adapter's name is taken.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"The rank is {rank!r}: give an integer of 1 or more.")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha!r}: give a number above 0, for example twice the rank.")
    check_dropout(dropout)
    base = _base(model)
    names = _find_targets(base, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        use_rslora=rslora,
        use_dora=dora,
        fan_in_fan_out=_is_conv1d(base, names),
        **_task(base),
    )
    with seeded(seed):
        return _add(model, config, name)


def add_ia3(model: PreTrainedModel | PeftModel, *, name: str = "default") -> PeftModel:
    """Rescale keys, values and the inner activations of the feed-forward layers, IA3 (Liu et al., 2022).

    Each of them is multiplied by a vector that starts at one. Where one layer computes query, key and value (GPT-2,
    ModernBERT), the query is rescaled too. Everything else is as in ``add_lora``.

    Args:
        model: as for ``add_lora``.
        name: name of the adapter, without a dot.

    Returns:
        The peft model, for ``fit`` and ``evaluate``.

    Raises:
        ValueError: the architecture is unknown, or the adapter's name is taken.
    """
    base = _base(model)
    feed_forward = architecture.block_outputs(base)[1]
    keys, values = (architecture.layers_called(base, names) for names in (architecture.KEYS, architecture.VALUES))
    for path in architecture.block_paths(base):
        if not all(any(name.startswith(f"{path}.") for name in names) for names in (keys, values)):
            raise ValueError(
                f"The key and value layers of {type(base).__name__} are not known: use add_lora with "
                "targets='all-linear', which does not need them."
            )
    names = architecture.layers_called(base, [*architecture.KEYS, *architecture.VALUES])
    config = IA3Config(
        target_modules=names + feed_forward,
        feedforward_modules=feed_forward,
        fan_in_fan_out=_is_conv1d(base, names),
        **_task(base),
    )
    return _add(model, config, name)


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge the active adapter into a copy of the weights: a plain transformers model that computes the same.

    The model given is left unchanged, with all its adapters. All weights of the new model can train.

    Raises:
        ValueError: the adapter is a soft prompt, which changes no weights.
    """
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("A soft prompt can't be merged, since it changes no weights: save it with save_adapter.")
    copied = copy.deepcopy(model)
    base = copied.get_base_model()
    for name in architecture.head_names(base):  # with IA3, peft itself unwraps only heads of one layer
        head = getattr(base, name)
        if isinstance(head, ModulesToSaveWrapper):
            setattr(base, name, head.modules_to_save[model.active_adapter])
    return copied.merge_and_unload(safe_merge=True).requires_grad_(True)


def save_adapter(model: PeftModel, folder: str | Path) -> Path:
    """Save the active adapter or soft prompt with its head in peft's format, and the names of its classes.

    Plain peft can load it: ``PeftModel.from_pretrained(base, folder)``. A language model's adapter has no classes.
    Weights of the base that were not in its checkpoint, such as a pooler that started at random, are saved too.

    Args:
        model: a peft model.
        folder: created if it does not exist.

    Returns:
        The folder with the adapter: ``folder`` itself, or, if the adapter's name is not "default", the subfolder of
        that name, as in peft.

    Raises:
        ModelError: the folder holds a whole model.
        OSError: the folder cannot be created or written.
    """
    name = model.active_adapter
    target = Path(folder) if name == "default" else Path(folder) / name
    if (target / "config.json").is_file():  # with the adapter beside it, transformers would load both together
        raise ModelError(f"The folder {str(target)!r} holds a model already: save the adapter in another folder.")
    target.mkdir(parents=True, exist_ok=True)
    # False, since peft would ask the hub whether the vocabulary has grown and the embeddings must be saved too
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    _save_new_weights(_base(model), target / SAFETENSORS_WEIGHTS_NAME)
    if architecture.head_names(_base(model)):
        (target / _LABELS_FILE).write_text(json.dumps(class_names(model.config)) + "\n", encoding="utf-8")
    else:
        (target / _LABELS_FILE).unlink(missing_ok=True)  # from an adapter that was saved here before
    return target


def load_adapter(model: PreTrainedModel | PeftModel, folder: str | Path, *, name: str = "default") -> PeftModel:
    """Put a saved adapter and its head onto the base model it was trained with; it is active, and training can go on.

    Args:
        model: the base model, or one that already has adapters; if the adapter has classes, with a head for as many.
        folder: the folder that ``save_adapter`` returned, or that peft wrote.
        name: new name of the adapter.

    Returns:
        The peft model, for ``fit`` and ``evaluate``.

    Raises:
        ValueError: the folder has no adapter, the adapter is for another architecture or number of classes, or the
            name is taken; or the model's other adapters were trained over other random weights of the base.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"There is no saved adapter in {str(folder)!r}: give the folder that save_adapter() returned.")
    labels = json.loads((folder / _LABELS_FILE).read_text("utf-8")) if (folder / _LABELS_FILE).is_file() else None
    if labels is not None and len(labels) != len(class_names(model.config)):
        raise ValueError(
            f"The adapter in {str(folder)!r} is for the {len(labels)} classes {labels}, the model's head is for "
            f"{len(class_names(model.config))}: load the model with these classes."
        )
    _require_free(model, name)
    # peft refuses is_trainable for soft prompts, since P-tuning does not save its network; the embeddings still train
    config = PeftConfig.from_pretrained(folder)
    trainable = not config.is_prompt_learning
    try:
        of_base = _saved_base_weights(_base(model), folder / SAFETENSORS_WEIGHTS_NAME, config)
        if isinstance(model, PeftModel):
            _require_same_base(_base(model), of_base)
            model.load_adapter(folder, name, is_trainable=trainable)
            model.set_adapter(name)
            loaded = model
        else:
            loaded = PeftModel.from_pretrained(model, folder, name, is_trainable=trainable)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"The adapter in {str(folder)!r} does not fit {type(_base(model)).__name__} ({first_line(error)}): "
            "load a fresh copy of the model it was trained with."
        ) from error
    report_random_weights(_base(loaded), of_base, folder)
    add_new_weights(_base(loaded), of_base)
    if labels is not None:
        name_classes(loaded.config, labels)
    return loaded


def bitfit(model: PreTrainedModel) -> PreTrainedModel:
    """Train only the biases and the head, BitFit (Ben Zaken et al., 2022).

    Args:
        model: a transformer; changed in place, all other weights are frozen.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no biases below its head (Llama, T5, ModernBERT).
    """
    heads = tuple(f"{name}." for name in architecture.head_names(model))
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias") and not name.startswith(heads)}
    if not biases:
        raise ValueError(f"{type(model).__name__} has no biases below its head to train: use add_lora.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in biases or name.startswith(heads))
    return model


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _base_weights(base: PreTrainedModel) -> dict[str, Tensor]:
    """The base's weights by the names that they had before peft wrapped layers; copied heads keep their new names."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items()}


def _save_new_weights(base: PreTrainedModel, file: Path) -> None:
    """Add the weights that are not in the base's checkpoint to an adapter's file, from which peft loads them too."""
    new = {name: tensor for name, tensor in _base_weights(base).items() if name in new_weights(base)}
    if not new:
        return
    saved = load_file(file)
    wrapped = {key.rpartition(".lora_")[0] or key.rpartition(".ia3_")[0] for key in saved}
    for name, tensor in new.items():
        layer, _, last = f"{_PEFT_PREFIX}{name}".rpartition(".")
        # cloned, since a safetensors file refuses weights that share their memory
        saved[f"{layer}.base_layer.{last}" if layer in wrapped else f"{layer}.{last}"] = tensor.contiguous().clone()
    save_file(saved, file, metadata={"format": "pt"})


def _saved_base_weights(base: PreTrainedModel, file: Path, config: PeftConfig) -> dict[str, Tensor]:
    """Weights of the base in an adapter's file, by the names of ``_base_weights``."""
    if not file.is_file():  # peft also reads an older kind of file, which save_adapter never wrote
        return {}
    own = [f".{name}." for name in config.modules_to_save or []]  # the head, and what peft trains as a whole
    saved = {
        key.removeprefix(_PEFT_PREFIX).replace(".base_layer.", "."): tensor for key, tensor in load_file(file).items()
    }
    names = _base_weights(base).keys() & saved.keys()
    return {name: saved[name] for name in sorted(names) if not any(part in f".{name}" for part in own)}


def _require_same_base(base: PreTrainedModel, saved: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that would change the base below the other adapters of a model.

    Raises:
        ValueError: the adapter was trained over a base with other random weights.
    """
    weights = _base_weights(base)
    other = [name for name, tensor in saved.items() if not torch.equal(weights[name].cpu(), tensor)]
    if other:
        raise ValueError(f"which has adapters over another {other[0]}")


def _task(base: PreTrainedModel) -> dict[str, Any]:
    """Options that make peft train and save the head, whatever its name, and keep the signature of ``forward``."""
    endings = {
        "ForSequenceClassification": TaskType.SEQ_CLS,
        "ForCausalLM": TaskType.CAUSAL_LM,
        "LMHeadModel": TaskType.CAUSAL_LM,
        "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
    }
    task = next((task for ending, task in endings.items() if type(base).__name__.endswith(ending)), None)
    heads = architecture.head_names(base)
    if task is TaskType.SEQ_CLS:  # peft adds these two itself
        heads = [name for name in heads if name not in ("classifier", "score")]
    return {"task_type": task, "modules_to_save": heads or None}


def _find_targets(base: PreTrainedModel, targets: str | Sequence[str] | None) -> list[str]:
    """Resolve ``targets`` to names of layers for peft."""
    layers = architecture.linear_layers(base)
    if not layers:
        raise ValueError(f"{type(base).__name__} has no linear layers that learn below its head: use freeze instead.")
    if targets == "all-linear":
        return list(layers)
    if isinstance(targets, str):
        targets = [targets]
    last_parts = sorted({name.split(".")[-1] for name in layers})
    if targets is None:
        names = [name for name in last_parts if name in {*architecture.QUERIES, *architecture.VALUES}]
        if any(set(names).isdisjoint(kind) for kind in (architecture.QUERIES, architecture.VALUES)):
            raise ValueError(
                f"The query and value layers of {type(base).__name__} are not known: "
                f"give targets, choosing from {', '.join(last_parts)}, or 'all-linear'."
            )
        found = architecture.layers_called(base, names)
        same_names = {name for name, _ in base.named_modules() if name.split(".")[-1] in names}
        return names if same_names == set(found) else found  # peft would take layers that cannot learn, too
    for target in targets:
        if not architecture.layers_called(base, [target]):
            raise ValueError(
                f"{type(base).__name__} has no linear layer {target!r} below its head "
                f"({did_you_mean(target, last_parts)}): "
                f"choose from {', '.join(last_parts)}, or 'all-linear'."
            )
    if not targets:
        raise ValueError(f"targets is empty: choose from {', '.join(last_parts)}, or 'all-linear'.")
    return list(targets)


def _is_conv1d(base: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether these layers store their weights as (in, out); peft needs to know."""
    layers = architecture.linear_layers(base)
    found = [layers[name] for name in architecture.layers_called(base, names)]
    return any(isinstance(getattr(layer, "base_layer", layer), Conv1D) for layer in found)


def _require_free(model: PreTrainedModel | PeftModel, name: str) -> None:
    if not name or "." in name:
        raise ValueError(f"An adapter can't be named {name!r}: give a name without a dot.")
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise ValueError(f"The model already has an adapter {name!r}: give another name.")


def _add(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str) -> PeftModel:
    _require_free(model, name)
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, name)
    model.add_adapter(name, config)
    model.set_adapter(name)
    return model
