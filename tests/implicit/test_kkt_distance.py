"""Layers under constraints: an answer that is further from the solution than its gradient shows."""

from typing import Any

import pytest
import torch
from references import F64, orthogonal, randn
from torch import Tensor

import implicitlayer as il

N = 12
BASIS = orthogonal(N, seed=0)


def flat_program(log10_condition: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H, p, a and the solution of min x'Hx / 2 - p'x under a'x = 1, all components of comparable size."""
    values = torch.logspace(0, -log10_condition, N, dtype=F64)
    H, a = (BASIS * values) @ BASIS.T, randn(N, seed=8)
    z = randn(N, seed=9)
    solution = z - a * (a @ z - 1) / (a @ a)
    return H, H @ solution, a, solution


@pytest.mark.parametrize("lanes", [False, True], ids=["one", "lanes"])
@pytest.mark.parametrize("log10_condition", [4, 6])
def test_under_constraints_too_the_backward_solve_sees_what_the_gradient_hides(
    log10_condition: int, lanes: bool
) -> None:
    H, p, a, solution = flat_program(log10_condition)
    P = torch.eye(N, dtype=F64) - torch.outer(a, a) / (a @ a)

    def descend(problem: Any, x: Tensor, t: Tensor) -> Tensor:
        x = a / (a @ a)
        for _ in range(2000):  # step 1 / ||H||; the flattest directions need 1e4 times as many
            x = x - P @ (H @ x - p)
        return x

    def layer(solver: Any, **settings: Any) -> Any:
        return il.constrained_argmin(
            lambda x, t: 0.5 * ((x @ H) * x).sum(-1) - (t * x).sum(-1),
            solver,
            equality=lambda x, t: (x @ a - 1)[..., None],
            batch_dims=int(lanes),
            **settings,
        )

    zero, t = torch.zeros(*[2] * lanes, N, dtype=F64), p.expand(*[2] * lanes, N).clone().requires_grad_()
    made = layer(descend)
    x = made(zero, t)
    assert float(made.active_set.stationarity.max()) < 1e-3, "else this tests nothing"
    with pytest.warns(il.StationarityWarning, match="a Newton step from it is .* of its size long"):
        torch.autograd.grad(x.sum(), t)
    # the Newton step of a quadratic program is the distance itself; the solve has a residual of 1e-10 at this condition
    away = float((x.detach() - solution).norm(dim=-1).max() / x.detach().norm(dim=-1).max())
    assert float(made.last_record.relative_distance.max()) == pytest.approx(away, rel=1e-3)
    with pytest.raises(il.StationarityError, match="a Newton step"):
        torch.autograd.grad(layer(descend, on_failure="raise")(zero, t).sum(), t)
    for answer in (solution, solution * (1 + 1e-7)):  # within the tolerance: nothing is said
        torch.autograd.grad(layer(lambda problem, x, t: answer, on_failure="raise")(zero, t).sum(), t)  # noqa: B023
    torch.autograd.grad(layer(descend, polish=1, on_failure="raise")(zero, t).sum(), t)


def test_an_answer_on_the_wrong_side_of_a_border_is_told_under_constraints() -> None:
    """x0 <= 1 holds at the solution; the rough answer has not reached it, and hides that behind an error of x1."""
    c = 1e-4
    objective = lambda x, t: 0.5 * c * (x[0] - t) ** 2 + 0.5 * (x[1] - 3) ** 2  # noqa: E731
    t = torch.tensor(1.02, dtype=F64, requires_grad=True)

    solver = lambda problem, x, t: torch.tensor([0.995, 3.0 + 1e-5], dtype=F64)  # noqa: E731
    layer = il.constrained_argmin(objective, solver, inequality=lambda x, t: x[0] - 1, stationarity_rtol=1e-2)
    x = layer(torch.zeros(2, dtype=F64), t)
    with pytest.warns(il.StationarityWarning, match="too rough to tell its active set"):
        torch.autograd.grad(x[0], t)
    solver = lambda problem, x, t: torch.tensor([1.0, 3.0], dtype=F64)  # noqa: E731
    layer = il.constrained_argmin(
        objective, solver, inequality=lambda x, t: x[0] - 1, active_rtol=1e-9, on_failure="raise"
    )
    assert float(torch.autograd.grad(layer(torch.zeros(2, dtype=F64), t)[0], t)[0]) == 0.0


@pytest.mark.parametrize("changed", [False, True])
def test_an_objective_under_constraints_that_changes_before_the_backward_is_differentiated_as_it_was(
    changed: bool,
) -> None:
    factor = [1.0]
    layer = il.constrained_argmin(
        lambda x, t: ((x - factor[0] * t) ** 2).sum(),
        lambda problem, x, t: t - (t.sum() - 1) / 2,
        equality=lambda x, t: x.sum() - 1,
        on_failure="raise",
    )
    t = torch.tensor([0.3, 2.0], dtype=F64, requires_grad=True)
    x, again = (layer(torch.zeros(2, dtype=F64), t) for _ in range(2))
    if changed:
        factor[0] = 3.0
        with pytest.raises(il.ClosureError, match="the objective has changed"):  # second derivatives run it again
            torch.autograd.grad(again[0], t, create_graph=True)
    (gradient,) = torch.autograd.grad(x[0], t)
    torch.testing.assert_close(gradient, torch.tensor([0.5, -0.5], dtype=F64), rtol=1e-10, atol=0)
