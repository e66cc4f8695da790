"""Load a model that a run left, whatever its kind, and classify texts or search with it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from ftkit.adapters.bottleneck import load_bottleneck
from ftkit.adapters.lora import load_adapter
from ftkit.contrastive.towers import TwoTowers
from ftkit.data.text import cut_texts
from ftkit.errors import AssetError, ModelError, first_line
from ftkit.models.device import choose_device
from ftkit.models.efficientnet import EfficientNet
from ftkit.models.encoders import ImageEncoder, load_image_encoder, load_text_encoder
from ftkit.models.loading import class_names, load, load_language_model
from ftkit.models.modules import eval_mode
from ftkit.prompting.classifier import PromptClassifier
from ftkit.prompting.templates import Template, Verbalizer, encode_prompts
from ftkit.training.batching import make_batch

INFO_FILE = "ftkit.json"  # says which kind of model a folder holds, and what it was trained on

BASE_FOLDER, TEXT_FOLDER, IMAGE_FOLDER = "base", "text", "image"  # parts of a kept model

HEADS_FILE = "heads.safetensors"  # of two towers

# the most in a batch, padding included; on a CPU, activations that stay in its caches are a tenth faster
_BATCH_TOKENS, _BATCH_TOKENS_CPU, _BATCH_ROWS = 4096, 1024, 256

_Searched = Sequence[str] | NDArray[np.uint8] | torch.Tensor


@dataclass(frozen=True, eq=False)
class KeptClassifier:
    """A kept classifier of texts.

    Attributes:
        kind: "classifier", "adapter", "bottleneck" or "prompt".
        names: names of the C classes.
        model: gives ``logits`` of shape (B, C) for a batch of token ids.
        tokenizer: its tokenizer.
        max_length: number of tokens after which a text is cut.
        info: what ``ftkit.json`` says; empty if the folder has none.
    """

    kind: str
    names: list[str]
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    info: dict[str, Any]

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Classify N texts, in batches of texts of similar length.

        Args:
            texts: the texts.

        Returns:
            The probability of each class, shape (N, C), in the order of the texts.

        Raises:
            PromptError: a text cannot be put into the prompt, for example because it contains a special token.
        """
        found = np.zeros((len(texts), len(self.names)), dtype=np.float32)
        columns = self._encode(list(texts)) if len(texts) else {"input_ids": []}
        device = next(self.model.parameters()).device
        with eval_mode(self.model), torch.inference_mode():
            lengths = np.array([len(ids) for ids in columns["input_ids"]], dtype=np.int64)
            for indices in _batches(lengths, _BATCH_TOKENS_CPU if device.type == "cpu" else _BATCH_TOKENS):
                rows = [{name: column[i] for name, column in columns.items()} for i in indices]
                batch = make_batch(self.model, rows, np.arange(len(rows)), device)
                found[indices] = self.model(**batch).logits.float().cpu().double().softmax(-1).numpy()
        return found

    def _encode(self, texts: list[str]) -> dict[str, list[list[int]]]:
        """The columns that the model reads, with one list for each text."""
        if self.kind != "prompt":
            return dict(self.tokenizer(texts, truncation=True, max_length=self.max_length))
        rows = [{"text": text} for text in cut_texts(texts, self.tokenizer, self.max_length)]
        encoded, _ = encode_prompts(rows, *_prompt(self.info), self.tokenizer)
        return {name: encoded[name][:] for name in encoded.column_names}


@dataclass(frozen=True, eq=False)
class KeptTowers:
    """Two kept towers, which search among images by text, and among texts by image.

    Attributes:
        model: the two towers.
        info: what ``ftkit.json`` says.
        kind: "towers".
    """

    model: TwoTowers
    info: dict[str, Any]
    kind: str = "towers"

    def nearest(
        self, queries: _Searched, among: _Searched, k: int = 5
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the most similar of some candidates for each query.

        Args:
            queries: N texts, N images as uint8 of shape (N, S, S, 3), or their embeddings, shape (N, D).
            among: M candidates likewise; give embeddings if you search among them several times.
            k: number of candidates to find; fewer if M is smaller.

        Returns:
            Numbers of the candidates, the most similar first, and their similarities, shape (N, min(k, M)) each.
        """
        similarities = self._embed(queries) @ self._embed(among).T
        found = similarities.topk(min(k, similarities.shape[1]), dim=1)
        return found.indices.numpy(), found.values.numpy()

    def _embed(self, items: _Searched) -> torch.Tensor:
        if isinstance(items, torch.Tensor):
            return items
        if isinstance(items, np.ndarray) and items.ndim == 4:
            return self.model.encode_images(items)
        return self.model.encode_texts(items)


@torch.inference_mode(False)  # the layers of a network are found by its gradients
def load_kept(folder: str | Path) -> KeptClassifier | KeptTowers:
    """Load the model that a run left in its folder ``model/``; it gives the probabilities that it gave then.

    Args:
        folder: the folder. One without ``ftkit.json`` is accepted if plain transformers saved a text classifier there.

    Raises:
        ModelError: there is no such model, or a part of it is missing or damaged.
    """
    folder = Path(folder).absolute()
    info = _read_info(folder)
    kind = info.get("kind", "classifier")
    try:
        if kind == "towers":
            return KeptTowers(_load_towers(folder, info), info)
        model, tokenizer = _LOADERS[kind](folder, info)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError | AssetError):
            raise
        raise ModelError(
            f"The model in {str(folder)!r} can't be loaded ({first_line(error)}): keep it again, or copy all files of "
            "its folder."
        ) from error
    names = info.get("labels") or class_names(model.config)
    max_length = info.get("max_length") or min(tokenizer.model_max_length, 512)
    return KeptClassifier(kind, names, model, tokenizer, max_length, info)


def _read_info(folder: Path) -> dict[str, Any]:
    """Read ``ftkit.json``; empty for a folder that plain transformers saved."""
    if not (folder / INFO_FILE).is_file():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"There is no kept model in {str(folder)!r}: give the folder `model` that a run with --keep leaves, or "
                "one in which transformers saved a text classifier."
            )
        return {}
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        if info["kind"] in (*_LOADERS, "towers"):
            return info
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ModelError(
        f"The file {str(folder / INFO_FILE)!r} does not say which kind of model this is: keep the model again, or copy "
        "all files of its folder."
    )


def _load_classifier(folder: Path, info: dict[str, Any]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    return load(folder)


def _load_on_base(folder: Path, info: dict[str, Any]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    if not (folder / BASE_FOLDER).is_dir():
        raise ModelError(
            f"The adapter in {str(folder)!r} lacks its base model, the folder {BASE_FOLDER!r}: copy it there, or keep "
            "the model again."
        )
    base, tokenizer = load(folder / BASE_FOLDER)
    adapted = (load_adapter if info["kind"] == "adapter" else load_bottleneck)(base, folder)
    return adapted.eval(), tokenizer


def _load_prompt(folder: Path, info: dict[str, Any]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    own = folder / BASE_FOLDER
    lm, tokenizer = load_language_model(own if own.is_dir() else info["base"])
    template, verbalizer = _prompt(info)
    _, words = encode_prompts([dict.fromkeys(template.fields, "a")], template, verbalizer, tokenizer)
    model = PromptClassifier(
        load_adapter(lm, folder), words, info["labels"], length_normalised=verbalizer.length_normalised
    )
    return model.eval(), tokenizer


def _load_towers(folder: Path, info: dict[str, Any]) -> TwoTowers:
    told = info["image"]
    if told["network"] == EfficientNet.__name__:
        network = EfficientNet(pretrained=False)
        network.load_state_dict(load_file(folder / IMAGE_FOLDER / "model.safetensors"))
        network = network.to(choose_device().device)
    else:
        network = load_image_encoder(folder / IMAGE_FOLDER).network
    mean, std = tuple(told["mean"]), tuple(told["std"])
    image = ImageEncoder(network, size=told["size"], mean=mean, std=std).eval()
    text = load_text_encoder(folder / TEXT_FOLDER)
    model = TwoTowers(text, image, info["dim"], head=info["head"], loss=info["loss"], normalise=info["normalise"])
    weights = load_file(folder / HEADS_FILE)
    left = model.load_state_dict(weights, strict=False)
    own = {name for name in left.missing_keys if not name.startswith(("text.", "image."))}
    if own or left.unexpected_keys:
        raise ModelError(
            f"The heads in {str(folder / HEADS_FILE)!r} do not fit ({', '.join([*own, *left.unexpected_keys])}): keep "
            "the model again."
        )
    return model.eval()


_LOADERS = {
    "classifier": _load_classifier, "adapter": _load_on_base, "bottleneck": _load_on_base, "prompt": _load_prompt,
}  # fmt: skip


def _prompt(info: dict[str, Any]) -> tuple[Template, Verbalizer]:
    return Template(**info["template"]), Verbalizer(**info["verbalizer"])


def _batches(lengths: NDArray[np.int64], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Divide rows into batches of few tokens, longest rows first, so that a lack of memory shows at once."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, min(_BATCH_ROWS, tokens // max(1, int(lengths[order[start]]))))
        yield order[start : start + rows]
        start += rows
