"""``il.constrained_argmin`` at answers that are not exact: solutions at zero, borders within their error."""

import pytest
import torch
from kkt_problems import bound, squares
from references import F64

import implicitlayer as il
from implicitlayer._errors import InfeasibleError, KinkWarning
from implicitlayer.programs._kkt_active import length_of_step


def half_squares(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((x - t) ** 2).sum()


@pytest.mark.parametrize("answer", [[1e-12, 3e-13], [-1e-12, 3e-13], [0.0, 0.0]])
def test_an_answer_that_is_zero_up_to_the_accuracy_of_its_solver_is_one(answer: list[float]) -> None:
    # the gradient would move x by 5: relative to that the answer is good to 2e-13, relative to itself to nothing
    t = torch.tensor([-0.01, -5.0], dtype=F64, requires_grad=True)
    at = torch.tensor(answer, dtype=F64)
    layer = il.constrained_argmin(half_squares, lambda problem, init, t: at, inequality=lambda x, t: -x)
    x = layer(torch.zeros(2, dtype=F64), t)
    assert layer.active_set is not None and layer.active_set.active.tolist() == [True, True]
    assert torch.autograd.grad(x.sum(), t)[0].tolist() == [0.0, 0.0]


def test_a_large_force_does_not_hide_a_violation() -> None:
    # the gradient would move x by 1e8; that is no reason to accept 1.01 where 1 is allowed
    layer = il.constrained_argmin(half_squares, lambda problem, init, t: t.clamp(max=1.01), inequality=bound)
    with pytest.raises(InfeasibleError, match=r"distance from one is about 0\.01 "):
        layer(torch.zeros(2, dtype=F64), torch.tensor([1e8, 0.5], dtype=F64, requires_grad=True))


def test_a_border_within_the_error_of_a_rough_answer_is_a_kink() -> None:
    # the answer is 1.1e-4 from the minimum on the free side and 1e-5 from the border: the border may well be active
    t = torch.tensor([1.0001, 0.0], dtype=F64, requires_grad=True)
    rough = lambda problem, init, t: torch.tensor([1 - 1e-5, 0.0], dtype=F64)  # noqa: E731
    for side, expected in (("inactive", [1.0, 1.0]), ("active", [0.0, 1.0])):
        layer = il.constrained_argmin(squares, rough, inequality=lambda x, t: x[:1] - 1, at_kink=side)  # type: ignore[arg-type]
        with pytest.warns(KinkWarning, match=r"1 inequalities are at their border .*within 2\.2e-04"):
            x = layer(torch.zeros(2, dtype=F64), t)
        assert torch.autograd.grad(x.sum(), t)[0].tolist() == pytest.approx(expected)


def test_a_border_beyond_the_error_of_the_answer_is_no_kink() -> None:
    t = torch.tensor([0.5, 0.0], dtype=F64, requires_grad=True)
    rough = lambda problem, init, t: t + 1e-5  # noqa: E731
    layer = il.constrained_argmin(squares, rough, inequality=lambda x, t: x[:1] - 0.5 - 1e-4)
    x = layer(torch.zeros(2, dtype=F64), t)  # warnings are errors
    assert layer.active_set is not None and int(layer.active_set.num_kinks) == 0
    assert torch.autograd.grad(x.sum(), t)[0].tolist() == pytest.approx([1.0, 1.0])


def test_the_length_of_a_step_is_exact_for_one_curvature_and_never_too_large() -> None:
    slope, H = torch.tensor([3.0, -4.0], dtype=F64), torch.diag(torch.tensor([2.0, 50.0], dtype=F64))
    assert float(length_of_step(slope, 2 * slope)) == pytest.approx(2.5)
    assert 0 < float(length_of_step(slope, H @ slope)) <= float(torch.linalg.solve(H, slope).norm())
    assert float(length_of_step(slope, 0 * slope)) == 0.0  # no curvature tells no length


@pytest.mark.parametrize("objective", [1e-30, 1e-12, 1e-9, 1.0, 1e9, 1e30])
@pytest.mark.parametrize("length", [1e-12, 1.0, 1e9])
def test_no_unit_of_the_objective_or_of_x_is_taken_for_an_inexact_solve(objective: float, length: float) -> None:
    # the point of a ball that is nearest to t: x = r t / |t|, and a warning would be an error here
    layer = il.constrained_argmin(
        lambda x, t, r: objective * ((x - t) ** 2).sum(),
        lambda problem, init, t, r: t * (r / t.norm()).clamp(max=1.0),
        inequality=lambda x, t, r: (x**2).sum() - r**2,
    )
    t = length * torch.tensor([2.0, 1.0, 0.5], dtype=F64)
    r = torch.tensor(length, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(torch.zeros(3, dtype=F64), t, r).sum(), r)
    assert abs(float(gradient - (t / t.norm()).sum())) < 1e-13  # of a handful of operations on numbers of size one


@pytest.mark.parametrize("share", [0.01, 100.0])
def test_a_force_below_the_tolerance_is_that_of_a_kink_and_one_above_holds_the_border(share: float) -> None:
    """x <= 1 at t = 1: the multiplier is 0, and a solver that tells ``share`` of the tolerance means that or not."""
    # the gradient 2 (x - t) has terms of size 2 |x| + 2 |t|; forces are compared with active_rtol times their size
    t, active_rtol = torch.tensor([1.0, 0.25], dtype=F64), 1e-4
    scale = float((2 * (t - t)).norm() + (2 * t).norm())  # of the gradient, and of the curvature times x
    force = torch.tensor([share * active_rtol * scale], dtype=F64)
    layer = il.constrained_argmin(
        squares,
        lambda problem, init, t: (t.detach().clone(), (None, force)),
        inequality=lambda x, t: x[:1] - 1,
        solver_returns_multipliers=True,
        active_rtol=active_rtol,
        stationarity_rtol=None,
        on_failure="ignore",
    )
    layer(torch.zeros(2, dtype=F64), t.requires_grad_())
    found = layer.active_set
    assert found is not None
    assert (int(found.num_kinks), int(found.num_active)) == ((1, 0) if share < 1 else (0, 1))
