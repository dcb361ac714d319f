"""The line search alone, on functions of one variable: its conditions, its reach, and many searches at once."""

import math
from collections.abc import Callable

import pytest
import torch
from references import F64
from torch import Tensor

from implicitlayer.solvers._line_search import DECREASE, MAX_TRIALS, LineSearch

EPS = torch.finfo(F64).eps
Phi = Callable[[Tensor], Tensor]

# All fall at 0, and have a point that satisfies both conditions.
FUNCTIONS: dict[str, Phi] = {
    "parabola": lambda a: 0.5 * (a - 1) ** 2,
    "parabola, far away": lambda a: 0.5e-12 * (a - 1e6) ** 2,
    "parabola, very near": lambda a: 0.5e12 * (a - 1e-6) ** 2,
    "two wells": lambda a: ((a - 2) ** 2 - 1) ** 2 + 0.3 * a,
    "exponential": lambda a: torch.exp(3 * a) - 30 * a,
    "logarithm, undefined beyond 1": lambda a: -a - torch.log(1 - a) / 3,
    "flat, then a wall": lambda a: -1e-3 * a + torch.relu(a - 10) ** 4,
    "waves on a slope": lambda a: -a + 0.05 * a**2 + 0.3 * torch.sin(4 * a) ** 2,
    "rational (More & Thuente 1994, eq. 5.1)": lambda a: -a / (a**2 + 2),
    "steep (More & Thuente 1994, eq. 5.2)": lambda a: (a + 0.004) ** 5 - 2 * (a + 0.004) ** 4,
}
FIRST = [1e-3, 0.1, 1.0, 10.0, 1e3]  # first trials


def value_and_slope(phi: Phi, a: Tensor) -> tuple[Tensor, Tensor]:
    a = a.detach().requires_grad_()
    value = phi(a)
    (slope,) = torch.autograd.grad(value.sum(), a)
    return value.detach(), slope


def search(phi: Phi, first: Tensor, curvature: float) -> tuple[LineSearch, Tensor, Tensor]:
    """Run until every lane has ended; returns the search, the accepted lanes and those that failed."""
    value, slope = value_and_slope(phi, torch.zeros_like(first))
    state = LineSearch(first, EPS, curvature)
    state.start(torch.ones_like(first, dtype=torch.bool), value, slope, first)
    accepted = failed = torch.zeros_like(first, dtype=torch.bool)
    for _ in range(MAX_TRIALS + 1):
        yes, no = state.advance(*value_and_slope(phi, state.step))
        step, trials = state.step, state.trials
        accepted, failed = accepted | (yes & ~failed), failed | (no & ~accepted)
        if bool((accepted | failed).all()):
            return state, accepted, failed
        done = accepted | failed  # what ended is asked again and must not move
        assert torch.equal(step[done & yes], state.step[done & yes])
        state.trials = torch.where(done, trials - 1, trials)
    raise AssertionError("a search did not end")


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("curvature", [0.1, 0.9, math.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_accepted_step_satisfies_the_conditions(name: str, curvature: float, first: float) -> None:
    phi = FUNCTIONS[name]
    state, accepted, _ = search(phi, torch.tensor(first, dtype=F64), curvature)
    assert bool(accepted)
    (f0, s0), (f, s) = value_and_slope(phi, torch.zeros((), dtype=F64)), value_and_slope(phi, state.step)
    a = float(state.step)
    # none of these is decided at rounding level, so the plain test holds
    assert a > 0 and float(f) <= float(f0 + DECREASE * a * s0)
    assert curvature == math.inf or float(s.abs()) <= curvature * float(s0.abs())
    # 4 to 6 trials cross the decades (factors 4, 16, 64, ...), a dozen narrow the bracket, each by a tenth at least
    assert int(state.trials) <= 18


def test_armijo_never_lengthens_a_step() -> None:
    for phi in FUNCTIONS.values():
        for first in FIRST:
            state, _, _ = search(phi, torch.tensor(first, dtype=F64), math.inf)
            assert float(state.step) <= first


def test_a_parabola_takes_two_trials_from_any_side() -> None:
    """The cubic through two points of a parabola, or the line through two of its slopes, finds its minimum."""
    for first in (0.3, 50.0):
        state, _, _ = search(FUNCTIONS["parabola"], torch.tensor(first, dtype=F64), 1e-3)
        assert int(state.trials) == 2 and float(state.step) == pytest.approx(1.0, rel=1e-12)


def test_all_lanes_at_once_make_the_trials_that_each_makes_alone() -> None:
    firsts = torch.tensor(FIRST, dtype=F64)
    for phi in (FUNCTIONS["two wells"], FUNCTIONS["logarithm, undefined beyond 1"], FUNCTIONS["exponential"]):
        together, _, _ = search(phi, firsts, 0.9)
        for i, first in enumerate(firsts):
            alone, _, _ = search(phi, first, 0.9)
            assert torch.equal(together.step[i], alone.step)


def test_a_function_without_end_is_followed_to_the_last_trial() -> None:
    state, accepted, _ = search(lambda a: -a, torch.tensor(1.0, dtype=F64), 0.9)
    assert bool(accepted) and float(state.step) > 1e30 and int(state.trials) == MAX_TRIALS + 1


@pytest.mark.parametrize("curvature", [0.9, math.inf])
def test_values_that_contradict_the_slope_make_it_fail(curvature: float) -> None:
    """phi should fall and rises by as much: not even steps that change nothing at rounding level are accepted."""
    state = LineSearch(torch.zeros((), dtype=F64), EPS, curvature)
    one = torch.ones((), dtype=F64)
    state.start(one.bool(), one, -one, one)
    for _ in range(MAX_TRIALS):
        accepted, failed = state.advance(one + state.step, -one)
        assert not bool(accepted)
    assert bool(failed)


def test_a_minimum_below_the_rounding_errors_of_the_values_is_found_by_the_slopes() -> None:
    """phi = 1e10 + (a - 1)^2 / 2 * 1e-8: all values on the way are equal."""
    state = LineSearch(torch.zeros((), dtype=F64), EPS, 0.1)
    offset = torch.tensor(1e10, dtype=F64)
    state.start(torch.ones((), dtype=torch.bool), offset, -1e-8 * torch.ones((), dtype=F64), torch.tensor(5.0).double())
    assert not bool(state.advance(offset, 1e-8 * (state.step - 1))[0])
    assert bool(state.advance(offset, 1e-8 * (state.step - 1))[0])
    assert float(state.step) == pytest.approx(1.0, rel=1e-12)


def test_a_start_in_some_lanes_leaves_the_others_where_they_are() -> None:
    first = torch.tensor([10.0, 10.0], dtype=F64)
    state = LineSearch(first, EPS, 0.9)
    zero, both = torch.zeros(2, dtype=F64), torch.tensor([True, True])
    value, slope = value_and_slope(FUNCTIONS["exponential"], zero)
    state.start(both, value, slope, first)
    state.advance(*value_and_slope(FUNCTIONS["exponential"], state.step))
    kept = float(state.step[1])
    state.start(torch.tensor([True, False]), zero, -torch.ones(2, dtype=F64), torch.full((2,), 7.0, dtype=F64))
    assert state.step.tolist() == [7.0, kept] and state.trials.tolist() == [0.0, 1.0]
    assert state.high[0][0] == math.inf and state.high[0][1] == 10.0
