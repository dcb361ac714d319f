"""Part of the suite: gradients of layers of every kind, by ``check_argmin_gradients`` and dense references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

F64 = torch.float64
NamedCheck = tuple[str, Callable[[], None]]


def passes(testing: Any, function: Callable[..., Any], problem: Any, **settings: Any) -> None:
    """check_argmin_gradients on a problem of the kit says "passed"."""
    report = testing.check_argmin_gradients(function, problem.solver, problem.init, *problem.theta, **settings)
    assert report.verdict == "passed", str(report)


def passes_on(
    testing: Any, function: Callable[..., Any], solver: Callable[..., Any], init: Any, *theta: Any, **settings: Any
) -> None:
    """The same on a problem written here."""
    report = testing.check_argmin_gradients(function, solver, init, *theta, **settings)
    assert report.verdict == "passed", str(report)


# --------------------------------------------------------------------------------------------------------- structures


def structures(il: Any, testing: Any) -> Iterator[NamedCheck]:
    """Several leaves in x and theta, coupled; 0-d and empty ones; theta that does not enter."""
    theta = {"w": testing.normal_tensor((2, 2), seed=4), "b": testing.normal_tensor((), seed=5)}
    init = {"p": torch.zeros(2, dtype=F64), "q": torch.zeros((), dtype=F64), "r": torch.zeros(0, dtype=F64)}
    layer = il.argmin(coupled, solve_coupled)
    yield "pytrees", partial(passes_on, testing, coupled, solve_coupled, init, theta, torch.arange(2))
    yield "order of keys", partial(testing.check_dict_order, layer, init, theta, torch.arange(2))
    problem = testing.quadratic_problem(4, log10_cond=1, dtype=torch.float32)
    yield "float32", partial(passes, testing, problem.objective, problem, modes=("vjp", "jvp"))
    wells = testing.nonconvex_problem(3)
    yield "a local minimum", partial(passes, testing, wells.objective, wells, modes=("vjp",))
    large = testing.quadratic_problem(12, log10_cond=4)
    yield "condition 1e4", partial(passes, testing, large.objective, large, modes=("vjp", "jvp"))
    for log10_scale in (-100, 100):
        problem = testing.smooth_convex_problem(3, log10_cond=1, log10_scale=log10_scale)
        yield f"objective times 1e{log10_scale}", partial(scaled_objective_is_right, il, testing, problem)


def coupled(x: Any, theta: Any, numbers: Tensor) -> Tensor:
    """1/2 (|p|^2 + 2 q^2 + q sum p) - <w 1 + numbers, p> - b^2 q."""
    p, q = x["p"], x["q"]
    quadratic = 0.5 * ((p * p).sum() + 2 * q * q + q * p.sum())
    return quadratic - (theta["w"].sum(1) + numbers) @ p - theta["b"] ** 2 * q + x["r"].sum()


def solve_coupled(f: Any, init: Any, theta: Any, numbers: Tensor) -> Any:
    """Stationary where p + q/2 = c and 2 q + sum(p)/2 = d: eliminate p."""
    c, d = theta["w"].sum(1) + numbers, theta["b"] ** 2
    q = (d - c.sum() / 2) / (2 - len(c) / 4)
    return {"p": c - q / 2, "q": q, "r": init["r"]}


def scaled_objective_is_right(il: Any, testing: Any, problem: Any) -> None:
    """The factor is no theta: the gradient is that of the problem, whatever its scale and that of the cotangent."""
    for log10_scale in (0, -150, 150):
        v = testing.cotangent(problem.init, log10_scale=log10_scale, seed=6)
        x = il.argmin(problem.objective, problem.solver)(problem.init, *problem.theta)
        got = torch.autograd.grad(x, problem.theta, v)
        for g, right in zip(got, problem.dense_gradient(v), strict=True):
            size = right.abs().max()
            assert float(((g - right) / size).abs().max()) <= 1e-8, f"{problem!r}, cotangent 1e{log10_scale}: {g}"


# ----------------------------------------------------------------------------------------------------------- settings


def settings_of_layers(il: Any, testing: Any) -> Iterator[NamedCheck]:
    """Proximal objectives, fixed points, saddle points, batches, Gauss-Newton matrices, polish."""
    A, b = testing.spd_matrix(3, log10_cond=1), testing.normal_tensor((3,), seed=7)
    center, strength = testing.normal_tensor((3,), seed=8), torch.tensor([0.5, 1.0, 2.0], dtype=F64)

    def quadratic(x: Tensor) -> Tensor:
        return 0.5 * x @ (A @ x) - b @ x

    def proximal_solution(f: Any, x: Tensor, center: Tensor, strength: Any = 0.7) -> Tensor:
        return torch.linalg.solve(A + strength * torch.eye(3, dtype=F64), b + strength * center)

    known = il.proximal(quadratic, 0.7)
    yield "proximal", partial(passes_on, testing, known, proximal_solution, torch.zeros(3, dtype=F64), center)
    with_data = il.proximal(lambda x, b: 0.5 * x @ (A @ x) - b @ x, 0.7)
    yield (
        "proximal with data",
        partial(
            passes_on,
            testing,
            with_data,
            lambda f, x, center, b: torch.linalg.solve(A + 0.7 * torch.eye(3, dtype=F64), b + 0.7 * center),
            torch.zeros(3, dtype=F64),
            center,
            b,
        ),
    )

    def learned(x: Tensor, center: Tensor, strength: Tensor) -> Tensor:
        value: Tensor = il.proximal(quadratic, strength)(x, center)
        return value

    yield (
        "proximal, learned strength",
        partial(passes_on, testing, learned, proximal_solution, torch.zeros(3, dtype=F64), center, strength),
    )
    # a linear loss has no curvature: the metric is the Hessian, and zero steps of CG are exact (first-order MAML)
    yield (
        "proximal, zero steps",
        partial(
            passes_on,
            testing,
            il.proximal(lambda x, slope: slope @ x, 0.7),
            lambda f, x, center, slope: center - slope / 0.7,
            torch.zeros(3, dtype=F64),
            center,
            b,
            linear_solver=il.ConjugateGradient(max_steps=0),
            modes=("vjp", "jvp", "vmap"),
        ),
    )
    root = testing.root_problem(3, log10_cond=1, seed=2)
    for solver in (il.Dense(), il.NormalEquations()):
        yield (
            f"root by {type(solver).__name__}",
            partial(passes, testing, root.residual, root, kind="root", linear_solver=solver, modes=("vjp", "jvp")),
        )
    contraction = testing.general_matrix(3, seed=9) / 2
    yield (
        "fixed point",
        partial(
            passes_on,
            testing,
            lambda x, m, c: m @ torch.tanh(x) + c,
            iterate,
            torch.zeros(3, dtype=F64),
            contraction,
            b,
            kind="fixed_point",
        ),
    )
    saddle = testing.indefinite_matrix(4, log10_cond=1, seed=10)
    target = testing.normal_tensor((4,), seed=11)
    for settings in ({"linear_solver": il.Minres()}, {"negative_curvature": "minres"}):
        how = "linear_solver=Minres()" if "linear_solver" in settings else "negative_curvature='minres'"
        yield (
            f"saddle point, {how}",
            partial(
                passes_on,
                testing,
                lambda x, s, t: 0.5 * x @ (s @ x) - t @ x,
                lambda f, x, s, t: torch.linalg.solve((s + s.T) / 2, t),
                torch.zeros(4, dtype=F64),
                saddle,
                target,
                **settings,
            ),
        )
    yield "saddle point, refused", partial(saddle_is_refused, il, testing)
    data = testing.normal_tensor((5, 3), seed=12)
    y = testing.normal_tensor((5,), seed=13)
    yield (
        "Gauss-Newton matrix",
        partial(
            passes_on,
            testing,
            il.composite(lambda o, data, y, w: 0.5 * (w * (o - y) ** 2).sum(), lambda x, data, y, w: data @ x),
            lambda f, x, data, y, w: torch.linalg.solve((data.T * w) @ data, (data.T * w) @ y),
            torch.zeros(3, dtype=F64),
            data,
            y,
            y**2 + 0.5,
            curvature="gauss_newton",
            modes=("vjp", "jvp", "vmap"),
        ),
    )
    lanes = torch.stack([center, b, center - b])  # [3 lanes, 3]
    yield (
        "batch_dims",
        partial(
            passes_on,
            testing,
            lambda x, t, s: (torch.exp(s) * torch.cosh(x) - t * x).sum(-1),
            lambda f, x, t, s: torch.asinh(t * torch.exp(-s)),
            torch.zeros(3, 3, dtype=F64),
            lanes,
            strength.log(),  # shared by all lanes
            batch_dims=1,
            modes=("vjp", "jvp", "double"),
        ),
    )
    yield "a Newton step after a coarse solver", partial(polish_helps, testing)
    shared = torch.tensor([0.3, -0.2, 0.5], dtype=F64)
    yield (
        "a batched solver under vmap",
        partial(
            passes_on,
            testing,
            lambda x, t: 0.5 * ((x - t) ** 2).sum() + 0.25 * (x**4).sum(),
            il.solvers.GradientDescent(step_size=0.5, max_steps=200, rtol=1e-13),
            torch.ones(3, dtype=F64),
            shared,
            modes=("vjp", "vmap"),
        ),
    )


def saddle_is_refused(il: Any, testing: Any) -> None:
    """Conjugate gradients are for minima: at a saddle point a layer raises, alone and in a batch."""
    problem = testing.nonconvex_problem(3, log10_cond=0.3)
    layer = il.argmin(problem.objective, lambda f, x, *theta: problem.saddle)
    v = testing.normal_tensor((3,), seed=15)
    for x in (
        layer(problem.init, *problem.theta),
        torch.func.vmap(lambda init: layer(init, *problem.theta))(torch.stack([problem.init] * 2))[1],
    ):
        try:
            torch.autograd.grad(x, problem.theta, v)
        except il.IndefiniteError:
            continue
        raise AssertionError(f"{problem!r}: a gradient was made at a saddle point")


def polish_helps(testing: Any) -> None:
    """Two Newton steps take an error of 1e-5 to rounding, as the report of the check measures it."""
    problem = testing.smooth_convex_problem(3, log10_cond=1)

    def coarse(f: Any, x: Tensor, *theta: Tensor) -> Tensor:
        found: Tensor = problem.solution(*theta) * (1 + 1e-5)
        return found

    report = testing.check_argmin_gradients(
        problem.objective, coarse, problem.init, *problem.theta, polish=2, modes=("vjp",)
    )
    assert report.verdict == "passed" and report.relative_error < 1e-9, str(report)


def iterate(function: Callable[..., Tensor], x: Tensor, *theta: Tensor) -> Tensor:
    """60 rounds of a map that contracts by one half: 1e-18."""
    for _ in range(60):
        x = function(x, *theta)
    return x
