"""Linear solvers on every kind of matrix, and singular Hessians behind a layer."""

from __future__ import annotations

from typing import Any

import torch

import implicitlayer as il
from implicitlayer import testing
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import DTYPES, SEEDS, must_be_right
from tests.thorough._reference import F64, Tensor, of_size_one
from tests.thorough._trial import SLACK, Trial, default_rtol, residual_allowed

SOLVERS: tuple[tuple[str, il.LinearSolver], ...] = (
    ("conjugate gradients", il.ConjugateGradient()),
    ("MINRES", il.Minres()),
    ("GMRES", il.Gmres()),
    ("GMRES restarted", il.Gmres(restart=7)),
    ("Bi-CGSTAB", il.Bicgstab()),
    ("normal equations", il.NormalEquations()),
    ("dense", il.Dense()),
)
KINDS = ("positive definite", "indefinite", "general", "singular, in range", "singular, out of range")
# What a solver is made for, and solves where rounding allows: there a report is a false alarm. Elsewhere a report is as
# good as an answer: conjugate gradients and MINRES need symmetry, restarts and Bi-CGSTAB may stall, normal equations
# square the condition.
MADE_FOR = {
    "conjugate gradients": ("positive definite",),
    "MINRES": ("positive definite", "indefinite"),
    "GMRES": ("positive definite", "indefinite", "general"),
    "dense": ("positive definite", "indefinite", "general"),
}


def work_solver(
    trial: Trial, solver: int, kind: int, n: int, tenths: int, seed: int, hard: int, single: int, big: int, far: int
) -> None:
    """CONVERGED is true: the residual, recomputed in float64, is what the tolerance promises; at every scale."""
    dtype = DTYPES[single]
    name, linear_solver = SOLVERS[solver]
    system = KINDS[kind]
    trial.kind = f"{name}, {system}"
    limit = 25 if single else 200
    matrix_scale = max(min(big, limit), -limit) if seed % 2 else 0  # half of them of size one
    # u = b / A must be a number of the dtype, with room for the condition
    room = 25 if single else 180
    rhs_scale = max(min(far, limit, matrix_scale + room), -limit, matrix_scale - room) if seed % 2 else 0
    if system.startswith("singular"):
        n = max(n, 2)
        symmetric = "symmetric" if name in ("conjugate gradients", "MINRES") or seed % 3 else "general"
        unit = testing.singular_matrix(n, seed % n, kind=symmetric, seed=seed)
        trial.must = "either" if hard or "in range" in system else "report"  # b = A z is in the range
    else:
        make = {"positive definite": testing.spd_matrix, "indefinite": testing.indefinite_matrix}
        unit = make.get(system, testing.general_matrix)(n, log10_cond=tenths / 10, seed=seed)
        good = system in MADE_FOR.get(name, ())
        trial.must = must_be_right(10 ** (tenths / 10), n, dtype) if good else "either"
    matrix = (unit * 10.0**matrix_scale).to(dtype)
    z = testing.normal_tensor((n,), seed=seed + 40)
    b = ((unit @ z if hard or system == "singular, in range" else z) * 10.0**rhs_scale).to(dtype)
    solution = linear_solver(matrix, b)
    if not solution.status.ok:
        trial.reports.append(f"status {solution.status.name}")
    if not bool(b.any()):  # rank 0: nothing but zero is in the range
        trial.claim(not bool(solution.value.any()), "b = 0 has an answer other than 0")
        return
    if not bool(matrix.any()):
        return
    a, rhs = of_size_one(matrix.double()), of_size_one(b.double())
    u = solution.value.double() * (float(matrix.abs().max()) / 10.0**matrix_scale)
    u = u / float(b.abs().max()) * 10.0**matrix_scale
    size = float(rhs.norm())
    residual = float((rhs - a @ u).norm()) / size
    # the products are rounded in the dtype of A: n eps ||A|| ||u||, made once by the solver and once more in u
    rounding = 2 * n * torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(a, 2) * u.norm()) / size
    trial.errors.append(residual)
    allowed = SLACK * default_rtol(dtype) + rounding
    trial.claim(residual <= allowed, f"true relative residual {residual:.2e}, allowed {allowed:.2e}")


def work_singular(trial: Trial, kind: int, n: int, missing: int, seed: int, out: int) -> None:
    """A singular Hessian or Jacobian: right for a cotangent in its range, reported for one with a part outside."""
    name = testing_kind = ("positive semidefinite", "symmetric", "general")[kind]
    trial.kind = f"{name}, {'in range' if out == 0 else 'out of range'}"
    matrix = testing.singular_matrix(n, max(n - missing, 1), kind=testing_kind, seed=seed)
    inverse = torch.linalg.pinv(matrix, rtol=1e-12)
    exact = matrix @ testing.normal_tensor((n,), seed=seed + 41)  # b in the range: a solution exists
    theta = exact.clone().requires_grad_()
    into_range = inverse.T @ (matrix.T @ testing.normal_tensor((n,), seed=seed + 42))  # of the transpose
    v = into_range / into_range.norm()
    if out:  # a part of relative size 1 to 1e-6, far above ten times the tolerance of 1e-10
        z = testing.normal_tensor((n,), seed=seed + 43)
        outside = z - matrix.T @ (inverse.T @ z)
        v = v + 10.0 ** (1 - out) * outside / outside.norm()
    # GMRES may break down on a singular matrix that is not symmetric, also with b in its range (Brown & Walker 1997,
    # theorem 2.6, needs null space and range to meet in zero only): there a report is right too.
    trial.must = "report" if out else "either" if name == "general" else "right"

    def solver(f: Any, x: Tensor, b: Tensor) -> Tensor:
        return inverse @ b

    zero = torch.zeros(n, dtype=F64)
    if name == "general":
        layer = il.root(lambda x, b: matrix @ x - b, solver)
    else:
        linear_solver = il.ConjugateGradient() if name == "positive semidefinite" else il.Minres()
        layer = il.argmin(lambda x, b: 0.5 * x @ (matrix @ x) - b @ x, solver, linear_solver=linear_solver)
    gradient = torch.autograd.grad(layer(zero, theta), theta, v)[0]
    trial.look_at(layer.last_record)
    if out:
        return
    # Any u with A'u = v is a solution; one from Krylov vectors has no part in the null space of A', up to rounding
    # that the solve does not see. The residual is what is promised, and it alone has no free part.
    residual = float((v - matrix.T @ gradient).norm() / v.norm())
    trial.errors.append(residual)
    allowed = residual_allowed(F64, n)
    trial.claim(residual <= allowed, f"relative residual {residual:.2e}, allowed {allowed:.2e}")
    if name != "general":
        # the other singular values are within [0.1, 1]: condition 10
        trial.compare("gradient of least norm", [gradient], [inverse.T @ v], 20 * allowed)


FAMILIES = [
    DrawnFamily("linear solver", "every linear solver on every kind of matrix", 1000,
                {"solver": (0, len(SOLVERS) - 1), "kind": (0, len(KINDS) - 1), "n": (1, 24), "tenths": (0, 100),
                 "seed": SEEDS, "hard": (0, 1), "single": (0, 1), "big": (-200, 200), "far": (-200, 200)}, work_solver),
    DrawnFamily("singular", "singular matrices, cotangents inside and outside of the range", 400,
                {"kind": (0, 2), "n": (2, 12), "missing": (1, 4), "seed": SEEDS, "out": (0, 7)}, work_singular),
]  # fmt: skip
