"""The bottleneck adapter itself, and the layers of a transformer that it goes after."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit import anatomy
from ftkit.models import seeded

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Bottleneck(nn.Module):
    """x + up(act(down(x))): two layers with a narrow middle and a way around them.

    ``up`` starts at zero, so that the module starts as the identity. It has 2 size width + size + width parameters.

    Args:
        size: of x, of shape (..., size).
        width: of the middle.
        activation: "relu" or "gelu".
    """

    def __init__(self, size: int, width: int, activation: str = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(size, width)
        self.act = ACTIVATIONS[activation]()
        self.up = nn.Linear(width, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.act(self.down(x)))


def adapted_layers(model: PreTrainedModel, kind: str) -> list[str]:
    """Names of the layers whose output an adapter changes: see ``add_adapters``."""
    attention, feed_forward = anatomy.block_outputs(model)
    return attention + feed_forward if kind == "houlsby" else feed_forward


def make_adapters(model: PreTrainedModel, number: int, width: int, activation: str, seed: int) -> nn.ModuleList:
    """New adapters of the model's hidden size, on its device and in its precision.

    Raises:
        ValueError: a width that is no whole number from 1, an activation that is not known.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"The width of an adapter is {width!r}: give a whole number from 1, for instance 16.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}: choose from {', '.join(ACTIVATIONS)}.")
    with seeded(seed):
        adapters = nn.ModuleList(Bottleneck(model.config.hidden_size, width, activation) for _ in range(number))
    return adapters.to(model.device, model.dtype).train(model.training)
