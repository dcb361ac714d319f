"""ANIL and prototypical networks against what their papers write, computed without the package's methods."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import implicitlayer as il

WAYS, SHOTS, TASKS = 3, 2, 2
NETWORK = il.fewshot.conv4(WAYS, num_filters=3, image_size=14)
HEAD = ("head.weight", "head.bias")


def problem() -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Theta, support and query of two tasks of random pictures, float64."""
    generator = torch.Generator().manual_seed(0)
    theta = NETWORK.init(generator, dtype=torch.float64)
    labels = torch.arange(WAYS).repeat(SHOTS).expand(TASKS, -1)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.rand(TASKS, WAYS * SHOTS, 1, 14, 14, dtype=torch.float64, generator=generator)
        return images, labels

    return {name: leaf.requires_grad_() for name, leaf in theta.items()}, batch(), batch()


def gradients(losses: torch.Tensor, theta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
    return dict(zip(theta, found, strict=True))


def anil(num_steps: int, step_size: Any = 0.5) -> il.meta.ANIL:
    return il.meta.ANIL(NETWORK.features, il.fewshot.task_cross_entropy, step_size=step_size, num_steps=num_steps)


def protonet() -> il.meta.ProtoNet:
    return il.meta.ProtoNet(NETWORK.features, il.fewshot.task_cross_entropy)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_anil_is_back_propagation_through_steps_of_the_head_on_the_whole_network(num_steps: int) -> None:
    theta, support, query = problem()
    expected = theta["head.bias"].new_zeros(())
    for i in range(TASKS):
        phi = dict(theta)
        for _ in range(num_steps):  # the whole network at every step, no feature kept
            loss = F.cross_entropy(NETWORK(phi, support[0][i]), support[1][i])
            moves = torch.autograd.grad(loss, [phi[name] for name in HEAD], create_graph=True)
            phi |= {name: phi[name] - 0.5 * move for name, move in zip(HEAD, moves, strict=True)}
        expected = expected + F.cross_entropy(NETWORK(phi, query[0][i]), query[1][i])
    losses = anil(num_steps)(theta, support, query)
    torch.testing.assert_close(losses.sum(), expected)
    torch.testing.assert_close(gradients(losses, theta), gradients(expected, theta))


def test_the_body_that_anil_adapts_is_that_of_theta_and_a_learned_step_size_gets_its_gradient() -> None:
    theta, support, query = problem()
    step_size = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    method = anil(2, step_size)
    phi = method.adapt(theta, support)
    assert {name for name in theta if not torch.equal(phi[name][0], theta[name])} == set(HEAD)
    (found,) = torch.autograd.grad(method(theta, support, query).sum(), step_size)
    h = 1e-5  # the error of central differences is h² times a third derivative of order one, and 1e-16 / h of rounding
    above, below = (anil(2, 0.5 + sign * h)(theta, support, query).sum() for sign in (1, -1))
    torch.testing.assert_close(found, (above - below).detach() / (2 * h), rtol=1e-7, atol=1e-9)
    assert [*method.parameters()] == [step_size]


def test_a_prototypical_network_is_the_softmax_of_negative_squared_distances_from_the_class_means() -> None:
    theta, support, query = problem()
    expected = theta["head.bias"].new_zeros(())
    for i in range(TASKS):
        known, asked = (NETWORK.features(theta, images[i]) for images in (support[0], query[0]))
        means = torch.stack([known[support[1][i] == way].mean(0) for way in range(WAYS)])
        distances = torch.cdist(asked, means).square()
        expected = expected + F.cross_entropy(-distances, query[1][i])
    losses = protonet()(theta, support, query)
    torch.testing.assert_close(losses.sum(), expected)
    found = gradients(losses, theta)
    torch.testing.assert_close(found, gradients(expected, theta))
    assert all(not found[name].any() for name in HEAD)  # its prototypes take the place of the head


@pytest.mark.parametrize("method", [anil(1), protonet()], ids=["ANIL", "ProtoNet"])
def test_a_head_or_features_that_do_not_fit_are_named(method: il.meta.MetaMethod) -> None:
    theta, support, _ = problem()
    with pytest.raises(ValueError, match=r"theta must be a dict .*'head.bias'.*head=\(weight, bias\)"):
        method.adapt({name: leaf for name, leaf in theta.items() if name != "head.bias"}, support)


def test_features_of_another_width_are_named() -> None:
    theta, support, _ = problem()
    method = il.meta.ProtoNet(lambda params, images: images.flatten(2), il.fewshot.task_cross_entropy)
    with pytest.raises(ValueError, match=r"features returned shape \(2, 6, 196\) and must return \[2, K, 3\]"):
        method.adapt(theta, support)


def test_a_class_without_a_support_example_is_named() -> None:
    theta, (images, labels), _ = problem()
    labels = labels.clone()
    labels[1] = labels[1] % 2
    with pytest.raises(ValueError, match="Class 2 of task 1 has no support example"):
        protonet().adapt(theta, (images, labels))


@pytest.mark.parametrize("method", [anil(3), protonet()], ids=["ANIL", "ProtoNet"])
def test_methods_of_the_head_learn_glyphs(method: il.meta.MetaMethod) -> None:
    network = il.fewshot.conv4(5, num_filters=8)
    theta = {name: leaf.requires_grad_() for name, leaf in network.init(torch.Generator().manual_seed(0)).items()}
    method = type(method)(
        network.features,
        il.fewshot.task_cross_entropy,
        **({"step_size": 0.5, "num_steps": 3} if isinstance(method, il.meta.ANIL) else {}),
    )
    sampler = il.fewshot.EpisodeSampler(il.fewshot.Glyphs("train"), num_ways=5, num_shots=1, num_query=3, seed=0)
    trainer = il.meta.Trainer(
        method,
        theta,
        sampler,
        torch.optim.Adam(theta.values(), lr=1e-2),
        tasks_per_step=4,
        max_steps=40,
        metric=lambda phi, query: il.fewshot.task_accuracy(network(phi, query[0]), query[1]),
        show_progress=False,
    )
    accuracies = [record["accuracy"] for record in trainer.fit()]
    # a guess is right once in five; the first ten steps and the last differ by more than their noise of 2 to 3 %
    assert sum(accuracies[-10:]) / 10 > max(0.5, sum(accuracies[:10]) / 10 + 0.1)
