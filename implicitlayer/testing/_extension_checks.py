"""The conformance checks of sets and regularisers, and of meta-learning methods."""

# y: a point, P: the projection or proximal operator at step 1.

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from implicitlayer.api._argmin import argmin
from implicitlayer.base._tree import flatten, tree_map, unflatten
from implicitlayer.meta._method import MetaMethod, one_per_task
from implicitlayer.sets._set import ConvexSet
from implicitlayer.sets._term import ProximalTerm
from implicitlayer.testing import _arrays as arrays
from implicitlayer.testing._claims import require

SIZE = 4
# An exact projection of points of size 1 to 10 is good to a few roundings, one that iterates to 1e-9, say.
CLOSE = 1e-8
STEP = 1e-6  # of central differences: CLOSE of two values makes 1e-2, so a rounding of 1e-16 makes 1e-10

Check = Callable[[Any], None]


def points() -> list[torch.Tensor]:
    return [size * arrays.normal_tensor((SIZE,), seed=70 + i) for i, size in enumerate((0.3, 1.0, 3.0, 10.0) * 3)]


def check_shape_and_dtype(term: ProximalTerm) -> None:
    """The answer has the shape and dtype of the point, in float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        for shape, lane_dims in (((SIZE,), 0), ((3, SIZE), 1)):
            value = term.prox(arrays.normal_tensor(shape, seed=60, dtype=dtype), 1.0, lane_dims)
            require(value.shape == shape, term, f"returned shape {tuple(value.shape)} for {shape}")
            require(value.dtype == dtype, term, f"returned {value.dtype} for {dtype}")


def check_the_projection_is_the_nearest_point(term: ConvexSet) -> None:
    """P(y) is in the set (P moves it no more), and (y - P(y))'(z - P(y)) <= 0 for every z of the set: the nearest."""
    for y in points():
        nearest = term.project(y)
        moved = float((term.project(nearest) - nearest).norm())
        text = f"moves its own projection by {moved:.2e}: P(P(y)) must be P(y)"
        require(moved <= CLOSE * (1 + float(nearest.norm())), term, text)
        for other in points():
            z = term.project(other)
            product = float((y - nearest) @ (z - nearest))
            allowed = CLOSE * (1 + float(y.norm())) * (1 + float((z - nearest).norm()))
            text = f"has a point nearer to y than P(y): (y - P(y))'(z - P(y)) = {product:.2e} > 0 for another P(z)"
            require(product <= allowed, term, text)


def check_the_prox_is_that_of_a_convex_function(term: ProximalTerm) -> None:
    """``||P(y) - P(z)||^2 <= (P(y) - P(z))'(y - z)`` at every step, which holds for a convex term and no other."""
    for step in (0.5, 1.0, 2.0):
        for y, z in zip(points(), points()[1:], strict=False):
            apart = term.prox(y, step) - term.prox(z, step)
            excess = float(apart @ apart - apart @ (y - z))
            text = f"is no proximal operator: ||P(y) - P(z)||^2 exceeds (P(y) - P(z))'(y - z) by {excess:.2e}"
            require(excess <= CLOSE * (1 + float((y - z).norm()) ** 2), term, text)


def check_the_derivative_is_that_of_the_projection(term: ProximalTerm) -> None:
    """Autograd's Jacobian is symmetric and agrees with differences, but for points at a kink; ``diagonal`` is it."""
    compared = 0
    for i, y in enumerate(points()):
        jacobian = torch.autograd.functional.jacobian(lambda at: term.prox(at, 1.0), y)
        crooked = float((jacobian - jacobian.mT).abs().max())
        require(crooked <= 1e-6, term, f"has a Jacobian that is not symmetric, by {crooked:.2e}")
        diagonal = term.diagonal(y, 1.0)
        if diagonal is not None:
            off = float((jacobian - torch.diag(diagonal)).abs().max())
            require(off <= 1e-6, term, f"says a diagonal derivative that is off by {off:.2e}")
        direction = arrays.normal_tensor((SIZE,), seed=90 + i)
        h = STEP * (1 + y.norm())
        ahead, here, behind = (term.prox(y + s * h * direction, 1.0) for s in (1, 0, -1))
        if float(((ahead - here) - (here - behind)).norm() / h) > 1e-3:
            continue  # a kink between the two, or curvature: nothing can be said
        compared += 1
        off = float((jacobian @ direction - (ahead - behind) / (2 * h)).norm())
        require(off <= 1e-3, term, f"has an autograd derivative that is off by {off:.2e} from differences")
    require(compared > 0, term, "has kinks at all points that were tried")


def check_activity_holds_up_to_the_next_kink(term: ProximalTerm) -> None:
    """What ``activity`` holds stays held, and free entries free, up to a quarter of the distance of a kink."""
    for i, y in enumerate(points()):
        held, margins = term.activity(y, 1.0)
        require(held.dtype == torch.bool and held.shape == y.shape == margins.shape, term, "has an activity unlike y")
        require(not bool((margins < 0).any()), term, "says a negative distance from a kink")
        known = margins[margins.isfinite()]
        if held.dtype != torch.bool or not known.numel():
            continue
        direction = arrays.normal_tensor((SIZE,), seed=110 + i)
        there = term.activity(y + 0.25 * known.min() * direction / direction.norm(), 1.0)[0]
        text = f"holds other entries within a quarter of the distance {known.min():.2e}"
        require(torch.equal(held, there), term, text)


def check_violation_is_zero_in_the_set_alone(term: ConvexSet) -> None:
    """``violation`` is zero at P(y), and positive where P moves y."""
    for y in points():
        nearest = term.project(y)
        inside, outside = float(term.violation(nearest)), float(term.violation(y))
        require(inside <= CLOSE * (1 + float(y.norm())), term, f"says a violation of {inside:.2e} inside the set")
        if float((y - nearest).norm()) > 1e-3:
            require(outside > 1e-6, term, f"says a violation of {outside:.2e} outside the set")


def check_lanes_are_independent(term: ProximalTerm) -> None:
    """With ``lane_dims=1`` every lane is treated as alone."""
    stacked = torch.stack(points())
    together = term.prox(stacked, 1.0, 1)
    for i, y in enumerate(points()):
        apart = float((together[i] - term.prox(y, 1.0)).norm())
        require(apart <= CLOSE * (1 + float(y.norm())), term, f"treats lane {i} otherwise than alone, by {apart:.2e}")


def check_nan_stays(term: ProximalTerm) -> None:
    """NaN in the point is not projected away: NOTE [NaN stays]."""
    y = points()[0]
    y[1] = torch.nan
    require(bool(term.prox(y, 1.0).isnan().any()), term, "made finite numbers of NaN")


def check_inputs_are_left_alone(term: ProximalTerm) -> None:
    """The point is not changed in place."""
    y = points()[0]
    before, version = y.clone(), y._version
    term.prox(y, 1.0), term.activity(y, 1.0), term.diagonal(y, 1.0), term.violation(y)
    require(torch.equal(y, before) and y._version == version, term, "changed the point in place")


def check_a_layer_has_its_derivative(term: ProximalTerm) -> None:
    """The gradient of ``il.argmin`` of 1/2 ||x - t||^2 with the term, in t, is the derivative of P."""
    y, v = points()[1], arrays.normal_tensor((SIZE,), seed=130)
    how: dict[str, Any] = {"constraint" if isinstance(term, ConvexSet) else "regularizer": term}
    layer = argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), lambda f, x, t: term.prox(t), **how)
    t = y.clone().requires_grad_()
    (got,) = torch.autograd.grad(layer(torch.zeros_like(y), t), t, v)
    right = torch.autograd.functional.jacobian(lambda at: term.prox(at, 1.0), y).mT @ v
    off = float((got - right).norm())
    require(off <= 1e-6, term, f"gives a layer a gradient that is off by {off:.2e}")


def term_checks(term: ProximalTerm) -> Iterator[Check]:
    yield check_shape_and_dtype
    if isinstance(term, ConvexSet):
        yield from (check_the_projection_is_the_nearest_point, check_violation_is_zero_in_the_set_alone)
    yield from (check_the_prox_is_that_of_a_convex_function, check_the_derivative_is_that_of_the_projection)
    yield from (check_activity_holds_up_to_the_next_kink, check_lanes_are_independent, check_nan_stays)
    yield from (check_inputs_are_left_alone, check_a_layer_has_its_derivative)


# Of meta-learning methods, on small classification tasks in float64.
# B: tasks, K: examples of a task, N = 2 classes, d = 3 inputs. theta: scales [d], a head [N, d] and [N].

# Inner problems of the checks are solved to 1e-9 at least; a method that solves them says so by its examples.
SAME = 1e-7


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
        require(apart <= SAME, method, f"treats task {i} otherwise than alone: losses are {apart:.2e} apart")
        off = float((_gradient(together[i], theta) - _gradient(alone, theta)).norm())
        require(off <= SAME, method, f"treats task {i} otherwise than alone: meta-gradients are {off:.2e} apart")


def check_the_meta_gradient_is_what_it_says(method: MetaMethod) -> None:
    """Where the method says ``exact``, it is the derivative of the query losses; else it points where they rise."""
    theta, support, query = start(), tasks(4, 201), tasks(6, 202)
    gradient = _gradient(method(theta, support, query).mean(), theta)
    require(bool(gradient.isfinite().all()) and bool(gradient.any()), method, f"has the meta-gradient {gradient}")
    random, along = arrays.normal_tensor(tuple(gradient.shape), seed=203), gradient / gradient.norm()
    direction = (random / random.norm() + along) / 2 if method.exact else along  # a slope that is no small part of it
    # the losses are good to 1e-9 at least, so that a difference over 1e-4 is good to 1e-5
    slope = (_mean_loss(method, 1e-4 * direction) - _mean_loss(method, -1e-4 * direction)) / 2e-4
    if method.exact:
        off = abs(float(gradient @ direction) - slope)
        text = f"has a meta-gradient that is off by {off:.2e} of {slope:.2e}"
        text += "; exact = False says it is another direction"
        require(off <= 2e-5 + 1e-4 * abs(slope), method, text)
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
