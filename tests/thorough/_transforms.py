"""Second order in three ways, forward mode, and batches with lanes of every kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.func import grad, jvp, vmap

import implicitlayer as il
from implicitlayer import testing
from implicitlayer.base._types import OnFailure
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import DTYPES, SEEDS, condition_of, must_be_right
from tests.thorough._reference import F64, Dense, Tensor, newton_traced
from tests.thorough._trial import Trial, residual_allowed

PROBLEMS = (
    ("quadratic", testing.quadratic_problem),
    ("softplus", testing.smooth_convex_problem),
    ("double wells", testing.nonconvex_problem),
    ("root", testing.root_problem),
)
# What is promised for second derivatives. Two solves stand behind each other, so default tolerances leave about
# condition^2 * 10 rtol; the conditions drawn are at most 20 (10^1, twice that for softplus).
PROMISED_SECOND_ORDER = 1e-6


def layer_of(problem: testing.ArgminProblem | testing.RootProblem) -> il.ImplicitLayer:
    make = il.root if isinstance(problem, testing.RootProblem) else il.argmin
    return make(problem.function, problem.solver)


def work_second_order(trial: Trial, problem: int, n: int, tenths: int, seed: int, mode: int) -> None:
    """Hessian of c'x + 1/2 |x|^2 in theta times a vector: reverse over reverse, forward over reverse, and the other."""
    name, make = PROBLEMS[problem]
    trial.kind = ("reverse over reverse", "forward over reverse", "reverse over forward")[mode]
    case = make(n, log10_cond=tenths / 10, seed=seed)
    layer = layer_of(case)
    theta = tuple(t.detach() for t in case.theta)
    w = tuple(testing.normal_tensor(t.shape, seed=seed + 20 + i) for i, t in enumerate(theta))
    c = testing.normal_tensor((n,), seed=seed + 11)
    everything = tuple(range(len(theta)))

    def loss(*t: Tensor) -> Tensor:
        x = layer(case.init, *t)
        return c @ x + 0.5 * x @ x

    if mode == 0:
        points = [t.clone().requires_grad_() for t in theta]
        first = torch.autograd.grad(loss(*points), points, create_graph=True)
        got = torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, w, strict=True)), points)
    elif mode == 1:
        got = jvp(grad(loss, argnums=everything), theta, w)[1]
    else:
        got = grad(lambda *t: jvp(loss, t, w)[1], argnums=everything)(*theta)

    points = [t.clone().requires_grad_() for t in theta]
    x = newton_traced(case.stationarity, case.solution(*theta), points)
    first = torch.autograd.grad(c @ x + 0.5 * x @ x, points, create_graph=True)
    along = torch.stack([(g * d).sum() for g, d in zip(first, w, strict=True)]).sum()
    expected = torch.autograd.grad(along, points)
    trial.compare(name, got, expected, PROMISED_SECOND_ORDER)


def work_forward(trial: Trial, problem: int, n: int, tenths: int, seed: int, single: int) -> None:
    """Tangents of the solution."""
    dtype = DTYPES[single]
    name, make = PROBLEMS[problem]
    trial.kind = f"{'f32' if single else 'f64'}, {name}"
    case = make(n, log10_cond=tenths / 10, seed=seed, dtype=dtype)
    dense = Dense.of(case)
    trial.must = must_be_right(dense.condition, n, dtype)
    theta = tuple(t.detach() for t in case.theta)
    w = tuple(testing.normal_tensor(t.shape, seed=seed + 20 + i, dtype=dtype) for i, t in enumerate(theta))
    layer = layer_of(case)
    tangent = jvp(lambda *t: layer(case.init, *t), theta, w)[1]
    trial.look_at(layer.last_record)
    # a quadratic differentiates A along a tangent that is not symmetric; its mixed derivative takes care of that
    trial.compare("tangent", [tangent], [dense.jvp(w)], dense.allowed_jvp(w, dtype))


LANE_SOLVERS: tuple[tuple[str, il.LinearSolver], ...] = (
    ("conjugate gradients", il.ConjugateGradient()),
    ("MINRES", il.Minres()),
    ("GMRES", il.Gmres()),
    ("dense", il.Dense()),
    ("Bi-CGSTAB", il.Bicgstab()),
)
TROUBLES = ("none", "shared matrix", "indefinite lane", "singular lane", "zero cotangent", "NaN cotangent")


def same_bits(trial: Trial, clean: Sequence[Tensor], got: Sequence[Tensor], lanes: list[int]) -> None:
    """Whether these lanes are bit for bit what they were without trouble beside them: a figure of its own.

    Their numbers are compared with the right ones anyway, so that a change in rounding is no wrong result.
    """
    if lanes:
        equal = all(torch.equal(one[lanes], two[lanes]) for one, two in zip(clean, got, strict=True))
        trial.numbers["same bits"] = float(equal)


def work_batch(trial: Trial, trouble: int, solver: int, lanes: int, n: int, tenths: int, seed: int) -> None:
    """vmap over quadratics of condition 1 to 10^(tenths/10); a lane in trouble must not change a bit of the others."""
    kind = trial.kind = TROUBLES[trouble]
    solver_name, linear_solver = LANE_SOLVERS[solver]
    trial.must = "either" if solver_name == "Bi-CGSTAB" else "right"  # it may break down, and says so
    conditions = [tenths / 10 * i / max(lanes - 1, 1) for i in range(lanes)]
    matrices = torch.stack([testing.spd_matrix(n, log10_cond=c, seed=seed + i) for i, c in enumerate(conditions)])
    if kind == "shared matrix":
        matrices = matrices[-1:].expand(lanes, n, n).clone()
    b = testing.normal_tensor((lanes, n), seed=seed + 30)
    v = testing.normal_tensor((lanes, n), seed=seed + 31)
    bad = seed % lanes

    def objective(x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
        return 0.5 * x @ (matrix @ x) - b @ x

    def exact(f: object, x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.pinv(matrix.detach(), rtol=1e-13)
        return inverse @ b.detach()

    policy: OnFailure = "ignore" if kind in ("indefinite lane", "singular lane") else "warn"
    layer = il.argmin(objective, exact, linear_solver=linear_solver, on_failure=policy, stationarity_rtol=None)

    def gradients(matrices: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        matrices, b = matrices.clone().requires_grad_(), b.clone().requires_grad_()
        if kind == "shared matrix":
            x = vmap(lambda b: layer(torch.zeros(n, dtype=F64), matrices[0], b))(b)
        else:
            x = vmap(lambda a, b: layer(torch.zeros(n, dtype=F64), a, b))(matrices, b)
        return torch.autograd.grad(x, (matrices, b), v)

    if kind == "NaN cotangent":  # named, for the whole batch, under every policy
        trial.must = "report"
        v[bad, seed % n] = torch.nan
        try:
            gradients(matrices, b, v)
        except il.NonFiniteError as error:
            trial.claim(lanes == 1 or f"lane {bad}" in str(error), f"the lane {bad} is not named: {error}")
            if trial.wrong:
                trial.must = "right"
                return
            raise
        return
    got = gradients(matrices, b, v)
    others = list(range(lanes))
    if kind in ("indefinite lane", "singular lane"):
        others.remove(bad)
        spoiled = matrices.clone()
        spoiled[bad] = -matrices[bad] if kind == "indefinite lane" else 0.0
        clean, got = got, gradients(spoiled, b, v)
        status = layer.last_record.solution.codes[bad]  # type: ignore[union-attr]
        solves_it = kind == "indefinite lane" and solver_name != "conjugate gradients"
        known = il.Status(int(status))
        trial.claim(known.ok == solves_it or solver_name == "Bi-CGSTAB", f"the bad lane has status {known.name}")
        same_bits(trial, clean, got, others)
    elif kind == "zero cotangent":
        v[bad] = 0
        clean, got = got, gradients(matrices, b, v)
        trial.claim(not bool(got[1][bad].any()), "a zero cotangent has a gradient")
        others.remove(bad)
        same_bits(trial, clean, got, others)
    expected_a = torch.zeros_like(matrices)
    for i in others:
        u, x = torch.linalg.solve(matrices[i], v[i]), torch.linalg.solve(matrices[i], b[i])
        expected = -(torch.outer(u, x) + torch.outer(x, u)) / 2
        condition = condition_of(matrices[i])
        allowed = 2**0.5 * condition * residual_allowed(F64, n)
        if kind == "shared matrix":
            expected_a[0] += expected
            trial.compare(f"b, lane {i}", [got[1][i]], [u], allowed)
        else:
            trial.compare(f"lane {i}", [got[0][i], got[1][i]], [expected, u], allowed)
    if kind == "shared matrix":  # errors add up, and the sum may cancel: it is compared with the sum of the sizes
        sizes = [
            torch.linalg.solve(matrices[0], b[i]).norm() * torch.linalg.solve(matrices[0], v[i]).norm() for i in others
        ]
        allowed = 2**0.5 * condition_of(matrices[0]) * residual_allowed(F64, n)
        trial.compare("shared A", [got[0]], [expected_a], allowed * float(sum(sizes)) / float(expected_a.norm()))


FAMILIES = [
    DrawnFamily("second order", "second derivatives, in three compositions", 400,
                {"problem": (0, 3), "n": (1, 5), "tenths": (0, 10), "seed": SEEDS, "mode": (0, 2)}, work_second_order),
    DrawnFamily("forward mode", "tangents against the dense formula", 400,
                {"problem": (0, 3), "n": (1, 10), "tenths": (0, 30), "seed": SEEDS, "single": (0, 1)}, work_forward),
    DrawnFamily("batch", "vmap over lanes of mixed conditioning, one of them in trouble", 400,
                {"trouble": (0, 5), "solver": (0, 4), "lanes": (1, 6), "n": (1, 10), "tenths": (0, 40),
                 "seed": SEEDS}, work_batch),
]  # fmt: skip
