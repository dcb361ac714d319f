"""The network with max pooling, mini-ImageNet's, against plain PyTorch layers, under every transform."""

import pytest
import torch
import torch.nn.functional as F
from fewshot.network_problems import EXACT, Params, plain_logits, problem, product_of, random_like, task
from torch import Tensor

from implicitlayer.fewshot import Conv4, conv4, task_cross_entropy
from implicitlayer.fewshot._kernels import max_pool

# 21 -> 10 -> 5 -> 2 -> 1: two of the four halvings leave a row and a column out
TINY = conv4(3, in_channels=3, num_filters=3, image_size=21, downsample="max_pool")


def total_loss(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    return task_cross_entropy(TINY(params, images), labels).sum()


@pytest.mark.parametrize("network", [TINY, conv4(5, num_filters=4, image_size=32, downsample="max_pool")])
@pytest.mark.parametrize("blank", [False, True])
def test_logits_gradients_and_products_are_those_of_torch_layers(network: Conv4, blank: bool) -> None:
    params, images, labels = problem(network, 3, 6)
    if blank:  # where half a picture has one colour the entries of a square are equal: the first one counts
        images[..., : network.image_size // 2] = 0.5
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    values = list(leaves.values())
    ours = network(leaves, images)
    plain = torch.stack([plain_logits(task(leaves, i), x, "max_pool") for i, x in enumerate(images)])
    torch.testing.assert_close(ours, plain, **EXACT)
    if blank:
        return  # rounding decides between nearly equal entries, and the two networks round in different places
    direction = [torch.randn_like(p) for p in values]
    answers = []
    for logits in (ours, plain):
        loss = sum(F.cross_entropy(z, y) * weight for z, y, weight in zip(logits, labels, (1, -2, 0.5), strict=True))
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        answers.append((gradients, torch.autograd.grad(gradients, values, direction)))
    torch.testing.assert_close(answers[0][0], answers[1][0], **EXACT)
    torch.testing.assert_close(answers[0][1], answers[1][1], rtol=1e-8, atol=1e-8)


def test_mini_imagenet_network_has_the_published_sizes() -> None:
    network = conv4(5, in_channels=3, num_filters=32, image_size=84, downsample="max_pool")
    params = network.init(torch.Generator().manual_seed(0))
    assert params["conv1.weight"].shape == (32, 3, 3, 3) and params["head.weight"].shape == (5, 5 * 5 * 32)
    assert sum(p.numel() for p in params.values()) == 27 * 32 + 3 * 288 * 32 + 4 * 64 + 800 * 5 + 5
    images = torch.rand(2, 5, 3, 84, 84)  # two tasks are more than go through at once on a CPU
    expected = torch.stack([plain_logits(params, x, "max_pool") for x in images])
    # Logits of order 1 after four normalisations of sums of up to 288 terms: 288 eps = 3e-5 at worst a layer.
    torch.testing.assert_close(network(params, images), expected, rtol=1e-4, atol=1e-4)


def test_derivatives_match_finite_differences() -> None:
    network = conv4(2, in_channels=1, num_filters=1, image_size=16, downsample="max_pool")
    params, images, _ = problem(network, 1, 5)  # two images that are normalised are 1 and -1 whatever the filters
    names = [name for name in params if not name.startswith("head")]

    def logits(*values: Tensor) -> Tensor:
        return network(params | dict(zip(names, values, strict=True)), images)

    values = [params[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(logits, values)
    assert torch.autograd.gradgradcheck(logits, values)


def test_all_modes_of_differentiation_agree_to_third_order() -> None:
    params, images, labels = problem(TINY, 2, 4)
    direction = random_like(params)

    def along(order: int, params: Params) -> Params:  # forward over reverse runs on PyTorch's own pooling
        if order == 0:
            return torch.func.grad(total_loss)(params, images, labels)
        return torch.func.jvp(lambda p: along(order - 1, p), (params,), (direction,))[1]

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    values, direction_values = list(leaves.values()), list(direction.values())
    derivative = torch.autograd.grad(total_loss(leaves, images, labels), values, create_graph=True)
    for order in (1, 2):
        derivative = torch.autograd.grad(derivative, values, direction_values, create_graph=True)
        # Relative to the largest entry: each order multiplies the size of the terms that cancel.
        expected = along(order, params)
        for value, name in zip(derivative, leaves, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9 * expected[name].abs().max().item())


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_vmap_over_tasks_equals_the_native_batch(mode: str) -> None:
    product = product_of(total_loss, mode)
    params, images, labels = problem(TINY, 3, 4)
    direction = random_like(params)
    lanes = torch.vmap(product)(params, images, labels, direction)
    torch.testing.assert_close(lanes, product(params, images, labels, direction), rtol=1e-9, atol=1e-9)


def test_pooling_maps_any_mix_of_batched_and_shared_lanes() -> None:
    # Under vmap the entries and their places may have lanes or not, each by itself.
    x = torch.randn(2, 5, 4, 2, 3, dtype=torch.float64)
    lanes = torch.randn(3, *x.shape, dtype=torch.float64)
    g = torch.randn(2, 2, 2, 2, 3, dtype=torch.float64)

    def pull_back(x: Tensor, g: Tensor) -> Tensor:
        return torch.func.vjp(max_pool, x)[1](g)[0]

    looped = torch.stack([pull_back(lane, g) for lane in lanes])
    assert torch.equal(torch.vmap(pull_back, in_dims=(0, None))(lanes, g), looped)
    several = torch.stack([g, 2 * g, -g])
    assert torch.equal(
        torch.vmap(pull_back, in_dims=(None, 0))(x, several), torch.stack([pull_back(x, one) for one in several])
    )


def test_sizes_that_pooling_leaves_nothing_of_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size=15 must be at least 16 with downsample='max_pool'.*Take larger"):
        conv4(5, image_size=15, downsample="max_pool")
    with pytest.raises(ValueError, match="downsample='mean' must be one of 'stride', 'max_pool'"):
        conv4(5, downsample="mean")  # type: ignore[arg-type]
