"""``il.qp`` with rows that have two sides, and with bounds on x."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, central_differences, randn, relative_error
from torch.func import grad, vmap

import implicitlayer as il

TIGHT = 1e-10  # rounding times condition numbers of about 1e3
N, M = 5, 4


def program(seed: int = 0, lanes: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Strongly convex, with rows and bounds that some inside point satisfies; many of them hold at the solution."""
    root, inside, G = (
        randn(*lanes, N, N, seed=seed),
        randn(*lanes, N, seed=seed + 1),
        randn(*lanes, M, N, seed=seed + 2),
    )
    middle, width = (G @ inside[..., None])[..., 0], randn(*lanes, 2, M, seed=seed + 3).abs()
    box = 0.5 * randn(*lanes, 2, N, seed=seed + 4).abs() + 0.1
    return {
        "Q": root @ root.mT + torch.eye(N, dtype=F64),
        "p": 6 * randn(*lanes, N, seed=seed + 5),
        "G": G,
        "lower": middle - width[..., 0, :],
        "h": middle + width[..., 1, :],
        "lb": inside - box[..., 0, :],
        "ub": inside + box[..., 1, :],
    }


def conditions(data: dict[str, torch.Tensor], x: torch.Tensor, rows: torch.Tensor, bounds: torch.Tensor) -> float:
    """The largest violation of the conditions of optimality, which prove the solution of a convex program."""
    Gx = data["G"] @ x
    parts = [data["Q"] @ x + data["p"] + data["G"].T @ rows + bounds]
    for value, low, high, force in ((Gx, data["lower"], data["h"], rows), (x, data["lb"], data["ub"], bounds)):
        parts += [(value - high).clamp(min=0), (low - value).clamp(min=0)]
        parts += [force.clamp(min=0) * (high - value).clamp(max=1e3), force.clamp(max=0) * (value - low).clamp(max=1e3)]
    return max(float(part.abs().max()) for part in parts)


@pytest.mark.parametrize("seed", range(5))
def test_the_conditions_of_optimality_hold_with_the_multipliers(seed: int) -> None:
    data = program(10 * seed)
    x, found = il.qp(**data, return_multipliers=True)
    rows, bounds = found.inequality
    assert conditions(data, x, rows, bounds) < TIGHT
    assert int((rows != 0).sum() + (bounds != 0).sum()) >= 2  # or nothing was tried


def test_the_solution_is_that_of_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    data = program(20)
    arrays = {name: t.numpy() for name, t in data.items()}
    found = optimize.minimize(
        lambda x: 0.5 * x @ arrays["Q"] @ x + arrays["p"] @ x,
        np.zeros(N),
        jac=lambda x: arrays["Q"] @ x + arrays["p"],
        method="SLSQP",
        bounds=optimize.Bounds(arrays["lb"], arrays["ub"]),
        constraints=optimize.LinearConstraint(arrays["G"], arrays["lower"], arrays["h"]),
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert relative_error(il.qp(**data), torch.from_numpy(found.x)) < 1e-6  # what SLSQP reaches


@pytest.mark.parametrize("name", ["Q", "p", "G", "lower", "h", "lb", "ub"])
def test_gradients_are_the_differences_of_the_solver(name: str) -> None:
    data, v = program(10), randn(N, seed=1)

    def value(changed: torch.Tensor) -> torch.Tensor:
        x, found = il.qp(**{**data, name: changed}, return_multipliers=True)
        return (x * v).sum() + 0.1 * (found.inequality[0] ** 2).sum() + 0.1 * (found.inequality[1] ** 2).sum()

    leaf = data[name].clone().requires_grad_()
    (got,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        # steps of 1e-5: truncation about 1e-10 times third derivatives, rounding 1e-14 / 1e-5
        expected = central_differences(value, data[name], 1e-5)
    assert float((got - expected).norm()) < 1e-7 * (1 + float(expected.norm()))
    assert relative_error(grad(value)(data[name]), got) < TIGHT  # under a transform every side is a row


def test_a_box_alone_is_a_clamp() -> None:
    t = torch.tensor([-3.0, -0.2, 0.3, 4.0], dtype=F64, requires_grad=True)
    lb, ub = (torch.full((4,), side, dtype=F64, requires_grad=True) for side in (-1.0, 2.0))
    x = il.qp(torch.eye(4, dtype=F64), -t, lb=lb, ub=ub)
    assert torch.allclose(x, t.clamp(-1, 2), atol=TIGHT)
    by_t, by_lb, by_ub = torch.autograd.grad(x.sum(), (t, lb, ub))
    assert torch.allclose(by_t, torch.tensor([0, 1, 1, 0], dtype=F64), atol=TIGHT)
    assert torch.allclose(by_lb, torch.tensor([1, 0, 0, 0], dtype=F64), atol=TIGHT)
    assert torch.allclose(by_ub, torch.tensor([0, 0, 0, 1], dtype=F64), atol=TIGHT)


@pytest.mark.parametrize("none", [math.inf, 1e20, 1e25])
def test_a_side_that_is_none_is_left_out_lane_by_lane_with_zero_gradient_and_multiplier(none: float) -> None:
    data = program(30, lanes=(3,))
    gone = {name: randn(*data[name].shape, seed=k) > 0.3 for k, name in enumerate(("lower", "h", "lb", "ub"))}
    for name, mask in gone.items():
        data[name] = torch.where(mask, none if name in ("h", "ub") else -none, data[name])
    leaves = {name: t.clone().requires_grad_() for name, t in data.items()}
    x, found = il.qp(**leaves, return_multipliers=True)
    v = randn(3, N, seed=9)
    got = torch.autograd.grad((x * v).sum(), list(leaves.values()))
    by_name = dict(zip(leaves, got, strict=True))
    for name, mask in gone.items():
        assert not by_name[name][mask].any() and bool(by_name[name].isfinite().all())
    for lane in range(3):  # the same with a very far side: no side there can hold
        far = {name: t[lane].clamp(-1e3, 1e3) if name in gone else t[lane] for name, t in data.items()}
        one, multipliers = il.qp(**far, return_multipliers=True)
        assert relative_error(x[lane], one) < TIGHT
        for part, other in zip(found.inequality, multipliers.inequality, strict=True):
            assert torch.allclose(part[lane], other, atol=1e-9)


@pytest.mark.parametrize("lanes", [(1,), (6,)])
@pytest.mark.parametrize("rank", [2, N])
@pytest.mark.parametrize("far", [1e7, 1e9, 1e12, 1e16])
def test_a_side_that_is_far_away_is_none(far: float, rank: int, lanes: tuple[int, ...]) -> None:
    """Strictly convex, and with a flat Q that needs the interior point."""
    for seed in range(5):
        data = program(10 * seed, lanes)
        root = randn(*lanes, N, rank, seed=seed)
        data |= {"Q": root @ root.mT + (rank == N) * 0.1 * torch.eye(N, dtype=F64)}
        data |= {"p": (data["Q"] @ data["p"][..., None])[..., 0] + 0.3 * randn(*lanes, N, seed=seed).abs()}
        with_far, without = ({**data, "ub": data["ub"].clone()} for _ in range(2))
        with_far["ub"][..., ::2], without["ub"][..., ::2] = far, math.inf
        found, expected = (il.qp(**d) for d in (with_far, without))
        assert relative_error(found, expected) < 1e-8  # of the flat Q's conditions, to 1e-11 of their terms


@pytest.mark.parametrize(("curvature", "pull", "expected"), [(1.0, 1e9, 1e8), (0.0, 1.0, 1e8), (1e-9, 1.0, 1e8)])
def test_far_sides_are_reached_where_the_solution_is_far(curvature: float, pull: float, expected: float) -> None:
    Q = curvature * torch.eye(2, dtype=F64).expand(2, 2, 2)
    p = torch.tensor([[-pull, -pull], [-pull, pull]], dtype=F64)
    x = il.qp(Q, p, lb=torch.zeros(2, dtype=F64), ub=torch.tensor([1e8, 0.5], dtype=F64))
    assert relative_error(x, torch.tensor([[expected, 0.5], [expected, 0.0]], dtype=F64)) < 1e-12


def test_a_row_whose_sides_are_equal_is_an_equation_that_moves_with_both() -> None:
    data = program(40)
    G, b = data["G"], data["G"][:1] @ torch.ones(N, dtype=F64)
    far = torch.full((M - 1,), 1e20, dtype=F64)
    b.requires_grad_()

    def two_sided(side: torch.Tensor) -> Any:
        return il.qp(
            data["Q"], data["p"], G=G, lower=torch.cat([side, -far]), h=torch.cat([side, far]), return_multipliers=True
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither a kink nor rows that depend on each other
        x, found = two_sided(b)
    expected, multipliers = il.qp(data["Q"], data["p"], G[:1], b, return_multipliers=True)
    assert relative_error(x, expected) < TIGHT
    assert torch.allclose(found.inequality[:1], multipliers.equality, atol=TIGHT)
    assert not found.inequality[1:].any()
    (got,), (want,) = (torch.autograd.grad((one**2).sum(), b) for one in (x, expected))
    assert relative_error(got, want) < TIGHT


def test_a_fixed_unknown_is_fixed() -> None:
    side = torch.tensor([-1.0, 0.25, -1.0], dtype=F64)
    x = il.qp(torch.eye(3, dtype=F64), -torch.ones(3, dtype=F64), lb=side, ub=torch.tensor([2.0, 0.25, 0.5], dtype=F64))
    assert torch.allclose(x, torch.tensor([1.0, 0.25, 0.5], dtype=F64), atol=TIGHT)


def test_vmap_over_sides_equals_a_loop() -> None:
    data = program(50)
    lower, ub = data["lower"] + 0.1 * randn(3, M, seed=1).abs(), data["ub"] + randn(3, N, seed=2).abs()
    rest = {name: t for name, t in data.items() if name not in ("lower", "ub")}
    rest["h"] = data["h"] + 1
    solve = lambda low, up: il.qp(**rest, lower=low, ub=up)  # noqa: E731
    assert (
        relative_error(vmap(solve)(lower, ub), torch.stack([solve(*one) for one in zip(lower, ub, strict=True)]))
        < TIGHT
    )


def test_sides_that_cross_are_infeasible_and_name_their_lane() -> None:
    lb = torch.zeros(2, 3, dtype=F64)
    lb[1, 0] = 2
    with pytest.raises(il.InfeasibleError, match=r"infeasible in lane 1 of \(2,\)"):
        il.qp(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64), lb=lb, ub=torch.ones(3, dtype=F64))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lower": torch.ones(2, dtype=F64)}, ValueError, "G and h or lower belong together"),
        ({"lb": torch.ones(2, dtype=F64)}, ValueError, r"lb must end in dimensions \(3,\)"),
        ({"ub": [1.0] * 3}, TypeError, "ub must be a real floating tensor, got list"),
        ({"lb": torch.ones(3)}, ValueError, "Bring all arguments to one dtype"),
        ({"lb": torch.full((3,), math.nan, dtype=F64)}, il.NonFiniteError, "not finite"),
    ],
)
def test_misuse_is_an_error_that_says_so(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        il.qp(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64), **changed)
