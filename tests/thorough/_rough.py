"""Answers that are rougher than they look: step limits at ill conditioning, loose lassos; and corners of sets."""

# A layer promises an answer within LIMIT of the solution (relative to its size), or a word about it. What is compared
# with the exact gradient is therefore allowed the error of an answer that is LIMIT away, times how much the gradient's
# own terms cancel: for thetas in which d^2 f / dtheta dx = M(x) it is ||u|| ||M(x) - M(x*)|| / ||M(x*)'u||.

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

import implicitlayer as il
from implicitlayer import testing
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import SEEDS
from tests.thorough._reference import F64
from tests.thorough._trial import Trial, residual_allowed

LIMIT = 1e-3  # the default stationarity_rtol


def step_limited(solver: int, steps: int, beta: float) -> tuple[str, Any]:
    """A solver that stops after so many steps, or after 1e-6 of its first gradient."""
    limits: dict[str, Any] = {"max_steps": steps, "rtol": 1e-6}
    return (
        ("LBFGS", il.solvers.LBFGS(**limits)),
        ("AcceleratedGradient", il.solvers.AcceleratedGradient(smoothness=beta, **limits)),
        ("GradientDescent", il.solvers.GradientDescent(1 / beta, **limits)),
        ("NewtonCG", il.solvers.NewtonCG(**{**limits, "max_steps": 1 + steps // 40})),
        ("SciPy L-BFGS-B", il.solvers.SciPyMinimize("L-BFGS-B", options={"maxiter": steps, "maxcor": 5})),
    )[solver]


def work_step_limited(
    trial: Trial, solver: int, n: int, tenths: int, seed: int, steps: int, told: int, linear: int
) -> None:
    """1/2 x'Hx + s/2 x'x - p'x at s = 0, conditions of 1e2 to 1e8: the gradient in s is -u'x with H u = v.

    ``told``: whether the layer sees the solver's status, or a plain function.
    """
    trial.must = "either"
    problem = testing.quadratic_problem(n, log10_cond=tenths / 10, seed=seed)
    matrix, p = (t.detach() for t in problem.theta)
    values, vectors = torch.linalg.eigh(matrix)
    name, inner = step_limited(solver, steps, float(values[-1]))
    trial.kind = name
    run = inner if told else lambda f, x, *theta: inner(f, x, *theta)
    linear_solver = (None, il.Minres(), il.Dense())[linear]
    s = torch.zeros((), dtype=F64, requires_grad=True)
    layer = il.argmin(
        lambda x, s: 0.5 * x @ matrix @ x + 0.5 * s * x @ x - p @ x,
        run,
        **({} if linear_solver is None else {"linear_solver": linear_solver}),
    )
    v = testing.normal_tensor((n,), seed=seed + 5)
    x = layer(torch.zeros(n, dtype=F64), s)
    (got,) = torch.autograd.grad(x, s, v)
    exact, u = (vectors @ ((vectors.T @ t) / values) for t in (p, v))
    condition = float(values[-1] / values[0])
    size = float(x.detach().norm())
    away = float((x.detach() - exact).norm())
    # a Newton step by a solve to a residual rho is right to condition * rho
    blurred = 1 + condition * residual_allowed(F64, n)
    trial.numbers["away / allowed"] = away / (LIMIT * size) if size > 0 else math.inf
    if not told and away * blurred < LIMIT * size and condition < 1e6:
        trial.must = "right"  # a plain function whose answer is near enough: any word is a false alarm
    trial.claim(away <= LIMIT * size * blurred, f"the answer is {away / max(size, 1e-300):.1e} of its size away")
    right = -(u @ exact)
    cancelled = float(u.norm() * exact.norm() / right.abs())
    allowed = cancelled * (LIMIT * blurred * size / float(exact.norm()) + condition * residual_allowed(F64, n))
    trial.compare("gradient", [got], [right], allowed)


def work_rough_constrained(trial: Trial, n: int, tenths: int, seed: int, distance: int, hidden: int, kind: int) -> None:
    """1/2 x'Hx + s/2 x'x - p'x with a'x = 1 or a'x <= 1 at s = 0, and an answer that is off along the constraint.

    ``hidden``: the error lies along the flattest direction, behind 1e-3 of it along the steepest one.
    """
    trial.kind, trial.must = ("equation", "inequality")[kind], "either"
    problem = testing.quadratic_problem(n, log10_cond=tenths / 10, seed=seed)
    matrix = problem.theta[0].detach()
    z, a, v, w = (testing.normal_tensor((n,), seed=seed + i) for i in (1, 2, 3, 4))
    exact = z - a * (a @ z - 1) / (a @ a)
    p = matrix @ exact + float(matrix.diagonal().mean()) * a
    tangent = torch.linalg.qr(torch.cat([a[:, None], torch.eye(n, dtype=F64)], 1))[0][:, 1:n]
    values, vectors = torch.linalg.eigh(tangent.T @ matrix @ tangent)
    modes = tangent @ vectors
    error = modes[:, 0] + 1e-3 * modes[:, -1] if hidden else modes @ (modes.T @ w)
    answer = exact + 10.0 ** (-distance / 4) * exact.norm() * error / error.norm()
    u = modes @ ((modes.T @ v) / values)
    side = {("equality", "inequality")[kind]: lambda x, s: a @ x - 1}
    layer = il.constrained_argmin(
        lambda x, s: 0.5 * x @ matrix @ x + 0.5 * s * x @ x - p @ x, lambda problem, x, s: answer.clone(), **side
    )
    s = torch.zeros((), dtype=F64, requires_grad=True)
    x = layer(torch.zeros(n, dtype=F64), s)
    (got,) = torch.autograd.grad(x, s, v)
    condition, size = float(values[-1] / values[0]), float(answer.norm())
    away = float((x.detach() - exact).norm())
    blurred = 1 + condition * residual_allowed(F64, n)
    trial.numbers["away / allowed"] = away / (LIMIT * size)
    # the other side of the check: the conditions hold to LIMIT of their own terms, which cancel at most all but away
    if away * blurred < LIMIT * size / 10 and condition < 1e6:
        trial.must = "right"
    trial.claim(away <= LIMIT * size * blurred, f"the answer is {away / size:.1e} of its size away")
    right = -(u @ exact)
    cancelled = float(u.norm() * exact.norm() / right.abs())
    allowed = cancelled * (LIMIT * blurred * size / float(exact.norm()) + condition * residual_allowed(F64, n))
    trial.compare("gradient", [got], [right], allowed)


def coordinate_descent(data: np.ndarray, target: np.ndarray, strength: float, sweeps: int, tolerance: float) -> Any:
    """The lasso 1/2m |X x - y|^2 + a |x|_1 by cyclic coordinate descent from zero, until no entry moves by more.

    Source: J. Friedman et al., Regularization paths for generalized linear models via coordinate descent (2010).
    """
    m, n = data.shape
    x, rest, squares = np.zeros(n), target.copy(), (data**2).sum(0) / m
    for _ in range(sweeps):
        largest = 0.0
        for j in range(n):
            pull = x[j] * squares[j] + data[:, j] @ rest / m
            new = math.copysign(max(abs(pull) - strength, 0.0), pull) / squares[j]
            if new != x[j]:
                rest -= (new - x[j]) * data[:, j]
                largest = max(largest, abs(new - x[j]))
                x[j] = new
        if largest <= tolerance * max(np.abs(x).max(), 1e-300):
            break
    return x


def work_lasso(trial: Trial, m: int, n: int, seed: int, strength: int, tolerance: int, polish: int) -> None:
    """Lassos whose solver stops early: the gradient of |x|^2 in the strength, by the active set of the solution."""
    trial.must = "either"
    trial.kind = "polished" if polish else "as it is"
    draw = np.random.default_rng(seed)
    data = draw.normal(size=(m, n))
    target = data[:, : min(n, 4)] @ draw.normal(size=min(n, 4)) + 0.5 * draw.normal(size=m)
    a = 10 ** (-strength / 10) * np.abs(data.T @ target).max() / m
    exact = coordinate_descent(data, target, a, 20_000, 1e-15)
    free = exact != 0
    part = data[:, free]
    gram = part.T @ part / m
    signs = np.sign(exact[free])
    slack = a - np.abs(data.T @ (target - data @ exact) / m)
    condition = np.linalg.cond(gram) if free.any() else 1.0
    # a solution that is known to fewer digits than its distance from a kink, or no single one, decides nothing
    least = min([*np.abs(exact[free]) / np.abs(exact).max(), *slack[~free] / a, 1.0]) if free.any() else 0.0
    if not free.any() or condition > 1e6 or least < 1e-7:
        trial.kind = "undecided"
        return
    exact[free] = np.linalg.solve(gram, part.T @ target / m - a * signs)
    slope = -np.linalg.solve(gram, signs)  # dx / da on the free entries
    right = 2 * exact[free] @ slope
    X, y = torch.from_numpy(data), torch.from_numpy(target)
    theta = torch.tensor(a, dtype=F64, requires_grad=True)
    layer = il.argmin(
        lambda x, a: ((X @ x - y) ** 2).mean() / 2,
        lambda f, x, a: torch.from_numpy(coordinate_descent(data, target, float(a), 500, 10.0 ** (-tolerance / 2))),
        regularizer=lambda a: il.L1(a),
        polish=8 if polish else 0,
    )
    x = layer(torch.zeros(n, dtype=F64), theta)
    (got,) = torch.autograd.grad((x**2).sum(), theta)
    size = float(x.detach().norm())
    away = float(np.linalg.norm(x.detach().numpy() - exact))
    trial.claim(away <= 2 * LIMIT * size, f"the answer is {away / max(size, 1e-300):.1e} of its size away")
    # the gradient 2 x'slope: an x that is LIMIT away on the right piece, and GMRES to its residual
    cancelled = 2 * np.linalg.norm(exact) * np.linalg.norm(slope) / abs(right)
    allowed = cancelled * (2 * LIMIT + condition * n * residual_allowed(F64, n))
    trial.compare("gradient", [got], [torch.tensor(right)], float(allowed))


def work_corner(trial: Trial, kind: int, n: int, extra: int, seed: int, single: int) -> None:
    """Corners of {A x = b} and {A x <= b} with small integers: x does not move with the target, the gradient is 0."""
    dtype = torch.float32 if single else F64
    trial.kind = ("a set of equations", "equations", "inequalities")[kind] + (", f32" if single else "")
    generator = torch.Generator().manual_seed(seed)
    A = torch.randint(-3, 4, (n, n), generator=generator).to(F64)
    if abs(float(torch.linalg.det(A))) < 0.5:
        trial.kind = "singular"
        return
    corner = torch.randint(-2, 3, (n,), generator=generator).to(F64)
    if kind == 0:  # equations that follow from the others change no set
        A = torch.cat([A, torch.randint(-1, 2, (extra, n), generator=generator).to(F64) @ A])
    b = A @ corner
    pull = torch.randn(n, generator=generator, dtype=F64)
    if kind == 2:  # grad f + A'mu = 0 with mu > 0
        pull = A.T @ (0.5 + torch.rand(n, generator=generator, dtype=F64)) / 2
    A, b, answer = A.to(dtype), b.to(dtype), corner.to(dtype)
    target = (corner + pull).to(dtype).requires_grad_()
    bounds: list[Any] = [
        lambda f, s: il.argmin(f, s, constraint=il.sets.Affine(A, b), on_failure="raise"),
        lambda f, s: il.constrained_argmin(f, s, equality=lambda x, t: A @ x - b, on_failure="raise"),
        lambda f, s: il.constrained_argmin(f, s, inequality=lambda x, t: A @ x - b, on_failure="raise"),
    ]
    layer = bounds[kind](lambda x, t: ((x - t) ** 2).sum(), lambda f, x, t: answer.clone())
    v = testing.normal_tensor((n,), seed=seed + 1).to(dtype)
    (got,) = torch.autograd.grad(layer(torch.zeros(n, dtype=dtype), target), target, v)
    # the projection onto the free directions, of which there are none, is known to eps times the condition of A
    noise = 64 * n * float(torch.linalg.cond(A.double())) * torch.finfo(dtype).eps + 1e-9
    error = float(got.norm() / v.norm())
    trial.errors.append(error)
    trial.claim(error <= noise, f"a gradient of {error:.1e} where the solution does not move, allowed {noise:.1e}")


FAMILIES = [
    DrawnFamily("step limit", "solvers that stop early, at conditions of 1e2 to 1e8", 900,
                {"solver": (0, 4), "n": (2, 30), "tenths": (20, 80), "seed": SEEDS, "steps": (1, 200), "told": (0, 1),
                 "linear": (0, 2)}, work_step_limited),
    DrawnFamily("rough, constrained", "answers under constraints that are off, at conditions of 1e2 to 1e8", 400,
                {"n": (2, 20), "tenths": (20, 80), "seed": SEEDS, "distance": (4, 40), "hidden": (0, 1),
                 "kind": (0, 1)}, work_rough_constrained),
    DrawnFamily("loose lasso", "L1 layers around coordinate descent that stops early", 700,
                {"m": (5, 20), "n": (3, 20), "seed": SEEDS, "strength": (3, 25), "tolerance": (2, 16),
                 "polish": (0, 1)}, work_lasso),
    DrawnFamily("corner", "vertices of linear constraints", 500,
                {"kind": (0, 2), "n": (1, 6), "extra": (0, 2), "seed": SEEDS, "single": (0, 1)}, work_corner),
]  # fmt: skip
