"""LoRA (Hu et al., 2021) and IA3 (Liu et al., 2022) through peft, and BitFit (Ben Zaken et al., 2021)."""

import copy
import difflib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.models import architecture
from ftkit.models.loading import class_names, name_classes
from ftkit.models.modules import seeded

# peft 0.21 reads a property that transformers has renamed: nothing that a reader could mend
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

LABELS_FILE = "labels.json"  # beside peft's two files, which do not name the classes


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

    A starts at random and B at zero, so that the model starts as it was. The updates and the head train, all else is
    frozen. The model is changed in place. One that has an adapter gets another, which becomes the active one, with a
    head of its own that starts as the base's; ``set_adapter(name)`` of the model switches.

    Args:
        model: a transformer, with a classification or language-model head; or what this function returned.
        rank: of the update, r.
        alpha: the update is scaled by alpha / rank.
        dropout: probability, in [0, 1), on the input of the update.
        targets: names of linear layers, whole or their last parts; "all-linear" is every one below the head; None is
            the query and value of each attention (with the key, where the three are one layer).
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023).
        dora: train the length of each weight row apart from its direction (Liu et al., 2024).
        name: of the adapter, without a dot.
        seed: of A; the global chance stays as it was.

    Returns:
        The peft model, which ``fit`` and ``evaluate`` take.

    Raises:
        ValueError: a number out of range, no layer of that name, a name that is taken.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"The rank is {rank!r}: give a whole number from 1.")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha!r}: give a number above 0, for instance twice the rank.")
    if not 0 <= dropout < 1:
        raise ValueError(f"A dropout of {dropout!r} is no probability in [0, 1): try 0.1, or 0 for none.")
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

    Each gets a vector that is multiplied in and starts at one. Where query, key and value are one layer (GPT-2,
    ModernBERT), the query is rescaled too. The rest is as in ``add_lora``.

    Raises:
        ValueError: an architecture whose blocks can't be read, a name that is taken.
    """
    base = _base(model)
    feed_forward = architecture.block_outputs(base)[1]
    names = architecture.layers_called(base, [*architecture.KEYS, *architecture.VALUES])
    config = IA3Config(
        target_modules=names + feed_forward,
        feedforward_modules=feed_forward,
        fan_in_fan_out=_is_conv1d(base, names),
        **_task(base),
    )
    return _add(model, config, name)


def merge(model: PeftModel) -> PreTrainedModel:
    """The plain transformers model that computes what this one does with its active adapter, weights added in.

    The model given stays as it is, with all its adapters; in the one returned everything can train.

    Raises:
        ValueError: a soft prompt, which is no change of weights.
    """
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("A soft prompt can't be merged, for it changes no weight: save it with save_adapter.")
    copied = copy.deepcopy(model)
    base = copied.get_base_model()
    for name in architecture.head_names(base):  # by hand, for with IA3 peft unwraps only heads of one layer
        head = getattr(base, name)
        if isinstance(head, ModulesToSaveWrapper):
            setattr(base, name, head.modules_to_save[model.active_adapter])
    return copied.merge_and_unload(safe_merge=True).requires_grad_(True)


def save_adapter(model: PeftModel, folder: str | Path) -> Path:
    """Save the active adapter, or soft prompt, and its head as peft does, and beside them the names of its classes.

    Plain peft loads it: ``PeftModel.from_pretrained(base, folder)``. A language model's adapter has no classes.

    Returns:
        Where it is: the folder, which is made if need be; for an adapter with a name, as in peft, the folder of that
        name in it.

    Raises:
        OSError: the folder can't be made or written.
    """
    name = model.active_adapter
    place = Path(folder) if name == "default" else Path(folder) / name
    place.mkdir(parents=True, exist_ok=True)
    # peft would ask the hub whether the vocabulary has grown, to save the embeddings too
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    if architecture.head_names(_base(model)):
        (place / LABELS_FILE).write_text(json.dumps(class_names(model.config)) + "\n", encoding="utf-8")
    else:
        (place / LABELS_FILE).unlink(missing_ok=True)  # of an adapter that was saved here before
    return place


def load_adapter(model: PreTrainedModel | PeftModel, folder: str | Path, *, name: str = "default") -> PeftModel:
    """Put a saved adapter with its head onto the base it was trained on; it is active and can train on.

    Args:
        model: the base, with a head for as many classes if the adapter has some; or one that has adapters already.
        folder: what ``save_adapter``, or peft, wrote.
        name: what the adapter is called from now on.

    Raises:
        ValueError: no adapter there, another number of classes, another architecture, a name that is taken.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"There is no saved adapter in {str(folder)!r}: give the folder that save_adapter() returned.")
    labels = json.loads((folder / LABELS_FILE).read_text("utf-8")) if (folder / LABELS_FILE).is_file() else None
    if labels is not None and len(labels) != len(class_names(model.config)):
        raise ValueError(
            f"The adapter in {str(folder)!r} is for the {len(labels)} classes {labels}, the model's head for "
            f"{len(class_names(model.config))}: load the model with these classes."
        )
    _require_free(model, name)
    # peft refuses to call a soft prompt trainable, for that of P-tuning has lost its network; its embeddings do train
    trainable = not PeftConfig.from_pretrained(folder).is_prompt_learning
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name, is_trainable=trainable)
            model.set_adapter(name)
            loaded = model
        else:
            loaded = PeftModel.from_pretrained(model, folder, name, is_trainable=trainable)
    except (RuntimeError, ValueError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"The adapter in {str(folder)!r} does not fit {type(_base(model)).__name__} ({first}): load the model "
            "that it was trained on, anew."
        ) from error
    if labels is not None:
        name_classes(loaded.config, labels)
    return loaded


def bitfit(model: PreTrainedModel) -> PreTrainedModel:
    """Let the biases and the head train and freeze all else, BitFit (Ben Zaken et al., 2022).

    Returns:
        The same model, changed in place.

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


def _task(base: PreTrainedModel) -> dict[str, Any]:
    """What makes peft train and save the head, whatever it is called, and keep the model's call as it is."""
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
    """The names of layers to give to peft."""
    layers = architecture.linear_layers(base)
    if targets == "all-linear":
        return list(layers)
    if isinstance(targets, str):
        targets = [targets]
    last_parts = sorted({name.split(".")[-1] for name in layers})
    if targets is None:
        names = [name for name in last_parts if name in {*architecture.QUERIES, *architecture.VALUES}]
        if not names:
            raise ValueError(
                f"No query and value layers are known in {type(base).__name__}: "
                f"give targets, some of {', '.join(last_parts)}, or 'all-linear'."
            )
        return names
    for target in targets:
        if not architecture.layers_called(base, [target]):
            nearest = difflib.get_close_matches(target, last_parts, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(
                f"{type(base).__name__} has no linear layer {target!r} below its head{hint}: "
                f"choose from {', '.join(last_parts)}, or 'all-linear'."
            )
    if not targets:
        raise ValueError(f"targets is empty: choose from {', '.join(last_parts)}, or 'all-linear'.")
    return list(targets)


def _is_conv1d(base: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether these layers hold their weight as (in, out), which peft has to know."""
    layers = architecture.linear_layers(base)
    found = [layers[name] for name in architecture.layers_called(base, names)]
    return any(isinstance(getattr(layer, "base_layer", layer), Conv1D) for layer in found)


def _require_free(model: PreTrainedModel | PeftModel, name: str) -> None:
    if not name or "." in name:
        raise ValueError(f"An adapter can't be called {name!r}: give a name without a dot.")
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise ValueError(f"The model has an adapter {name!r} already: give another name.")


def _add(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str) -> PeftModel:
    _require_free(model, name)
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, name)
    model.add_adapter(name, config)
    model.set_adapter(name)
    return model
