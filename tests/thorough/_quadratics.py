"""Random quadratics 1/2 x'Ax - b'x: the figures of conjugate gradients, ill conditioning, and every scale."""

# n: unknowns. v: cotangent. With S = (A + A')/2 and u = S^-1 v the gradient is u in b, -(u x' + x u')/2 in A.

from __future__ import annotations

import math
import operator
from fractions import Fraction

import torch

import implicitlayer as il
from implicitlayer import testing
from tests.thorough._family import DrawnFamily
from tests.thorough._reference import F64, Dense, Tensor
from tests.thorough._trial import SLACK, Trial, default_rtol, residual_allowed

DTYPES = (torch.float64, torch.float32)
LARGE = 0.03  # an error that a user would want to know of


def condition_of(matrix: Tensor) -> float:
    """Of a symmetric positive definite matrix as it is stored; inf where rounding has made it singular."""
    values = torch.linalg.eigvalsh(matrix.detach().double() / float(matrix.abs().max()))
    return float(values[-1] / values[0]) if float(values[0]) > 0 else float("inf")


def exact_residual(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    """``||v - A u|| / ||v||`` by integers: no rounding of its own at any condition number."""
    entries, a = as_integers(matrix)
    us, e_u = as_integers(u)
    vs, e_v = as_integers(v)
    lowest = min(a + e_u, e_v)  # all numbers in units of 2^lowest
    n = len(us)
    residual = [
        (b << (e_v - lowest)) - (sum(map(operator.mul, entries[i * n : i * n + n], us)) << (a + e_u - lowest))
        for i, b in enumerate(vs)
    ]
    unit = Fraction(2) ** lowest
    return float(torch.tensor([float(r * unit) for r in residual], dtype=F64).norm() / v.double().norm())


def as_integers(tensor: Tensor) -> tuple[list[int], int]:
    """Integers and the power of two that they are multiples of; exact."""
    parts = [math.frexp(value) for value in tensor.detach().double().reshape(-1).tolist()]
    lowest = min(exponent for _, exponent in parts)
    return [int(m * 2.0**53) << (exponent - lowest) for m, exponent in parts], lowest - 53


def work_quadratic(trial: Trial, n: int, tenths: int, seed: int, hard: int, single: int) -> None:
    """Condition up to 1e6. float64 must be right; float32 right or reported, and never CONVERGED above 10 rtol."""
    dtype = DTYPES[single]
    trial.kind = f"{'f32' if single else 'f64'}, {'b = A z' if hard else 'random b'}"
    trial.must = "either" if single else "right"
    problem = testing.quadratic_problem(n, log10_cond=tenths / 10, seed=seed, dtype=dtype)
    matrix, b = problem.theta
    v = testing.cotangent(problem.init, "hard" if hard else "normal", seed=seed + 11, matrix=matrix)
    layer = il.argmin(problem.objective, problem.solver)
    x = layer(problem.init, matrix, b)
    got = torch.autograd.grad(x, (matrix, b), v)
    trial.look_at(layer.last_record)
    trial.numbers["steps per unknown"] = trial.numbers.pop("steps") / n
    estimate = float(layer.last_record.solution_error) / float(got[1].double().norm())  # type: ignore[union-attr]
    u: Tensor = torch.linalg.solve(matrix.detach().double(), v.double())
    at = problem.solution(matrix, b)
    expected = [-(torch.outer(u, at) + torch.outer(at, u)) / 2, u]
    # ||g_A||^2 = (|u|^2 |x|^2 + (u'x)^2) / 2 and ||B||^2 <= 1 + |x|^2: the gradient errs by sqrt 2 of what u errs by
    error = trial.compare("gradient", got, expected, 2**0.5 * condition_of(matrix) * residual_allowed(dtype, n))
    if error > LARGE:
        trial.numbers["estimate / large error"] = estimate / error
    residual = exact_residual(matrix, got[1], v)
    trial.numbers["residual / rtol"] = residual / default_rtol(dtype)
    claim_residual(trial, residual, matrix, got[1], v)


def claim_residual(trial: Trial, residual: float, matrix: Tensor, u: Tensor, v: Tensor) -> None:
    """The residual that a solve without a word may leave; the figure in the table is the strict one, 10 rtol alone.

    The solver sees its residual through products in the dtype of A, which round by n eps ||A|| ||u||.
    """
    dtype = matrix.dtype
    size = float(torch.linalg.matrix_norm(matrix.detach().double(), 2) * u.double().norm() / v.double().norm())
    allowed = SLACK * default_rtol(dtype) + 2 * len(v) * torch.finfo(dtype).eps * size
    trial.claim(residual <= allowed, f"true relative residual {residual:.2e} in silence, allowed {allowed:.2e}")


def work_ill_conditioned(trial: Trial, n: int, exponent: int, seed: int, hard: int, single: int) -> None:
    """Condition 1e7 to 1e20 (float32: 1e5 to 1e12): right to what the residual promises, or reported."""
    dtype = DTYPES[single]
    log10_cond = 5 + (exponent - 7) * 7 / 13 if single else float(exponent)
    trial.kind = f"{'f32' if single else 'f64'}, {'b = A z' if hard else 'random b'}"
    trial.must = "either"
    problem = testing.quadratic_problem(n, log10_cond=log10_cond, seed=seed, dtype=dtype)
    matrix, b = problem.theta
    v = testing.cotangent(problem.init, "hard" if hard else "normal", seed=seed + 11, matrix=matrix)
    # b = A z with this z: a dense solve may fail or lose every digit here, and z is the answer up to rounding
    z = testing.normal_tensor((n,), seed=seed + 7, dtype=dtype)
    layer = il.argmin(problem.objective, lambda f, x, *theta: z)
    x = layer(problem.init, matrix, b)
    got = torch.autograd.grad(x, b, v)
    trial.look_at(layer.last_record)
    residual = exact_residual(matrix, got[0], v)
    trial.numbers["residual / rtol"] = residual / default_rtol(dtype)
    # What CONVERGED promises at any condition number; the error is then at most condition times it, where the dense
    # reference (good to about condition * eps) can tell.
    claim_residual(trial, residual, matrix, got[0], v)
    condition = condition_of(matrix)
    if condition <= 1e13:
        u: Tensor = torch.linalg.solve(matrix.detach().double(), v.double())
        trial.compare("gradient in b", got, [u], condition * residual_allowed(dtype, n))


SCALED = (
    ("quadratic", testing.quadratic_problem),
    ("softplus", testing.smooth_convex_problem),
    ("root", testing.root_problem),
)


def work_scales(
    trial: Trial, n: int, tenths: int, seed: int, which: int, objective: int, cotangent: int, single: int
) -> None:
    """Objective and cotangent scaled by up to 1e+-200 (float32: 1e+-25): the same relative accuracy."""
    dtype = DTYPES[single]
    # u = v / H must be a number of the dtype, with its small entries (condition up to 1e4) not yet subnormal
    if single:
        objective, cotangent = round(objective / 8), round(cotangent / 8)
        cotangent = max(min(cotangent, objective + 30), objective - 30)
    cotangent = max(min(cotangent, objective + 290), objective - 290)
    name, make = SCALED[which]
    trial.kind = f"{'f32' if single else 'f64'}, {name}"
    problem = make(n, log10_cond=tenths / 10, log10_scale=objective, seed=seed, dtype=dtype)
    dense = Dense.of(problem)
    v = testing.cotangent(problem.init, seed=seed + 11, log10_scale=cotangent)
    trial.must = must_be_right(dense.condition, n, dtype)
    layer = (il.root if name == "root" else il.argmin)(problem.function, problem.solver)
    got = torch.autograd.grad(layer(problem.init, *problem.theta), problem.theta, v)
    trial.look_at(layer.last_record)
    unit = v.double() / 10.0**cotangent
    # a quadratic's gradient in (A, b) has the units v / A; the factor in front of the others is no theta
    shifts = (objective, objective) if name == "quadratic" else (0, 0, 0)
    normal = [g.double() / 10.0 ** (cotangent - shift) for g, shift in zip(got, shifts, strict=True)]
    right = [g * 10.0**shift for g, shift in zip(dense.vjp(unit), shifts, strict=True)]
    trial.compare("gradient", normal, right, dense.allowed_vjp(unit, dtype))


def must_be_right(condition: float, n: int, dtype: torch.dtype) -> str:
    """A tolerance below what rounding leaves, ``condition n eps``, cannot be promised: then a report is right too."""
    return "right" if condition * n * torch.finfo(dtype).eps <= default_rtol(dtype) else "either"


SEEDS = (0, 99_999)
FAMILIES = [
    DrawnFamily("quadratic", "gradients of quadratics, condition up to 1e6", 4200,
                {"n": (1, 60), "tenths": (0, 60), "seed": SEEDS, "hard": (0, 1), "single": (0, 1)}, work_quadratic),
    DrawnFamily("ill-conditioned", "condition 1e7 to 1e20: right, or reported", 600,
                {"n": (2, 30), "exponent": (7, 20), "seed": SEEDS, "hard": (0, 1), "single": (0, 1)},
                work_ill_conditioned),
    DrawnFamily("scales", "objective and cotangent scaled by 1e+-200", 600,
                {"n": (1, 12), "tenths": (0, 30), "seed": SEEDS, "which": (0, 2), "objective": (-200, 200),
                 "cotangent": (-200, 200), "single": (0, 1)}, work_scales),
]  # fmt: skip
