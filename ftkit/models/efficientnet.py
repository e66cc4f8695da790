"""EfficientNet-Lite0 (Tan and Le, 2019) with its batch norms folded into the convolutions."""

import torch
from efficientnet_lite_pytorch import EfficientNet as LibraryNetwork
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ftkit.data.assets import registry
from ftkit.models.modules import seeded

NAME = "efficientnet-lite0"


class EfficientNet(nn.Module):
    """EfficientNet-Lite0 (Tan and Le, 2019) without its classifier: convolutions and the mean over positions.

    Each batch norm, with its statistics from ImageNet, is folded into the convolution before it. This is faster, and
    small batches cannot spoil the statistics. Every weight can be trained. Train and eval mode are the same, as there
    is no dropout either.

    Attributes:
        width: number of features, 1280.
        mean, std: for each channel of images in [0, 1].
    """

    width = 1280
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3  # the lite networks were trained on (pixel - 127) / 128

    def __init__(self, *, pretrained: bool = True, seed: int = 0) -> None:
        """Build the network on the CPU.

        Args:
            pretrained: False gives random weights that keep the scale of the signal (He et al., 2015), for training
                from scratch.
            seed: seed of the random weights.

        Raises:
            AssetError: the weights cannot be downloaded or read.
        """
        super().__init__()
        with seeded(seed):
            library = LibraryNetwork.from_name(NAME).eval()
            if pretrained:
                with registry.reading(NAME) as folder:
                    file = next(folder.glob("*.pth"))
                    library.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            self.stem = _Convolution(library._conv_stem, library._bn0)
            self.blocks = nn.ModuleList(_Block(block) for block in library._blocks)
            self.head = _Convolution(library._conv_head, library._bn1)
            if not pretrained:
                self._draw()
        self.to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU, also in training

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: (B, 3, H, W) float, normalised. Any size works, best a multiple of 32; training used 224.

        Returns:
            (B, 1280) float features, each in [0, 6].
        """
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem(x), inplace=True)
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x), inplace=True).mean((2, 3))

    def _draw(self) -> None:
        """Draw weights that keep the scale of the signal without batch norm."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                no_relu = name.endswith("project")
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if no_relu else "relu")
                nn.init.zeros_(module.bias)


class _Convolution(nn.Conv2d):
    """A convolution fused with the batch norm after it, padded as the library does for images of 224 pixels."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        fused = fuse_conv_bn_eval(convolution, norm)
        left, right, *_ = getattr(fused.static_padding, "padding", (0, 0))
        super().__init__(
            fused.in_channels, fused.out_channels, fused.kernel_size, tuple(fused.stride), groups=fused.groups,
            padding=left if left == right else 0,
        )  # fmt: skip
        # with stride 2, TensorFlow pads one pixel more on the right and at the bottom; torch's convolution cannot
        self.before = None if left == right else (left, right, left, right)
        self.weight, self.bias = fused.weight, fused.bias.requires_grad_()  # fused from frozen running means

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, H / stride, W / stride)."""
        return super().forward(x if self.before is None else F.pad(x, self.before))


class _Block(nn.Module):
    """Inverted residual (Sandler et al., 2018): expand, convolve depthwise, project; add the input if it fits."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.expand = _Convolution(block._expand_conv, block._bn0) if hasattr(block, "_expand_conv") else None
        self.depthwise = _Convolution(block._depthwise_conv, block._bn1)
        self.project = _Convolution(block._project_conv, block._bn2)
        first = self.expand or self.depthwise
        self.skips = self.depthwise.stride == (1, 1) and first.in_channels == self.project.out_channels

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, H / stride, W / stride)."""
        # in place is safe: the backward pass needs a convolution's input, not its output
        x = inputs if self.expand is None else F.relu6(self.expand(inputs), inplace=True)
        x = self.project(F.relu6(self.depthwise(x), inplace=True))
        return x.add_(inputs) if self.skips else x
