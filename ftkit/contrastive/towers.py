"""The two-tower model: a text encoder and an image encoder that learn a common space."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
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

_CLIP_SCALE, _MAX_SCALE = math.log(1 / 0.07), math.log(100)  # logarithms; initial value and upper bound of CLIP

_SIGLIP_SCALE, _SIGLIP_BIAS = math.log(10), -10.0  # initial values: like most combinations, all start as no pair

FEATURE_COLUMNS = {"text": "text_features", "image": "image_features"}  # by tower, in rows of ``cache_towers``


@dataclass
class PairOutput:
    """Output of a two-tower model for a batch.

    Attributes:
        loss: a scalar.
        text, image: embeddings, shape (B, D) each.
    """

    loss: Tensor
    text: Tensor
    image: Tensor


class TwoTowers(ModelWithLoss):
    """A text encoder and an image encoder, each with a head, and a temperature (Radford et al., 2021).

    ``fit`` trains it on rows of ``encode_pairs`` or, if a tower is locked, of ``cache_towers``. The other pairs of a
    batch are the negatives, so ``batch_size`` is part of the loss.

    Args:
        text, image: from ``load_text_encoder`` and ``load_image_encoder``.
        dim: width D of the common space.
        head: of each tower, "linear" (no bias) or "mlp" (one hidden layer as wide as the tower).
        loss: "clip", "siglip", or a function of text embeddings, image embeddings, logit scale and groups.
        temperature: initial temperature, 1 / scale, in [0.01, 1]; None is 0.1 for "siglip" and 0.07 for other losses.
        learn_temperature: train the temperature, within [0.01, 1].
        normalise: use cosines as similarities; False uses dot products.
        chunk_size: pairs that a tower encodes at a time, to save memory. The loss is still that of the whole batch: a
            chunk is encoded without keeping its activations, and once more for its gradient (gradient caching, Gao et
            al., 2021). None encodes the batch in one piece.
        seed: of the heads' initial weights.

    Raises:
        ValueError: the loss or the head is unknown, or the temperature is outside [0.01, 1].
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
            raise ValueError(f"There is no loss {loss!r}: choose clip or siglip, or pass a function.")
        if temperature is not None and not 0.01 <= temperature <= 1:
            raise ValueError(f"A temperature of {temperature} is outside the range 0.01 to 1: try 0.07, as in CLIP.")
        self.text, self.image, self.loss, self._dim = text, image, loss, dim
        self.normalise, self.chunk_size = normalise, chunk_size
        with seeded(seed):
            self.text_head, self.image_head = (_make_head(head, tower.width, dim) for tower in (text, image))
        start = _SIGLIP_SCALE if loss == "siglip" else _CLIP_SCALE
        scale = torch.tensor(start if temperature is None else -math.log(temperature))
        self.logit_scale = nn.Parameter(scale, requires_grad=learn_temperature)
        if loss == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor(_SIGLIP_BIAS))
        self.to(self.device).eval()

    @classmethod
    def from_clip(cls, name: str, *, chunk_size: int | None = None) -> "TwoTowers":
        """Load a complete CLIP model with its own projections and temperature.

        Args:
            name: a hub id or a folder.
            chunk_size: as for the class.

        Raises:
            ModelError: there is no such model, or it is not a CLIP model.
        """
        text, image, text_head, image_head, logit_scale = load_clip(name)
        model = cls(text, image, text_head.out_features, chunk_size=chunk_size)
        model.text_head, model.image_head = text_head, image_head
        model.logit_scale.data.fill_(logit_scale)
        return model.to(model.device).eval()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.text.parameters()).device

    @property
    def temperature(self) -> float:
        """The current temperature, 1 / scale."""
        return float((-self.logit_scale.detach()).exp())

    def lock(self, *towers: Literal["text", "image"]) -> "TwoTowers":
        """Freeze towers, but not their heads, and return the model.

        Locking the image tower only is locked-image tuning, LiT (Zhai et al., 2022).

        Raises:
            ValueError: there is no such tower.
        """
        for tower in towers:
            if tower not in FEATURE_COLUMNS:
                raise ValueError(f"There is no tower {tower!r}: choose text, image, or both.")
            getattr(self, tower).requires_grad_(False)
        return self

    def forward(self, labels: Tensor | None = None, **columns: Tensor) -> PairOutput:
        """Embed a batch of pairs and compute the loss; ``labels`` are the ``groups`` of ``clip_loss``."""
        text, image = self.embed_text(**columns), self.embed_image(**columns)
        return PairOutput(self.pair_loss(text, image, labels), text, image)

    def pair_loss(self, text: Tensor, image: Tensor, groups: Tensor | None = None) -> Tensor:
        """Loss of a batch of embeddings, with this model's own loss and scale; arguments as for ``clip_loss``."""
        if self.loss == "siglip":
            return siglip_loss(text, image, self.logit_scale, groups, self.logit_bias, normalise=self.normalise)
        if self.loss == "clip":
            return clip_loss(text, image, self.logit_scale, groups, normalise=self.normalise)
        return self.loss(text, image, self.logit_scale, groups)

    def embed_text(self, text_features: Tensor | None = None, **columns: Tensor) -> Tensor:
        """Embed tokenised texts, or cached features (B, width) of the locked text tower; gives shape (B, D)."""
        inputs = {name: column for name, column in columns.items() if name not in ("pixel_values", "image_features")}
        return self._embed(self.text, self.text_head, inputs, text_features)

    def embed_image(
        self, pixel_values: Tensor | None = None, image_features: Tensor | None = None, **columns: Tensor
    ) -> Tensor:
        """Embed images (B, 3, S, S), or cached features (B, width) of the locked image tower; gives shape (B, D)."""
        return self._embed(self.image, self.image_head, {"pixel_values": pixel_values}, image_features)

    def _embed(self, tower: nn.Module, head: nn.Module, inputs: dict[str, Tensor], features: Tensor | None) -> Tensor:
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
        if features is None:
            features = self._encode_in_chunks(tower, inputs, trains)
        elif trains:
            raise ValueError("The rows hold cached features of a tower that now trains: lock it or encode them again.")
        embedded = head(features)
        return F.normalize(embedded, dim=-1) if self.normalise else embedded

    def _encode_in_chunks(self, tower: nn.Module, inputs: dict[str, Tensor], trains: bool) -> Tensor:
        size, num_pairs = self.chunk_size, len(next(iter(inputs.values())))
        if size is None or num_pairs <= size:
            return tower(**inputs)
        parts = [{name: column[i : i + size] for name, column in inputs.items()} for i in range(0, num_pairs, size)]
        # the second pass repeats the dropout of the first; use_reentrant=False, for the inputs need no gradient
        encode = partial(checkpoint, tower, use_reentrant=False) if trains else tower
        return torch.cat([encode(**part) for part in parts])

    def after_step(self) -> None:
        """Keep the scale within [1, 100]."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, _MAX_SCALE)

    @torch.inference_mode()
    def encode(self, rows: Sequence[Any], *, batch_size: int = 16) -> tuple[Tensor, Tensor]:
        """Embed the texts and the images of all rows, in eval mode.

        Args:
            rows: N rows of ``encode_pairs`` or ``cache_towers``.
            batch_size: rows in a forward pass.

        Returns:
            Text embeddings and image embeddings, shape (N, D) each, on the CPU.
        """
        order, texts, images = [], [], []
        with eval_mode(self):
            for indices in evaluation_batches(row_lengths(rows), batch_size):
                batch = make_batch(self, rows, indices, self.device)
                batch.pop("labels")
                texts.append(self.embed_text(**batch).float().cpu())
                images.append(self.embed_image(**batch).float().cpu())
                order.append(torch.from_numpy(indices))
        restored = torch.cat(order).argsort()
        return torch.cat(texts)[restored], torch.cat(images)[restored]

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Embed N texts in eval mode; gives shape (N, D), on the CPU."""
        max_length, embedded = min(self.text.tokenizer.model_max_length, 512), [torch.empty(0, self._dim)]
        with eval_mode(self):
            for start in range(0, len(texts), batch_size):
                part = list(texts[start : start + batch_size])
                batch = self.text.tokenize(part, max_length, padding=True, return_tensors="pt")
                embedded.append(self.embed_text(**batch.to(self.device)).float().cpu())
        return torch.cat(embedded)

    @torch.inference_mode()
    def encode_images(self, images: ArrayLike, *, batch_size: int = 16) -> Tensor:
        """Embed images, uint8 of shape (N, S, S, 3), in eval mode; gives shape (N, D), on the CPU."""
        images = np.asarray(images)
        pairs = Pairs(images, [""] * len(images), pd.DataFrame(index=range(len(images))))
        max_length = min(self.text.tokenizer.model_max_length, 32)
        rows, embedded = encode_pairs({"": pairs}, self, max_length=max_length)[""], [torch.empty(0, self._dim)]
        with eval_mode(self):
            for start in range(0, len(rows), batch_size):
                part = [rows[i]["pixel_values"] for i in range(len(rows))[start : start + batch_size]]
                embedded.append(self.embed_image(torch.from_numpy(np.stack(part)).to(self.device)).float().cpu())
        return torch.cat(embedded)

    def measure(self, rows: Any, batch_size: int) -> Retrieval:
        """Let each caption rank all images of the rows; the loss is that of all rows as one batch, in nats."""
        text, image = self.encode(rows, batch_size=batch_size)
        with torch.inference_mode():
            batch = [part.to(self.device) for part in (text, image, torch.from_numpy(rows.groups))]
            loss = float(self.pair_loss(*batch))
        queries, candidates = rows.pairs.own_captions, rows.pairs.own_images
        similarities = (text @ image.T).numpy()[np.ix_(queries, candidates)]
        return Retrieval(similarities, rows.groups[queries], loss, rows.groups[candidates])


def _make_head(kind: str, width: int, dim: int) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim))
    if kind != "linear":
        raise ValueError(f"There is no head {kind!r}: choose linear or mlp.")
    return nn.Linear(width, dim, bias=False)
