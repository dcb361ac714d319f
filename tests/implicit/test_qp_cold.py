"""Many programs begin with a cold search for their active sets; it leads where the interior point leads."""

import pytest
import torch
from references import F64, randn, relative_error
from solvers.test_interior_point import Program, programs

import implicitlayer as il
from implicitlayer._interior_point import interior_point
from implicitlayer.implicit import _qp_cold, _qp_solve
from implicitlayer.implicit._qp_cold import answers
from implicitlayer.implicit._qp_exact import TIGHT, exact, factorised, violation

ROUNDING = 1e-9  # of solves with the matrix of a random program, condition below 1e5


@pytest.mark.parametrize(("n", "e", "m"), [(1, 0, 1), (4, 2, 0), (6, 0, 12), (10, 3, 12), (30, 5, 40)])
def test_what_the_search_finds_are_solutions(n: int, e: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = programs(30, n, e, m, seed=n + e)
    rest: list[int] = []

    def counted(some: Program, rtol: float) -> object:
        rest.append(len(some[1]))
        return interior_point(some, rtol)

    monkeypatch.setattr(_qp_cold, "interior_point", counted)
    answer, _ = answers(data, 1e-9)
    assert sum(rest) <= 6  # a search that fails falls back in silence, and slowly
    # V'V keeps the digits that the condition of Q, at most 1e5 here, leaves: the exact solve comes after it
    assert float(violation(data, answer).max()) < 1e-8
    exactly = exact(data, interior_point(data), torch.ones(30, dtype=torch.bool)).solution
    for name in ("x", "equality", "inequality"):
        assert relative_error(getattr(answer, name), getattr(exactly, name)) < 1e-6


def test_the_factors_are_those_of_the_whole_matrix_in_every_lane() -> None:
    n, e, m = 10, 2, 12
    data = tuple(t.reshape(4, 5, *t.shape[1:]) for t in programs(20, n, e, m, seed=4))
    answer, start = answers(data, 1e-9)  # type: ignore[arg-type]
    assert start is not None and start.held.shape == (4, 5, m)
    assert len({int(count) for count in start.held.sum(-1).flatten()}) > 1  # lanes hold different numbers of rows
    rhs = randn(4, 5, n + e + m, 3, seed=0)
    assert relative_error(start.factors.solve(rhs), factorised(data, start.held).solve(rhs)) < ROUNDING  # type: ignore[arg-type]
    assert start.factors.codes.shape == answer.codes.shape == (4, 5)


def test_lanes_that_the_search_cannot_solve_are_left_to_the_interior_point() -> None:
    Q, p, A, b, G, h = programs(6, 5, 1, 6, seed=2)
    Q[1] = Q[1] * torch.tensor([1.0, 0, 0, 0, 0], dtype=F64)[:, None] * torch.tensor([1.0, 0, 0, 0, 0], dtype=F64)
    G, h = torch.cat([G, torch.eye(5, dtype=F64).expand(6, 5, 5), -torch.eye(5, dtype=F64).expand(6, 5, 5)], 1), h
    h = torch.cat([h, torch.full((6, 10), 10.0, dtype=F64)], -1)
    G[3, 1], h[3, 1] = G[3, 0], h[3, 0]  # a border that is given twice
    data = Q, p, A, b, G, h
    found = exact(data, answers(data, 1e-9)[0], torch.ones(6, dtype=torch.bool))
    assert float(found.error.max()) <= TIGHT
    for lane in range(6):
        alone = tuple(t[lane : lane + 1] for t in data)
        expected = exact(alone, interior_point(alone), torch.tensor([True]))
        assert relative_error(found.solution.x[lane], expected.solution.x[0]) < ROUNDING


def test_no_constraint_at_all_and_no_lane_at_all() -> None:
    Q, p = programs(3, 4, 0, 0, seed=5)[:2]
    assert relative_error(il.qp(Q, p), -torch.linalg.solve(Q, p)) < ROUNDING
    assert il.qp(Q[:0], p[:0]).shape == (0, 4)


def test_gradients_are_those_of_the_interior_point(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [t.requires_grad_() for t in programs(8, 8, 2, 10, seed=6)]
    found = torch.autograd.grad((il.qp(*leaves) ** 3).sum(), leaves)
    monkeypatch.setattr(_qp_solve, "answers", lambda program, rtol: (interior_point(program, rtol), None))
    expected = torch.autograd.grad((il.qp(*leaves) ** 3).sum(), leaves)
    for got, want in zip(found, expected, strict=True):
        assert relative_error(got, want) < ROUNDING
