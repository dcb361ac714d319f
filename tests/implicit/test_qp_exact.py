"""``il.qp`` finds the active set: weak borders, small curvatures, solutions at zero, degenerate and unscaled data."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, randn, relative_error

import implicitlayer as il
from implicitlayer._errors import KinkWarning
from implicitlayer.programs._interior_point import Data, QuadraticSolution, interior_point
from implicitlayer.programs._qp_exact import TIGHT, exact, undecided, violation
from implicitlayer.solvers import OSQP, Clarabel, InteriorPoint

optimize = pytest.importorskip("scipy.optimize")

EYE = torch.eye(2, dtype=F64)
ROUNDING = 1e-12  # every solution below is a vertex or separable: a few operations on numbers of size one


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("curvature", [1e-3, 1e-5, 1e-6, 1e-7])
def test_a_border_that_pushes_weakly_is_found(curvature: float) -> None:
    # separable: x2 minimises curvature (x2^2 / 2 - x2) up to 0.2, with the multiplier 0.8 curvature
    p, h = tensor([-1.0, -curvature]).requires_grad_(), tensor([0.5, 0.2]).requires_grad_()
    x = il.qp(torch.diag(tensor([1.0, curvature])), p, G=EYE, h=h)
    assert torch.allclose(x, tensor([0.5, 0.2]), atol=ROUNDING)
    by_p, by_h = torch.autograd.grad(x[1], (p, h))
    assert not bool(by_p.any()) and torch.allclose(by_h, tensor([0.0, 1.0]), atol=ROUNDING)


@pytest.mark.parametrize("curvature", [1e-8, 1e-10, 1e-12])
def test_a_border_whose_force_is_below_the_tolerance_is_a_kink_and_told(curvature: float) -> None:
    """A small curvature across the unknowns; one of an unknown of its own is a unit, in which the force is as any."""
    turn = tensor([[0.6, 0.8], [-0.8, 0.6]])
    p, h = tensor([-1.0, -curvature]), tensor([0.5, 0.2]).requires_grad_()
    Q = torch.diag(tensor([1.0, curvature]))
    with pytest.warns(KinkWarning, match="1 inequalities are at their border"):
        x = il.qp(turn.mT @ Q @ turn, turn.mT @ p, G=turn, h=h)
    assert torch.allclose(turn @ x, tensor([0.5, 0.2]), atol=ROUNDING)
    x = il.qp(Q, p, G=EYE, h=h)
    assert torch.allclose(x, tensor([0.5, 0.2]), atol=ROUNDING)
    (by_h,) = torch.autograd.grad(x.sum(), h)
    assert torch.allclose(by_h, tensor([1.0, 1.0]), atol=ROUNDING)


@pytest.mark.parametrize("ridge", [1e-4, 1e-6, 1e-7])
def test_a_small_ridge_on_two_of_four_bounded_unknowns(ridge: float) -> None:
    eye, p = torch.eye(4, dtype=F64), tensor([-2.0, -0.3, -0.5 * ridge, -3 * ridge])
    h = torch.cat([torch.ones(4, dtype=F64), torch.zeros(4, dtype=F64)]).requires_grad_()
    x = il.qp(torch.diag(tensor([1.0, 1.0, ridge, ridge])), p, G=torch.cat([eye, -eye]), h=h)
    assert torch.allclose(x, tensor([1.0, 0.3, 0.5, 1.0]), atol=1e-8)  # x3: rounding 1e-16 over a curvature of 1e-7
    (by_h,) = torch.autograd.grad(x.sum(), h)
    assert torch.allclose(by_h, tensor([1.0, 0, 0, 1, 0, 0, 0, 0]), atol=1e-8)


def test_a_border_at_zero_with_a_small_curvature_is_found() -> None:
    for curvature in (1e-5, 1e-6, 1e-7):
        p = tensor([-1.0, -curvature]).requires_grad_()
        x = il.qp(torch.diag(tensor([1.0, curvature])), p, G=EYE, h=tensor([0.5, 0.0]))
        assert torch.allclose(x, tensor([0.5, 0.0]), atol=ROUNDING)


def test_ill_conditioned_separable_programs_are_clamps() -> None:
    # curvatures from 1 to 1e-6
    lanes, n = 100, 5
    curvature = 10 ** -randn(lanes, n, seed=0).mul(3).abs().clamp(max=6)
    centre = 2 * randn(lanes, n, seed=1)
    low, high = -0.1 - randn(lanes, n, seed=2).abs(), 0.1 + randn(lanes, n, seed=3).abs()
    h = torch.cat([high, -low], -1).requires_grad_()
    eye = torch.eye(n, dtype=F64)
    bounds = torch.cat([eye, -eye])
    x = il.qp(torch.diag_embed(curvature), -curvature * centre, G=bounds, h=h, on_failure="ignore")
    assert torch.allclose(x, torch.clamp(centre, low, high), atol=1e-9)
    force = curvature * (centre - torch.clamp(centre, low, high)).abs()
    clear = (force > 1e-5) | (force == 0)  # above active_rtol = 1e-8 times the gradient, of size up to about 10
    (by_h,) = torch.autograd.grad((x * clear).sum(), h)
    expected = torch.cat([centre > high, centre < low], -1).double() * torch.cat([clear, -1.0 * clear], -1)
    assert torch.allclose(by_h, expected, atol=1e-8)


SOLVERS = [None, InteriorPoint(), OSQP(), Clarabel()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_solution_at_zero_is_found_and_does_not_move(solver: Any) -> None:
    if isinstance(solver, OSQP | Clarabel):
        pytest.importorskip(type(solver).__name__.lower())
    p = tensor([0.01, 5.0]).requires_grad_()
    x = il.qp(EYE, p, G=-EYE, h=torch.zeros(2, dtype=F64), solver=solver)
    assert float(x.detach().abs().max()) < ROUNDING
    assert not bool(torch.autograd.grad(x.sum(), p)[0].any())


def test_non_negative_least_squares_is_that_of_scipy() -> None:
    root, p = randn(60, 12, 5, seed=0), 3 * torch.rand(60, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    p[40:] -= 6  # the others mostly have nothing selected
    x = il.qp(root.mT @ root, p, G=-torch.eye(5, dtype=F64), h=torch.zeros(5, dtype=F64))
    for lane in range(60):
        matrix = root[lane].numpy()
        rhs = np.linalg.lstsq(matrix.T, -p[lane].numpy(), rcond=None)[0]  # M'rhs = -p
        assert torch.allclose(x[lane], torch.from_numpy(optimize.nnls(matrix, rhs)[0]), atol=1e-9)
    assert bool((x.abs() < 1e-12).all(-1).any()) and bool((x.abs().amax(-1) > 0.1).any())  # some of either kind


def test_negative_points_are_projected_to_the_corner_of_a_simplex() -> None:
    points = -0.1 - randn(20, 4, seed=5).abs()
    eye, ones = torch.eye(4, dtype=F64), torch.ones(1, 4, dtype=F64)
    h = torch.cat([torch.zeros(4, dtype=F64), ones[0, :1]]).requires_grad_()
    x = il.qp(eye, -points, G=torch.cat([-eye, ones]), h=h)
    assert float(x.detach().abs().max()) < ROUNDING
    (by_h,) = torch.autograd.grad(x.sum(), h)
    assert torch.allclose(by_h, tensor([-20.0, -20, -20, -20, 0]), atol=1e-9)  # x = -h on the corner's four borders


@pytest.mark.parametrize(
    ("p", "row", "right", "equation", "expected"),
    [
        ([-1.0, 0.5], [0.0, 1.0], 1e-9, False, [1.0, -0.5]),
        ([-1e6, -1e-3], [0.0, 1.0], 2e-3, False, [1e6, 1e-3]),
        # the right-hand side is rounding of zero: 5.6e-17
        ([-1.0, 0.5, 0.2], [1.0, 1.0, 1.0], 0.1 + 0.2 - 0.3, True, [0.9, -0.6, -0.3]),
    ],
)
def test_strictly_convex_programs_with_borders_near_zero_are_not_unbounded(
    p: list[float], row: list[float], right: float, equation: bool, expected: list[float]
) -> None:
    names = ("A", "b") if equation else ("G", "h")
    sides = dict(zip(names, (tensor([row]), tensor([right])), strict=True))
    x = il.qp(torch.eye(len(p), dtype=F64), tensor(p), **sides)
    assert torch.allclose(x, tensor(expected), rtol=1e-9, atol=0)


def test_borders_far_from_the_scale_of_the_objective_are_found_in_both_directions() -> None:
    # minimiser 1e6 inside a box of 1e-6, minimiser 1e-6 inside a box of 1e6: clamp in both
    for centre, half in ((1e6, 1e-6), (1e-6, 1e6)):
        t = tensor([centre, -0.5 * min(centre, half)])
        x = il.qp(EYE, -t, G=torch.cat([EYE, -EYE]), h=torch.full((4,), half, dtype=F64))
        assert torch.allclose(x, t.clamp(-half, half), rtol=1e-9, atol=0)


def test_a_point_of_a_users_solver_is_judged_itself_if_it_is_far_from_a_solution() -> None:
    p = tensor([-3.0, 0.0]).requires_grad_()
    settings: dict[str, Any] = {"G": tensor([[1.0, 0.0]]), "h": tensor([1.0]), "solver": lambda *data: [0.3, 0.1]}
    with pytest.warns(il.StationarityWarning, match="does not satisfy the optimality conditions"):
        x = il.qp(EYE, p, **settings)
    assert x.tolist() == [0.3, 0.1]
    settings["on_failure"] = "raise"
    with pytest.raises(il.StationarityError, match="does not satisfy the optimality conditions"):
        il.qp(EYE, p, **settings)


def degenerate(lanes: int) -> Data:
    """Programs of small integers: many borders through one point, multipliers that are zero, no curvature."""
    generator = torch.Generator().manual_seed(22)
    draw = lambda *shape, low: torch.randint(low, -low + 1, shape, generator=generator).double()  # noqa: E731
    n, eye = 5, torch.eye(5, dtype=F64).expand(lanes, 5, 5)
    G = torch.cat([draw(lanes, 8, n, low=-1), eye, -eye], 1)
    h = torch.cat([torch.zeros(lanes, 8, dtype=F64), torch.ones(lanes, 2 * n, dtype=F64)], 1)
    p = draw(lanes, n, low=-2)
    return torch.zeros(lanes, n, n, dtype=F64), p, p.new_zeros(lanes, 0, n), p.new_zeros(lanes, 0), G, h


def test_degenerate_linear_programs_have_the_value_of_highs_and_tell_what_they_do_not_know() -> None:
    data = degenerate(40)
    answer = interior_point(data)
    found = exact(data, answer, torch.ones(40, dtype=torch.bool))
    tight = found.error <= TIGHT
    assert 36 <= int(tight.sum()) < 40  # where many borders meet in a point the search may go in a circle
    _, p, _, _, G, h = (t.numpy() for t in data)
    for lane in tight.nonzero()[:, 0].tolist():
        value = optimize.linprog(p[lane], G[lane], h[lane], bounds=(None, None)).fun
        assert float(data[1][lane] @ found.solution.x[lane]) == pytest.approx(value, abs=1e-9)
    x = il.qp(data[0], data[1], G=data[4], h=data[5], on_failure="ignore")  # all of them, with the second attempt
    for lane in range(40):
        value = optimize.linprog(p[lane], G[lane], h[lane], bounds=(None, None)).fun
        assert float(data[1][lane] @ x[lane]) == pytest.approx(value, abs=1e-8)
    for lane in (~tight).nonzero()[:, 0].tolist():
        alone = il.qp(data[0][lane], data[1][lane], G=data[4][lane], h=data[5][lane], on_failure="ignore")
        assert float(data[1][lane] @ (alone - x[lane])) == pytest.approx(0, abs=1e-8)


def test_a_single_program_without_a_solution_is_told_after_the_second_attempt() -> None:
    with pytest.raises(il.UnboundedError, match="the quadratic program is unbounded"):
        il.qp(0 * EYE, tensor([1.0, 1.0]))
    with pytest.raises(il.InfeasibleError, match="the quadratic program is infeasible"):
        il.qp(EYE, tensor([1.0, 1.0]), G=tensor([[1.0, 0.0], [-1.0, 0.0]]), h=tensor([-1.0, 0.0]))


def test_the_search_recovers_from_a_guess_that_holds_nothing() -> None:
    root, G = randn(30, 6, 6, seed=1), randn(30, 9, 6, seed=2)
    empty = torch.zeros(30, 0, 6, dtype=F64), torch.zeros(30, 0, dtype=F64)
    data = (root @ root.mT + torch.eye(6, dtype=F64), 5 * randn(30, 6, seed=3), *empty, G, torch.ones(30, 9, dtype=F64))
    right = interior_point(data)
    nothing = torch.zeros_like(right.codes)
    start = QuadraticSolution(0 * right.x, right.equality, 0 * right.inequality, nothing, nothing, right.error)
    found = exact(data, start, torch.ones(30, dtype=torch.bool))
    assert bool((found.error <= TIGHT).all()) and not bool(found.held.any())
    assert torch.allclose(found.solution.x, right.x, atol=1e-6)
    assert not bool(undecided(data, found.solution).any())


def test_lanes_that_are_not_near_are_left_alone() -> None:
    data = degenerate(4)
    answer = interior_point(data)
    rough = QuadraticSolution(
        answer.x + 0.1, answer.equality, answer.inequality, answer.codes, answer.steps, answer.error
    )
    near = torch.tensor([True, False, False, True])
    found = exact(data, rough, near)
    assert torch.equal(found.solution.x[~near], rough.x[~near])
    assert torch.equal(found.error[~near], violation(data, rough)[~near])


def test_a_force_and_a_distance_that_both_differ_from_zero_are_undecided() -> None:
    data: Data = (EYE, tensor([-3.0, -0.5]), EYE[:0], tensor([]), EYE, tensor([1.0, 1.0]))
    codes = torch.zeros((), dtype=torch.long)
    at = QuadraticSolution(tensor([1 - 1e-7, 0.5]), tensor([]), tensor([2.0, 0.0]), codes, codes, tensor(0.0))
    assert undecided(data, at).tolist() == [True, False]
    assert float(violation(data, at)) > 1e-8


def test_what_stays_undecided_is_told_as_a_kink() -> None:
    # -1e-8 x2^2 / 2 on x2 <= 1 has its minimum at the border, but the force of the answer is smaller than the distance,
    # and without that border as an equation the program has no minimum: the search cannot tell
    x, z = tensor([1.0, 1 - 1e-7]), tensor([1e-8])
    Q, p = torch.diag(tensor([1.0, -1e-8])), tensor([-1.0, 0.0]).requires_grad_()
    G, h = tensor([[0.0, 1.0]]), tensor([1.0])
    # a gradient of 1e-8 is left, and over the curvature of 1e-8 that may be a distance of 1 to either side
    with pytest.warns(KinkWarning, match=r"1 inequalities are at their border .*within 2\.0e\+00"):
        got = il.qp(Q, p, G=G, h=h, solver=lambda *data: (x, (tensor([]), z)))
    assert torch.equal(got, x)


@pytest.mark.parametrize("power", range(0, 21, 4))
def test_the_multiplier_of_a_row_hides_nothing_of_its_residual_whatever_the_units(power: int) -> None:
    """x[0] is held by a row of length s, so the derivative of v'x in p[0] is zero, and in the row's side -v'dx / s.

    The solve may leave 2e-10 of ||v|| in units of the row and of Q (NOTE in ``_qp_function``); before, a product lost
    what is below eps of the multiplier, 1 / s times as much.
    """
    s = 2.0**-power
    Q, row = torch.tensor([[2.0**-11, -1.0], [-1.0, 24576.0]], dtype=F64), torch.tensor([[-s, 0.0]], dtype=F64)
    x, v = torch.tensor([-2.0, 2.0], dtype=F64), torch.tensor([-1.0, 3.0], dtype=F64)
    p = (-(Q @ x) - row[0] / s).requires_grad_()
    h = torch.tensor([2 * s], dtype=F64, requires_grad=True)
    in_p, in_h = torch.autograd.grad(il.qp(Q, p, G=row, h=h) @ v, (p, h))
    assert abs(float(in_p[0])) <= 2e-10 * float(v.norm()) / 24576
    # dx[1] / dx[0] = 1 / 24576 along the border, and dx[0] / dh = -1 / s
    right = torch.tensor([-(float(v[0]) + float(v[1]) / 24576) / s], dtype=F64)
    assert relative_error(in_h, right) <= 1e-9
    assert relative_error(in_p[1:], -v[1:] / 24576) <= 1e-9


@pytest.mark.parametrize("how", ["plain", "lanes", "recorded", "jacrev", "jacfwd", "masked"])
@pytest.mark.parametrize("ridge", [1e-4, 1e-8, 1e-11, 1e-14])
def test_a_corner_under_a_tiny_ridge_has_the_gradients_of_the_linear_program(ridge: float, how: str) -> None:
    """Both rows are held, so x = R^-1 h: dx/dh = R^-1, dx/dR by the row's multiplier of the loss, dx/dp = 0."""
    R, h, weights = tensor([[1.0, 2.0], [3.0, -1.0]]), tensor([1.0, 1.0]), tensor([1.0, 1.0])
    Q, p = ridge * tensor([[2.0, 1.0], [1.0, 3.0]]), -(R.T @ tensor([1.0, 1.0]))
    x, u = torch.linalg.solve(R, h), torch.linalg.solve(R.T, weights)

    def loss(p: torch.Tensor, R: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        many = [t.expand(3, *t.shape) if how == "lanes" else t for t in (Q, p, R, h)]
        found = il.qp(many[0], many[1], G=many[2], h=many[3], on_failure="mask" if how == "masked" else "warn")
        return (found * weights).sum() / (3 if how == "lanes" else 1)

    if how in ("jacrev", "jacfwd"):
        gradients = getattr(torch.func, how)(loss, (0, 1, 2))(p, R, h)
    else:
        leaves = [t.clone().requires_grad_() for t in (p, R, h)]
        with il.diagnostics() if how == "recorded" else nullcontext():
            gradients = torch.autograd.grad(loss(*leaves), leaves)
    for found, right in zip(gradients, (torch.zeros_like(p), -torch.outer(u, x), u), strict=True):
        allowed = 1e-13 if how in ("plain", "lanes") else 1e-9  # rounding; ten times the rtol of a solve
        assert torch.allclose(found, right, rtol=allowed, atol=allowed)
