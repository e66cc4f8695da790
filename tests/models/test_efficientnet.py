"""EfficientNet compared with the library's network, which computes the same more slowly."""

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet as LibraryNetwork
from torch import Tensor, nn

from ftkit.data.assets import registry
from ftkit.models.efficientnet import NAME, EfficientNet


@pytest.fixture(scope="module")
def library() -> nn.Module:
    network = LibraryNetwork.from_name(NAME).eval()
    file = next(registry.fetch(NAME).glob("*.pth"))
    network.load_state_dict(torch.load(file, weights_only=True))
    return network


@pytest.fixture(scope="module")
def network() -> EfficientNet:
    return EfficientNet()


def make_images(number: int, height: int, width: int | None = None) -> Tensor:
    return torch.randn(number, 3, height, width or height, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(32, 32), (100, 100), (128, 128), (224, 224), (96, 160)])
def test_features_equal_those_of_the_library(library: nn.Module, network: EfficientNet, size: tuple[int, int]) -> None:
    images = make_images(2, *size)
    with torch.inference_mode():
        expected = library.extract_features(images).mean((2, 3))
        actual = network(images)
    assert actual.shape == (2, network.width)
    assert torch.linalg.norm(actual - expected) <= 1e-4 * torch.linalg.norm(expected)


def test_gradients_equal_those_of_the_library_and_reach_every_weight(library: nn.Module, network: EfficientNet) -> None:
    """In-place activations must not overwrite what the backward pass reads."""
    gradients = []
    for encode in (network, lambda images: library.extract_features(images).mean((2, 3))):
        images = make_images(2, 64).requires_grad_()
        encode(images).square().sum().backward()
        gradients.append(images.grad)
    library.zero_grad()
    assert torch.linalg.norm(gradients[0] - gradients[1]) <= 1e-3 * torch.linalg.norm(gradients[1])
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    network.zero_grad()


def test_a_batch_changes_no_state(network: EfficientNet) -> None:
    images = make_images(3, 64)
    with torch.no_grad():
        alone, together = network(images[:1]), network.train()(images)
    network.eval()
    assert not list(network.buffers())
    assert torch.allclose(alone, together[:1], atol=1e-4)


def test_random_weights_depend_on_the_seed_and_keep_the_scale_of_the_signal() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (EfficientNet(pretrained=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    images = make_images(4, 64)
    with torch.no_grad():
        assert torch.equal(one(images), same(images))
        assert not torch.allclose(one(images), other(images))
        features = one(images)
    assert features.std(0).mean() > 0.03  # features differ between images, unlike with the library's random weights
    assert 0.1 < features.mean() < 3
