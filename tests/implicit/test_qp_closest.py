"""``il.qp(infeasible="closest")``: the smallest shift, the solution under it, and their derivatives."""

import warnings
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il

optimize = pytest.importorskip("scipy.optimize")

EYE = torch.eye(2, dtype=F64)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def contradictory(seed: int, n: int = 4, e: int = 2, m: int = 8) -> list[Tensor]:
    """Random rows whose sides are too small for any x: more of them than unknowns, in general position."""
    Q, p = spd_matrix(n, 1, seed=seed), randn(n, seed=seed + 1)
    A, b, G, h = (
        randn(e, n, seed=seed + 2),
        randn(e, seed=seed + 3),
        randn(m, n, seed=seed + 4),
        randn(m, seed=seed + 5),
    )
    return [t.requires_grad_() for t in (Q, p, A, b, G, h - 2)]


def closest(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
    x: Tensor = il.qp(Q, p, A, b, G, h, infeasible="closest")
    return x


def test_two_bounds_that_contradict_each_other_meet_in_the_middle() -> None:
    """1 <= x[0] <= 0: each side moves by a half, x[0] is the mean of both, and x[1] minimises on its own."""
    p, lower, upper = (tensor(v).requires_grad_() for v in ([3.0, -0.7], [1.0, -5.0], [0.0, 5.0]))
    with il.diagnostics() as records:
        x = il.qp(EYE, p, lb=lower, ub=upper, infeasible="closest")
    assert torch.allclose(x, tensor([0.5, 0.7]), atol=1e-12)
    gradients = torch.autograd.grad(x @ tensor([2.0, 1.0]), (p, lower, upper))
    for found, right in zip(gradients, ([0.0, -1.0], [1.0, 0.0], [1.0, 0.0]), strict=True):
        assert torch.allclose(found, tensor(right), atol=1e-12)
    shift = records[-1].active_set.shift  # type: ignore[union-attr]
    assert shift is not None and torch.allclose(shift.sort().values, tensor([0.0, 0.0, 0.5, 0.5]), atol=1e-12)


def test_equations_that_contradict_each_other_are_solved_in_the_sense_of_least_squares() -> None:
    A, b = randn(5, 3, seed=1), randn(5, seed=2)
    x = il.qp(spd_matrix(3, 1, seed=3), randn(3, seed=4), A, b, infeasible="closest")
    assert relative_error(x, torch.linalg.lstsq(A, b[:, None]).solution[:, 0]) < 1e-11  # a condition below 1e2


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_the_shift_is_the_smallest_and_x_the_solution_under_it(seed: int) -> None:
    given = contradictory(seed)
    Q, p, A, b, G, h = (t.detach() for t in given)
    with pytest.raises(il.InfeasibleError):
        il.qp(*given)
    with il.diagnostics() as records:
        x = closest(*given).detach()
    shift = records[-1].active_set.shift  # type: ignore[union-attr]
    # SciPy minimises |Ax - b|^2 + |(Gx - h)+|^2, smooth and convex: its gradient of 1e-9 over curvatures above 1e-1
    away = lambda x: torch.cat([A @ x - b, torch.relu(G @ x - h)])  # noqa: E731

    def half(flat: Any) -> tuple[float, Any]:
        point = torch.from_numpy(flat).requires_grad_()
        value = 0.5 * (away(point) ** 2).sum()
        return value.item(), torch.autograd.grad(value, point)[0].numpy()

    least = optimize.minimize(half, x.numpy() * 0, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-10})
    expected = away(torch.from_numpy(least.x))
    assert relative_error(shift, expected) < 1e-7
    moved = b + shift[:2], h + shift[2:]
    assert relative_error(A @ x, moved[0]) < 1e-10 and float((G @ x - moved[1]).max()) < 1e-10
    # no feasible direction leads down: SLSQP from x with the moved sides, slightly loosened, finds nothing lower
    loose = 1e-7
    rows = [
        {"type": "ineq", "fun": lambda z: loose - abs(A.numpy() @ z - moved[0].numpy())},
        {"type": "ineq", "fun": lambda z: loose + moved[1].numpy() - G.numpy() @ z},
    ]
    value = lambda z: 0.5 * z @ Q.numpy() @ z + p.numpy() @ z  # noqa: E731
    other = optimize.minimize(value, x.numpy(), constraints=rows, method="SLSQP", options={"ftol": 1e-14})
    size = float((Q @ x + p).norm())  # the value falls by the multipliers times what is loosened
    assert value(x.numpy()) - other.fun < 1e3 * loose * size


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_gradients_in_all_data_agree_with_differences(seed: int) -> None:
    data = contradictory(seed)
    v = randn(4, seed=seed + 7)
    gradients = torch.autograd.grad(closest(*data) @ v, data)
    directions = [randn(*t.shape, seed=seed + 8 + i) for i, t in enumerate(data)]
    h = 1e-6
    with torch.no_grad():
        ends = [closest(*[t + s * h * d for t, d in zip(data, directions, strict=True)]) @ v for s in (1, -1)]
        # the symmetric part of Q counts
        found = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    difference = (ends[0] - ends[1]) / (2 * h)
    # solutions to 1e-13 over h, and h^2 times third derivatives, each of the size of the gradients cubed at most
    sizes = sum(float(g.norm()) for g in gradients)
    assert abs(float(difference - found)) < 1e-6 * (1 + sizes)


def test_second_derivatives_are_right() -> None:
    Q, p, A, b, G, h = contradictory(6)
    assert torch.autograd.gradgradcheck(lambda p, b, h: closest(Q.detach(), p, A.detach(), b, G.detach(), h), (p, b, h))
    v = randn(4, seed=3)
    assert torch.autograd.gradcheck(
        lambda G: torch.autograd.grad(closest(Q, p, A, b, G, h) @ v, G, create_graph=True)[0][:2],
        (G,),
        eps=1e-6,
        atol=1e-3,
    )


def test_a_feasible_program_keeps_its_bits() -> None:
    Q, p, A, _, G, _ = contradictory(0)
    data = Q, p, A, A.detach() @ torch.ones(4, dtype=F64), G, (G.sum(1) + 0.3).detach()
    plain, with_option = il.qp(*data), closest(*data)
    assert torch.equal(plain, with_option)
    with il.diagnostics() as records:
        closest(*data)
    assert records[-1].active_set.shift is None  # type: ignore[union-attr]


def test_lanes_without_a_feasible_point_are_moved_and_the_others_solved_as_ever() -> None:
    Q, p, _, _, G, h = (t.detach() for t in contradictory(12))
    sides = torch.stack([h, (G.sum(1) + 0.3), h - 0.5]).requires_grad_()
    x, found = il.qp(Q, p, G=G, h=sides, infeasible="closest", return_multipliers=True)
    apart = [il.qp(Q, p, G=G, h=side, infeasible="closest") for side in sides]
    assert torch.equal(x, torch.stack(apart)) and found.inequality.shape == sides.shape
    (gradient,) = torch.autograd.grad(x.sum(), sides)
    for lane in range(3):
        (alone,) = torch.autograd.grad(apart[lane].sum(), sides, retain_graph=True)
        assert torch.equal(gradient[lane], alone[lane])
    # the conditions of optimality: Q x + p + G'z = 0, whatever z of moved rows is
    assert relative_error(x @ Q + p, -(found.inequality @ G)) < 1e-9


def test_rows_whose_rank_changes_with_the_data_are_told_where_they_have_a_gradient() -> None:
    """x[0] <= 0 and x[0] >= 1, as rows: turned a little against each other they meet far away."""
    G, h = tensor([[1.0, 0.0], [-1.0, 0.0]]), tensor([0.0, -1.0]).requires_grad_()
    p = tensor([0.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = il.qp(EYE, p, G=G, h=h, infeasible="closest")
    assert torch.allclose(torch.autograd.grad(x[0], h)[0], tensor([0.5, -0.5]))
    with pytest.warns(il.KinkWarning, match=r"the 2 rows that were moved .* have rank 1, .* Detach A and G"):
        il.qp(EYE, p, G=G.clone().requires_grad_(), h=h, infeasible="closest")
    with pytest.raises(il.KinkError, match="then x jumps"):
        il.qp(EYE, p, G=G.clone().requires_grad_(), h=h, infeasible="closest", on_failure="raise")


def test_an_inequality_that_depends_on_what_was_moved_is_told() -> None:
    """0 <= x <= -1 moves to -1/2; a third row x <= -1/2 is at its border for every x that is left."""
    G, h = tensor([[1.0], [-1.0], [1.0]]), tensor([-1.0, 0.0, -0.5])
    with pytest.warns(il.KinkWarning):
        x = il.qp(tensor([[1.0]]), tensor([0.0]).requires_grad_(), G=G, h=h, infeasible="closest")
    assert torch.allclose(x, tensor([-0.5]))


def test_sparse_rows_float32_and_another_search_find_the_same() -> None:
    Q, p, A, b, G, h = (t.detach() for t in contradictory(18))
    right = closest(Q, p, A, b, G, h)
    assert torch.allclose(closest(Q, p, A.to_sparse(), b, G.to_sparse(), h), right, rtol=1e-10)
    single = closest(*(t.float() for t in (Q, p, A, b, G, h)))
    assert single.dtype == torch.float32 and relative_error(single.double(), right) < 1e-4


def test_an_objective_that_falls_under_the_moved_sides_is_unbounded() -> None:
    G, h = tensor([[1.0, 0.0], [-1.0, 0.0]]), tensor([0.0, -1.0])
    with pytest.raises(il.UnboundedError):
        il.qp(torch.zeros(2, 2, dtype=F64), tensor([0.0, 1.0]), G=G, h=h, infeasible="closest")


def test_where_values_cannot_be_seen_it_is_refused() -> None:
    G, h, p = tensor([[1.0, 0.0], [-1.0, 0.0]]), tensor([0.0, -1.0]), tensor([[0.0, 1.0]])
    with pytest.raises(ValueError, match=r"infeasible='closest' is not under a transform"):
        torch.vmap(lambda p: il.qp(EYE, p, G=G, h=h, infeasible="closest"))(p)
    with pytest.raises(ValueError, match=r"is not beside on_failure='mask', .* Leave one of the two out\.$"):
        il.qp(EYE, p, G=G, h=h, infeasible="closest", on_failure="mask")  # a batch already
    with pytest.raises(ValueError, match=r"infeasible='closest' is not beside on_failure='mask'"):
        il.qp(EYE, p[0], G=G, h=h, infeasible="closest", on_failure="mask")
    with pytest.raises(ValueError, match=r"infeasible='nearest' must be one of \('error', 'closest'\)"):
        il.qp(EYE, p[0], G=G, h=h, infeasible="nearest")  # type: ignore[arg-type]


@pytest.mark.parametrize("exponent", range(11))
def test_a_contradiction_of_any_size_is_met_in_the_middle_or_is_below_the_size_that_counts(exponent: int) -> None:
    """gap <= x[0] <= 0 beside an x[1] of size one: contradictions below 1e-6 of it are none for ``il.qp``."""
    gap = 10.0**-exponent
    G, h = tensor([[1.0, 0.0], [-1.0, 0.0]]), tensor([0.0, -gap])
    x = il.qp(EYE, tensor([0.3, -1.0]), G=G, h=h, infeasible="closest")
    # the middle to rounding of numbers of size one, or a point between both sides, to 1e-11 of that size
    allowed = 1e-11 if gap > 1e-6 else gap / 2 + 1e-11
    assert abs(float(x[0]) - gap / 2) <= allowed and abs(float(x[1]) - 1) < 1e-11
