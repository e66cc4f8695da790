"""In which mode a network's modules run: training, with dropout and running statistics, or evaluation, without."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode; afterwards each module is as it was, for frozen ones may differ from the rest."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def train_mode(model: nn.Module) -> None:
    """Train mode, but eval mode where all parameters are frozen: dropout and running statistics are still there."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
