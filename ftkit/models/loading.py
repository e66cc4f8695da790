"""Classifiers and language models: loaded from an asset, a folder or the hub, and saved."""

import contextlib
import copy
import logging
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ftkit.data.assets import registry
from ftkit.errors import ModelError, first_line, in_brief
from ftkit.models.device import choose_device
from ftkit.models.heads import Heads
from ftkit.models.modules import seeded

ADAPTER_FILE, BOTTLENECK_FILE = "adapter_config.json", "bottleneck.json"  # in folders that hold an adapter only


def load_classifier(
    name_or_path: str | Path,
    labels: int | Sequence[str],
    *,
    pretrained: bool = True,
    dropout: float | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a network with a classification head of the right size, and its tokenizer.

    Args:
        name_or_path: an asset ("minilm"), a folder that ``save`` or ``save_pretrained`` wrote, or a hub id.
        labels: the number of classes, or their names in order, all different.
        pretrained: False gives the same architecture with random weights, for training from scratch.
        dropout: probability in [0, 1) for every dropout layer of the network; None keeps the checkpoint's.
        seed: seed of the weights that are not in the checkpoint (the head, or all of them from scratch).

    Returns:
        The model in float32, in eval mode and on the device from ``choose_device``, and the tokenizer.

    Raises:
        ModelError: the model does not exist, or cannot classify text.
    """
    names = [f"class {i}" for i in range(labels)] if isinstance(labels, int) else [str(label) for label in labels]
    if len(set(names)) < max(len(names), 2):
        raise ModelError(f"A classifier needs 2 or more different labels, not {names}: check the label column.")
    check_dropout(dropout)
    model, tokenizer, info, old_config = _read_classifier(name_or_path, names, pretrained, dropout, seed)
    if pretrained:
        _reorder_head(model, class_names(old_config))
        _report_weights(model, info, name_or_path, old_config)
    return finish_loading(model, tokenizer, name_or_path)


def _read_classifier(
    name_or_path: str | Path, names: Sequence[str], pretrained: bool, dropout: float | None, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any], PreTrainedConfig]:
    """Read a classifier, its tokenizer, which weights came from the checkpoint, and the checkpoint's config."""
    source, options, advice = locate_model(name_or_path)
    with as_model_error(name_or_path, advice), quiet_transformers(), seeded(seed):
        config = AutoConfig.from_pretrained(source, **options)
        old_config = copy.deepcopy(config)
        name_classes(config, names)
        if dropout is not None:
            set_dropout(config, dropout)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if pretrained:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        else:
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            model.config._name_or_path = ""  # it comes from no checkpoint
            info = {"missing_keys": set(model.state_dict()), "mismatched_keys": set(), "unexpected_keys": set()}
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    info |= {"mismatched_keys": mismatched, "unexpected_keys": _without_buffers(info["unexpected_keys"])}
    add_new_weights(model, {*info["missing_keys"], *mismatched})
    return model, tokenizer, info, old_config


def load_language_model(name_or_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Weights in a folder are memory-mapped: a page is read into memory when it is first used.

    Args:
        name_or_path: an asset ("smollm2"), a folder that ``save`` or ``save_pretrained`` wrote, or a hub id.

    Returns:
        The model in float32, in eval mode and on the device from ``choose_device``, and the tokenizer, which pads on
        the right and has the model's window as its ``model_max_length``.

    Raises:
        ModelError: the model does not exist, or does not predict the next token.
    """
    source, options, advice = locate_model(name_or_path)
    with as_model_error(name_or_path, advice), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
    unused = _unused_weights(model, _without_buffers(info["unexpected_keys"]))
    if unused and info["missing_keys"]:
        raise _misfit(model, info | {"unexpected_keys": unused}, name_or_path)
    masked = any(name.endswith("ForMaskedLM") for name in model.config.architectures or [])
    if info["missing_keys"] or info["mismatched_keys"] or masked:  # BERT would load, but see the word it has to predict
        raise ModelError(
            f"The model {str(name_or_path)!r} ({', '.join(model.config.architectures or ['unknown'])}) was not trained "
            "to predict the next token: use smollm2, or a causal language model from the hub."
        )
    _report_unused(unused, name_or_path)
    tokenizer.padding_side = "right"
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, window or tokenizer.model_max_length)
    return finish_loading(model, tokenizer, name_or_path)


def finish_loading(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Check that the tokenizer has words and can pad, and put the model on its device and into eval mode.

    Raises:
        ModelError: there is no tokenizer, or it cannot pad.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # if there is none, transformers makes one without words
        raise ModelError(f"The model {str(name)!r} has no tokenizer: save the one it was trained with in its folder.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if model.config.pad_token_id is None:  # GPT-like models classify from the last token before the padding
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.config.pad_token_id is None:
        raise ModelError(
            f"The tokenizer of {str(name)!r} can't pad a batch: set its pad_token and save it in the model's folder."
        )
    return model.to(choose_device().device).eval(), tokenizer


def class_names(config: PreTrainedConfig) -> list[str]:
    """Names of a classifier's classes, in order."""
    return [config.id2label[i] for i in sorted(config.id2label)]  # some configs count them from 1


def name_classes(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Set the number and the names of a classifier's classes, which exclude each other."""
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = None  # of an old head, such as a regression: pipelines read it


def new_weights(model: PreTrainedModel) -> set[str]:
    """Names of the weights that no checkpoint has, because they started at random; a new head is among them.

    ``save_adapter`` and ``save_bottleneck`` save them too. The set is empty for models that were not loaded here.
    """
    return getattr(model, "_new_weights", set())


def add_new_weights(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Mark further weights as new: no checkpoint has them."""
    model._new_weights = new_weights(model) | {*names}


def report_random_weights(base: PreTrainedModel, saved: Container[str], folder: str | Path) -> None:
    """Print which weights of an adapter's base started at random and were not saved with the adapter."""
    body = base.base_model_prefix + "."
    random = sorted(name for name in new_weights(base) if name.startswith(body) and name not in saved)
    if random:
        print(
            f"{folder}: {len(random)} weights of the base start at random and were not saved with the adapter, so "
            f"its logits may differ from those in training: {in_brief(random)}"
        )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Save model, head and tokenizer; plain transformers, or the function that loaded them, can load them again.

    Args:
        model: a classifier or a language model; not one with adapters (see ``save_adapter`` and ``save_bottleneck``).
        tokenizer: its tokenizer.
        folder: created if it does not exist; files of an earlier save are replaced.

    Returns:
        The folder.

    Raises:
        ModelError: the model is not a plain transformers model, or the folder holds an adapter.
        OSError: the folder cannot be created or written.
    """
    _require_plain(model)
    folder = Path(folder)
    if (folder / ADAPTER_FILE).is_file():  # transformers would put it on the model when it loads
        raise ModelError(f"The folder {str(folder)!r} holds an adapter already: save the model in another folder.")
    folder.mkdir(parents=True, exist_ok=True)  # transformers would only log a failure
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a classifier that ``save`` wrote, with the same head, label names and logits.

    Raises:
        ModelError: the folder does not contain a saved classifier, or some weights are missing or unexpected.
    """
    folder = Path(folder).absolute()  # a folder may have the name of an asset
    _refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"There is no saved model in {str(folder)!r}: give the folder that save() returned.")
    source, options, advice = locate_model(folder)
    with as_model_error(folder, advice), quiet_transformers():
        config = AutoConfig.from_pretrained(source, **options)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise ModelError(f"The model in {str(folder)!r} has no classification head: add one with load_classifier.")
    names = class_names(config)
    model, tokenizer, info, _ = _read_classifier(folder, names, pretrained=True, dropout=None, seed=0)
    if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
        raise _misfit(model, info, folder)
    _report_weights(model, info, folder, config)
    return finish_loading(model, tokenizer, folder)


def locate_model(
    name_or_path: str | Path,
    kinds: Sequence[str] = ("text-encoder", "language-model"),
    what: str = "a text model",
    example: str = "minilm",
) -> tuple[str, dict[str, bool], str]:
    """Find a model among the assets, in a folder or on the hub.

    Args:
        name_or_path: an asset, a folder or a hub id.
        kinds: the kinds of asset to accept.
        what: what these kinds are called in a message.
        example: a model to suggest in a message.

    Returns:
        The source and the options for ``from_pretrained``, and what to do if it cannot load the model.

    Raises:
        ModelError: the model does not exist, or is an asset of another kind.
    """
    # with None, transformers asks the reader, whose "y" would run code that comes with the model
    local = {"local_files_only": True, "trust_remote_code": False}
    if str(name_or_path) in registry.names():
        asset = registry.get(str(name_or_path))
        if asset.kind not in kinds:
            raise ModelError(f"The asset {asset.name!r} is of kind {asset.kind!r}, not {what}: use {example}.")
        return str(registry.fetch(asset.name)), local, registry.CHECK_FILES
    if Path(name_or_path).is_dir():
        _refuse_adapter(Path(name_or_path))
        return str(name_or_path), local, f"give a folder that save() wrote, or a model like {example}"
    if isinstance(name_or_path, Path) or str(name_or_path).count("/") != 1:
        known = ", ".join(name for kind in kinds for name in registry.names(kind))
        asset = f"an asset ({known}), " if known else ""
        raise ModelError(f"There is no model {str(name_or_path)!r}: give {asset}a folder, or a hub id like owner/name.")
    name = str(name_or_path)
    if registry.offline():
        return name, local, f"FTKIT_OFFLINE is set: unset it, or use one like {example}"
    try:
        HfApi().model_info(name, timeout=10)  # once: from_pretrained retries for half a minute, on stderr
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"The hub shows no model {name!r}: check the name, log in with `hf auth login` if it is not public, "
            f"or use one like {example}."
        ) from None
    except (OSError, httpx2.HTTPError) as error:  # a model in the cache still loads
        return name, local, f"the hub did not answer ({error}): check the network, or use one like {example}"
    return name, local | {"local_files_only": False}, f"choose another model, or one like {example}"


def check_dropout(dropout: float | None) -> None:
    """Refuse a dropout outside [0, 1).

    Raises:
        ModelError: the dropout is not a probability in [0, 1).
    """
    if dropout is not None and not 0 <= dropout < 1:
        raise ModelError(f"The dropout is {dropout}, not a probability in [0, 1): try 0.1, or 0 for none.")


def set_dropout(config: PreTrainedConfig, dropout: float) -> None:
    """Set every dropout probability of a config; their names differ between model families."""
    for name, value in vars(config).items():
        if (
            "drop" in name
            and "layerdrop" not in name
            and isinstance(value, float | int)
            and not isinstance(value, bool)
        ):
            setattr(config, name, float(dropout))


def _report_weights(
    model: PreTrainedModel, info: dict[str, Any], name: str | Path, old_config: PreTrainedConfig
) -> None:
    """Print which weights below the head the checkpoint lacks or has in vain, and what happened to its head.

    A new head is not mentioned if the checkpoint has none.
    """
    new = sorted(new_weights(model))
    body = [key for key in new if key.startswith(model.base_model_prefix + ".")]
    if body:
        some = in_brief(body)
        print(f"{name}: {len(body)} weights below the head are not in the checkpoint and start at random: {some}")
    _report_unused(_unused_weights(model, info["unexpected_keys"]), name)
    names, old_names, old_type = class_names(model.config), class_names(old_config), old_config.problem_type
    if info["mismatched_keys"] - {*body}:
        print(f"{name}: its head is for {len(old_names)} classes, not {len(names)}: a new one replaces it")
    elif len(new) == len(body):
        if {*names} != {*old_names}:
            print(f"{name}: its head is kept, its classes {old_names} are now called {names}")
        if old_type not in (None, "single_label_classification"):
            print(f"{name}: its head is kept, and was trained for {old_type}: its classes now exclude each other")


def _reorder_head(model: PreTrainedModel, old_names: Sequence[str]) -> None:
    """Reorder the outputs of a head that was kept, if its classes have the same names in another order."""
    names, inside = class_names(model.config), model.base_model_prefix + "."
    heads = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == len(names) and not path.startswith(inside)
    ]
    if (
        names == old_names
        or {*names} != {*old_names}
        or len(heads) != 1
        or f"{heads[0][0]}.weight" in new_weights(model)
    ):
        return
    order = [old_names.index(name) for name in names]
    with torch.no_grad():
        for parameter in heads[0][1].parameters():
            parameter.copy_(parameter[order].clone())


def _report_unused(unused: set[str], name: str | Path) -> None:
    if unused:
        some = in_brief(sorted(unused))
        print(f"{name}: the network has no place for {len(unused)} of the checkpoint's weights: {some}")


def _without_buffers(keys: Iterable[str]) -> set[str]:
    """Leave out the buffers that other versions of transformers saved, which hold nothing that was learned."""
    return {key for key in keys if not re.search(r"(^|\.)(position_ids|token_type_ids|inv_freq)$", key)}


def _unused_weights(model: PreTrainedModel, unexpected: Iterable[str]) -> set[str]:
    """Those of the unexpected weights that stand inside a layer of the network; not a head or pooler it lacks."""
    layers = {name for name, _ in model.base_model.named_children()}
    prefix = model.base_model_prefix + "."
    return {key for key in unexpected if key.removeprefix(prefix).split(".")[0] in layers}


def _require_plain(model: PreTrainedModel) -> None:
    """Refuse a model that its config does not describe, since loading it would drop or lack some of its weights.

    Raises:
        ModelError: the model is wrapped, or its weights are not those of a new model with its config.
    """
    if any(isinstance(module, Heads) for module in model.modules()) and not hasattr(model, "peft_config"):
        raise ModelError(
            f"This {type(model).__name__} has several heads, which plain transformers cannot load: keep its weights "
            "with torch.save(model.state_dict(), FILE), and load them into one that MultiHead has split for the same "
            "tasks."
        )
    if not isinstance(model, PreTrainedModel):
        advice = "give save() a model from load_classifier() or load_language_model()"
        if hasattr(model, "peft_config"):
            advice = "save its adapter with save_adapter(), or give save() the model that merge() returns"
        raise ModelError(f"A {type(model).__name__} is not a plain transformers model: {advice}.")
    with torch.device("meta"):  # without memory for its weights
        plain = type(model)(copy.deepcopy(model.config))
    ours, theirs = ({(name, tensor.shape) for name, tensor in m.state_dict().items()} for m in (model, plain))
    if ours != theirs:
        differences = _differences({name for name, _ in ours - theirs}, {name for name, _ in theirs - ours})
        raise ModelError(
            f"The weights of this {type(model).__name__} are not those that its config describes ({differences}): "
            "save bottleneck adapters with save_bottleneck(), and a peft model with save_adapter()."
        )


def _misfit(model: PreTrainedModel, info: dict[str, Any], name: str | Path) -> ModelError:
    missing = {*info["missing_keys"], *info["mismatched_keys"]}
    return ModelError(
        f"The weights of {str(name)!r} are not those of a {type(model).__name__} "
        f"({_differences(info['unexpected_keys'], missing)}): save the model again, bottleneck adapters with "
        "save_bottleneck() and a peft model with save_adapter()."
    )


def _differences(extra: set[str], missing: set[str]) -> str:
    found = (("too many", extra), ("missing", missing))
    return " and ".join(f"{len(names)} {what}, such as {min(names)}" for what, names in found if names)


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter; transformers would put one of peft on a whole model beside it.

    Raises:
        ModelError: the folder holds an adapter.
    """
    if (folder / ADAPTER_FILE).is_file():
        call = "load_adapter"
    elif (folder / BOTTLENECK_FILE).is_file() and not (folder / "config.json").is_file():
        call = "load_bottleneck"
    else:
        return
    raise ModelError(
        f"The folder {str(folder)!r} holds an adapter, not a model of its own: load the model that it was trained on, "
        f"and give both to {call}()."
    )


@contextlib.contextmanager
def as_model_error(name: str | Path, advice: str) -> Iterator[None]:
    """Turn an error of ``from_pretrained`` into a ``ModelError`` of one line.

    Args:
        name: the model, as the reader gave it.
        advice: what to do, from ``locate_model``.
    """
    try:
        yield
    except ImportError as error:
        needed = re.split(r"[.:]( |$)", first_line(error))[0]
        raise ModelError(
            f"The model {str(name)!r} needs a package that is not installed ({needed}): install it with pip."
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = first_line(error)
        if "tiktoken" in reason:  # transformers takes a damaged SentencePiece file for one of tiktoken
            reason = "its vocabulary file is damaged, or needs the package tiktoken"
        raise ModelError(f"The model {str(name)!r} can't be loaded ({reason}): {advice}.") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the load reports and progress bars of transformers out of a notebook."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
