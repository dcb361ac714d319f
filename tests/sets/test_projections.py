"""Projections onto sets: the nearest point, its derivative, lanes, pytrees and wrong arguments."""

import math
from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il
from implicitlayer.sets import Affine, Ball, Box, NonNegative, Projection, Simplex
from implicitlayer.sets._term import ProximalTerm, resolve

MATRIX, RHS = randn(2, 5, seed=1), randn(2, seed=2)
SETS: dict[str, ProximalTerm] = {
    "box": Box(-0.3, randn(5, seed=3).abs()),
    "one-sided box": Box(upper=0.2),
    "non-negative": NonNegative(),
    "simplex": Simplex(1.5),
    "ball": Ball(0.7, randn(5, seed=4)),
    "affine": Affine(MATRIX, RHS),
}
EACH = pytest.mark.parametrize("name", list(SETS))


def feasible(name: str, seed: int) -> Tensor:
    """A random point of the set, made without its projection."""
    free = randn(5, seed=seed)
    if name == "simplex":
        return 1.5 * torch.softmax(3 * free, 0)
    if name == "ball":
        return randn(5, seed=4) + 0.7 * torch.rand((), dtype=F64) * free / free.norm()
    if name == "affine":
        basis = torch.linalg.svd(MATRIX)[2][2:]  # of the null space
        return torch.linalg.lstsq(MATRIX, RHS.unsqueeze(-1)).solution[:, 0] + basis.T @ free[:3]
    lower, upper = {"box": (-0.3, SETS["box"].upper), "one-sided box": (-math.inf, 0.2)}.get(name, (0.0, math.inf))  # type: ignore[attr-defined]
    return torch.clamp(torch.clamp(free, min=lower), max=torch.as_tensor(upper, dtype=F64))


@EACH
def test_the_projection_is_the_nearest_point(name: str) -> None:
    # p is the projection of y if and only if p is in the set and <y - p, q - p> <= 0 for every q of the set
    term = SETS[name]
    for seed in range(8):
        y = 2 * randn(5, seed=10 + seed)
        p = term.prox(y)
        assert float(term.violation(p)) <= 1e-14  # rounding of numbers of size 2
        for other in range(5):
            assert float((y - p) @ (feasible(name, seed=50 + other) - p)) <= 1e-13


@EACH
def test_points_of_the_set_stay_and_have_no_violation(name: str) -> None:
    x = feasible(name, seed=7)
    assert float(SETS[name].violation(x)) <= 1e-14
    torch.testing.assert_close(SETS[name].prox(x), x, rtol=0, atol=1e-14)


@EACH
def test_the_violation_of_a_point_outside_is_its_distance(name: str) -> None:
    y = 3 * randn(5, seed=20)
    distance, violation = float((y - SETS[name].prox(y)).norm()), float(SETS[name].violation(y))
    assert distance > 0.1
    if name in ("simplex", "affine"):  # bounds from below, up to a factor of sqrt(n) and of the singular values
        assert 0.05 * distance <= violation <= 3 * distance
    else:
        assert violation == pytest.approx(distance, rel=1e-13)


@EACH
def test_the_derivative_in_y_matches_differences_and_is_symmetric(name: str) -> None:
    y, h = 2 * randn(5, seed=30), 1e-6
    jacobian = torch.func.jacrev(SETS[name].prox)(y)
    columns = [(SETS[name].prox(y + h * e) - SETS[name].prox(y - h * e)) / (2 * h) for e in torch.eye(5, dtype=F64)]
    # truncation h^2, rounding 1e-16 / h = 1e-10
    torch.testing.assert_close(jacobian, torch.stack(columns, 1), rtol=0, atol=1e-8)
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (Box, (randn(5, seed=1) - 1, randn(5, seed=1) + 0.5)),
        (Simplex, (torch.tensor(1.5, dtype=F64),)),
        (Ball, (torch.tensor(0.7, dtype=F64), randn(5, seed=4))),
        (Affine, (MATRIX, RHS)),
    ],
    ids=["box", "simplex", "ball", "affine"],
)
def test_derivatives_in_the_data_of_a_set_match_differences(build: Any, data: tuple[Tensor, ...]) -> None:
    y = 2 * randn(5, seed=31)
    leaves = [t.clone().requires_grad_() for t in data]
    assert torch.autograd.gradcheck(lambda *d: build(*d).prox(y), leaves)
    assert torch.autograd.gradgradcheck(lambda *d: build(*d).prox(y), leaves)


@EACH
def test_lanes_are_projected_alone_and_vmap_agrees(name: str) -> None:
    y = 2 * randn(3, 5, seed=32)
    alone = torch.stack([SETS[name].prox(lane) for lane in y])
    torch.testing.assert_close(SETS[name].prox(y, lane_dims=1), alone, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.vmap(SETS[name].prox)(y), alone, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        SETS[name].violation(y, 1), torch.stack([SETS[name].violation(lane) for lane in y]), rtol=1e-13, atol=1e-14
    )


def test_the_derivative_of_affine_is_right_under_vmap_of_forward_mode() -> None:
    y, b = randn(5, seed=33), randn(3, 2, seed=34)
    together = torch.func.vmap(torch.func.jacfwd(lambda b: Affine(MATRIX, b).prox(y)))(b)
    torch.testing.assert_close(together, torch.linalg.pinv(MATRIX).expand(3, 5, 2), rtol=0, atol=1e-13)


def test_redundant_equations_do_no_harm_and_contradictions_show_in_the_violation() -> None:
    twice, y = torch.cat([MATRIX, MATRIX[:1]]), randn(5, seed=35)
    right = Affine(twice, torch.cat([RHS, RHS[:1]]))
    torch.testing.assert_close(right.prox(y), Affine(MATRIX, RHS).prox(y), rtol=0, atol=1e-13)
    wrong = Affine(twice, torch.cat([RHS, RHS[:1] + 1]))
    assert float(wrong.violation(wrong.prox(y))) > 0.1


def test_the_simplex_of_a_point_with_ties_shares_the_total() -> None:
    y = torch.ones(4, dtype=F64, requires_grad=True)
    p = Simplex(2.0).prox(y)
    assert p.tolist() == [0.5] * 4
    (slope,) = torch.autograd.grad(p[0], y)
    assert slope.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_a_simplex_along_a_dimension_projects_every_slice() -> None:
    y = randn(2, 3, 4, seed=36)
    expected = torch.stack([torch.stack([Simplex(1.0).prox(m[:, j]) for j in range(4)], 1) for m in y])
    torch.testing.assert_close(Simplex(1.0, dim=-2).prox(y), expected, rtol=0, atol=1e-15)
    totals = torch.tensor([1.0, 2.0], dtype=F64)
    expected = torch.stack([Simplex(t).prox(lane) for t, lane in zip((1.0, 2.0), y, strict=True)])
    torch.testing.assert_close(Simplex(totals).prox(y, lane_dims=1), expected, rtol=0, atol=1e-15)


def test_equal_bounds_fix_an_entry_and_pass_its_gradient_to_a_bound() -> None:
    bound = torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
    x = Box(bound, bound).prox(torch.tensor([1.0, 5.0], dtype=F64))
    assert x.tolist() == [1.0, 1.0]
    assert torch.autograd.grad(x.sum(), bound)[0].tolist() == [1.0, 1.0]
    assert Box(bound, bound).activity(torch.tensor([1.0, 5.0], dtype=F64))[1].tolist() == [math.inf, math.inf]


def test_a_ball_of_radius_zero_is_its_center() -> None:
    center = randn(3, seed=37).requires_grad_()
    for y in (center.detach(), randn(3, seed=38)):
        x = Ball(0.0, center).prox(y)
        assert torch.equal(x, center)
        assert torch.autograd.grad(x.sum(), center)[0].tolist() == [1.0] * 3


def test_infinite_bounds_leave_no_nan_in_the_gradient() -> None:
    y, upper = randn(3, seed=39).requires_grad_(), torch.tensor(0.1, dtype=F64, requires_grad=True)
    slopes = torch.autograd.grad(Box(upper=upper).prox(y).sum(), [y, upper])
    assert slopes[0].tolist() == [float(v < 0.1) for v in y]
    assert float(slopes[1]) == sum(float(v >= 0.1) for v in y)


# -------------------------------------------------------------------------------------------------- pytrees of unknowns


def tree(seed: int) -> dict[str, Tensor]:
    return {"w": randn(2, 2, seed=seed), "b": randn(3, seed=seed + 1)}


def test_a_ball_over_a_pytree_joins_its_leaves() -> None:
    y = tree(40)
    p = Ball(0.5).prox(y)
    flat = torch.cat([y["w"].reshape(-1), y["b"]])
    expected = 0.5 * flat / flat.norm()
    torch.testing.assert_close(torch.cat([p["w"].reshape(-1), p["b"]]), expected, rtol=1e-14, atol=0)


def test_bounds_may_be_a_pytree_in_any_order_of_keys() -> None:
    y = tree(41)
    p = Box({"b": 0.0, "w": torch.zeros(2, 1, dtype=F64)}, 9.0).prox(y)
    assert list(p) == ["w", "b"]
    assert all(torch.equal(p[k], y[k].clamp(0.0, 9.0)) for k in y)


def test_every_part_of_a_pytree_may_have_its_own_set() -> None:
    y = {"outer": tree(42), "free": randn(2, seed=43)}
    term = resolve({"free": None, "outer": Ball(0.1)}, ())
    p = term.prox(y)
    assert torch.equal(p["free"], y["free"])
    assert torch.equal(p["outer"]["w"], Ball(0.1).prox(y["outer"])["w"])
    held, margins = term.activity(y)
    assert not held["free"].any()
    assert held["outer"]["w"].all()
    assert margins["free"].isinf().all()
    assert float(term.violation(y)) == pytest.approx(float(Ball(0.1).violation(y["outer"])))


def test_activity_tells_the_held_entries_and_the_distance_from_a_kink() -> None:
    y = torch.tensor([-1.0, 0.25, 3.0], dtype=F64)
    held, margin = Box(0.0, 1.0).activity(y)
    assert held.tolist() == [True, False, True]
    assert margin.tolist() == [1.0, 0.25, 2.0]
    held, margin = Simplex(1.0).activity(y)  # the projection is (0, 0, 1), tau = 2
    assert held.tolist() == [True, True, False]
    assert margin.tolist() == [3.0, 1.75, 1.0]
    held, margin = Ball(5.0).activity(torch.tensor([6.0, 8.0], dtype=F64))
    assert held.tolist() == [True, True]
    assert margin.tolist() == [5.0, 5.0]


# ------------------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(torch.tensor(float("nan")), 1.0), r"lower=nan must be a number\. Use infinity"),
        (lambda: Box(0.0, float("nan")), r"upper=nan must be a number"),
        (lambda: Box(2.0, 1.0), r"lower=2\.0 must not be above upper=1\.0: the box is empty"),
        (lambda: Simplex(0.0), r"total=0\.0 must be positive and finite"),
        (lambda: Simplex(torch.tensor([1.0, -2.0])), r"total=-2\.0 \(an entry of it\) must be positive"),
        (lambda: Simplex(dim=0), r"dim=0 must be negative"),
        (lambda: Simplex(dim=-2).prox(torch.ones(3)), r"dim=-2 is out of range for a leaf of shape \(3,\)"),
        (
            lambda: Simplex(torch.ones(2)).prox(torch.ones(3)),
            r"total of shape \(2,\) must be one number, or one per la",
        ),
        (lambda: Ball(-1.0), r"radius=-1\.0 must be non-negative"),
        (lambda: Ball(1.0, torch.ones(2)).prox(torch.ones(3)), r"center of shape \(2,\) does not broadcast"),
        (lambda: Box(torch.ones(2, 3), 9.0).prox(torch.ones(3)), r"lower of shape \(2, 3\) does not broadcast"),
        (
            lambda: Box({"a": 0.0}, 9.0).prox({"b": torch.ones(3)}),
            r"lower must be one tensor or number, or have the st",
        ),
        (lambda: Affine(torch.ones(3), torch.ones(1)), r"A \[m, n\] and b \[m\] must fit: got shapes \(3,\)"),
        (lambda: Affine(torch.ones(1, 4), torch.ones(1)).prox(torch.ones(3)), r"needs 4 unknowns; x has 3 entries"),
        (
            lambda: Projection(lambda y: y[:1]).prox(torch.ones(3)),
            r"the projection must return the shapes it was given",
        ),
        (
            lambda: resolve({"a": Box()}, ()).prox(torch.ones(3)),
            r"a pytree of constraints must have the structure of x",
        ),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("terms", [3.0, [None], {"a": Box(), "b": "ball"}, Box])
def test_what_is_no_set_is_refused(terms: Any) -> None:
    with pytest.raises(TypeError, match=r"constraint must be a set or regulariser .* Wrap a projection of your own"):
        resolve(terms, ())


def test_a_projection_of_the_user_sees_theta_and_tells_what_it_holds() -> None:
    term = il.sets.Projection(lambda y, top: torch.where(y < top, y, top)).bind((torch.tensor(0.5, dtype=F64),))
    y = torch.tensor([0.0, 2.0], dtype=F64)
    assert term.prox(y).tolist() == [0.0, 0.5]
    held, margin = term.activity(y)
    assert held.tolist() == [False, True]
    assert margin.isnan().all()
    assert float(term.violation(y)) == 1.5


def test_thetas_that_were_given_to_an_operator_are_kept_in_a_layer() -> None:
    strength, target = torch.tensor(0.3, dtype=F64, requires_grad=True), torch.tensor([0.9, -2.0, 3.0], dtype=F64)

    def soft(y: Tensor, step: Tensor, by: Tensor) -> Tensor:
        return torch.where(y > step * by, y - step * by, torch.where(y < -step * by, y + step * by, 0.0))

    layer = il.argmin(
        lambda x, t, s: 0.5 * ((x - t) ** 2).sum(),
        il.solvers.ProximalGradient(rtol=1e-12),
        regularizer=lambda t, s: il.Prox(soft, (s,)),
    )
    x = layer(torch.zeros(3, dtype=F64), target, strength)
    assert torch.allclose(x, torch.tensor([0.6, -1.7, 2.7], dtype=F64))
    assert torch.allclose(torch.autograd.grad(x.abs().sum(), strength)[0], torch.tensor(-3.0, dtype=F64))
    below = il.sets.Projection(lambda y, most: y.clamp(max=most), (1.0,))
    assert torch.equal(below.bind((2.0,)).project(target), torch.tensor([0.9, -2.0, 1.0], dtype=F64))
