"""How a layer with constraints says that its solver ended, when it was called lane by lane."""

import pytest

import implicitlayer as il
from implicitlayer.constrained._kkt_point import Answer


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_status_of_many_lanes_is_that_of_the_worst_and_the_steps_are_the_most(order: tuple[int, ...]) -> None:
    lanes = [
        il.SolverResult(None, il.Status.CONVERGED, 9, "good"),
        il.SolverResult(None, il.Status.MAX_STEPS_REACHED, 4, "slow"),
        il.SolverResult(None, il.Status.STAGNATED, 2, "stuck"),
    ]
    result = Answer([], [], [lanes[i] for i in order]).result("x")
    assert (result.status, result.num_steps, result.message) == (il.Status.STAGNATED, 9, "stuck")
