"""Nonlinear problems: smooth convex, nonconvex minima, saddle points under every policy, roots."""

from __future__ import annotations

import torch

import implicitlayer as il
from implicitlayer import testing
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import DTYPES, SEEDS, must_be_right
from tests.thorough._reference import F64, Dense
from tests.thorough._trial import SLACK, Trial, default_rtol, relative_error, residual_allowed


def work_minimum(trial: Trial, n: int, tenths: int, seed: int, nonconvex: int, single: int) -> None:
    """Softplus regressions and double wells at a minimum."""
    dtype = DTYPES[single]
    make = testing.nonconvex_problem if nonconvex else testing.smooth_convex_problem
    trial.kind = f"{'f32' if single else 'f64'}, {'double wells' if nonconvex else 'softplus'}"
    problem = make(n, log10_cond=tenths / 10, seed=seed, dtype=dtype)
    dense = Dense.of(problem)
    trial.must = must_be_right(dense.condition, n, dtype)
    v = testing.cotangent(problem.init, seed=seed + 11)
    layer = il.argmin(problem.objective, problem.solver)
    got = torch.autograd.grad(layer(problem.init, *problem.theta), problem.theta, v)
    trial.look_at(layer.last_record)
    trial.compare("gradient", got, dense.vjp(v), dense.allowed_vjp(v, dtype))


POLICIES = ("raise", "il.Minres", "minres", "truncate", "damp")


def work_saddle(trial: Trial, n: int, tenths: int, seed: int, policy: int) -> None:
    """At a saddle point: an error by default, right with MINRES, and a record of what else was done."""
    name = trial.kind = POLICIES[policy]
    problem = testing.nonconvex_problem(n, log10_cond=tenths / 10, seed=seed)
    assert problem.saddle is not None
    trial.must = "right" if "in" in name.lower().split(".")[-1] else "either"
    solver = il.Minres() if name == "il.Minres" else None
    repair = name if name in ("minres", "truncate", "damp") else "raise"
    layer = il.argmin(
        problem.objective, lambda f, x, *t: problem.saddle, linear_solver=solver, negative_curvature=repair
    )
    tilt = problem.theta[2]
    v = testing.cotangent(problem.init, seed=seed + 11)
    x = layer(problem.init, *problem.theta)
    gradient = torch.autograd.grad(x, tilt, v)[0]  # the objective holds -t'x: this is u with H u = v
    record = layer.last_record
    assert isinstance(record, il.BackwardRecord)
    trial.look_at(record)
    at = problem.saddle.clone().requires_grad_()
    value = problem.stationarity(at, *[t.detach() for t in problem.theta])
    hessian = torch.stack([torch.autograd.grad(f, at, retain_graph=True)[0] for f in value])
    solution = record.solution
    damped = hessian + (0.0 if solution.damping is None else float(solution.damping)) * torch.eye(n, dtype=F64)
    if solution.remedy and name in ("truncate", "damp"):
        trial.reports.append(f"remedy: {solution.remedy.split(' by ')[0]}")
    if name == "truncate" and solution.remedy:  # a biased gradient, and named so; a descent direction at least
        trial.claim(float(gradient @ v) > 0, "the truncated iterate is no descent direction")
        return
    values = torch.linalg.svdvals(damped)
    condition = float(values[0] / values[-1])
    error = relative_error([gradient], [torch.linalg.solve(damped, v)])
    trial.errors.append(error)
    allowed = condition * residual_allowed(F64, n)
    trial.claim(error <= allowed, f"error {error:.2e} of the system named in the record, allowed {allowed:.2e}")
    if trial.wrong and trial.reports:  # a remedy that solves another system than the record says is no report
        trial.reports.clear()


ROOT_SOLVERS: tuple[tuple[str, il.LinearSolver], ...] = (
    ("GMRES", il.Gmres()),
    ("GMRES restarted", il.Gmres(restart=4)),
    ("Bi-CGSTAB", il.Bicgstab()),
    ("normal equations", il.NormalEquations()),
    ("dense", il.Dense()),
)


def work_root(trial: Trial, n: int, tenths: int, seed: int, solver: int, single: int) -> None:
    """Roots with a Jacobian that is not symmetric, by every general linear solver."""
    dtype = DTYPES[single]
    name, linear_solver = ROOT_SOLVERS[solver]
    trial.kind = name
    problem = testing.root_problem(n, log10_cond=tenths / 10, seed=seed, dtype=dtype)
    dense = Dense.of(problem)
    robust = name in ("GMRES", "dense")  # the others may stall on a general matrix, and say so
    trial.must = must_be_right(dense.condition, n, dtype) if robust else "either"
    v = testing.cotangent(problem.init, "hard" if seed % 2 else "normal", seed=seed + 11, matrix=dense.jacobian.T)
    layer = il.root(problem.residual, problem.solver, linear_solver=linear_solver)
    got = torch.autograd.grad(layer(problem.init, *problem.theta), problem.theta, v)
    trial.look_at(layer.last_record)
    trial.compare("gradient", got, dense.vjp(v), dense.allowed_vjp(v, dtype))


def work_proximal(trial: Trial, n: int, tenths: int, seed: int, strength: int) -> None:
    """1/2 (x - y)'A(x - y) + s/2 |x - t|^2: x = (A + s I)^-1 (A y + s t), with a number or a learned s per entry."""
    learned = bool(seed % 2)
    trial.kind = "learned strength" if learned else "fixed strength"
    matrix = testing.spd_matrix(n, log10_cond=tenths / 10, seed=seed)
    y, t = (testing.normal_tensor((n,), seed=seed + i).requires_grad_() for i in (1, 2))
    size = 10.0**strength
    weights = (
        (size * testing.normal_tensor((n,), seed=seed + 3).abs().clamp_min(0.1)).requires_grad_() if learned else None
    )
    factor = torch.full((n,), size, dtype=F64) if weights is None else weights

    def exact(t: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(matrix + torch.diag(s), matrix @ y + s * t)

    objective = il.proximal(lambda x, y: 0.5 * (x - y) @ matrix @ (x - y), size if weights is None else weights)
    rtol = default_rtol(F64)
    layer = il.argmin(objective, lambda f, x, t, y: exact(t, y, factor).detach())
    inputs = [t, y] if weights is None else [t, y, weights]
    v = testing.cotangent(t, seed=seed + 11)
    got = torch.autograd.grad(layer(torch.zeros(n, dtype=F64), t, y), inputs, v)
    trial.look_at(layer.last_record)
    expected = torch.autograd.grad(exact(t, y, factor), inputs, v)
    # Preconditioned by s, the residual is small relative to v in units of s (up to sqrt of its spread, twice); the
    # errors of A u and s u relative to the gradient: their sizes are at most ||A|| |u| and |s| |u|, and the gradient in
    # t alone is s u.
    full = matrix + torch.diag(factor.detach())
    values = torch.linalg.eigvalsh(full)
    spread = float(factor.detach().max() / factor.detach().min())
    u = torch.linalg.solve(full, v)
    at = exact(t, y, factor).detach()
    mixed = float(torch.linalg.matrix_norm(matrix, 2) + factor.detach().max() + (at - t.detach()).norm())
    size_of_gradient = float(torch.cat([e.reshape(-1) for e in expected]).norm())
    allowed = float(values[-1] / values[0]) * spread * (SLACK * rtol + 8 * n * 2.3e-16) * mixed * float(u.norm())
    trial.compare("gradient", got, expected, allowed / size_of_gradient)


FAMILIES = [
    DrawnFamily("minimum", "smooth convex and nonconvex problems at a minimum", 700,
                {"n": (1, 12), "tenths": (0, 30), "seed": SEEDS, "nonconvex": (0, 1), "single": (0, 1)}, work_minimum),
    DrawnFamily("saddle", "saddle points under every policy for negative curvature", 400,
                {"n": (1, 10), "tenths": (0, 20), "seed": SEEDS, "policy": (0, 4)}, work_saddle),
    DrawnFamily("root", "non-symmetric roots by every general linear solver", 500,
                {"n": (1, 12), "tenths": (0, 30), "seed": SEEDS, "solver": (0, 4), "single": (0, 1)}, work_root),
    DrawnFamily("proximal", "proximal problems with their closed form", 200,
                {"n": (1, 12), "tenths": (0, 30), "seed": SEEDS, "strength": (-3, 3)}, work_proximal),
]  # fmt: skip
