"""Gradients through solvers of every kind, over pytrees of every kind."""

import json
import subprocess
import sys
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, dense_gradients, newton, randn, relative_error, smooth_objective
from torch import Tensor

import implicitlayer as il
from implicitlayer.solvers import GradientDescent, SciPyMinimize, TorchOptimizer


def problem() -> tuple[Tensor, ...]:
    tensors = (randn(8, 4, seed=1), randn(8, seed=2), torch.tensor(0.5, dtype=F64))
    return tuple(t.requires_grad_() for t in tensors)


def numpy_gradient(x: Any, weight: Any, offset: Any, log_strength: Any) -> Any:
    return weight.T @ (1 / (1 + np.exp(-(weight @ x + offset)))) + np.exp(log_strength) * x


def numpy_descent(objective: Any, init: Tensor, *theta: Tensor) -> Any:
    """Plain NumPy: nothing that autograd could see."""
    arrays = [t.numpy() for t in theta]
    step = 1 / (np.linalg.norm(arrays[0], 2) ** 2 / 4 + np.exp(arrays[2]))  # softplus'' <= 1/4
    x = init.numpy()
    for _ in range(400):  # the error shrinks by 1 - mu/L < 0.9 per step
        x = x - step * numpy_gradient(x, *arrays)
    return x


CHILD = """
import json, math, sys
p = json.load(sys.stdin); W, b, s = p["weight"], p["offset"], math.exp(p["strength"])
x = [0.0] * len(W[0])
for _ in range(400):
    z = [1 / (1 + math.exp(-sum(w * v for w, v in zip(row, x)) - c)) for row, c in zip(W, b)]
    g = [sum(W[i][j] * z[i] for i in range(len(W))) + s * x[j] for j in range(len(x))]
    x = [v - p["step"] * d for v, d in zip(x, g)]
print(json.dumps(x))
"""


def subprocess_descent(objective: Any, init: Tensor, weight: Tensor, offset: Tensor, log_strength: Tensor) -> Any:
    """The same in another process, in pure Python."""
    step = 1 / (float(torch.linalg.matrix_norm(weight, 2)) ** 2 / 4 + float(log_strength.exp()))
    payload = {"weight": weight.tolist(), "offset": offset.tolist(), "strength": log_strength.item(), "step": step}
    run = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(payload), capture_output=True, text=True, check=True
    )
    return torch.tensor(json.loads(run.stdout), dtype=F64)


def with_torch_autograd(objective: Any, init: Tensor, *theta: Tensor) -> Tensor:
    """A loop that records every step; the layer cuts it off."""
    theta = tuple(t.clone().requires_grad_() for t in theta)
    x = init.clone().requires_grad_()
    for _ in range(300):
        (gradient,) = torch.autograd.grad(objective(x, *theta), x, create_graph=True)
        x = x - 0.1 * gradient
    assert x.requires_grad
    return x


SOLVERS = {
    "dense Newton": newton,
    "BFGS": SciPyMinimize("BFGS", options={"gtol": 1e-9}),
    "L-BFGS-B": SciPyMinimize("L-BFGS-B", options={"ftol": 0.0, "gtol": 1e-9}),
    "Newton-CG": SciPyMinimize("Newton-CG", options={"xtol": 1e-11}),
    "trust-krylov": SciPyMinimize("trust-krylov", options={"gtol": 1e-9}),
    "SLSQP": SciPyMinimize("SLSQP", options={"ftol": 1e-17}),
    "Adam": TorchOptimizer(torch.optim.Adam, max_steps=4000, rtol=1e-8, lr=0.02),
    "LBFGS": TorchOptimizer(
        torch.optim.LBFGS, max_steps=10, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=0.0
    ),
    "GradientDescent": GradientDescent(step_size=0.1, max_steps=2000, rtol=1e-10),
    "NumPy": numpy_descent,
    "subprocess": subprocess_descent,
    "recording loop": with_torch_autograd,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_through_any_solver_is_the_dense_implicit_gradient(name: str) -> None:
    theta, v, init = problem(), randn(4, seed=3), torch.zeros(4, dtype=F64)
    x = il.argmin(smooth_objective, SOLVERS[name])(init, *theta)
    got = torch.autograd.grad(x, theta, v)
    exact = newton(smooth_objective, init, *(t.detach() for t in theta))
    # every solver ends with a gradient of 1e-7 or less, so x is within 1e-7 / 1.6 (the strength alone) of the minimum
    assert relative_error(x, exact) < 1e-6
    for g, e in zip(got, dense_gradients(smooth_objective, exact, theta, v), strict=True):
        assert relative_error(g, e) < 2e-6  # Lipschitz in x, with a constant of order one


def test_backpropagation_through_an_unrolled_loop_gives_the_same_gradient() -> None:
    theta, v = problem(), randn(4, seed=3)
    x = torch.zeros(4, dtype=F64, requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(smooth_objective(x, *theta), x, create_graph=True)
        x = x - 0.1 * gradient
    unrolled = torch.autograd.grad(x, theta, v)
    layer = il.argmin(smooth_objective, newton)
    implicit = torch.autograd.grad(layer(torch.zeros(4, dtype=F64), *theta), theta, v)
    for g, e in zip(implicit, unrolled, strict=True):
        assert relative_error(g, e) < 1e-8  # (1 - 0.1 * 1.6)^300 = 1e-23: the loop has converged; rtol 1e-10 remains


# ------------------------------------------------------------------------------------------------------------ pytrees

Point = namedtuple("Point", ["a", "b"])

# Three leaves of shapes (2, 2), (), (3,) in every kind of container, and how to take them out again.
CONTAINERS: dict[str, tuple[Any, Any]] = {
    "dict": (lambda w, s, u: {"w": w, "s": s, "u": u}, lambda t: (t["w"], t["s"], t["u"])),
    "OrderedDict": (lambda w, s, u: OrderedDict(w=w, s=s, u=u), lambda t: (t["w"], t["s"], t["u"])),
    "list": (lambda w, s, u: [w, s, u], lambda t: tuple(t)),
    "tuple": (lambda w, s, u: (w, s, u), lambda t: t),
    "namedtuple": (lambda w, s, u: Point(w, Point(s, u)), lambda t: (t.a, t.b.a, t.b.b)),
    "nested": (
        lambda w, s, u: {"x": [w, {"y": (s,)}], "z": Point([], u)},
        lambda t: (t["x"][0], t["x"][1]["y"][0], t["z"].b),
    ),
}


def flat_objective(x: Tensor, theta: Tensor) -> Tensor:
    """Couples all entries: a block-diagonal solve would be wrong."""
    return torch.logsumexp(torch.cat([x, -x.sum().reshape(1), theta]), 0) + 0.5 * ((x - theta) ** 2).sum()


def parts(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return flat[:4].reshape(2, 2), flat[4], flat[5:]


def join(w: Tensor, s: Tensor, u: Tensor) -> Tensor:
    return torch.cat([w.reshape(-1), s.reshape(1), u])


@pytest.mark.parametrize("kind", CONTAINERS)
def test_pytrees_of_coupled_leaves_have_the_gradient_of_the_flat_problem(kind: str) -> None:
    build, take = CONTAINERS[kind]
    theta, v = randn(8, seed=4).requires_grad_(), randn(8, seed=5)
    layer = il.argmin(
        lambda x, t: flat_objective(join(*take(x)), join(*take(t))),
        lambda f, x, t: build(*parts(newton(flat_objective, torch.zeros(8, dtype=F64), join(*take(t))))),
    )
    x = layer(build(*parts(torch.zeros(8, dtype=F64))), build(*parts(theta)))
    assert type(x) is type(build(0, 0, 0))
    (got,) = torch.autograd.grad(join(*take(x)), theta, v)
    exact = newton(flat_objective, torch.zeros(8, dtype=F64), theta.detach())
    (expected,) = dense_gradients(flat_objective, exact, [theta], v)
    assert relative_error(got, expected) < 1e-9  # condition below 3


def test_the_order_of_dictionary_keys_is_irrelevant() -> None:
    def run(order: list[str], answer_order: list[str]) -> list[Tensor]:
        values = {"a": randn(2, seed=1), "b": randn(3, seed=2)}
        theta = {key: values[key].requires_grad_() for key in order}

        def objective(x: Any, t: Any) -> Tensor:
            both = torch.cat([x["a"] - t["a"], x["b"] - t["b"]])
            return 0.5 * (both**2).sum() + 0.1 * torch.logsumexp(torch.cat([x["a"], x["b"]]), 0)

        def solver(f: Any, x: Any, t: Any) -> Any:
            answer = GradientDescent(step_size=0.9, max_steps=100)(f, x, t)
            return {key: answer[key] for key in answer_order}

        x = il.argmin(objective, solver)({key: torch.zeros_like(values[key]) for key in order}, theta)
        return list(torch.autograd.grad((x["a"] ** 2).sum() + x["b"].sum(), (theta["a"], theta["b"])))

    expected = run(["a", "b"], ["a", "b"])
    for order, answer_order in ((["b", "a"], ["a", "b"]), (["a", "b"], ["b", "a"]), (["b", "a"], ["b", "a"])):
        for g, e in zip(run(order, answer_order), expected, strict=True):
            assert relative_error(g, e) < 1e-13  # sums in another order; condition below 2


def test_gradients_reach_every_leaf_of_several_structured_thetas() -> None:
    a, b, c = (randn(3, seed=s).requires_grad_() for s in (1, 2, 3))
    layer = il.argmin(
        lambda x, first, second: ((x - first["a"] * first["rest"][0]) ** 2).sum() + ((x - second[1]) ** 2).sum(),
        lambda f, x, first, second: (first["a"] * first["rest"][0] + second[1]) / 2,
    )
    x = layer(torch.zeros(3, dtype=F64), {"a": a, "rest": (b,)}, ["label", c, None, 3])
    grads = torch.autograd.grad(x.sum(), (a, b, c))
    for g, e in zip(grads, (b / 2, a / 2, torch.full_like(c, 0.5)), strict=True):
        assert torch.allclose(g, e, rtol=1e-12)
