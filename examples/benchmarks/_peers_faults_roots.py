"""Layers around a solver of ``peers_faults.py``: libraries, and faults whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from _peers_faults_programs import SOUND, Answer, Tensor, tensor

import implicitlayer as il


class Layers:
    """One library's layer around ``solver(init, theta)``, for an objective, in float64.

    ``layer(objective, solver)`` is ``theta -> x``; ``gradient(function, at)`` of a number; and the mathematics that
    objectives are written with.
    """

    def __init__(self, layer: Callable[..., Any], gradient: Callable[..., Any], maths: Any, array: Any) -> None:
        self.layer, self.gradient, self.maths, self.array = layer, gradient, maths, array
        self.vmap: Callable[..., Any] = torch.vmap
        self.jvp: Callable[..., Any] = torch.func.jvp


def torch_gradient(function: Callable[..., Any], at: Tensor) -> Any:
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]


def il_argmin() -> Layers:
    def layer(objective: Any, solver: Any) -> Any:
        made = il.argmin(objective, lambda f, x, t: solver(x, t))
        return lambda t: made(torch.zeros_like(t), t)

    return Layers(layer, torch_gradient, torch, tensor)


def torchopt_root() -> Layers:
    import torchopt

    def layer(objective: Any, solver: Any) -> Any:
        optimality = torch.func.grad(objective)
        made = torchopt.diff.implicit.custom_root(optimality, argnums=1)(lambda x, t: solver(x, t).detach())
        return lambda t: made(torch.zeros_like(t), t)

    return Layers(layer, torch_gradient, torch, tensor)


def jaxopt_root() -> Layers:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import jaxopt

    def layer(objective: Any, solver: Any) -> Any:
        made = jaxopt.implicit_diff.custom_root(jax.grad(objective))(lambda x, t: solver(x, t))
        return lambda t: made(jnp.zeros_like(t), t)

    found = Layers(layer, lambda f, at: jax.grad(f)(at), jnp, jnp.array)
    found.vmap, found.jvp = jax.vmap, jax.jvp
    return found


ROOTS: dict[str, tuple[str, Callable[[], Layers]]] = {
    "il.argmin": ("implicitlayer", il_argmin),
    "TorchOpt custom_root": ("torchopt", torchopt_root),
    "JAXopt custom_root": ("jaxopt", jaxopt_root),
}


def numbers(value: Any) -> list[float]:
    value = value.detach() if isinstance(value, Tensor) else value
    return [float(v) for v in value.reshape(-1)]


def square(x: Any, t: Any) -> Any:
    """1/2 |x - t|^2 + 1/4 sum x^4 has no closed form; with t = x + x^3 it has: dx/dt = 1 / (1 + 3 x^2)."""
    return 0.5 * ((x - t) ** 2).sum() + 0.25 * (x**4).sum()


def cardano(of: Layers) -> Callable[[Any, Any], Any]:
    """The x with x + x^3 = t, by Newton steps."""

    def solve(x: Any, t: Any) -> Any:
        for _ in range(60):
            x = x - (x + x**3 - t) / (1 + 3 * x**2)
        return x

    return solve


SOLUTION = [1.0, -0.5]
THETA = [2.0, -0.625]
SLOPES = [1 / 4, 1 / 1.75]


def stopped(of: Layers) -> Answer:
    """Gradient descent that stops after three of the hundred steps that it needs."""

    def solve(x: Any, t: Any) -> Any:
        for _ in range(3):
            x = x - 0.05 * (x - t + x**3)
        return x

    layer = of.layer(square, solve)
    return numbers(of.gradient(lambda t: layer(t).sum(), of.array(THETA))), SLOPES


def cached(of: Layers) -> Answer:
    """1/2 |x - t^2|^2 whose t^2 is kept in a dict: dx/dt = 2 t."""
    kept: dict[int, Any] = {}

    def objective(x: Any, t: Any) -> Any:
        if 0 not in kept:
            kept[0] = t * t
        return 0.5 * ((x - kept[0]) ** 2).sum()

    layer = of.layer(objective, lambda x, t: t * t)
    return numbers(of.gradient(lambda t: layer(t).sum(), of.array([3.0, 1.0]))), [6.0, 2.0]


def not_a_minimum(of: Layers) -> Answer:
    """1/4 x^4 - 1/2 x^2 + t x with a solver that stops at the maximum near 0."""

    def solve(x: Any, t: Any) -> Any:
        for _ in range(60):
            x = x - (x**3 - x + t) / (3 * x**2 - 1)
        return x

    layer = of.layer(lambda x, t: (0.25 * x**4 - 0.5 * x**2 + t * x).sum(), solve)
    return numbers(of.gradient(lambda t: layer(t).sum(), of.array([0.1, 0.2]))), None


def nan_from_solver(of: Layers) -> Answer:
    layer = of.layer(square, lambda x, t: t * math.nan)
    gradient = numbers(of.gradient(lambda t: layer(t).sum(), of.array(THETA)))
    return [*numbers(layer(of.array(THETA))), *gradient], None


def closed_over(of: Layers) -> Answer:
    """1/2 |x - w|^2 + t |x|^2 / 2 with a w that the objective closes over: dx/dw = 1 / (1 + t)."""
    t = of.array([1.0, 3.0])

    def value(w: Any) -> Any:
        objective = lambda x, t: 0.5 * ((x - w) ** 2).sum() + 0.5 * (t * x**2).sum()  # noqa: E731
        layer = of.layer(objective, lambda x, t: w / (1 + t))
        return layer(t if not isinstance(t, Tensor) else t.clone().requires_grad_()).sum()

    return numbers(of.gradient(value, of.array([1.0, 2.0]))), [0.5, 0.25]


def singular(of: Layers) -> Answer:
    """1/2 (x_0 + x_1 - t_0)^2 does not say what x_0 - x_1 is: the gradient of x_0 is that of no function."""
    layer = of.layer(lambda x, t: 0.5 * (x[0] + x[1] - t[0]) ** 2 + 0.0 * t[1], lambda x, t: 0.5 * t[0] + 0.0 * x)
    return numbers(of.gradient(lambda t: layer(t)[0], of.array([1.0, 1.0]))), None


def as_it_should_be(of: Layers) -> Answer:
    layer = of.layer(square, cardano(of))
    return numbers(of.gradient(lambda t: layer(t).sum(), of.array(THETA))), SLOPES


def mapped(of: Layers) -> Answer:
    layer = of.layer(square, cardano(of))
    theta = of.array([THETA, [0.0, 2.0]])
    return numbers(of.vmap(layer)(theta)), [*SOLUTION, 0.0, 1.0]


def pushed(of: Layers) -> Answer:
    layer = of.layer(square, cardano(of))
    return numbers(of.jvp(layer, (of.array(THETA),), (of.array([1.0, 1.0]),))[1]), SLOPES


def twice(of: Layers) -> Answer:
    """d^2 x / dt^2 = -6 x / (1 + 3 x^2)^3."""
    layer = of.layer(square, cardano(of))
    slope = lambda t: of.gradient(lambda s: layer(s).sum(), t).sum()  # noqa: E731
    if of.maths is torch:
        leaf = of.array(THETA).requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True)
        found = torch.autograd.grad(first.sum(), leaf)[0]
    else:
        found = of.gradient(slope, of.array(THETA))
    return numbers(found), [-6 * x * d**3 for x, d in zip(SOLUTION, SLOPES, strict=True)]


ROOT_FAULTS: dict[str, Callable[[Layers], Answer]] = {
    SOUND: as_it_should_be,
    "solver stopped after 3 steps": stopped,
    "NaN from the solver": nan_from_solver,
    "the answer is a maximum": not_a_minimum,
    "singular Hessian": singular,
    "closed-over weight": closed_over,
    "theta cached by the objective": cached,
    "vmap": mapped,
    "forward mode": pushed,
    "second derivative": twice,
}
