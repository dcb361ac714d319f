"""``on_failure="mask"``: a lane that fails costs no other lane."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitlayer as il

F64 = torch.float64
LANES, N = 4, 3
BAD = 2


def good_theta() -> Tensor:
    return torch.linspace(0.5, 2.0, LANES * N, dtype=F64).reshape(LANES, N)


def spoiled(how: str) -> tuple[Tensor, Tensor]:
    """theta, and how far off a solver is in every lane."""
    theta, off = good_theta(), torch.zeros(LANES, 1, dtype=F64)
    if how == "NaN in theta":
        theta[BAD, 0] = math.nan
    if how == "NaN from the solver":
        off[BAD] = math.nan
    if how == "not stationary":
        off[BAD] = 1.0
    return theta, off


def layer(kind: str, off: Tensor) -> Callable[..., Tensor]:
    """x = sqrt(t), through exp-free equations whose curvature differs by lane; s is shared."""
    solve: Any = lambda f, x, t, s: torch.sqrt(t) + off  # noqa: E731
    solve = type("Solver", (), {"batched": True, "__call__": lambda self, *args: solve_of(*args)})()
    solve_of = lambda f, x, t, s: (t / s) ** 0.5 + off  # noqa: E731
    options: dict[str, Any] = {"batch_dims": 1, "on_failure": "mask"}
    if kind == "argmin":
        return il.argmin(lambda x, t, s: (s * x**3 / 3 - t * x).sum(-1), solve, **options)
    if kind == "root":
        return il.root(lambda x, t, s: s * x**2 - t, solve, **options)
    if kind == "fixed_point":
        return il.fixed_point(lambda x, t, s: 0.5 * (x + t / (s * x)), solve, **options)
    if kind == "box":
        box = il.sets.Box(0.1, 9.0)
        return il.argmin(lambda x, t, s: (s * x**3 / 3 - t * x).sum(-1), solve, constraint=box, **options)
    return il.ArgminLayer(lambda x, t, s: (s * x**3 / 3 - t * x).sum(-1), solve, **options)


KINDS = ("argmin", "root", "fixed_point", "box", "module")


D = il.solvers
NAN_LAYERS: dict[str, Callable[..., Any]] = {  # x = t, and t < 9
    "LBFGS": lambda **kw: il.argmin(lambda x, t: ((x - t) ** 2).sum(-1), D.LBFGS(rtol=1e-10), **kw),
    "NewtonCG": lambda **kw: il.argmin(lambda x, t: ((x - t) ** 2).sum(-1), D.NewtonCG(rtol=1e-10), **kw),
    "momentum": lambda **kw: il.argmin(lambda x, t: ((x - t) ** 2).sum(-1), D.AcceleratedGradient(rtol=1e-10), **kw),
    "compiled": lambda **kw: il.compile(NAN_LAYERS["LBFGS"](**kw), backend="eager"),
    "box": lambda **kw: il.argmin(
        lambda x, t: ((x - t) ** 2).sum(-1), D.LBFGS(rtol=1e-10), constraint=il.sets.Box(-9.0, 9.0), **kw
    ),
    "Newton": lambda **kw: il.root(lambda x, t: x - t, D.Newton(), **kw),
    "Broyden": lambda **kw: il.root(lambda x, t: x - t, D.Broyden(), **kw),
    "Anderson": lambda **kw: il.fixed_point(lambda x, t: 0.5 * (x + t), D.AndersonAcceleration(rtol=1e-10), **kw),
    "SciPy": lambda **kw: il.argmin(lambda x, t: ((x - t) ** 2).sum(-1), D.SciPyMinimize("BFGS"), **kw),
    "regularised": lambda **kw: il.argmin(
        lambda x, t: ((x - t) ** 2).sum(-1), D.ProximalGradient(il.sets.Box(-9.0, 9.0), rtol=1e-10), **kw
    ),
}


@pytest.mark.parametrize("name", NAN_LAYERS)
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("differentiated", [True, False])
def test_a_lane_in_which_a_solver_meets_nan_is_masked_whatever_is_checked(
    name: str, checked: bool, differentiated: bool
) -> None:
    """Such a solver returns ``init`` there, a finite point. One that takes all lanes as one problem loses them all."""
    theta, _ = spoiled("NaN in theta")
    kept = [lane for lane in range(LANES) if lane != BAD]
    rtol = {} if checked else {"stationarity_rtol": None}
    layer, init = NAN_LAYERS[name](batch_dims=1, on_failure="mask", **rtol), torch.ones(LANES, N, dtype=F64)
    for _ in range(2):
        theta.requires_grad_(differentiated)
        x = layer(init, theta)
        assert bool(x[BAD].isnan().all())
        if name in ("SciPy", "regularised"):
            assert bool(x.isnan().all())
        else:
            torch.testing.assert_close(x[kept], theta[kept], rtol=1e-8, atol=0)
            if differentiated:
                (gradient,) = torch.autograd.grad(x.nansum(), theta)
                expected = torch.ones_like(theta).index_fill_(0, torch.tensor(BAD), 0.0)
                torch.testing.assert_close(gradient, expected)
        if name != "compiled":
            assert layer.records[0].failed.tolist() == x.isnan().all(-1).tolist()


def test_without_a_derivative_a_lane_outside_of_the_set_is_masked() -> None:
    """The solver stays below its bound of 1, and the set begins at 2 in one lane."""
    lower = torch.tensor([0.0, 2.0, 0.5], dtype=F64)[:, None]
    layer = il.argmin(
        lambda x: (x**2).sum(-1),
        lambda f, x: x.clamp(max=1.0),
        constraint=lambda: il.sets.Box(lower, 9.0),
        batch_dims=1,
        on_failure="mask",
    )
    x = layer(torch.full((3, 2), 3.0, dtype=F64))
    assert x.isnan().all(-1).tolist() == layer.records[0].failed.tolist() == [False, True, False]


def test_imaml_leaves_out_a_task_with_nan() -> None:
    """Three tasks (p - b)^2 with a proximal term of 1: the meta-gradient is that of the other two, 4/9 and -8/9."""
    support = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [3.0, -1.0]], dtype=F64)
    theta = {"w": torch.zeros(2, dtype=F64, requires_grad=True)}
    method = il.meta.iMAML(lambda p, b: ((p["w"] - b) ** 2).sum(1), D.LBFGS(rtol=1e-8), strength=1.0, on_failure="mask")
    losses = method(theta, support, torch.ones(3, 2, dtype=F64))
    assert losses.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(losses.nansum(), theta["w"])
    torch.testing.assert_close(gradient, torch.tensor([4 / 9, -8 / 9], dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["NaN in theta", "NaN from the solver", "not stationary"])
def test_a_lane_that_fails_leaves_all_others_bitwise_as_they_are(kind: str, how: str) -> None:
    init, results = torch.ones(LANES, N, dtype=F64), []
    w = torch.arange(1.0, N + 1, dtype=F64)
    for fault in ("none", how):
        theta, off = spoiled(fault)
        theta.requires_grad_()
        shared = torch.tensor(1.5, dtype=F64, requires_grad=True)
        with il.diagnostics() as records:
            x = layer(kind, off)(init, theta, shared)
        per_lane = (x * x * w).sum(-1)
        keep = torch.arange(LANES) != BAD
        to_theta, to_shared = torch.autograd.grad(per_lane[keep].sum(), (theta, shared), retain_graph=True)
        (all_theta,) = torch.autograd.grad(per_lane.nansum(), theta)
        results.append((x.detach(), to_theta, to_shared, all_theta, records[0].failed))
    (x0, t0, s0, _, none), (x1, t1, s1, all1, failed) = results
    assert none is not None and not none.any()
    assert failed is not None and failed.tolist() == [lane == BAD for lane in range(LANES)]
    assert x1[BAD].isnan().all() and torch.equal(x1[keep], x0[keep])
    assert torch.equal(t1[keep], t0[keep]) and torch.equal(s1, s0)
    assert (t1[BAD] == 0).all() and (all1[BAD] == 0).all()


@pytest.mark.parametrize("kind", ["argmin", "root"])
def test_a_single_problem_that_fails_is_nan_with_a_zero_gradient(kind: str) -> None:
    def fails(f: Any, x: Tensor, t: Tensor) -> Tensor:
        raise ZeroDivisionError

    t = torch.tensor([2.0], dtype=F64, requires_grad=True)
    function = (lambda x, t: ((x - t) ** 2).sum()) if kind == "argmin" else (lambda x, t: x - t)
    for solver in (fails, lambda f, x, t: t + 1, lambda f, x, t: t * math.nan):
        with il.diagnostics() as records:
            x = getattr(il, kind)(function, solver, on_failure="mask")(torch.zeros(1, dtype=F64), t)
        assert x.isnan().all() and records[0].failed is not None and bool(records[0].failed)
        assert torch.autograd.grad(x.sum(), t)[0].item() == 0.0


def test_a_lane_that_fails_under_vmap_and_a_backward_that_fails_are_masked() -> None:
    def solve(f: Any, x: Tensor, t: Tensor) -> Tensor:
        if t < 0:
            raise ArithmeticError("no root")
        return t.sqrt()

    t = torch.tensor([4.0, -1.0, 9.0], dtype=F64, requires_grad=True)
    root = il.root(lambda x, t: x * x - t, solve, on_failure="mask")
    x = torch.vmap(root, (None, 0))(torch.ones((), dtype=F64), t)
    assert x.isnan().tolist() == [False, True, False]
    assert torch.autograd.grad(x.sum(), t)[0].tolist() == [0.25, 0.0, 1 / 6]
    each = torch.vmap(torch.func.grad(lambda t: root(torch.ones((), dtype=F64), t)))(t.detach())
    assert each.tolist() == [0.25, 0.0, 1 / 6]
    # the curvature of lane 0 is negative: the backward fails there, and there alone
    flat = il.argmin(lambda x, t: 0.5 * t * x * x, lambda f, x, t: 0 * t, on_failure="mask", batch_dims=1)
    t = torch.tensor([-1.0, 2.0], dtype=F64)
    shift = torch.ones(2, dtype=F64, requires_grad=True)
    tilted = il.argmin(
        lambda x, t, b: 0.5 * t * x * x - b * x, lambda f, x, t, b: b / t, on_failure="mask", batch_dims=1
    )
    assert flat(torch.ones(2, dtype=F64), t).tolist() == [0.0, 0.0]
    g = torch.autograd.grad(tilted(torch.ones(2, dtype=F64), t, shift).sum(), shift)[0]
    assert g.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("how", ["infeasible", "unbounded", "NaN", "indefinite"])
def test_a_quadratic_program_without_a_solution_is_masked(how: str) -> None:
    generator = torch.Generator().manual_seed(1)
    Q = torch.eye(N, dtype=F64).expand(LANES, N, N).clone()
    p = torch.randn(LANES, N, generator=generator, dtype=F64)
    G = torch.cat([torch.eye(N, dtype=F64), -torch.eye(N, dtype=F64)]).expand(LANES, 2 * N, N).clone()
    h = torch.full((LANES, 2 * N), 0.5, dtype=F64)
    keep, results = torch.arange(LANES) != BAD, []
    for fault in ("none", how):
        data = [t.clone() for t in (Q, p, G, h)]
        if fault == "infeasible":
            data[3][BAD, 0] = -1.0
        if fault == "unbounded":
            data[0][BAD], data[2][BAD] = 0.0, 0.0
        if fault == "NaN":
            data[1][BAD, 0] = math.nan
        if fault == "indefinite":
            data[0][BAD, 0, 0] = -1.0
        data = [t.requires_grad_() for t in data]
        with il.diagnostics() as records:
            x = il.qp(data[0], data[1], None, None, data[2], data[3], on_failure="mask")
        gradients = torch.autograd.grad(x[keep].square().sum(), data)
        results.append((x.detach(), gradients, records[0].failed))
    (x0, g0, none), (x1, g1, failed) = results
    assert none is not None and not none.any()
    assert failed is not None and failed.tolist() == [lane == BAD for lane in range(LANES)]
    assert x1[BAD].isnan().all() and torch.equal(x1[keep], x0[keep])
    for a, b in zip(g0, g1, strict=True):
        # the factors are made anew where a lane is not finite: rounding of one solve of size 9
        torch.testing.assert_close(b[keep], a[keep], rtol=0, atol=1e-13)
        assert (b[BAD] == 0).all()


@pytest.mark.parametrize("how", ["NaN", "outside", "not optimal"])
def test_a_lane_of_a_constrained_layer_is_masked(how: str) -> None:
    """The point of the line sum(x) = 1 that is nearest to t: x = t + (1 - sum(t)) / n."""
    t = good_theta().requires_grad_()
    fault = {"NaN": math.nan, "outside": 0.3, "not optimal": 0.0}[how]
    results = []
    for spoiled in (False, True):

        class Solver:
            batched = True

            def __call__(self, problem: Any, x: Tensor, t: Tensor, spoiled: bool = spoiled) -> Tensor:
                answer = t + (1 - t.sum(-1, keepdim=True)) / N
                if spoiled:
                    answer[BAD] += fault
                    answer[BAD, 0] += 0.3 * (how == "not optimal")
                    answer[BAD, 1] -= 0.3 * (how == "not optimal")
                return answer

        layer = il.constrained_argmin(
            lambda x, t: ((x - t) ** 2).sum(-1),
            Solver(),
            equality=lambda x, t: x.sum(-1) - 1,
            batch_dims=1,
            on_failure="mask",
        )
        with il.diagnostics() as records:
            x = layer(torch.zeros(LANES, N, dtype=F64), t)
        keep = torch.arange(LANES) != BAD
        (g,) = torch.autograd.grad((x[keep] * torch.arange(1.0, N + 1, dtype=F64)).sum(), t)
        results.append((x.detach(), g, records[0].failed))
    (x0, g0, _), (x1, g1, failed) = results
    assert failed is not None and failed.tolist() == [lane == BAD for lane in range(LANES)]
    assert x1[BAD].isnan().all() and torch.equal(x1[keep], x0[keep])
    torch.testing.assert_close(g1[keep], g0[keep], rtol=0, atol=1e-13)  # rounding of a solve of size 4
    assert (g1[BAD] == 0).all()


class _Raises:
    """sqrt(t / s), which raises where it meets a negative number."""

    batched = True

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, f: Any, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        if bool((t < 0).any()):
            raise torch.linalg.LinAlgError("no root")
        return (t / s) ** 0.5


@pytest.mark.parametrize("kind", ["argmin", "root", "box"])
def test_a_batched_solver_that_raises_under_vmap_costs_its_lane_alone(kind: str) -> None:
    t, s = torch.tensor([4.0, -1.0, 9.0], dtype=F64, requires_grad=True), torch.tensor(2.0, dtype=F64)
    solver = _Raises()
    if kind == "root":
        made = il.root(lambda x, t, s: s * x * x - t, solver, on_failure="mask")
    else:
        box = il.sets.Box(0.0, 100.0) if kind == "box" else None
        objective = lambda x, t, s: s * x**3 / 3 - t * x  # noqa: E731
        made = il.argmin(objective, solver, constraint=box, on_failure="mask")
    with il.diagnostics() as records:
        x = torch.vmap(made, (None, 0, None))(torch.ones((), dtype=F64), t, s)
    assert x.isnan().tolist() == [False, True, False]
    assert records[0].failed is not None and records[0].failed.tolist() == [False, True, False]
    assert "nonfinite" in str(records[0].solver_status).lower()
    assert solver.calls == [(3,), (1,), (1,), (1,)]
    good = torch.tensor([4.0, 9.0], dtype=F64)
    # dx / dt = 1 / (2 s x); solves to 1e-10
    gradient = torch.autograd.grad(x.nansum(), t)[0]
    assert float(gradient[1]) == 0.0
    torch.testing.assert_close(gradient[[0, 2]], 1 / (4 * (good / 2) ** 0.5), rtol=1e-9, atol=0)


@pytest.mark.parametrize("batched", [True, False])
def test_a_solver_of_several_lanes_that_raises_is_told_what_to_do(batched: bool) -> None:
    solver = _Raises()
    run: Any = solver if batched else lambda *args: solver(*args)
    made = il.root(lambda x, t, s: s * x * x - t, run, on_failure="mask", batch_dims=1)
    t, s = torch.tensor([4.0, -1.0, 9.0], dtype=F64, requires_grad=True), torch.tensor(2.0, dtype=F64)
    with pytest.raises(
        il.SolverOutputError, match=r"solver of 3 lanes raised.*no root.*Return NaN.*torch\.vmap"
    ) as info:
        made(torch.ones(3, dtype=F64), t, s)
    assert isinstance(info.value.__cause__, torch.linalg.LinAlgError)
    with pytest.raises(torch.linalg.LinAlgError):  # without masks it is the solver's own
        il.root(lambda x, t, s: s * x * x - t, run, batch_dims=1)(torch.ones(3, dtype=F64), t, s)


@pytest.mark.parametrize("batched", [True, False])
def test_a_solver_that_raises_for_a_lane_of_a_constrained_layer(batched: bool) -> None:
    class Solver:
        def __call__(self, problem: Any, x: Tensor, t: Tensor) -> Tensor:
            mine = t if self.batched else t[problem.lane]
            if bool((mine < 0).any()):
                raise ZeroDivisionError("division by zero")
            return mine + (1 - mine.sum(-1, keepdim=True)) / N

    Solver.batched = batched  # type: ignore[attr-defined]
    layer = il.constrained_argmin(
        lambda x, t: ((x - t) ** 2).sum(-1),
        Solver(),
        equality=lambda x, t: x.sum(-1) - 1,
        batch_dims=1,
        on_failure="mask",
    )
    t = good_theta()
    t[BAD, 0] = -1.0
    t.requires_grad_()
    if batched:
        with pytest.raises(il.SolverOutputError, match=r"solver of 4 lanes raised ZeroDivisionError"):
            layer(torch.zeros(LANES, N, dtype=F64), t)
        return
    x = layer(torch.zeros(LANES, N, dtype=F64), t)
    keep = torch.arange(LANES) != BAD
    assert x[BAD].isnan().all()
    torch.testing.assert_close(x[keep], (t + (1 - t.sum(-1, keepdim=True)) / N)[keep], rtol=1e-14, atol=1e-14)
    w = torch.arange(1.0, N + 1, dtype=F64)
    gradient = torch.autograd.grad((x[keep] * w).sum(), t)[0]
    torch.testing.assert_close(gradient[keep], (w - w.mean()).expand(LANES - 1, N), rtol=1e-10, atol=1e-12)
    assert not gradient[BAD].any()


def test_nan_in_the_theta_of_a_lane_with_constraints_masks_it_though_the_solver_knows_an_answer() -> None:
    t = torch.tensor([[2.0, 0.5], [math.nan, 1.0]], dtype=F64, requires_grad=True)
    layer = il.constrained_argmin(
        lambda x, t: ((x - t) ** 2).sum(-1),
        lambda problem, x, t: t[problem.lane].nan_to_num(0.0).clamp(max=1.0),
        inequality=lambda x, t: x - 1,
        batch_dims=1,
        on_failure="mask",
    )
    x = layer(torch.zeros(2, 2, dtype=F64), t)
    assert x[0].tolist() == [1.0, 0.5] and x[1].isnan().all()
    (gradient,) = torch.autograd.grad(x.nansum(), t)
    assert gradient.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_infinite_data_that_a_good_lane_reads_stay_as_they_are() -> None:
    def capped(x: Tensor, t: Tensor, upper: Tensor) -> Tensor:
        return ((x - t) ** 2 + torch.relu(x - upper) ** 2).sum(-1)

    t = torch.tensor([[3.0, 1.0], [2.0, 3.0]], dtype=F64, requires_grad=True)
    for upper in (torch.tensor([math.inf, 0.5]), torch.tensor([[math.inf, 0.5], [1.0, math.inf]])):
        found = []
        for how in ("raise", "mask"):
            layer = il.argmin(capped, il.solvers.NewtonCG(), batch_dims=1, on_failure=how)  # type: ignore[arg-type]
            x = layer(torch.zeros(2, 2, dtype=F64), t, upper.double())
            found.append((x.detach(), *torch.autograd.grad(x.sum(), t)))
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("status", [None, il.Status.CONVERGED, il.Status.STEP_LIMIT, il.Status.NONFINITE])
@pytest.mark.parametrize("derivative", [False, True])
def test_a_solver_that_names_its_nan_lanes_need_not_say_so_twice(status: il.Status | None, derivative: bool) -> None:
    class Half:
        batched = True

        def __call__(self, objective: Any, x: Tensor, t: Tensor) -> il.SolverResult:
            value = torch.where(torch.tensor([[True], [False]]), t / 2, x)
            return il.SolverResult(value, status, nonfinite=torch.tensor([False, True]))

    t = torch.ones(2, 3, dtype=F64, requires_grad=derivative)
    how: dict[str, Any] = {"batch_dims": 1, "stationarity_rtol": None}
    layer = il.argmin(lambda x, t: ((x - t) ** 2 + x**2).sum(-1), Half(), on_failure="mask", **how)
    x = layer(torch.zeros(2, 3, dtype=F64), t)
    assert x[0].tolist() == [0.5] * 3 and bool(x[1].isnan().all())
    with pytest.raises(il.NonFiniteError):
        il.argmin(layer.function, Half(), **how)(torch.zeros(2, 3, dtype=F64), t)
