"""Keep the model that is best on validation rows, with its card, and the predictions of its test rows."""

import csv
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ftkit.adapters.bottleneck import adapter_names, save_bottleneck
from ftkit.adapters.lora import save_adapter
from ftkit.contrastive.retrieval import Retrieval
from ftkit.contrastive.towers import TwoTowers
from ftkit.data.assets import registry
from ftkit.data.pairs import Pairs
from ftkit.errors import ModelError
from ftkit.lab.kept.card import base_card, model_card
from ftkit.lab.kept.loading import BASE_FOLDER, HEADS_FILE, IMAGE_FOLDER, INFO_FILE, TEXT_FOLDER
from ftkit.lab.results import run_folder, write_whole, writing
from ftkit.metrics import Evaluation
from ftkit.models.architecture import head_names
from ftkit.models.loading import ADAPTER_FILE, class_names, name_classes, quiet_transformers, save
from ftkit.prompting.classifier import PromptClassifier
from ftkit.prompting.templates import Template, Verbalizer
from ftkit.training.batching import read_column
from ftkit.training.callbacks import Callback
from ftkit.training.feature_cache import UpperLayers
from ftkit.training.state import TrainingRun

PREDICTIONS, MODEL = "predictions.csv", "model"  # in the folder of a run


@dataclass(frozen=True, eq=False)
class Candidate:
    """A run that was considered: its method, its seed and its score on validation rows."""

    method: str
    seed: int
    score: float


class BestRun:
    """The run of a notebook that is best on its validation rows so far; it holds one model at a time.

    Args:
        keep: whether ``finish`` is to write the model; if not, none is held.

    Attributes:
        candidates: all runs that were considered, in order.
        best: the best of them; None before the first.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.candidates: list[Candidate] = []
        self.best: Candidate | None = None
        self._model: nn.Module | None = None
        self._config: Any = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._test: Evaluation | Retrieval | None = None

    def consider(
        self,
        model: nn.Module,
        *,
        method: str,
        seed: int,
        score: float,
        test: Evaluation | Retrieval,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Hold a run if it is better than all before; of equal runs, the first is held.

        Args:
            model: its trained model, which is not changed afterwards; or the ``UpperLayers`` of one.
            method, seed: what the run is called.
            score: score on validation rows, higher is better; NaN counts as the lowest.
            test: result on the test rows; it decides nothing.
            tokenizer: the model's tokenizer, if it differs from the one given to ``finish``.
        """
        candidate = Candidate(method, seed, -math.inf if math.isnan(score) else float(score))
        self.candidates.append(candidate)
        if self.best is None or candidate.score > self.best.score:
            model = _whole(model)
            self.best, self._tokenizer, self._test = candidate, tokenizer, test
            self._config, self._model = getattr(model, "config", None), model if self.keep else None

    def finish(
        self,
        settings: Any,
        metrics: Mapping[str, Mapping[str, Any]],
        *,
        rows: Any,
        names: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **how: Any,
    ) -> None:
        """Write the best run's predictions and, if it was kept, its model; say which run it is.

        Both go into the folder of the run, beside ``metrics.json``: ``predictions.csv`` and ``model/``.

        Args:
            settings: settings of the notebook.
            metrics: entries by method, as for ``save_metrics``.
            rows: the test rows, as for ``save_predictions``.
            names: names of the classes; None for those of the model.
            tokenizer: the models' tokenizer.
            how: further arguments of ``write_model``: ``template`` and ``verbalizer`` of a prompt, and ``domains``.

        Raises:
            ModelError: the model is of a kind that cannot be kept.
            OSError: a file cannot be written; the message says why and what to do.
        """
        if self.best is None:
            print("No run has left a model, so there are no predictions to write and no model to keep.")
            return
        folder, test = run_folder(), self._test
        if not isinstance(test, Retrieval):
            names = _settle_names(self._config, names)
        save_predictions(rows, test, names, folder=folder)
        of = f"the best of {len(self.candidates)} runs" if len(self.candidates) > 1 else "the only run"
        said = (
            f"{self.best.method.replace('_', ' ')}, seed {self.best.seed}, is {of} on validation rows "
            f"({self.best.score:.3f} there, {_test_score(test)}). Its predictions of the test rows are in {PREDICTIONS}"
        )
        if not self.keep:
            stale = f" ({MODEL}/ is of an earlier run)" if (folder / MODEL).exists() else ""
            print(f"{said}; keep=True leaves the model, too{stale}.")
            return
        write_model(
            self._model,
            folder / MODEL,
            settings,
            method=self.best.method,
            seed=self.best.seed,
            names=names,
            tokenizer=self._tokenizer or tokenizer,
            test=test,
            metrics=metrics,
            candidates=self.candidates,
            **how,
        )
        print(f"{said}, the model is in {MODEL}/.")


class LastModel(Callback):
    """Remember the whole network of the last ``fit``, for a notebook whose ``train`` does not return it.

    Attributes:
        model: the network, with all its layers if those that are frozen were cached. None before the first ``fit``.
        how: further arguments that ``write_model`` needs for it, such as ``template`` and ``verbalizer``.
    """

    steers = False

    def __init__(self, **how: Any) -> None:
        self.model: nn.Module | None = None
        self.how = how

    def on_start(self, run: TrainingRun) -> None:
        self.model = _whole(run.model)


def save_predictions(
    rows: Any,
    evaluation: Evaluation | Retrieval | Mapping[str, Evaluation],
    names: Sequence[str] | None = None,
    *,
    folder: str | Path | None = None,
) -> Path:
    """Write ``predictions.csv``: a line for each row, in order.

    The columns are text, label, predicted and the probability of each class, p(class). Of a retrieval they are the
    caption, the rank of the most similar correct image, the caption of the first hit, and its similarity.

    Args:
        rows: the N rows of the evaluation with their column ``text``; of a retrieval, the pairs. With several tasks,
            the rows by task.
        evaluation: the result on these rows; with several tasks one for each, and the first column is ``task``.
        names: names of the classes, in the order of the evaluation's probabilities.
        folder: target folder; by default that of ``save_metrics``.

    Returns:
        The path of the file.

    Raises:
        ValueError: the rows are not those of the evaluation, or have no texts.
        OSError: the file cannot be written; the message says why and what to do.
    """
    if isinstance(evaluation, Mapping):
        lines: list[Sequence[Any]] = [["task", *prediction_header(names)]]
        for task, of_task in evaluation.items():
            lines += ([task, *line] for line in _classified(rows[task], of_task, names))
    elif isinstance(evaluation, Retrieval):
        lines = [["caption", "rank", "first hit", "similarity"], *_retrieved(getattr(rows, "pairs", rows), evaluation)]
    else:
        lines = [prediction_header(names), *_classified(rows, evaluation, names)]
    content = io.StringIO(newline="")
    csv.writer(content).writerows(lines)  # ends lines with CR LF, so that both are quoted inside texts
    path = Path(folder or run_folder()) / PREDICTIONS
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, content.getvalue())


def prediction_header(names: Sequence[str], *, labelled: bool = True) -> list[str]:
    """Names of the columns of classified texts."""
    return ["text", *(["label"] if labelled else []), "predicted", *(f"p({name})" for name in names)]


def prediction_lines(
    texts: Iterable[str], labels: Iterable[str] | None, probabilities: NDArray[Any], names: Sequence[str]
) -> Iterator[list[str]]:
    """The cells of each classified text, under ``prediction_header``.

    Args:
        texts: N texts.
        labels: their labels in words, or None.
        probabilities: shape (N, C).
        names: names of the C classes.
    """
    given = ([] for _ in probabilities) if labels is None else ([label] for label in labels)
    for text, label, p in zip(texts, given, probabilities, strict=True):
        yield [text, *label, names[int(p.argmax())], *(f"{value:.6g}" for value in p)]


def _classified(rows: Any, evaluation: Evaluation, names: Sequence[str]) -> Iterator[list[str]]:
    _require_same_number(len(rows), len(evaluation.labels))
    try:
        texts = read_column(rows, "text")
    except KeyError:
        raise ValueError("The rows have no column 'text': give them as they were before they were encoded.") from None
    labels = [names[label] for label in evaluation.labels]
    return prediction_lines(texts, labels, evaluation.probabilities, names)


def _retrieved(pairs: Pairs, retrieval: Retrieval) -> Iterator[list[str]]:
    queries, images = pairs.own_captions, pairs.own_images
    _require_same_number(len(queries), len(retrieval.labels))
    first = retrieval.similarities.argmax(axis=1)
    for query, rank, hit, similarities in zip(queries, retrieval.ranks, first, retrieval.similarities, strict=True):
        yield [pairs.captions[query], str(rank), pairs.captions[images[hit]], f"{similarities[hit]:.6g}"]


def _require_same_number(rows: int, evaluated: int) -> None:
    if rows != evaluated:
        raise ValueError(f"There are {rows:,} rows, and {evaluated:,} were evaluated: give the rows of the evaluation.")


def write_model(
    model: nn.Module,
    folder: str | Path,
    settings: Any,
    *,
    method: str,
    seed: int,
    names: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    template: Template | None = None,
    verbalizer: Verbalizer | None = None,
    test: Evaluation | Retrieval | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    candidates: Sequence[Candidate] = (),
    domains: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a trained model as plain transformers or peft load it, with ``ftkit.json`` and a model card.

    The folder appears whole or not at all; an older one of that name is replaced. It can be moved, and holds no
    absolute path. ``load_kept`` loads every kind.

    Args:
        model: a classifier, one with an adapter of peft or with bottleneck adapters, a ``PromptClassifier`` around a
            model of peft, or ``TwoTowers``.
        folder: the folder to write.
        settings: settings of the notebook that trained it.
        method, seed: of the run.
        names: names of the classes; None for those in the model's config.
        tokenizer: its tokenizer; None for that of the pretrained model.
        template, verbalizer: those of a ``PromptClassifier``.
        test: its result on the test rows, for the card; this and what follows may be left out.
        metrics: results of all methods, as for ``save_metrics``.
        candidates: the runs among which it was chosen on validation rows.
        domains: by name of other data, ``accuracy`` and ``ci95`` of this method there.

    Returns:
        The folder.

    Raises:
        ModelError: the model is of another kind.
        OSError: the folder cannot be written; the message says why and what to do.
    """
    model, folder = _whole(model), Path(folder)
    kind = _kind_of(model)
    info: dict[str, Any] = {
        "kind": kind,
        "notebook": getattr(settings, "NOTEBOOK", None),
        "method": method,
        "seed": seed,
    }
    if kind == "towers":
        info |= _describe_towers(model, settings)
        tokenizer = model.text.tokenizer
    else:
        network = _network(model)
        info |= {
            "base": _base_name(network.config),
            "labels": _settle_names(model.config, names),
            "max_length": getattr(settings, "max_length", None),
            "text_column": getattr(settings, "text", None),
        }
        tokenizer = tokenizer or _find_tokenizer(network, settings)
    if kind == "prompt":
        info |= _describe_prompt(model, info["labels"], template, verbalizer)
    card = model_card(info, settings, test=test, metrics=metrics, candidates=candidates, domains=domains)
    with _new_folder(folder) as unfinished, quiet_transformers():
        _WRITERS[kind](model, tokenizer, unfinished, info)
        _hide_paths(unfinished, info)
        (unfinished / INFO_FILE).write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    return folder


def _kind_of(model: nn.Module) -> str:
    if isinstance(model, TwoTowers):
        return "towers"
    if isinstance(model, PromptClassifier):
        if isinstance(model.lm, PeftModel):
            return "prompt"
    elif isinstance(model, PeftModel):
        if head_names(model.get_base_model()):
            return "adapter"
    elif isinstance(model, PreTrainedModel):
        return "bottleneck" if adapter_names(model) else "classifier"
    raise ModelError(
        f"A {type(model).__name__} can't be kept: give a text classifier, one with adapters, a PromptClassifier around "
        "a language model with a soft prompt or LoRA, or TwoTowers."
    )


def _whole(model: nn.Module) -> nn.Module:
    return model.whole if isinstance(model, UpperLayers) else model


def _network(model: nn.Module) -> PreTrainedModel:
    """The transformer inside the adapter or the prompt."""
    model = model.lm if isinstance(model, PromptClassifier) else model
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _settle_names(config: Any, names: Sequence[str] | None) -> list[str]:
    """The classes in the order of the model, which then knows their names.

    Raises:
        ModelError: there is not one name for each class.
    """
    known = class_names(config)
    if names is None or {*names} == {*known}:
        return known
    if len(names) != len(known):
        raise ModelError(f"The model has {len(known)} classes, and there are {len(names)} names: give one for each.")
    name_classes(config, names)
    return list(names)


def _base_name(config: Any) -> str | None:
    """The asset or the hub id that a network was loaded from; None for a folder, and for random weights."""
    source = getattr(config, "_name_or_path", "")
    path = Path(source)
    if path.name in registry.names() and path.is_relative_to(registry.cache_dir()):
        return path.name
    return source if registry.HUB_ID.fullmatch(source) and not path.is_dir() else None


def _find_tokenizer(network: PreTrainedModel, settings: Any) -> PreTrainedTokenizerBase:
    source = network.config._name_or_path or getattr(settings, "model", "")
    if source in registry.names():
        source = str(registry.fetch(source))
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"There is no tokenizer for this {type(network).__name__}: give write_model its one."
        ) from error


def _describe_prompt(
    model: PromptClassifier, labels: list[str], template: Template | None, verbalizer: Verbalizer | None
) -> dict[str, Any]:
    if template is None or verbalizer is None or verbalizer.labels != labels:
        raise ModelError(
            f"A prompt for the classes {', '.join(labels)} is kept with its template and its label words: give both, "
            "as they were in training."
        )
    return {
        "template": asdict(template),
        "verbalizer": {"words": verbalizer.by_label, "length_normalised": model.length_normalised},
    }


def _describe_towers(model: TwoTowers, settings: Any) -> dict[str, Any]:
    image = model.image.network
    # a network that takes any size is kept with the size of the images that it was trained on
    size = model.image.size or getattr(settings, "size", None)
    if size is None:
        raise ModelError("The image tower takes images of any size: give settings with the `size` of its images.")
    return {
        "base": _base_name(model.text.network.config),
        "dim": model.text_head.out_features
        if isinstance(model.text_head, nn.Linear)
        else model.text_head[-1].out_features,
        "head": "linear" if isinstance(model.text_head, nn.Linear) else "mlp",
        "loss": "siglip" if hasattr(model, "logit_bias") else "clip",
        "normalise": model.normalise,
        "image": {
            "network": type(image).__name__,
            "base": _base_name(image.config) if isinstance(image, PreTrainedModel) else "efficientnet-lite0",
            "size": size,
            "mean": list(model.image.mean),
            "std": list(model.image.std),
        },
    }


def _write_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict[str, Any]
) -> None:
    save(model, tokenizer, folder)


def _write_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict[str, Any]) -> None:
    _write_peft(model, tokenizer, folder)
    _write_base(model.get_base_model(), tokenizer, folder / BASE_FOLDER, info)


def _write_bottleneck(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict[str, Any]
) -> None:
    save_bottleneck(model, folder)
    tokenizer.save_pretrained(folder)
    _write_base(model, tokenizer, folder / BASE_FOLDER, info)


def _write_prompt(
    model: PromptClassifier, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict[str, Any]
) -> None:
    _write_peft(model.lm, tokenizer, folder)
    if info["base"] is None:  # nobody could find it by its name
        _write_base(model.lm.get_base_model(), tokenizer, folder / BASE_FOLDER, info)


def _write_peft(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    saved = save_adapter(model, folder)
    if saved != folder:  # peft puts an adapter with a name of its own into a subfolder
        for file in list(saved.iterdir()):
            file.replace(folder / file.name)
        saved.rmdir()
    tokenizer.save_pretrained(folder)


def _write_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict[str, Any]) -> None:
    """Save the network below an adapter as plain transformers know it."""
    with torch.device("meta"):  # only for the names of its weights
        plain = type(model)(model.config)
    ours = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict={name: ours[name] for name in plain.state_dict()})
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(base_card(info), encoding="utf-8")


def _write_towers(model: TwoTowers, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict[str, Any]) -> None:
    model.text.network.save_pretrained(folder / TEXT_FOLDER)
    tokenizer.save_pretrained(folder / TEXT_FOLDER)
    image, place = model.image.network, folder / IMAGE_FOLDER
    if isinstance(image, PreTrainedModel):
        image.save_pretrained(place)
        size = dict.fromkeys(("height", "width"), info["image"]["size"])
        scaling = {"do_normalize": True, "image_mean": info["image"]["mean"], "image_std": info["image"]["std"]}
        (place / "preprocessor_config.json").write_text(json.dumps({"size": size, **scaling}), encoding="utf-8")
    else:
        place.mkdir()
        _save_tensors(image.state_dict(), place / "model.safetensors")
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("text.", "image."))}
    _save_tensors(own, folder / HEADS_FILE)


def _save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


_WRITERS = {
    "classifier": _write_classifier,
    "adapter": _write_adapter,
    "bottleneck": _write_bottleneck,
    "prompt": _write_prompt,
    "towers": _write_towers,
}


def _hide_paths(folder: Path, info: dict[str, Any]) -> None:
    """Leave out where on this machine the pretrained model was."""
    if (folder / ADAPTER_FILE).is_file():
        config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        asset = registry.read_registry().get(info["base"])
        config["base_model_name_or_path"] = (asset.hub if asset else info["base"]) or BASE_FOLDER
        (folder / ADAPTER_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("tokenizer_config.json"):  # transformers also writes how it was loaded
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place at the end, or vanishes after an error."""
    unfinished, old = (folder.with_name(f".{folder.name}.{os.getpid()}{end}") for end in ("", ".old"))
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            yield unfinished
            if folder.exists():
                folder.replace(old)
            unfinished.replace(folder)
        except SafetensorError as error:  # it names an error of the operating system by number
            if not (code := re.search(r"os error (\d+)", str(error))):
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _test_score(test: Evaluation | Retrieval) -> str:
    if isinstance(test, Retrieval):
        return f"recall at 5 of {test.recall(5):.3f} among the {test.similarities.shape[1]:,} test images"
    low, high = test.ci95
    return f"accuracy {test.accuracy:.3f} [{low:.3f}, {high:.3f}] on {len(test.labels):,} test rows"
