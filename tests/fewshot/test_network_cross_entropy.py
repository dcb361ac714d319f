"""`Conv4.cross_entropy`, whose derivatives are written by hand, against the same loss in plain operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fewshot.network_problems import EXACT, Params, problem, random_like, task
from torch import Tensor

from implicitlayer.fewshot import Conv4, conv4, task_accuracy, task_cross_entropy

Loss = Callable[[Params, Tensor, Tensor], Tensor]
TINY = conv4(3, in_channels=2, num_filters=3, image_size=9)
NETWORKS = [
    conv4(5, num_filters=8),
    conv4(3, in_channels=3, num_filters=4, image_size=21),
    conv4(4, num_filters=3, image_size=20),
    conv4(2, num_filters=1, image_size=1),
    TINY,
    conv4(3, num_filters=2, image_size=16, downsample="max_pool"),  # plain operations
]
# Rounding of a double through four batch norms, whose curvatures reach 1e4 in these problems.
CURVED = {"rtol": 1e-8, "atol": 1e-8}


def both(network: Conv4) -> tuple[Loss, Loss]:
    return network.cross_entropy, lambda params, images, labels: task_cross_entropy(network(params, images), labels)


def derivatives(
    loss: Loss, params: Params, images: Tensor, labels: Tensor, weights: Tensor, direction: list[Tensor]
) -> list[Any]:
    """Losses, the gradient of their weighted sum, its product with a direction, and the gradient of that product."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    weights = weights.detach().requires_grad_()
    inputs = [weights, *leaves.values()]
    losses = loss(leaves, images, labels)
    gradient = torch.autograd.grad((weights * losses).sum(), list(leaves.values()), create_graph=True)
    product = torch.autograd.grad(gradient, inputs, direction, retain_graph=True)
    differentiable = torch.autograd.grad(gradient, inputs, direction, create_graph=True)
    third = torch.autograd.grad(sum(p.square().sum() for p in differentiable), inputs)
    return [losses, gradient, product, differentiable, third]


@pytest.mark.parametrize("network", NETWORKS)
def test_three_orders_of_derivatives_are_those_of_plain_operations(network: Conv4) -> None:
    data = problem(network, 3, 6)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    direction = list(random_like(data[0]).values())
    ours, plain = (derivatives(loss, *data, weights, direction) for loss in both(network))
    torch.testing.assert_close(ours[:2], plain[:2], **EXACT)
    torch.testing.assert_close(ours[2:4], plain[2:4], **CURVED)
    torch.testing.assert_close(ours[4], plain[4], rtol=1e-7, atol=1e-5)  # third derivatives: curvatures squared


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("num_images", [6, 30])  # derivatives by hand of few images only
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_losses_with_accuracies_are_the_losses_and_the_accuracies(
    network: Conv4, num_images: int, num_tasks: int
) -> None:
    params, images, labels = problem(network, num_tasks, num_images)
    labels = labels.clone()
    labels[:, ::2] = network(params, images).argmax(-1)[:, ::2]  # half of them right at least
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    losses, accuracies = network.cross_entropy_and_accuracy(leaves, images, labels)
    assert not accuracies.requires_grad and torch.equal(accuracies, task_accuracy(network(params, images), labels))
    expected = network.cross_entropy(leaves, images, labels)
    gradients = [torch.autograd.grad(value.sum(), list(leaves.values())) for value in (losses, expected)]
    assert torch.equal(losses, expected)
    torch.testing.assert_close(*gradients, **EXACT)
    one = {name: p[0] for name, p in params.items()}
    loss, accuracy = network.cross_entropy_and_accuracy(one, images[0], labels[0])
    assert loss.ndim == accuracy.ndim == 0 and float(accuracy) == float(accuracies[0])


def test_products_of_two_gradients_of_one_evaluation_do_not_mix() -> None:
    params, images, labels = problem(TINY, 2, 5)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    direction = list(random_like(params).values())

    def products(loss: Loss) -> list[Any]:
        losses = loss(leaves, images, labels)
        first, second = (
            torch.autograd.grad(
                losses, list(leaves.values()), torch.tensor(weights, dtype=torch.float64), create_graph=True
            )
            for weights in ([1.0, 0.0], [3.0, -1.0])
        )
        return [
            torch.autograd.grad(g, list(leaves.values()), direction, retain_graph=True) for g in (first, second, first)
        ]

    ours, plain = (products(loss) for loss in both(TINY))
    torch.testing.assert_close(ours, plain, **CURVED)


def test_one_task_and_shared_parameters() -> None:
    params, images, labels = problem(TINY, 3, 5)
    shared = {name: p.requires_grad_() for name, p in task(params, 0).items()}
    for x, y in ((images, labels), (images[0], labels[0])):
        ours, plain = (loss(shared, x, y) for loss in both(TINY))
        assert ours.shape == plain.shape
        gradients = [torch.autograd.grad(value.sum(), list(shared.values())) for value in (ours, plain)]
        torch.testing.assert_close(gradients[0], gradients[1], **EXACT)


def test_parameters_that_need_no_gradient_get_none() -> None:
    params, images, labels = problem(TINY, 2, 5)
    head = {name: p.requires_grad_(name.startswith("head")) for name, p in params.items()}
    ours, plain = (
        torch.autograd.grad(loss(head, images, labels).sum(), [head["head.weight"], head["head.bias"]])
        for loss in both(TINY)
    )
    torch.testing.assert_close(ours, plain, **EXACT)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda loss, p, x, y: torch.func.grad(lambda p: loss(p, x, y).sum())(p),
        lambda loss, p, x, y: torch.vmap(torch.func.grad(loss))(p, x, y),
        lambda loss, p, x, y: torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(task(p, 0), x, y),
        lambda loss, p, x, y: torch.func.grad(lambda p: torch.vmap(loss)(p, x, y).sum())(p),
        lambda loss, p, x, y: torch.func.jvp(lambda p: loss(p, x, y), (p,), (random_like(p),)),
        lambda loss, p, x, y: torch.func.jvp(torch.func.grad(lambda p: loss(p, x, y).sum()), (p,), (random_like(p),)),
        lambda loss, p, x, y: torch.func.grad(lambda x: loss(p, x, y).sum())(x),
        lambda loss, p, x, y: torch.func.vjp(torch.func.grad(lambda p: loss(p, x, y).sum()), p)[1](random_like(p)),
    ],
    ids=["grad", "vmap-grad", "vmap-shared", "grad-vmap", "jvp", "jvp-grad", "images", "vjp-grad"],
)
def test_every_transform_gives_what_plain_operations_give(transformed: Any) -> None:
    params, images, labels = problem(TINY, 3, 5)
    torch.manual_seed(0)
    ours = transformed(both(TINY)[0], params, images, labels)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, transformed(both(TINY)[1], params, images, labels), **CURVED)


def test_gradients_in_float32_are_those_in_float64_to_rounding() -> None:
    params, images, labels = problem(conv4(5, num_filters=16), 2, 5)
    network = conv4(5, num_filters=16)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaves = {name: p.to(dtype).requires_grad_() for name, p in params.items()}
        found = torch.autograd.grad(
            network.cross_entropy(leaves, images.to(dtype), labels).sum(), list(leaves.values())
        )
        return torch.cat([g.double().flatten() for g in found])

    exact = gradient(torch.float64)
    # eps of 6e-8 times the depth of the sums (some hundred terms, four layers), times the condition of batch norms
    assert (gradient(torch.float32) - exact).norm() < 1e-4 * exact.norm()


def test_labels_that_do_not_fit_are_refused() -> None:
    params, images, labels = problem(TINY, 2, 5)
    with pytest.raises(ValueError, match="must be integers of shape"):
        TINY.cross_entropy(params, images, labels[:, :4])
    with pytest.raises(ValueError, match="must be integers of shape"):
        TINY.cross_entropy(params, images, labels.double())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("network", [TINY, NETWORKS[-1]])
def test_labels_may_be_small_integers(network: Conv4, dtype: torch.dtype) -> None:
    params, images, labels = problem(network, 2, 6)
    for loss in both(network):
        torch.testing.assert_close(loss(params, images, labels.to(dtype)), loss(params, images, labels))
