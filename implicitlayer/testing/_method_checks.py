"""The conformance checks of meta-learning methods, on small classification tasks in float64."""

# B: tasks, K: examples of a task, N = 2 classes, d = 3 inputs. theta: scales [d], a head [N, d] and [N].

from __future__ import annotations

from typing import Any

import torch

from implicitlayer.base._tree import flatten, tree_map, unflatten
from implicitlayer.meta._method import MetaMethod, one_per_task
from implicitlayer.testing import _arrays as arrays
from implicitlayer.testing._claims import require

# Inner problems of the checks are solved to 1e-9 at least; a method that solves them says so by its examples.
CLOSE = 1e-7


class TaskLossOfChecks:
    """The task loss ``loss(params, (inputs, labels)) -> [B]``: cross-entropy of a linear head on scaled inputs."""

    def __call__(self, params: Any, batch: Any) -> torch.Tensor:
        """Cross-entropy and a little weight decay, without which separable tasks have no minimum."""
        features = self.features(params, batch[0])
        logits = torch.baddbmm(params["head.bias"].unsqueeze(1), features, params["head.weight"].mT)
        decay = torch.stack([(leaf.flatten(1) ** 2).sum(1) for leaf in params.values()]).sum(0)
        return self.loss(logits, batch[1]) + 0.01 * decay

    def features(self, params: Any, inputs: torch.Tensor) -> torch.Tensor:
        """[B, K, d]."""
        scale: torch.Tensor = params["scale"]
        return inputs * scale.unsqueeze(1)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy [B] of logits [B, K, N]."""
        return torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").mean(1)


def start() -> dict[str, torch.Tensor]:
    """Theta."""
    shapes: dict[str, tuple[int, ...]] = {"scale": (3,), "head.weight": (2, 3), "head.bias": (2,)}
    theta = {name: 0.3 * arrays.normal_tensor(shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    theta["scale"] = 1 + theta["scale"]
    return {name: value.requires_grad_() for name, value in theta.items()}


def tasks(num_examples: int, seed: int) -> Any:
    """Three tasks of two classes around opposite centres, ``(inputs [B, K, d], labels [B, K])``."""
    labels = (torch.arange(num_examples) % 2).expand(3, num_examples)
    centres = arrays.normal_tensor((3, 1, 3), seed=200)
    noise = 0.5 * arrays.normal_tensor((3, num_examples, 3), seed=seed)
    return (2.0 * labels.unsqueeze(-1) - 1) * centres + noise, labels.clone()


def check_shapes(method: MetaMethod) -> None:
    """Adapted parameters are those of theta with the tasks in front; the losses are finite, one for each task."""
    theta, support, query = start(), tasks(4, 201), tasks(6, 202)
    phi = method.adapt(theta, support)
    shapes = {name: tuple(leaf.shape) for name, leaf in phi.items()}
    require(shapes == {name: (3, *leaf.shape) for name, leaf in theta.items()}, method, f"adapts to {shapes}")
    losses = method(theta, support, query)
    require(losses.shape == (3,) and bool(losses.isfinite().all()), method, f"has the query losses {losses.tolist()}")


def check_adaptation_lowers_the_inner_objective(method: MetaMethod) -> None:
    """Adaptation lowers ``inner_objective`` on the support of every task."""
    theta, support = start(), tasks(4, 201)
    with torch.no_grad():
        before = method.inner_objective(one_per_task(theta, 3), theta, support)
        after = method.inner_objective(method.adapt(theta, support), theta, support)
    require(bool((after < before).all()), method, f"adapts from {before.tolist()} to {after.tolist()}")


def check_tasks_are_independent(method: MetaMethod) -> None:
    """Losses and meta-gradients of a batch of tasks are those of its tasks one by one."""
    theta, support, query = start(), tasks(4, 201), tasks(6, 202)
    together = method(theta, support, query)
    for i in range(len(together)):
        one = [tree_map(lambda leaf, i=i: leaf[i : i + 1], batch) for batch in (support, query)]
        (alone,) = method(theta, *one)
        apart = abs(float((together[i] - alone).detach()))
        require(apart <= CLOSE, method, f"treats task {i} otherwise than alone: losses are {apart:.2e} apart")
        off = float((_gradient(together[i], theta) - _gradient(alone, theta)).norm())
        require(off <= CLOSE, method, f"treats task {i} otherwise than alone: meta-gradients are {off:.2e} apart")


def check_the_meta_gradient_is_what_it_says(method: MetaMethod) -> None:
    """Where the method says ``exact``, it is the derivative of the query losses; else it points where they rise."""
    theta, support, query = start(), tasks(4, 201), tasks(6, 202)
    gradient = _gradient(method(theta, support, query).mean(), theta)
    require(bool(gradient.isfinite().all()) and bool(gradient.any()), method, f"has the meta-gradient {gradient}")
    random = arrays.normal_tensor(tuple(gradient.shape), seed=203)
    direction = random / random.norm() if method.exact else gradient / gradient.norm()
    # the losses are good to 1e-9 at least, so that a difference over 1e-4 is good to 1e-5
    slope = (_mean_loss(method, 1e-4 * direction) - _mean_loss(method, -1e-4 * direction)) / 2e-4
    if method.exact:
        off = abs(float(gradient @ direction) - slope)
        text = f"has a meta-gradient that is off by {off:.2e} of {slope:.2e}"
        text += "; exact = False says it is another direction"
        require(off <= 1e-4 * (1 + abs(slope)), method, text)
    else:
        require(slope > 0, method, f"has a meta-gradient along which the query losses fall ({slope:.2e})")


def check_repeats_are_bitwise_equal(method: MetaMethod) -> None:
    """The same call gives the same bits, and changes neither theta nor the tasks."""
    theta, support, query = start(), tasks(4, 201), tasks(6, 202)
    given = flatten([theta, support, query])[0]
    before, versions = [leaf.detach().clone() for leaf in given], [leaf._version for leaf in given]
    first, second = (method(theta, support, query) for _ in range(2))
    require(torch.equal(first, second), method, "gave two answers to one batch of tasks")
    same = all(torch.equal(a, b) and a._version == v for a, b, v in zip(given, before, versions, strict=True))
    require(same, method, "changed theta or the tasks in place")
    require(all(leaf.grad is None for leaf in theta.values()), method, "left a gradient in theta before backward")


METHOD_CHECKS = [check_shapes, check_adaptation_lowers_the_inner_objective, check_tasks_are_independent]
METHOD_CHECKS += [check_the_meta_gradient_is_what_it_says, check_repeats_are_bitwise_equal]


def _mean_loss(method: MetaMethod, move: torch.Tensor) -> float:
    leaves, spec = flatten(start())
    parts = zip(leaves, move.split([leaf.numel() for leaf in leaves]), strict=True)
    theta = unflatten([(leaf.detach() + part.view_as(leaf)).requires_grad_() for leaf, part in parts], spec)
    return float(method(theta, tasks(4, 201), tasks(6, 202)).mean().detach())


def _gradient(loss: torch.Tensor, theta: dict[str, torch.Tensor]) -> torch.Tensor:
    leaves = flatten(theta)[0]
    parts = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])
