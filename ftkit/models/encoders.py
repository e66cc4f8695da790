"""Encoders that turn a text or an image into one vector."""

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
from ftkit.models.loading import (
    as_model_error,
    check_dropout,
    finish_loading,
    locate_model,
    quiet_transformers,
    set_dropout,
)
from ftkit.models.modules import seeded

_SMALL_VIT = "small-vit"

_PATCH = 16  # pixels, of the small ViT

_SIGLIP = {"siglip_text_model", "siglip2_text_model"}

_POOLED = {"clip_text_model", *_SIGLIP}  # trained on the output at one token

_HALF = (0.5, 0.5, 0.5)  # as mean and standard deviation, it maps [0, 1] to [-1, 1]


class TextEncoder(nn.Module):
    """A transformer that turns each text into one vector.

    BERT and similar models give the mean over the tokens without padding (Reimers and Gurevych, 2019). The text models
    of CLIP and SigLIP give the output at one token (``pooler_output``), as they were trained to.

    Attributes:
        network: the transformer.
        tokenizer: its tokenizer; ``tokenize`` calls it with the options that the network needs.
        pooling: "mean" or "pooler".
        window: number of tokens that every text is padded to; None if a mask marks the padding.
        width: size of the vectors.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.pooling = "pooler" if network.config.model_type in _POOLED else "mean"
        self.width: int = network.config.hidden_size
        # SigLIP was trained without a mask, on the output at the last token of the window
        self.window: int | None = (
            network.config.max_position_embeddings if network.config.model_type in _SIGLIP else None
        )
        if self.pooling == "mean" and getattr(network, "pooler", None) is not None:
            network.pooler = None  # its output would not be used, and its weights would get no gradient

    def tokenize(self, texts: list[str], max_length: int, **options: Any) -> BatchEncoding:
        """Tokenize texts into the columns that the network reads.

        Args:
            texts: N texts.
            max_length: number of tokens to keep of a text, with special tokens; SigLIP always uses its window.
            options: options of the tokenizer, such as ``padding`` and ``return_tensors``.
        """
        if self.window is not None:
            max_length = self.window
            options |= {"padding": "max_length", "return_attention_mask": False}
        return self.tokenizer(texts, truncation=True, max_length=max_length, **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 for a token and 0 for padding; None if there is no padding.
            more: further columns from the tokenizer, such as ``token_type_ids``.

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
    """A network that turns each image into one vector.

    A vision transformer gives its ``pooler_output`` if it was trained with one, else the mean over its patches.

    Attributes:
        network: an ``EfficientNet`` or a vision model of transformers.
        width: size of the vectors.
        size: height and width of the images in pixels; None if any size will do.
        mean, std: for each channel of images in [0, 1].
    """

    def __init__(
        self,
        network: EfficientNet | PreTrainedModel,
        *,
        size: int | None = None,
        mean: tuple[float, float, float] = _HALF,
        std: tuple[float, float, float] = _HALF,
    ) -> None:
        super().__init__()
        self.network, self.size, self.mean, self.std = network, size, mean, std
        config = getattr(network, "config", None)
        patch = getattr(config, "patch_size", None)
        self._patch = patch if isinstance(patch, int) else None
        was_training = network.training
        with torch.no_grad():  # configs name the width differently: run the network once
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
        if states.ndim == 4:  # convolutional network
            return states.mean((2, 3))
        if self._patch:  # other tokens come before the patches
            height, width = pixel_values.shape[2:]
            states = states[:, -(height // self._patch) * (width // self._patch) :]
        return states.mean(1)


def load_text_encoder(
    name: str | Path, *, pretrained: bool = True, dropout: float | None = None, seed: int = 0
) -> TextEncoder:
    """Load a text encoder.

    Args:
        name: the asset "minilm", a folder, or a hub id. Of a model for texts and images, only the text model is used.
        pretrained: False gives the same architecture with random weights.
        dropout: probability in [0, 1) for every dropout layer; None keeps the checkpoint's.
        seed: seed of random weights.

    Returns:
        The encoder in float32, in eval mode and on the device from ``choose_device``.

    Raises:
        ModelError: the model does not exist, or does not read text.
        AssetError: the weights of an asset cannot be found or downloaded.
    """
    check_dropout(dropout)
    source, options, advice = locate_model(name, ("text-encoder",), "a text encoder")
    with as_model_error(name, advice), quiet_transformers(), seeded(seed):
        config = AutoConfig.from_pretrained(source, **options)
        if dropout is not None:
            set_dropout(getattr(config, "text_config", config), dropout)
    network, _ = _load_tower(name, source, options, advice, config, pretrained, seed)
    network = getattr(network, "text_model", network)
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    _check_reads(name, network, "input_ids", "text encoder", "minilm")
    with as_model_error(name, advice), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return TextEncoder(*finish_loading(network, tokenizer, name)).eval()


def load_image_encoder(name: str | Path, *, pretrained: bool = True, size: int = 128, seed: int = 0) -> ImageEncoder:
    """Load an image encoder.

    Args:
        name: "efficientnet-lite0" (Tan and Le, 2019); "small-vit", a vision transformer (Dosovitskiy et al., 2021)
            of 4 layers of width 128; a folder, or a hub id, of a vision model. Of a model for texts and images, only
            the image model is used.
        pretrained: False gives the same architecture with random weights; "small-vit" always has random weights.
        size: height and width of the images for "small-vit" in pixels, a multiple of 16; other models have their own.
        seed: seed of random weights.

    Returns:
        The encoder in float32, in eval mode and on the device from ``choose_device``.

    Raises:
        ModelError: the model does not exist, does not read images, or "small-vit" cannot have this size.
        AssetError: the weights of an asset cannot be found or downloaded.
    """
    device = choose_device().device
    if name == EFFICIENTNET:
        network = EfficientNet(pretrained=pretrained, seed=seed).to(device)
        return ImageEncoder(network, mean=network.mean, std=network.std).eval()
    if name == _SMALL_VIT:
        return ImageEncoder(_small_vit(size, seed).to(device), size=size).eval()
    source, options, advice = locate_model(name, ("image-encoder",), "an image encoder", EFFICIENTNET)
    with as_model_error(name, advice), quiet_transformers():
        config = AutoConfig.from_pretrained(source, **options)
    network, missing = _load_tower(name, source, options, advice, config, pretrained, seed)
    network = getattr(network, "vision_model", network)
    _check_reads(name, network, "pixel_values", "image encoder", EFFICIENTNET)
    if missing:  # a classifier's checkpoint has no pooler: this one is random
        network.pooler = None
    return _image_encoder(network.to(device), source, options).eval()


def load_clip(name: str | Path) -> tuple[TextEncoder, ImageEncoder, nn.Linear, nn.Linear, float]:
    """Load both encoders of CLIP (Radford et al., 2021), their projections into one space, and the logit scale.

    Args:
        name: a folder, or a hub id such as openai/clip-vit-base-patch32.

    Returns:
        The text encoder; the image encoder; the text projection, (text width) -> (D,); the image projection,
        (image width) -> (D,); the logarithm of the logit scale. All modules are in float32, in eval mode and on the
        device from ``choose_device``.

    Raises:
        ModelError: the model does not exist, or is not a CLIP model.
    """
    source, options, advice = locate_model(name, (), "a CLIP model", "openai/clip-vit-base-patch32")
    with as_model_error(name, advice), quiet_transformers():
        config = AutoConfig.from_pretrained(source, **options)
        if config.model_type != "clip":
            raise ValueError(f"it is of the family {config.model_type}, not clip")
        model, info = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    _refuse_missing(name, info)
    model = model.to(choose_device().device).eval()
    texts = TextEncoder(*finish_loading(model.text_model, tokenizer, name)).eval()
    images = _image_encoder(model.vision_model, source, options).eval()
    return texts, images, model.text_projection, model.visual_projection, model.logit_scale.item()


def _small_vit(size: int, seed: int) -> ViTModel:
    if size < _PATCH or size % _PATCH:
        raise ModelError(f"A size of {size} pixels is not a multiple of {_SMALL_VIT}'s patch size {_PATCH}: try 128.")
    config = ViTConfig(
        image_size=size, patch_size=_PATCH, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256,
    )  # fmt: skip
    with seeded(seed):
        return ViTModel(config, add_pooling_layer=False)


def _load_tower(
    name: str | Path, source: str, options: dict[str, bool], advice: str, config: Any, pretrained: bool, seed: int
) -> tuple[PreTrainedModel, bool]:
    """Load a model without its head, and tell whether its pooler is missing in the checkpoint."""
    with as_model_error(name, advice), quiet_transformers(), seeded(seed):
        if not pretrained:
            model = AutoModel.from_config(config, dtype=torch.float32)
            model.config._name_or_path = ""  # it comes from no checkpoint
            return model, False
        model, info = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    return model, _refuse_missing(name, info)


def _refuse_missing(name: str | Path, info: dict[str, Any]) -> bool:
    """Refuse a checkpoint that lacks weights of the encoder, and tell whether it lacks a pooler, which it may."""
    missing = sorted(info["missing_keys"])
    lacking = [key for key in missing if "pooler" not in key]
    if lacking:
        raise ModelError(
            f"The model {str(name)!r} lacks {len(lacking)} weights of its encoder ({', '.join(lacking[:2])}): "
            "save the complete model, or choose another one."
        )
    return bool(missing)


def _check_reads(name: str | Path, network: PreTrainedModel, wanted: str, what: str, example: str) -> None:
    if network.main_input_name != wanted:
        raise ModelError(
            f"The model {str(name)!r} ({network.config.model_type}) reads {network.main_input_name}, not {wanted}, "
            f"so it can't be the {what}: use a model like {example}."
        )


def _image_encoder(network: PreTrainedModel, source: str, options: dict[str, bool]) -> ImageEncoder:
    """Wrap a vision model with the image size and normalisation that were saved with it."""
    try:  # not AutoImageProcessor, which needs torchvision
        saved, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=options["local_files_only"])
    except OSError:  # there is none
        saved = {}
    size = getattr(network.config, "image_size", None)
    size = size[0] if isinstance(size, list | tuple) else size
    if not saved.get("do_normalize", True):
        return ImageEncoder(network, size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    mean, std = (tuple(saved.get(key) or _HALF) for key in ("image_mean", "image_std"))
    return ImageEncoder(network, size=size, mean=mean, std=std)
