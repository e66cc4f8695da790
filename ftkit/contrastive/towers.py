"""The two-tower model: a text encoder and an image encoder that learn a common space."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ftkit.contrastive.losses import PairLoss, clip_loss, siglip_loss
from ftkit.contrastive.retrieval import Retrieval
from ftkit.contrastive.rows import encode_pairs
from ftkit.data.pairs import Pairs
from ftkit.models.encoders import ImageEncoder, TextEncoder, load_clip
from ftkit.models.modules import eval_mode, seeded
from ftkit.training.batching import evaluation_batches, make_batch, row_lengths
from ftkit.training.losses import ModelWithLoss

START_SCALE, MAX_SCALE = math.log(1 / 0.07), math.log(100)  # of CLIP, as logarithms

START_SIGLIP = (math.log(10), -10.0)  # scale and bias: at first every pair is taken for a wrong one, as most are

FEATURES = {"text": "text_features", "image": "image_features"}  # columns of what a locked tower gave


@dataclass
class PairOutput:
    """What two towers give of a batch: the loss, a scalar, and the embeddings of texts and images, (B, D) each."""

    loss: Tensor
    text: Tensor
    image: Tensor


class TwoTowers(ModelWithLoss):
    """A text encoder and an image encoder, a head on each, and the temperature (Radford et al., 2021).

    ``fit`` trains it, with the rows of ``encode_pairs`` or, locked towers encoded once, of ``cache_towers``; a batch's
    other pairs are the negatives, so that ``batch_size`` is part of the loss.

    Args:
        text, image: from ``load_text_encoder`` and ``load_image_encoder``.
        dim: width D of the common space.
        head: of each tower, "linear" (no bias) or "mlp" (as wide as the tower, one hidden layer).
        loss: "clip", "siglip", or a function of text and image embeddings, logit scale and groups.
        temperature: that is started with, 1 / scale; SigLIP starts at 0.1.
        learn_temperature: whether it is trained, within [0.01, 1].
        normalise: whether similarities are cosines; else they are dot products.
        chunk_size: pairs that a tower holds in memory at once. The loss is still that of the whole batch: chunks are
            encoded, forgotten, and encoded again for their gradient (gradient caching, Gao et al., 2021). None encodes
            the batch in one piece.
        seed: of the heads' weights.

    Raises:
        ValueError: no such loss or head, or a temperature outside of [0.01, 1].
    """

    memory_advice = "give the model a chunk_size, or a smaller one, which trains the same"

    def __init__(
        self,
        text: TextEncoder,
        image: ImageEncoder,
        dim: int = 128,
        *,
        head: Literal["linear", "mlp"] = "linear",
        loss: Literal["clip", "siglip"] | PairLoss = "clip",
        temperature: float | None = None,
        learn_temperature: bool = True,
        normalise: bool = True,
        chunk_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(loss, str) and loss not in ("clip", "siglip"):
            raise ValueError(f"There is no loss {loss!r}: give clip, siglip, or a function.")
        if temperature is not None and not 0.01 <= temperature <= 1:
            raise ValueError(f"A temperature of {temperature} is outside 0.01 to 1: CLIP starts at 0.07.")
        self.text, self.image, self.loss, self._dim = text, image, loss, dim
        self.normalise, self.chunk_size = normalise, chunk_size
        with seeded(seed):
            self.text_head, self.image_head = (_make_head(head, tower.width, dim) for tower in (text, image))
        start = START_SIGLIP[0] if loss == "siglip" else START_SCALE
        scale = torch.tensor(start if temperature is None else -math.log(temperature))
        self.logit_scale = nn.Parameter(scale, requires_grad=learn_temperature)
        if loss == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor(START_SIGLIP[1]))
        self.to(self.device).eval()

    @classmethod
    def from_clip(cls, name: str, *, chunk_size: int | None = None) -> "TwoTowers":
        """A whole CLIP model, of the hub or a folder, with its own projections and temperature.

        Raises:
            ModelError: no such model, or none of that kind.
        """
        text, image, text_head, image_head, logit_scale = load_clip(name)
        model = cls(text, image, text_head.out_features, chunk_size=chunk_size)
        model.text_head, model.image_head = text_head, image_head
        model.logit_scale.data.fill_(logit_scale)
        return model.to(model.device).eval()

    @property
    def device(self) -> torch.device:
        return next(self.text.parameters()).device

    @property
    def temperature(self) -> float:
        """1 / scale, now."""
        return float((-self.logit_scale.detach()).exp())

    def lock(self, *towers: Literal["text", "image"]) -> "TwoTowers":
        """Freeze towers, but not their heads: both locked trains the heads only; the image tower is LiT (Zhai et al.,
        2022). Returns the model."""
        for tower in towers:
            if tower not in FEATURES:
                raise ValueError(f"There is no tower {tower!r}: give text, image, or both.")
            getattr(self, tower).requires_grad_(False)
        return self

    def forward(self, labels: Tensor | None = None, **columns: Tensor) -> PairOutput:
        """Embed a batch of pairs and work out the loss; ``labels`` are the groups, as for ``clip_loss``."""
        text, image = self.embed_text(**columns), self.embed_image(**columns)
        return PairOutput(self.pair_loss(text, image, labels), text, image)

    def pair_loss(self, text: Tensor, image: Tensor, groups: Tensor | None = None) -> Tensor:
        """The loss that this model is trained with, of embeddings as for ``clip_loss``."""
        if self.loss == "siglip":
            return siglip_loss(text, image, self.logit_scale, groups, self.logit_bias, normalise=self.normalise)
        if self.loss == "clip":
            return clip_loss(text, image, self.logit_scale, groups, normalise=self.normalise)
        return self.loss(text, image, self.logit_scale, groups)

    def embed_text(self, text_features: Tensor | None = None, **columns: Tensor) -> Tensor:
        """Embeddings (B, D) of tokenised texts, or of what the locked text tower gave, (B, width)."""
        inputs = {name: column for name, column in columns.items() if name not in ("pixel_values", FEATURES["image"])}
        return self._embed(self.text, self.text_head, inputs, text_features)

    def embed_image(
        self, pixel_values: Tensor | None = None, image_features: Tensor | None = None, **columns: Tensor
    ) -> Tensor:
        """Embeddings (B, D) of images (B, 3, S, S), or of what the locked image tower gave, (B, width)."""
        return self._embed(self.image, self.image_head, {"pixel_values": pixel_values}, image_features)

    def _embed(self, tower: nn.Module, head: nn.Module, inputs: dict[str, Tensor], features: Tensor | None) -> Tensor:
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
        if features is None:
            features = self._encode_in_chunks(tower, inputs, trains)
        elif trains:
            raise ValueError("These rows were cached with a tower locked that is to train now: cache them again.")
        embedded = head(features)
        return F.normalize(embedded, dim=-1) if self.normalise else embedded

    def _encode_in_chunks(self, tower: nn.Module, inputs: dict[str, Tensor], trains: bool) -> Tensor:
        size, number = self.chunk_size, len(next(iter(inputs.values())))
        if size is None or number <= size:
            return tower(**inputs)
        parts = [{name: column[i : i + size] for name, column in inputs.items()} for i in range(0, number, size)]
        # checkpoint draws the same dropout again, and needs no gradient of its inputs
        encode = partial(checkpoint, tower, use_reentrant=False) if trains else tower
        return torch.cat([encode(**part) for part in parts])

    def after_step(self) -> None:
        """Keep the scale within [1, 100]."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, MAX_SCALE)

    @torch.inference_mode()
    def encode(self, rows: Sequence[Any], *, batch_size: int = 16) -> tuple[Tensor, Tensor]:
        """Embeddings of the texts and of the images of all rows, in eval mode, on the CPU, (N, D) each."""
        order, texts, images = [], [], []
        with eval_mode(self):
            for indices in evaluation_batches(row_lengths(rows), batch_size):
                batch = make_batch(self, rows, indices, self.device)
                batch.pop("labels")
                texts.append(self.embed_text(**batch).float().cpu())
                images.append(self.embed_image(**batch).float().cpu())
                order.append(torch.from_numpy(indices))
        given = torch.cat(order).argsort()
        return torch.cat(texts)[given], torch.cat(images)[given]

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Embeddings of texts, in eval mode, on the CPU, (N, D)."""
        most, embedded = min(self.text.tokenizer.model_max_length, 512), [torch.empty(0, self._dim)]
        with eval_mode(self):
            for start in range(0, len(texts), batch_size):
                part = list(texts[start : start + batch_size])
                batch = self.text.tokenize(part, most, padding=True, return_tensors="pt")
                embedded.append(self.embed_text(**batch.to(self.device)).float().cpu())
        return torch.cat(embedded)

    @torch.inference_mode()
    def encode_images(self, images: ArrayLike, *, batch_size: int = 16) -> Tensor:
        """Embeddings of images, uint8 of shape (N, S, S, 3), in eval mode, on the CPU, (N, D)."""
        import pandas as pd

        images = np.asarray(images)
        pairs = Pairs(images, [""] * len(images), pd.DataFrame(index=range(len(images))))
        most = min(self.text.tokenizer.model_max_length, 32)
        rows, embedded = encode_pairs({"": pairs}, self, max_length=most)[""], [torch.empty(0, self._dim)]
        with eval_mode(self):
            for start in range(0, len(rows), batch_size):
                part = [rows[i]["pixel_values"] for i in range(len(rows))[start : start + batch_size]]
                embedded.append(self.embed_image(torch.from_numpy(np.stack(part)).to(self.device)).float().cpu())
        return torch.cat(embedded)

    def measure(self, rows: Any, batch_size: int) -> Retrieval:
        """Each caption ranks all images of the rows; the loss is that of all rows as one batch, in nats."""
        text, image = self.encode(rows, batch_size=batch_size)
        with torch.inference_mode():
            ours = [part.to(self.device) for part in (text, image, torch.from_numpy(rows.groups))]
            loss = float(self.pair_loss(*ours))
        asked, searched = rows.pairs.own_captions, rows.pairs.own_images
        similarities = (text @ image.T).numpy()[np.ix_(asked, searched)]
        return Retrieval(similarities, rows.groups[asked], loss, rows.groups[searched])


def _make_head(kind: str, width: int, dim: int) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim))
    if kind != "linear":
        raise ValueError(f"There is no head {kind!r}: give linear or mlp.")
    return nn.Linear(width, dim, bias=False)
