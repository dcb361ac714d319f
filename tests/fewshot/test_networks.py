"""The few-shot network against plain PyTorch layers, under every transform, one task and many."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewshot.network_problems import EXACT, Params, plain_logits, problem, product_of, random_like, task
from torch import Tensor

from implicitlayer.fewshot import Conv4, conv4, task_accuracy, task_cross_entropy

TINY = conv4(3, in_channels=2, num_filters=3, image_size=9)


@pytest.mark.parametrize(
    "network",
    [
        conv4(5, num_filters=8),
        conv4(3, in_channels=3, num_filters=4, image_size=21),
        conv4(2, num_filters=1, image_size=1),
    ],
)
def test_logits_and_gradients_are_those_of_torch_layers(network: Conv4) -> None:
    params, images, labels = problem(network, 1, 6)
    one = {name: p[0].requires_grad_() for name, p in params.items()}
    ours, plain = network(one, images[0]), plain_logits(one, images[0])
    torch.testing.assert_close(ours, plain, **EXACT)
    leaves = list(one.values())
    gradients = torch.autograd.grad(task_cross_entropy(ours, labels[0]), leaves, create_graph=True)
    plain_gradients = torch.autograd.grad(F.cross_entropy(plain, labels[0]), leaves, create_graph=True)
    torch.testing.assert_close(gradients, plain_gradients, **EXACT)
    direction = [torch.randn_like(p) for p in leaves]
    products = torch.autograd.grad(gradients, leaves, direction)
    torch.testing.assert_close(products, torch.autograd.grad(plain_gradients, leaves, direction), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shared", [False, True])
def test_batch_of_tasks_equals_loop_over_tasks(shared: bool) -> None:
    network = conv4(5, num_filters=8)
    params, images, labels = problem(network, 3, 5)
    if shared:
        params = task(params, 0)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    losses = task_cross_entropy(network(leaves, images), labels)
    loop = torch.stack(
        [
            F.cross_entropy(plain_logits(leaves if shared else task(leaves, i), images[i]), labels[i])
            for i in range(len(images))
        ]
    )
    torch.testing.assert_close(losses, loop, **EXACT)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    ours = torch.autograd.grad(losses @ weights, list(leaves.values()))
    torch.testing.assert_close(ours, torch.autograd.grad(loop @ weights, list(leaves.values())), **EXACT)


def test_many_tasks_go_through_in_parts_with_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    params, images, labels = problem(TINY, 5, 4)
    whole = torch.func.grad(total_loss)(params, images, labels)
    logits = TINY(params, images)
    monkeypatch.setattr("implicitlayer.fewshot._networks._MAX_ACTIVATION", 4 * 25 * 3 * 2)  # two tasks at once
    torch.testing.assert_close(TINY(params, images), logits, **EXACT)
    torch.testing.assert_close(torch.func.grad(total_loss)(params, images, labels), whole, **EXACT)


def test_tasks_do_not_see_each_other() -> None:
    network = conv4(5, num_filters=8)
    params, images, _ = problem(network, 2, 5)
    changed = images.clone()
    changed[1] = changed[1].flip(-1) * 3
    before, after = network(params, images), network(params, changed)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_first_and_second_derivatives_match_finite_differences() -> None:
    network = conv4(2, in_channels=2, num_filters=2, image_size=5)
    params, images, _ = problem(network, 2, 3)
    names = list(params)

    def logits(images: Tensor, *values: Tensor) -> Tensor:
        return network(dict(zip(names, values, strict=True)), images)

    inputs = [t.requires_grad_() for t in (images, *params.values())]
    assert torch.autograd.gradcheck(logits, inputs)
    assert torch.autograd.gradgradcheck(logits, inputs)


def total_loss(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    return task_cross_entropy(TINY(params, images), labels).sum()


def test_all_modes_of_differentiation_give_one_hessian_vector_product() -> None:
    params, images, labels = problem(TINY, 2, 4)
    direction = random_like(params)

    def gradient(params: Params) -> Params:
        return torch.func.grad(total_loss)(params, images, labels)

    reverse = torch.func.vjp(gradient, params)[1](direction)[0]
    forward = torch.func.jvp(gradient, (params,), (direction,))[1]
    torch.testing.assert_close(reverse, forward, **EXACT)

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    values = list(leaves.values())
    gradients = torch.autograd.grad(total_loss(leaves, images, labels), values, create_graph=True)
    kept = torch.autograd.grad(gradients, values, list(direction.values()))
    torch.testing.assert_close(dict(zip(leaves, kept, strict=True)), forward, **EXACT)


def test_third_derivatives_are_right_in_reverse_mode() -> None:
    # Order three in reverse mode runs on the hand-written rules; forward over forward over reverse on plain operations.
    params, images, labels = problem(TINY, 2, 4)
    direction = random_like(params)

    def along(order: int, params: Params) -> Params:
        if order == 0:
            return torch.func.grad(total_loss)(params, images, labels)
        return torch.func.jvp(lambda p: along(order - 1, p), (params,), (direction,))[1]

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    values, direction_values = list(leaves.values()), list(direction.values())
    derivative = torch.autograd.grad(total_loss(leaves, images, labels), values, create_graph=True)
    for _ in range(2):
        derivative = torch.autograd.grad(derivative, values, direction_values, create_graph=True)
    torch.testing.assert_close(dict(zip(leaves, derivative, strict=True)), along(2, params), rtol=1e-7, atol=1e-7)


def test_forward_over_forward_is_not_zero() -> None:
    params, images, labels = problem(TINY, 1, 4)
    direction = random_like(params)

    def slope(params: Params) -> Tensor:
        return torch.func.jvp(lambda p: total_loss(p, images, labels), (params,), (direction,))[1]

    curvature = torch.func.jvp(slope, (params,), (direction,))[1]
    product = torch.func.vjp(torch.func.grad(lambda p: total_loss(p, images, labels)), params)[1](direction)[0]
    expected = sum((product[name] * direction[name]).sum() for name in params)
    torch.testing.assert_close(curvature, expected, **EXACT)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_vmap_over_tasks_equals_the_native_batch(mode: str) -> None:
    product = product_of(total_loss, mode)
    params, images, labels = problem(TINY, 3, 4)
    direction = random_like(params)
    lanes = torch.vmap(product)(params, images, labels, direction)
    torch.testing.assert_close(lanes, product(params, images, labels, direction), **EXACT)


def test_vmap_over_images_with_shared_parameters() -> None:
    params, images, _ = problem(TINY, 3, 4)
    shared = task(params, 0)
    lanes = torch.vmap(TINY, in_dims=(None, 0))(shared, images)
    torch.testing.assert_close(lanes, TINY(shared, images), **EXACT)


def test_float32_agrees_with_float64() -> None:
    network = conv4(5)
    params, images, labels = problem(network, 2, 5)
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        leaves = {name: p.to(dtype).requires_grad_() for name, p in params.items()}
        loss = task_cross_entropy(network(leaves, images.to(dtype)), labels).sum()
        gradients[dtype] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))]).double()
    error = (gradients[torch.float32] - gradients[torch.float64]).norm() / gradients[torch.float64].norm()
    # Sums of 600 terms round at 600 eps = 7e-5 at worst. An activation that rounds across zero would cost more.
    assert error < 1e-4


def test_blank_images_have_finite_derivatives() -> None:
    network = conv4(5, num_filters=4)
    params, images, labels = problem(network, 2, 5)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    loss = task_cross_entropy(network(leaves, torch.zeros_like(images)), labels).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    products = torch.autograd.grad(gradients, list(leaves.values()), [torch.ones_like(g) for g in gradients])
    assert all(t.isfinite().all() for t in (*gradients, *products))


def test_initial_parameters_have_the_stated_ranges() -> None:
    network = conv4(5)
    params = network.init(torch.Generator().manual_seed(3))
    assert {name: tuple(p.shape) for name, p in params.items()} == network.shapes
    for name, fan_sum in (("conv1.weight", 9 * 65), ("conv4.weight", 9 * 128), ("head.weight", 256 + 5)):
        bound = 1.73 * math.sqrt(6 / fan_sum)
        largest = params[name].abs().max().item()
        assert 0.95 * bound < largest <= bound
    assert params["head.bias"].min() >= 0 and params["head.bias"].max() <= 0.05
    assert (params["norm2.weight"] == 1).all() and (params["norm2.bias"] == 0).all()


def test_a_seed_fixes_the_initial_parameters() -> None:
    first, second = (TINY.init(torch.Generator().manual_seed(7), dtype=torch.float64) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.float64 for name in first)


def test_wrong_sizes_are_refused() -> None:
    for name in ("num_ways", "in_channels", "num_filters", "image_size"):
        sizes = {"num_ways": 5, name: 0}
        with pytest.raises(ValueError, match=f"{name}=0 must be an integer of at least 1"):
            conv4(**sizes)


def test_wrong_images_are_refused() -> None:
    params = TINY.init()
    with pytest.raises(ValueError, match=r"images of shape \(4, 2, 28, 28\) must be \[K, 2, 9, 9\]"):
        TINY(params, torch.zeros(4, 2, 28, 28))
    with pytest.raises(ValueError, match="images of shape"):
        TINY(params, torch.zeros(2, 9, 9))
    with pytest.raises(
        TypeError, match=r"input of conv4 has dtype torch\.uint8 and params\['conv1\.weight'\] .*float32"
    ):
        TINY(params, torch.zeros(4, 2, 9, 9, dtype=torch.uint8))


def test_wrong_parameters_are_refused() -> None:
    params, images, _ = problem(TINY, 2, 4)
    with pytest.raises(
        ValueError, match=r"params\['conv1.weight'\] of shape \(2, 3, 3, 3, 2\) must have shape .* one task"
    ):
        TINY(params, images[0])
    with pytest.raises(ValueError, match=r"params has no 'head\.bias'"):
        TINY({name: p for name, p in params.items() if name != "head.bias"}, images)


def test_task_losses_and_accuracies_match_torch() -> None:
    logits, labels = torch.randn(3, 7, 5, dtype=torch.float64), torch.randint(5, (3, 7))
    expected = torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, labels, strict=True)])
    torch.testing.assert_close(task_cross_entropy(logits, labels), expected, **EXACT)
    assert task_cross_entropy(logits[0], labels[0]).ndim == 0
    accuracy = task_accuracy(logits, labels)
    assert accuracy.tolist() == [(a.argmax(1) == b).double().mean().item() for a, b in zip(logits, labels, strict=True)]


@pytest.mark.parametrize("function", [task_cross_entropy, task_accuracy])
@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(3, 6, dtype=torch.long),  # fewer labels than images: a gather takes the first ones
        torch.zeros(1, 7, dtype=torch.long),  # one task's labels for three: a gather takes the first task
        torch.zeros(3, 1, dtype=torch.long),  # a comparison would broadcast it
        torch.zeros(7, dtype=torch.long),
        torch.zeros(3, 7),
        torch.zeros(3, 7, 5, dtype=torch.long),  # one-hot
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(function: Any, labels: Tensor) -> None:
    shape = str(tuple(labels.shape))
    expected = rf"labels of shape {re.escape(shape)} and dtype {labels.dtype} must be integers of shape \(3, 7\)"
    with pytest.raises(ValueError, match=expected):
        function(torch.zeros(3, 7, 5), labels)
