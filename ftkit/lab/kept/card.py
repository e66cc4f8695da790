"""The model card of a kept model, in the format of the Hugging Face hub."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from ftkit import __version__
from ftkit.contrastive.retrieval import Retrieval
from ftkit.data.assets import registry
from ftkit.metrics import Evaluation

_HUB_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit", "OFL-1.1": "ofl-1.1"}  # open ones, as the hub spells them

_LIBRARIES = {"classifier": "transformers", "adapter": "peft", "prompt": "peft"}  # that load it without this package

_WHAT = {
    "classifier": "A classifier of texts",
    "adapter": "An adapter that makes a classifier of texts, with its base model in `base/`",
    "bottleneck": "Bottleneck adapters that make a classifier of texts, with their base model in `base/`",
    "prompt": "A soft prompt or an adapter that makes a language model answer with the word of a class",
    "towers": "A text encoder and an image encoder with one common space",
}

_LOAD = {
    "classifier": """\
from transformers import pipeline

classify = pipeline("text-classification", model="model", top_k=None)
classify("A text.", truncation=True{cut})""",
    "adapter": """\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained("model/base")
model = PeftModel.from_pretrained(base, "model").eval()
tokenizer = AutoTokenizer.from_pretrained("model")
logits = model(**tokenizer("A text.", truncation=True{cut}, return_tensors="pt")).logits""",
    "towers": """\
from ftkit.lab import load_kept

kept = load_kept("model")
places, similarities = kept.nearest(["a red apple"], images)  # images: uint8, (N, height, width, 3)""",
}

_LOAD_CLASSIFIER = """\
from ftkit.lab import load_kept

kept = load_kept("model")
kept.names, kept.probabilities(["A text."])"""

_MOST_CONFUSIONS = 5


class _Candidate(Protocol):
    method: str
    seed: int
    score: float


@dataclass(frozen=True)
class _Data:
    """What the card may say about the data: the facts of an asset, or the name and the hash of the reader's own."""

    name: str
    text: str
    hub: str | None = None
    licence: str | None = None
    language: str | None = None
    identity: str = field(default="custom")  # as the type of a data set in the card's head


def model_card(
    info: Mapping[str, Any],
    settings: Any,
    *,
    test: Evaluation | Retrieval | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    candidates: Sequence[_Candidate] = (),
    domains: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Write the card of a kept model. All its figures come from the arguments.

    Args:
        info: what ``ftkit.json`` says of the model.
        settings: settings of the notebook that trained it.
        test, metrics, candidates, domains: as for ``write_model``.

    Returns:
        The text of ``README.md``: a head in YAML, and Markdown.
    """
    base, data = registry.read_registry().get(info["base"]), _read_data(settings)
    head = _head(info, base, data, test)
    parts = [
        f"# {_title(info)}",
        _what(info, base),
        _how_chosen(info, candidates, test),
        "## Scores",
        _scores(info, test, metrics or {}),
        "## Data",
        _data(settings, data),
        "## Limits, as measured",
        _limits(info, test, domains or {}),
        "## Use",
        _use(info),
        "## Licence",
        _licence(info, base, data),
    ]
    return f"---\n{head.to_yaml(line_break=chr(10))}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def base_card(info: Mapping[str, Any]) -> str:
    """A line or two for the folder of the model below an adapter."""
    hub = _hub_id(info["base"], registry.read_registry().get(info["base"]))
    head = f"---\nbase_model: {hub}\n---\n\n" if hub else ""
    return f"{head}The model below the adapter in the folder above it, without the adapter.\n"


def _title(info: Mapping[str, Any]) -> str:
    return f"{info['notebook'] or 'A model'}, {info['method']}".replace("_", " ")


def _hub_id(name: str | None, asset: registry.Asset | None) -> str | None:
    return asset.hub if asset else name


def _head(
    info: Mapping[str, Any], base: registry.Asset | None, data: _Data | None, test: Evaluation | Retrieval | None
) -> ModelCardData:
    licences = [source.licence if source else None for source in (base, data)]
    licence, licence_name = None, None
    if None not in licences:  # otherwise nobody here knows it
        known = [_HUB_LICENCES.get(name) for name in licences]
        licence = known[0] if None not in known else "other"
        licence_name = None if licence != "other" else "-and-".join(dict.fromkeys(_slug(name) for name in licences))
    languages = sorted({source.language for source in (base, data) if source and source.language})
    towers = info["kind"] == "towers"
    return ModelCardData(
        base_model=_hub_id(info["base"], base),
        library_name=_LIBRARIES.get(info["kind"], "ftkit"),
        pipeline_tag="zero-shot-image-classification" if towers else "text-classification",
        license=licence,
        license_name=licence_name,
        language=languages or None,
        tags=["ftkit", _slug(info["method"]), info["kind"]],
        datasets=[data.hub] if data and data.hub else None,
        metrics=["recall"] if towers else ["accuracy", "f1"],
        model_name=_title(info),
        eval_results=_results(info, data, test),
    )


def _results(
    info: Mapping[str, Any], data: _Data | None, test: Evaluation | Retrieval | None
) -> list[EvalResult] | None:
    """The scores of this one model, not means over seeds."""
    if test is None or data is None:
        return None
    if isinstance(test, Retrieval):
        scores = {("recall", f"recall at {k}"): test.recall(k) for k in (1, 5, 10)}
    else:
        scores = {
            ("accuracy", "accuracy"): test.accuracy,
            ("f1", "macro-F1"): test.macro_f1,
            ("accuracy", "balanced accuracy"): test.balanced_accuracy,
        }
    task = ("zero-shot-image-classification", "text-to-image retrieval")
    task = task if isinstance(test, Retrieval) else ("text-classification", "text classification")
    return [
        EvalResult(
            task_type=task[0],
            task_name=task[1],
            dataset_type=data.hub or data.identity,
            dataset_name=data.name,
            dataset_split="test",
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(value), 4),
        )
        for (kind, name), value in scores.items()
    ]


def _what(info: Mapping[str, Any], base: registry.Asset | None) -> str:
    source = _hub_id(info["base"], base)
    came = f"It was trained from [{source}](https://huggingface.co/{source})." if source else ""
    if base and not source:
        came = f"It was trained from {base.title}."
    if info["base"] is None:
        came = "It was trained from a model of its author's own, or from random weights."
    lines = [
        f"{_WHAT[info['kind']]}, trained by the method *{_method(info['method'])}* with seed {info['seed']}. {came}"
    ]
    if base:
        lines.append(" ".join(base.description.split()) + " Known flaws: " + " ".join(base.flaws.split()))
    if info["kind"] == "towers":
        lines.append(f"The image encoder is {info['image']['base'] or info['image']['network']}.")
    else:
        lines.append(f"Classes: {', '.join(map(_word, info['labels']))}.")
    if info["kind"] == "prompt":
        words = {name: ", ".join(map(repr, words)) for name, words in info["verbalizer"]["words"].items()}
        lines.append(
            f"The prompt is {_code(info['template']['text'])}; the words of the classes are "
            + "; ".join(f"{_word(name)}: {_code(text)}" for name, text in words.items())
            + "."
        )
    return "\n\n".join(lines)


def _how_chosen(info: Mapping[str, Any], candidates: Sequence[_Candidate], test: Evaluation | Retrieval | None) -> str:
    if not candidates:
        return ""
    best = next(c for c in candidates if (c.method, c.seed) == (info["method"], info["seed"]))
    by_method: dict[str, list[_Candidate]] = {}
    for candidate in candidates:
        by_method.setdefault(candidate.method, []).append(candidate)
    lines = [
        f"It was chosen by its score on validation rows, {best.score:.3f}, out of {len(candidates)} "
        f"{'run' if len(candidates) == 1 else 'runs'}. The test rows took no part in the choice."
    ]
    lines.append(
        _table(
            ["method", "seed", "score on validation rows"],
            [
                [_method(method), str(run.seed), f"{run.score:.3f}"]
                for method, runs in by_method.items()
                for run in runs
            ],
        )
    )
    return "\n\n".join(lines)


def _scores(
    info: Mapping[str, Any], test: Evaluation | Retrieval | None, metrics: Mapping[str, Mapping[str, Any]]
) -> str:
    lines = []
    if isinstance(test, Retrieval):
        low, high = test.ci95
        found = ", ".join(f"{test.recall(k):.3f}" for k in (1, 5, 10))
        images = test.similarities.shape[1]
        lines.append(
            f"This model, on test rows: recall at 1, 5 and 10 is {found} (95 % interval at 1: {low:.3f} to {high:.3f}) "
            f"with {len(test.labels):,} captions and {images:,} images. The median rank is "
            f"{float(np.median(test.ranks)):g}. Guessing gives {1 / images:.3f} at 1."
        )
    elif test is not None:
        low, high = test.ci95
        lines.append(
            f"This model, on {len(test.labels):,} test rows: accuracy {test.accuracy:.3f} (95 % interval {low:.3f} to "
            f"{high:.3f}), macro-F1 {test.macro_f1:.3f}, balanced accuracy {test.balanced_accuracy:.3f}, loss "
            f"{test.loss:.3f} nats, calibration error {test.calibration_error:.3f}. The commonest class of these rows "
            f"alone gives {test.majority:.3f}."
        )
    if metrics:
        rows = "" if test is None else f" All were tested on {_number_of_rows(test)}."
        what = "recall at 1" if isinstance(test, Retrieval) else "accuracy"
        lines.append(f"Beside it, every method of the run, baselines included: means over seeds.{rows}")
        lines.append(
            _table(
                ["method", what, "95 % interval", "seeds", "weights that train"],
                [_method_cells(name, entry) for name, entry in metrics.items()],
            )
        )
    return "\n\n".join(lines) or "It was not tested."


def _number_of_rows(test: Evaluation | Retrieval) -> str:
    if isinstance(test, Retrieval):
        return f"the same {len(test.labels):,} captions, unless a line comes from recorded runs"
    return f"the same {len(test.labels):,} rows"


def _method_cells(name: str, entry: Mapping[str, Any]) -> list[str]:
    def shown(value: Any, form: str) -> str:
        return "–" if value is None else form.format(value)

    seeds, interval = entry.get("seeds"), entry.get("ci95")
    return [
        _method(name),
        shown(entry.get("accuracy"), "{:.3f}"),
        "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
        ", ".join(map(str, seeds)) if isinstance(seeds, list | tuple) else shown(seeds, "{}"),
        shown(entry.get("trainable_parameters"), "{:,}"),
    ]


def _read_data(settings: Any) -> _Data | None:
    """Facts about the data that the settings name; of a file or folder its name and hash, never its content."""
    source = getattr(settings, "source", None) or getattr(settings, "images", None)
    if source is None:
        return None
    path = Path(source)
    if path.is_file():
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return _Data(path.name, f"A file of the author's own, {_code(path.name)}, sha256 `{digest}`.")
    if (asset := registry.read_registry().get(source)) is not None:
        text = (
            f"{asset.title} (the asset {_code(asset.name)} of ftkit). {asset.description} Known flaws: {asset.flaws} "
            f"Cite: {asset.citation.strip()}."
        )
        return _Data(asset.title, " ".join(text.split()), asset.hub, asset.licence, asset.language, asset.name)
    if path.is_dir():
        return _Data(
            path.name, f"A folder of the author's own, {_code(path.name)}, sha256 of its files `{_hash_folder(path)}`."
        )
    hub, _, config = source.partition(":")
    text = f"[{hub}](https://huggingface.co/datasets/{hub}) of the hub{f', {_code(config)}' if config else ''}."
    return _Data(source, text, hub)


def _hash_folder(folder: Path) -> str:
    """A digest of the names and the contents of all files."""
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{file.relative_to(folder).as_posix()}\n{digest}\n".encode())
    return whole.hexdigest()


def _data(settings: Any, data: _Data | None) -> str:
    if data is None:
        return "Not stated."
    rows = getattr(settings, "rows", None)
    return data.text + (f"\n\nTraining rows of a run: {rows:,} at most." if rows else "")


def _limits(info: Mapping[str, Any], test: Evaluation | Retrieval | None, domains: Mapping[str, Any]) -> str:
    lines = []
    if info.get("max_length"):
        lines.append(f"- It was trained and tested on texts cut after {info['max_length']:,} tokens.")
    if isinstance(test, Evaluation):
        lines += _confusions(test, info["labels"])
    if domains:
        lines.append("- On other data, means over seeds:\n")
        rows = [
            [_word(name), f"{found['accuracy']:.3f}", "{0[0]:.3f} to {0[1]:.3f}".format(found["ci95"])]
            for name, found in domains.items()
        ]
        lines.append(_table(["data", "accuracy", "95 % interval"], rows) + "\n")
    else:
        lines.append("- It was tried on no other data than the above.")
    return "\n".join(lines)


def _confusions(test: Evaluation, names: Sequence[str]) -> list[str]:
    """The classes that it confuses most on test rows."""
    wrong = test.confusion * (1 - np.eye(len(names), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSIONS]
    pairs = [divmod(int(place), len(names)) for place in order]
    lines = [
        f"  - {_word(names[true])} taken for {_word(names[said])}: {wrong[true, said]:,} of "
        f"{test.confusion[true].sum():,} rows"
        for true, said in pairs
        if wrong[true, said]
    ]
    if not lines:
        return [f"- It made no mistake on the {len(test.labels):,} test rows."]
    return ["- The classes that it confuses most, on test rows:", *lines]


def _use(info: Mapping[str, Any]) -> str:
    cut = f", max_length={info['max_length']}" if info.get("max_length") else ""
    code = _LOAD.get(info["kind"], _LOAD_CLASSIFIER).replace("{cut}", cut)
    text = f"`model` stands for this folder.\n\n```python\n{code}\n```"
    if info["kind"] == "prompt":
        base = "in `model/base`" if info["base"] is None else _code(info["base"])
        base += " of ftkit" if info["base"] in registry.names() else ""
        text += (
            '\n\nPlain peft loads it, too: `PeftModel.from_pretrained(base, "model")`, where `base` is the language '
            f"model {base}. The scores of the classes are then those of their words after the prompt."
        )
    if info["kind"] != "towers":
        text += "\n\nA whole file of texts, or a page to try it by hand:\n\n"
        text += "```sh\nftkit predict model texts.csv -o predictions.csv\nftkit serve model\n```"
    return text + "\n\nTo put it on the hub: `hf upload OWNER/NAME model`."


def _licence(info: Mapping[str, Any], base: registry.Asset | None, data: _Data | None) -> str:
    def stated(source: Any) -> str:
        rights = " ".join(getattr(source, "rights", "").split())
        return f"{source.licence}. {rights}".strip() if source and source.licence else "not known here."

    data_asset = registry.read_registry().get(data.identity) if data else None
    made = f"Made with ftkit {__version__}" + (f", notebook {info['notebook']}" if info["notebook"] else "") + "."
    return f"The pretrained model: {stated(base)} The data: {stated(data_asset)}\n\n{made}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _method(name: str) -> str:
    return _word(name.replace("_", " "))


def _word(name: str) -> str:
    """A name inside Markdown, so that none of its characters is a mark."""
    return re.sub(r"([\\`*_|\[\]<>$#~])", r"\\\1", " ".join(str(name).split()))


def _code(text: str) -> str:
    """A text as code inside Markdown, on one line."""
    text = text.replace("\n", "\\n")
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text.lower().replace("_", "-")).strip("-")
