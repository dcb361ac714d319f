"""Answers that are not exact: certificates, the stationarity check, and iterations as inner solvers."""

# C: bound of d^2 f / dtheta dx. rho, rho_C: Lipschitz constants in x of the Hessian and of that mixed derivative.

from __future__ import annotations

import math
from typing import Any

import torch

import implicitlayer as il
from implicitlayer import testing
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import SEEDS
from tests.thorough._reference import F64, Dense, Tensor
from tests.thorough._trial import Trial, relative_error

# sup of the third derivative of softplus: s (1 - s) (1 - 2 s) at s = (1 - 1 / sqrt 3) / 2
SOFTPLUS_3 = 1 / (6 * 3**0.5)
LIMIT = 1e-3  # the default stationarity_rtol


def moved(problem: testing.ArgminProblem, distance: float, seed: int) -> Any:
    """A solver whose answer is this far from the solution."""
    direction = testing.normal_tensor(problem.init.shape, seed=seed)

    def solver(f: Any, init: Tensor, *theta: Tensor) -> Tensor:
        return problem.solution(*theta) + distance * direction / direction.norm()

    return solver


def mixed_constants(problem: testing.ArgminProblem) -> tuple[float, float]:
    """C and rho_C of softplus(W x + o) for theta = o: W' diag(s'), s' <= 1/4."""
    weight = problem.theta[0].detach()
    norm, row = float(torch.linalg.matrix_norm(weight, 2)), float(weight.norm(dim=1).max())
    return norm / 4, SOFTPLUS_3 * row * norm


def work_certificate(trial: Trial, bound: int, n: int, tenths: int, seed: int, distance: int, steps: int) -> None:
    """Both errors made on purpose: x moved by 1e-8 to 1, conjugate gradients stopped early."""
    trial.kind = "bound" if bound else "estimate"
    problem = testing.smooth_convex_problem(n, log10_cond=tenths / 10, seed=seed)
    assert problem.mu is not None and problem.rho is not None
    weight, offset, strength = problem.theta[0].detach(), problem.theta[1], problem.theta[2].detach()
    mixed, mixed_lipschitz = mixed_constants(problem)
    known = il.Assumptions(problem.mu, problem.rho, 0.0, mixed, mixed_lipschitz)
    layer = il.argmin(
        problem.objective,
        moved(problem, 10.0 ** (-distance), seed + 3),
        linear_solver=il.ConjugateGradient(max_steps=steps),
        stationarity_rtol=None,
        assumptions=known if bound else None,
    )
    v = testing.cotangent(problem.init, seed=seed + 11)
    with il.diagnostics() as records:
        x = layer(problem.init, weight, offset, strength)
        got = torch.autograd.grad(x, offset, v)
    record = records[-1]
    assert isinstance(record, il.BackwardRecord)
    error = record.gradient_error
    dense = Dense.of(problem, [1])
    right = dense.vjp(v)
    true = float((got[0] - right[0]).norm())
    trial.errors.append(relative_error(got, right))
    ratio = float(error) / true if true > 0 else math.inf
    trial.numbers[f"{trial.kind} / error"] = ratio
    if bound:
        # the true error is known to about condition * 1e-15 of the gradient
        noise = dense.condition * 1e-14 * float(right[0].norm())
        trial.claim(error.rigorous, f"no bound: {error.note}")
        trial.claim(float(error) >= true - noise, f"bound {float(error):.3e} below the error {true:.3e}")
        away = float((x.detach() - problem.solution(*problem.theta)).norm())
        trial.claim(float(error.distance) >= away * (1 - 1e-6) - 1e-14 / problem.mu, "distance below the true one")
    else:
        trial.claim(not error.rigorous, "an estimate calls itself rigorous")


def work_stationarity(trial: Trial, n: int, tenths: int, seed: int, distance: int) -> None:
    """Quadratics with an answer at a known distance: when a warning must be given, and when it must not.

    With F = H d, the estimate is |F|^2 / |H F|. It is at most |d|, and at least 2 k / (1 + k^2) |d| with k the
    condition (Kantorovich's inequality for H^2).
    """
    trial.must = "either"
    problem = testing.quadratic_problem(n, log10_cond=tenths / 10, seed=seed)
    matrix = problem.theta[0].detach()
    exact = problem.solution(*problem.theta)
    away = float(exact.norm()) * 10.0 ** (-distance / 2)
    layer = il.argmin(problem.objective, moved(problem, away, seed + 3))
    x = layer(problem.init, *problem.theta).detach()
    record = layer.records[0]
    assert isinstance(record, il.ForwardRecord) and record.estimated_distance is not None
    true, condition = float((x - exact).norm()), float(torch.linalg.cond(matrix))
    size = float(max(x.norm(), (x - problem.init).norm()))
    relative = true / size if size > 0 else math.inf  # the answer is init, and both are zero
    least = 2 * condition / (1 + condition**2)
    trial.kind = "in between"
    noise = 1e-9 + 1e-15 * condition / relative  # F itself is rounded, by eps ||H|| |x| at most
    trial.claim(float(record.estimated_distance) <= true * (1 + noise), "the estimated distance is above the true one")
    trial.claim(float(record.estimated_distance) >= least * true * (1 - noise), "the estimated distance is too small")
    if least * relative > LIMIT * (1 + noise):
        trial.kind, trial.must = "must warn", "report"
    elif relative < LIMIT * (1 - noise):
        trial.kind, trial.must = "must not warn", "right"
    trial.claim(record.stationary is not None, "no verdict")


def work_iteration(trial: Trial, solver: int, n: int, tenths: int, seed: int) -> None:
    """Gradients through iterations that stop at ||g|| <= 1e-11 ||g_0|| (or thereabouts)."""
    problem = testing.smooth_convex_problem(n, log10_cond=tenths / 10, seed=seed)
    assert problem.mu is not None and problem.beta is not None and problem.rho is not None
    settings: dict[str, Any] = {"max_steps": 100_000, "rtol": 1e-11}
    name, inner = (
        ("GradientDescent", il.solvers.GradientDescent(1 / problem.beta, **settings)),
        (
            "AcceleratedGradient",
            il.solvers.AcceleratedGradient(smoothness=problem.beta, strong_convexity=problem.mu, **settings),
        ),
        ("AcceleratedGradient, no constants", il.solvers.AcceleratedGradient(**settings)),
        (
            "TorchOptimizer LBFGS",
            il.solvers.TorchOptimizer(
                torch.optim.LBFGS,
                max_steps=200,
                rtol=1e-9,
                line_search_fn="strong_wolfe",
                tolerance_grad=0.0,  # else it stops by itself, far above rtol
                tolerance_change=0.0,
            ),
        ),
        ("SciPy BFGS", il.solvers.SciPyMinimize("BFGS", options={"gtol": 1e-9})),
    )[solver]
    trial.kind = name
    if solver >= 3:  # the line searches of PyTorch and SciPy may give up near rounding, and their status says so
        trial.must = "either"
    offset = problem.theta[1]
    layer = il.argmin(problem.objective, inner)
    v = testing.cotangent(problem.init, seed=seed + 11)
    x = layer(problem.init, problem.theta[0].detach(), offset, problem.theta[2].detach())
    got = torch.autograd.grad(x, offset, v)
    forward = layer.records[0]
    assert isinstance(forward, il.ForwardRecord)
    if forward.solver_status is not None and not forward.solver_status.ok:
        trial.reports.append(f"solver status {forward.solver_status.name}")
    trial.look_at(layer.last_record)
    dense = Dense.of(problem, [1])
    u, right = dense.adjoint(v), dense.vjp(v)
    away = float((x.detach() - problem.solution(*problem.theta)).norm())
    # what the solver left: x is |g| / mu away at most, and the gradient errs by (C rho |u| / mu + rho_C |u|) per that
    mixed, mixed_lipschitz = mixed_constants(problem)
    inner_error = (mixed * problem.rho / problem.mu + mixed_lipschitz) * float(u.norm()) * away
    allowed = dense.allowed_vjp(v, F64) + 2 * inner_error / float(right[0].norm())
    trial.compare("gradient", got, right, allowed)
    start = torch.zeros_like(x).requires_grad_()
    first = float(torch.autograd.grad(problem.objective(start, *problem.theta), start)[0].norm())
    # the loosest of the tolerances above: 1e-9, absolute or relative to the first gradient
    allowed_away = 1e-9 * max(1.0, first) / problem.mu * n**0.5
    trial.claim(away <= allowed_away, f"the solver stopped {away:.1e} away, allowed {allowed_away:.1e}")


FAMILIES = [
    DrawnFamily("certificate", "record.gradient_error against the true error", 500,
                {"bound": (0, 1), "n": (1, 8), "tenths": (0, 20), "seed": SEEDS, "distance": (0, 8), "steps": (1, 8)},
                work_certificate),
    DrawnFamily("stationarity", "answers that are not stationary, at known distances", 300,
                {"n": (1, 12), "tenths": (0, 20), "seed": SEEDS, "distance": (0, 16)}, work_stationarity),
    DrawnFamily("iteration", "the library's own inner solvers", 200,
                {"solver": (0, 4), "n": (1, 8), "tenths": (0, 20), "seed": SEEDS}, work_iteration),
]  # fmt: skip
