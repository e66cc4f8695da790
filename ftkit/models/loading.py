"""Classifiers and language models, loaded from an asset, a folder or the hub, and saved."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
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
from ftkit.errors import ModelError
from ftkit.models.device import choose_device
from ftkit.models.modules import seeded


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
        labels: the number of classes, or their names in order, no two alike.
        pretrained: False gives the same architecture with random weights, for training from scratch.
        dropout: probability, in [0, 1), for every dropout layer of the network; None leaves the checkpoint's.
        seed: of the weights that are not in the checkpoint (the head; everything, from scratch).

    Returns:
        The model in float32 on the device that ``choose_device`` names, in eval mode, and the tokenizer.

    Raises:
        ModelError: no such model, or it can't classify text.
    """
    names = [f"class {i}" for i in range(labels)] if isinstance(labels, int) else [str(label) for label in labels]
    if len(set(names)) < max(len(names), 2):
        raise ModelError(f"A classifier needs 2 or more different labels, not {names}: check the label column.")
    _check_dropout(dropout)
    source, options, advice = _locate(name_or_path)
    with _plain_errors(name_or_path, advice), _quiet(), seeded(seed):
        config = AutoConfig.from_pretrained(source, **options)
        old_names = list(config.id2label.values())
        name_classes(config, names)
        if dropout is not None:
            _set_dropout(config, dropout)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if pretrained:
            how = {"config": config, "dtype": torch.float32, "output_loading_info": True}
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, ignore_mismatched_sizes=True, **how, **options
            )
        else:
            model, info = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32), None
    if info is not None:
        _say_what_is_new(model, info, name_or_path, old_names)
    return _ready(model, tokenizer, name_or_path)


def load_language_model(name_or_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    The weights of a folder are mapped, not read: a page comes into memory when it is first used, once.

    Args:
        name_or_path: an asset ("smollm2"), a folder that ``save`` or ``save_pretrained`` wrote, or a hub id.

    Returns:
        The model in float32 on the device that ``choose_device`` names, in eval mode, and the tokenizer, which pads on
        the right and knows the model's window as its ``model_max_length``.

    Raises:
        ModelError: no such model, or none that predicts the next token.
    """
    source, options, advice = _locate(name_or_path)
    with _plain_errors(name_or_path, advice), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
    masked = any(name.endswith("ForMaskedLM") for name in model.config.architectures or [])
    if info["missing_keys"] or info["mismatched_keys"] or masked:  # BERT would load, and see the word it is to predict
        raise ModelError(
            f"The model {str(name_or_path)!r} ({', '.join(model.config.architectures or ['unknown'])}) was not trained "
            "to predict the next token: use smollm2, or a causal language model of the hub."
        )
    tokenizer.padding_side = "right"
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, window or tokenizer.model_max_length)
    return _ready(model, tokenizer, name_or_path)


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Refuse what can't read or pad a text; then the model on its device and in eval mode, and the tokenizer."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up, which knows no word
        raise ModelError(f"The model {str(name)!r} has no tokenizer: save the one it was trained with beside it.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if model.config.pad_token_id is None:  # GPT-like models: they classify from the last token that is no padding
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.config.pad_token_id is None:
        raise ModelError(
            f"The tokenizer of {str(name)!r} can't pad a batch: set its pad_token and save it beside the model."
        )
    return model.to(choose_device().device).eval(), tokenizer


def class_names(config: PreTrainedConfig) -> list[str]:
    """The names of a classifier's classes, in order."""
    return [config.id2label[i] for i in range(config.num_labels)]


def name_classes(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Give a classifier as many classes as there are names, called so."""
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Save model, head and tokenizer so that plain transformers, or the function that loaded them, loads them.

    Args:
        folder: made if need be; what it holds of an earlier save is replaced.

    Returns:
        The folder.

    Raises:
        OSError: the folder can't be made or written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)  # transformers would merely log that it can't
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what ``save`` wrote: the same head, the same label names, identical logits.

    Raises:
        ModelError: the folder does not hold a saved classifier.
    """
    folder = Path(folder).absolute()  # a folder may be called as an asset is
    if not (folder / "config.json").is_file():
        raise ModelError(f"There is no saved model in {str(folder)!r}: give the folder that save() returned.")
    source, options, advice = _locate(folder)
    with _plain_errors(folder, advice), _quiet():
        config = AutoConfig.from_pretrained(source, **options)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise ModelError(f"The model in {str(folder)!r} has no classification head: use load_classifier to add one.")
    return load_classifier(folder, class_names(config))


def _locate(
    name_or_path: str | Path,
    kinds: Sequence[str] = ("text-encoder", "language-model"),
    what: str = "a text model",
    example: str = "minilm",
) -> tuple[str, dict[str, bool], str]:
    """Where from_pretrained finds a model, the options it needs, and what to do if it can't load what is there.

    An asset must be of one of these kinds, which together are called what; the advice names the example.
    """
    # False, for with None transformers asks the reader, and a "y" runs code that came with the model
    local = {"local_files_only": True, "trust_remote_code": False}
    if str(name_or_path) in registry.names():
        asset = registry.get(str(name_or_path))
        if asset.kind not in kinds:
            raise ModelError(f"The asset {asset.name!r} is of kind {asset.kind!r}, not {what}: use {example}.")
        return (
            str(registry.fetch(asset.name)),
            local,
            f"set FTKIT_CACHE to a new folder and run `ftkit fetch {asset.name}`",
        )
    if Path(name_or_path).is_dir():
        return str(name_or_path), local, f"give a folder that save() wrote, or a model like {example}"
    if isinstance(name_or_path, Path) or str(name_or_path).count("/") != 1:
        known = ", ".join(name for kind in kinds for name in registry.names(kind))
        asset = f"an asset ({known}), " if known else ""
        raise ModelError(f"There is no model {str(name_or_path)!r}: give {asset}a folder, or a hub id like owner/name.")
    name = str(name_or_path)
    if registry.offline():
        return name, local, f"FTKIT_OFFLINE is set: unset it, or use one like {example}"
    try:
        HfApi().model_info(name, timeout=10)  # asked once: from_pretrained retries for half a minute, on stderr
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"The hub shows no model {name!r}: check the name, log in with `hf auth login` if it is not public, "
            f"or use one like {example}."
        ) from None
    except (OSError, httpx2.HTTPError) as error:  # what was downloaded before still loads
        return name, local, f"the hub did not answer ({error}): check the network, or use one like {example}"
    return name, local | {"local_files_only": False}, f"choose another one, or one like {example}"


def _check_dropout(dropout: float | None) -> None:
    if dropout is not None and not 0 <= dropout < 1:
        raise ModelError(f"A dropout of {dropout} is no probability in [0, 1): try 0.1, or 0 for none.")


def _set_dropout(config: object, dropout: float) -> None:
    """Set every dropout probability a config has; their names differ from family to family."""
    for name, value in vars(config).items():
        if (
            "drop" in name
            and "layerdrop" not in name
            and isinstance(value, float | int)
            and not isinstance(value, bool)
        ):
            setattr(config, name, float(dropout))


def _say_what_is_new(model: PreTrainedModel, info: dict[str, object], name: str | Path, old_names: list[str]) -> None:
    """Name weights below the head that the checkpoint lacks, and say what became of a head that it has.

    That a head is new where there was none goes without saying.
    """
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new = sorted({*info["missing_keys"], *mismatched})
    body = [key for key in new if key.startswith(model.base_model_prefix + ".")]
    if body:
        some = ", ".join(body[:4])
        print(f"{name}: {len(body)} weights below the head are not in the checkpoint and start at random: {some}")
    names = class_names(model.config)
    if mismatched - {*body}:
        print(f"{name}: its head is for {len(old_names)} classes, not {len(names)}: a new one takes its place")
    elif len(new) == len(body) and names != old_names:
        print(f"{name}: its head is kept, its classes {old_names} are now called {names}")


@contextlib.contextmanager
def _plain_errors(name: str | Path, advice: str) -> Iterator[None]:
    """Turn what from_pretrained raises into one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"The model {str(name)!r} can't be loaded ({first}): {advice}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' load reports and bars out of a notebook; what matters in them we say ourselves."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
