"""The two-loop recursion against the dense formula, and what is particular to LBFGS."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

from implicitlayer import Status
from implicitlayer.solvers import LBFGS
from implicitlayer.solvers._lbfgs import _Matrices, _TwoLoop
from implicitlayer.solvers._line_search import LineSearch


def dense_inverse(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """H <- (I - s y'/y's) H (I - y s'/y's) + s s'/y's, from H = (s'y / y'y) I with the newest pair."""
    s, y = pairs[-1]
    identity = torch.eye(s.numel(), dtype=F64)
    inverse = (s @ y) / (y @ y) * identity
    for s, y in pairs:
        left = identity - torch.outer(s, y) / (y @ s)
        inverse = left @ inverse @ left.T + torch.outer(s, s) / (y @ s)
    return inverse


def remember(memory: _TwoLoop, lanes: Tensor, s: Tensor, y: Tensor) -> None:
    search = LineSearch(torch.zeros(lanes.shape, dtype=F64), 1e-16, 0.9)  # its slope is 0: any y's > 0 is enough
    memory.moved(lanes, s, y, search)


def pairs_of(num: int, n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    matrix = spd_matrix(n, 1, seed)
    return [(s := randn(n, seed=seed + 10 + i), matrix @ s + 0.0) for i in range(num)]


@pytest.mark.parametrize("num_pairs", [1, 3, 6])
def test_the_direction_is_that_of_the_dense_inverse(num_pairs: int) -> None:
    pairs, g = pairs_of(num_pairs, 8, seed=1), randn(8, seed=2)
    memory = _TwoLoop(g, 4)
    for s, y in pairs:
        remember(memory, torch.tensor(True), s, y)
    direction, step = memory.direction(torch.tensor(True), g, g, g.norm())
    # a handful of well-conditioned products in each: 1e3 eps
    assert relative_error(direction, -dense_inverse(pairs[-4:]) @ g) < 1e-12 and float(step) == 1.0


def test_lanes_remember_their_own_steps() -> None:
    """Lane 1 takes every other step, lane 2 none; one pair too flat to use is left out."""
    history = [pairs_of(6, 5, seed=20 * (i + 1)) for i in range(3)]
    g = randn(3, 5, seed=3)
    memory = _TwoLoop(g, 4)
    kept: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    for k in range(6):
        lanes = torch.tensor([True, k % 2 == 0, False])
        s = torch.stack([history[i][k][0] for i in range(3)])
        y = torch.stack([history[i][k][1] for i in range(3)])
        if k == 3:
            y[0] = -y[0]
        remember(memory, lanes, s, y)
        for i in range(3):
            if bool(lanes[i]) and not (i == 0 and k == 3):
                kept[i].append((s[i], y[i]))
    direction, step = memory.direction(torch.ones(3, dtype=torch.bool), g, g, g.norm(dim=-1))
    for i in range(2):
        assert relative_error(direction[i], -dense_inverse(kept[i][-4:]) @ g[i]) < 1e-12
    assert torch.equal(direction[2], -g[2]) and float(step[2]) == float(1 / g[2].norm())


def test_forgetting_returns_to_the_steepest_descent_in_those_lanes_only() -> None:
    pairs = pairs_of(2, 5, seed=4)
    memory, both = _TwoLoop(torch.zeros(2, 5), 4), torch.tensor([True, True])
    for s, y in pairs:
        remember(memory, both, s.expand(2, 5), y.expand(2, 5))
    g = randn(2, 5, seed=5)
    assert memory.forget(torch.tensor([True, False])).tolist() == [True, False]
    direction, _ = memory.direction(both, g, g, g.norm(dim=-1))
    assert torch.equal(direction[0], -g[0])
    assert relative_error(direction[1], -dense_inverse(pairs) @ g[1]) < 1e-12
    assert memory.forget(torch.tensor([True, False])).tolist() == [False, False]  # nothing is left there


@pytest.mark.parametrize("memory", [1, 3, 20])
def test_any_memory_reaches_the_dense_solution(memory: int) -> None:
    matrix, b = spd_matrix(15, 2, seed=6), randn(15, seed=7)
    solver = LBFGS(rtol=1e-10, memory=memory)
    result = solver.run(lambda x: 0.5 * x @ matrix @ x - b @ x, torch.zeros(15, dtype=F64))
    assert result.status is Status.CONVERGED
    # ||H^-1|| rtol ||b|| = 100 * 1e-10 ||b||, and ||x|| >= ||b||
    assert relative_error(result.value, torch.linalg.solve(matrix, b)) < 1e-8


def test_more_memory_takes_fewer_steps_on_a_quadratic() -> None:
    matrix, b = spd_matrix(30, 3, seed=8), randn(30, seed=9)

    def steps(memory: int) -> int:
        solver = LBFGS(rtol=1e-9, memory=memory)
        num = solver.run(lambda x: 0.5 * x @ matrix @ x - b @ x, torch.zeros(30, dtype=F64)).num_steps
        assert num is not None
        return num

    assert steps(60) < steps(10) < steps(1)


def test_a_valley_floor_far_below_the_rounding_of_the_value_is_still_followed() -> None:
    """The value is 1e8 + ...: the last eight digits of the gradient are reached where no value changes any more."""
    matrix, b = spd_matrix(10, 2, seed=10), randn(10, seed=11)
    result = LBFGS(rtol=1e-10).run(lambda x: 1e8 + 0.5 * x @ matrix @ x - b @ x, torch.zeros(10, dtype=F64))
    assert result.status is Status.CONVERGED
    assert relative_error(result.value, torch.linalg.solve(matrix, b)) < 1e-8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": 0}, "memory=0 must be at least 1. For none use GradientDescent."),
        ({"max_steps": -1}, "max_steps=-1 must be non-negative"),
        ({"rtol": -1e-3}, "rtol=-0.001 must be non-negative"),
        ({"atol": math.nan}, "atol=nan must be non-negative"),
    ],
)
def test_bad_settings_are_refused_by_name_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LBFGS(**settings)


@pytest.mark.parametrize("lanes", [(), (3,), (2, 2)])
def test_all_pairs_multiplied_out_give_the_direction_of_the_two_loops(lanes: tuple[int, ...]) -> None:
    matrix, n = spd_matrix(7, 2, seed=11), 7
    like = torch.zeros(*lanes, n, dtype=F64)
    loops, product = _TwoLoop(like, 20), _Matrices(like)
    everywhere = torch.ones(lanes, dtype=torch.bool)
    for k in range(12):  # more pairs than unknowns
        step = randn(*lanes, n, seed=20 + k)
        change = step @ matrix
        search = SimpleNamespace(step=torch.ones(lanes, dtype=F64), slope=(step * change).sum(-1))
        some = everywhere if k % 3 or not lanes else torch.arange(like[..., 0].numel()).reshape(lanes) != 0
        for method in (loops, product):
            method.moved(some, step, change, search)  # type: ignore[arg-type]
        gradient = randn(*lanes, n, seed=50 + k)
        norm = gradient.norm(dim=-1)
        (d, a), (e, b) = (method.direction(everywhere, like, gradient, norm) for method in (loops, product))
        # both sum 12 pairs of a matrix of condition 100 in another order
        assert torch.allclose(d, e, rtol=1e-9, atol=1e-11 * float(d.abs().max())) and torch.equal(a, b)
    assert bool(product.forget(everywhere).all()) and not bool(product.forget(everywhere).any())
    direction, first = product.direction(everywhere, like, gradient, norm)
    assert torch.equal(direction, -gradient) and torch.allclose(first, 1 / norm)


@pytest.mark.parametrize("n", [3, 12, 32])
def test_a_quadratic_takes_two_gradients_per_unknown(n: int) -> None:
    """Conjugate directions end after n steps in exact arithmetic; condition 100 leaves rounding a step or two."""
    matrix, b, count = spd_matrix(n, 2, seed=1), randn(n, seed=2), [0]

    def objective(x: Tensor) -> Tensor:
        count[0] += 1
        return 0.5 * x @ matrix @ x - b @ x

    result = LBFGS(rtol=1e-8).run(objective, torch.zeros(n, dtype=F64))
    assert result.status is Status.CONVERGED and count[0] <= 2 * n + 5
