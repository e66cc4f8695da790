"""Encoders that give one vector for a text or an image."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from ftkit.errors import ModelError
from ftkit.models.device import choose_device
from ftkit.models.efficientnet import NAME as EFFICIENTNET
from ftkit.models.efficientnet import EfficientNet
from ftkit.models.loading import _check_dropout, _locate, _plain_errors, _quiet, _ready, _set_dropout
from ftkit.models.modules import seeded

SMALL_VIT = "small-vit"

PATCH = 16  # pixels, of the small ViT

SIGLIP = {"siglip_text_model", "siglip2_text_model"}

POOLED = {"clip_text_model", *SIGLIP}  # they were trained on one token's output

HALF = (0.5, 0.5, 0.5)  # as mean and deviation they map [0, 1] to [-1, 1]


class TextEncoder(nn.Module):
    """A transformer that gives each text one vector.

    BERT and its kin give the mean over the tokens that are no padding (Reimers and Gurevych, 2019), the text models
    of CLIP and SigLIP what they were trained to give: the output at one token (``pooler_output``).

    Attributes:
        network: the transformer.
        tokenizer: its tokenizer; ``tokenize`` calls it as the network needs it.
        pooling: "mean" or "pooler".
        window: tokens that every text is padded to, or None where a mask tells what is padding.
        width: of the vectors.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.pooling = "pooler" if network.config.model_type in POOLED else "mean"
        self.width: int = network.config.hidden_size
        # SigLIP was trained without a mask, on the output at the last token of the window
        self.window: int | None = (
            network.config.max_position_embeddings if network.config.model_type in SIGLIP else None
        )
        if self.pooling == "mean" and getattr(network, "pooler", None) is not None:
            network.pooler = None  # its output would go unused, its weights get no gradient

    def tokenize(self, texts: list[str], max_length: int, **options: Any) -> BatchEncoding:
        """The columns that the network reads of texts.

        Args:
            texts: N of them.
            max_length: tokens kept of a text, special tokens included; SigLIP keeps its window.
            options: of the tokenizer, like ``padding`` and ``return_tensors``.
        """
        if self.window is not None:
            max_length = self.window
            options |= {"padding": "max_length", "return_attention_mask": False}
        return self.tokenizer(texts, truncation=True, max_length=max_length, **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 where there is a token and 0 where there is padding; None is all tokens.
            more: what else the tokenizer gives, like ``token_type_ids``.

        Returns:
            (B, width) float.
        """
        output = self.network(input_ids=input_ids, attention_mask=attention_mask, **more)
        if self.pooling == "pooler":
            return output.pooler_output
        states = output.last_hidden_state
        if attention_mask is None:
            return states.mean(1)
        weights = attention_mask.to(states.dtype).unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)  # a text without tokens gives zeros


class ImageEncoder(nn.Module):
    """A network that gives each image one vector.

    A vision transformer gives its ``pooler_output`` where it was trained with one, else the mean over its patches.

    Attributes:
        network: an ``EfficientNet`` or a vision model of transformers.
        width: of the vectors.
        size: pixels of the side that it wants, or None where any size goes.
        mean, std: per channel, for images in [0, 1].
    """

    def __init__(
        self,
        network: EfficientNet | PreTrainedModel,
        *,
        size: int | None = None,
        mean: tuple[float, float, float] = HALF,
        std: tuple[float, float, float] = HALF,
    ) -> None:
        super().__init__()
        self.network, self.size, self.mean, self.std = network, size, mean, std
        config = getattr(network, "config", None)
        patch = getattr(config, "patch_size", None)
        self._patch = patch if isinstance(patch, int) else None
        was_training = network.training
        with torch.no_grad():  # families call their width by many names: ask the network itself
            probe = torch.zeros(1, 3, size or 64, size or 64, device=next(network.parameters()).device)
            self.width: int = self.eval()(probe).shape[1]
        self.train(was_training)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: (B, 3, S, S) float, normalised with ``mean`` and ``std``.

        Returns:
            (B, width) float.
        """
        if isinstance(self.network, EfficientNet):
            return self.network(pixel_values)
        output = self.network(pixel_values=pixel_values)
        if getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        states = output.last_hidden_state
        if states.ndim == 4:  # of a convolutional network
            return states.mean((2, 3))
        if self._patch:  # tokens that are no patches come first
            height, width = pixel_values.shape[2:]
            states = states[:, -(height // self._patch) * (width // self._patch) :]
        return states.mean(1)


def load_text_encoder(
    name: str | Path, *, pretrained: bool = True, dropout: float | None = None, seed: int = 0
) -> TextEncoder:
    """Load a text encoder.

    Args:
        name: the asset "minilm", a folder, or a hub id; of a model of texts and images, the text half is taken.
        pretrained: False gives the same architecture with random weights.
        dropout: probability, in [0, 1), for every dropout layer; None leaves the checkpoint's.
        seed: of random weights.

    Returns:
        The encoder in float32 on the device that ``choose_device`` names, in eval mode.

    Raises:
        ModelError: no such model, or none that reads text.
        AssetError: the weights of an asset can't be had.
    """
    _check_dropout(dropout)
    source, options, advice = _locate(name, ("text-encoder",), "a text encoder")
    with _plain_errors(name, advice), _quiet(), seeded(seed):
        config = AutoConfig.from_pretrained(source, **options)
        if dropout is not None:
            _set_dropout(getattr(config, "text_config", config), dropout)
    network, _ = _load_tower(name, source, options, advice, config, pretrained, seed)
    network = getattr(network, "text_model", network)
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    _check_reads(name, network, "input_ids", "text encoder", "minilm")
    with _plain_errors(name, advice), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return TextEncoder(*_ready(network, tokenizer, name)).eval()


def load_image_encoder(name: str | Path, *, pretrained: bool = True, size: int = 128, seed: int = 0) -> ImageEncoder:
    """Load an image encoder.

    Args:
        name: "efficientnet-lite0" (Tan and Le, 2019); "small-vit", a vision transformer (Dosovitskiy et al., 2021)
            of 4 layers of width 128; a folder, or a hub id, of a vision model. Of a model of texts and images, the
            half for images is taken.
        pretrained: False gives the same architecture with random weights; "small-vit" has no others, whatever this
            says.
        size: pixels of the side of the images for "small-vit", a multiple of 16; the others have their own.
        seed: of random weights.

    Returns:
        The encoder in float32 on the device that ``choose_device`` names, in eval mode.

    Raises:
        ModelError: no such model, none that sees images, or a size that "small-vit" can't have.
        AssetError: the weights of an asset can't be had.
    """
    device = choose_device().device
    if name == EFFICIENTNET:
        network = EfficientNet(pretrained=pretrained, seed=seed).to(device)
        return ImageEncoder(network, mean=network.mean, std=network.std).eval()
    if name == SMALL_VIT:
        return ImageEncoder(_small_vit(size, seed).to(device), size=size).eval()
    source, options, advice = _locate(name, ("image-encoder",), "an image encoder", EFFICIENTNET)
    with _plain_errors(name, advice), _quiet():
        config = AutoConfig.from_pretrained(source, **options)
    network, missing = _load_tower(name, source, options, advice, config, pretrained, seed)
    network = getattr(network, "vision_model", network)
    _check_reads(name, network, "pixel_values", "image encoder", EFFICIENTNET)
    if missing:  # a checkpoint of a classifier has no pooler: the model made one up
        network.pooler = None
    return _image_encoder(network.to(device), source, options).eval()


def load_clip(name: str | Path) -> tuple[TextEncoder, ImageEncoder, nn.Linear, nn.Linear, float]:
    """Load both encoders of CLIP (Radford et al., 2021) and what brings them into one space.

    Args:
        name: a folder, or a hub id like openai/clip-vit-base-patch32.

    Returns:
        The text encoder; the image encoder; the projection of texts, (text width) -> (D,); the projection of
        images, (image width) -> (D,); the logarithm of the factor on the cosines. All in float32 on the device that
        ``choose_device`` names, in eval mode.

    Raises:
        ModelError: no such model, or it is not a CLIP model.
    """
    source, options, advice = _locate(name, (), "a CLIP model", "openai/clip-vit-base-patch32")
    with _plain_errors(name, advice), _quiet():
        config = AutoConfig.from_pretrained(source, **options)
        if config.model_type != "clip":
            raise ValueError(f"it is of the family {config.model_type}, not clip")
        model, info = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    _refuse_missing(name, info)
    model = model.to(choose_device().device).eval()
    texts = TextEncoder(*_ready(model.text_model, tokenizer, name)).eval()
    images = _image_encoder(model.vision_model, source, options).eval()
    return texts, images, model.text_projection, model.visual_projection, model.logit_scale.item()


def _small_vit(size: int, seed: int) -> ViTModel:
    if size < PATCH or size % PATCH:
        raise ModelError(f"A size of {size} pixels is no multiple of {SMALL_VIT}'s patches of {PATCH}: try 128.")
    config = ViTConfig(
        image_size=size, patch_size=PATCH, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256,
    )  # fmt: skip
    with seeded(seed):
        return ViTModel(config, add_pooling_layer=False)


def _load_tower(
    name: str | Path, source: str, options: dict[str, bool], advice: str, config: Any, pretrained: bool, seed: int
) -> tuple[PreTrainedModel, bool]:
    """The model without a head, and whether its pooler is not from the checkpoint."""
    with _plain_errors(name, advice), _quiet(), seeded(seed):
        if not pretrained:
            return AutoModel.from_config(config, dtype=torch.float32), False
        how = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, info = AutoModel.from_pretrained(source, **how, **options)
    return model, _refuse_missing(name, info)


def _refuse_missing(name: str | Path, info: dict[str, Any]) -> bool:
    """Refuse a checkpoint that lacks weights of an encoder; whether it lacks a pooler's, which it can do without."""
    missing = sorted(info["missing_keys"])
    lacking = [key for key in missing if "pooler" not in key]
    if lacking:
        raise ModelError(
            f"The model {str(name)!r} lacks {len(lacking)} weights of its encoder ({', '.join(lacking[:2])}): "
            "save the whole model, or choose another one."
        )
    return bool(missing)


def _check_reads(name: str | Path, network: PreTrainedModel, wanted: str, what: str, example: str) -> None:
    if network.main_input_name != wanted:
        raise ModelError(
            f"The model {str(name)!r} ({network.config.model_type}) reads {network.main_input_name}, not {wanted}, "
            f"so it can't be the {what}: use one like {example}."
        )


def _image_encoder(network: PreTrainedModel, source: str, options: dict[str, bool]) -> ImageEncoder:
    """Wrap a vision model with the size and normalisation that were saved beside it."""
    try:  # not AutoImageProcessor, which needs torchvision
        facts, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=options["local_files_only"])
    except OSError:  # there is none
        facts = {}
    size = getattr(network.config, "image_size", None)
    size = size[0] if isinstance(size, list | tuple) else size
    if not facts.get("do_normalize", True):
        return ImageEncoder(network, size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    mean, std = (tuple(facts.get(key) or HALF) for key in ("image_mean", "image_std"))
    return ImageEncoder(network, size=size, mean=mean, std=std)
