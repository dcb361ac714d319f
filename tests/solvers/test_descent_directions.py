"""The shared loop of the line-search solvers when a method's direction is of no use."""

import math
from typing import Any

import pytest
import torch
from references import F64
from torch import Tensor

from implicitlayer import Status
from implicitlayer.solvers import LBFGS, NewtonCG
from implicitlayer.solvers._descent import descend
from implicitlayer.solvers._leaves import Problem


class Fixed:
    """A method with one direction until it is told to forget, then the steepest."""

    conjugate = halving = False

    STATE = ()

    def __init__(self, direction: Tensor) -> None:
        self.first, self.forgotten = direction, torch.tensor(False)

    def direction(self, lanes: Tensor, x: Tensor, gradient: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(self.forgotten, -gradient, self.first), torch.ones_like(norm)

    def moved(self, lanes: Tensor, step: Tensor, change: Tensor, search: Any) -> None: ...

    def forget(self, lanes: Tensor) -> Tensor:
        again, self.forgotten = lanes & ~self.forgotten, self.forgotten | lanes
        return again


def half_plane(x: Tensor) -> Tensor:
    """(x1 - 1)^2 / 2, undefined where x0 < 0."""
    return torch.where(x[0] < 0, math.nan, 0.5 * (x[1] - 1) ** 2)


def test_a_direction_that_leads_nowhere_is_given_up_once() -> None:
    method = Fixed(torch.tensor([-1.0, 1.0], dtype=F64))  # downhill, and undefined at every step
    result = descend(LBFGS(rtol=1e-9), Problem(half_plane, torch.zeros(2, dtype=F64), ()), method, 0.9)
    assert bool(method.forgotten) and result.status is Status.CONVERGED
    assert torch.allclose(result.value, torch.tensor([0.0, 1.0], dtype=F64), atol=1e-8)


def test_an_uphill_direction_is_replaced_by_the_steepest() -> None:
    for direction in ([0.0, -1.0], [0.0, 0.0], [math.nan, 1.0]):
        method = Fixed(torch.tensor(direction, dtype=F64))
        result = descend(LBFGS(rtol=1e-9), Problem(half_plane, torch.zeros(2, dtype=F64), ()), method, 0.9)
        assert not bool(method.forgotten) and result.status is Status.CONVERGED


@pytest.mark.parametrize("make", [LBFGS, NewtonCG, lambda **s: NewtonCG(line_search="wolfe", **s)])
@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_a_start_at_the_solution_ends_at_once_and_not_at_max_steps(make: Any, rtol: float) -> None:
    """Nothing but rounding is left: a tolerance relative to the first gradient cannot be met."""
    shift = torch.tensor([0.3, -1.2, 2.0], dtype=F64)

    def objective(x: Tensor) -> Tensor:
        return torch.cosh(x - shift).sum() + ((x - shift) ** 4).sum()

    init = shift + 1e-16
    result = make(rtol=rtol).run(objective, init)
    assert result.num_steps is not None and result.num_steps <= 100
    assert torch.allclose(result.value, shift, rtol=0, atol=1e-7)  # where values differ by rounding: sqrt(eps)
