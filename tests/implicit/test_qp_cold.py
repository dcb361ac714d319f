"""Many programs begin with a cold search for their active sets; it leads where the interior point leads."""

import pytest
import torch
from references import F64, randn, relative_error
from solvers.test_interior_point import Program, programs

import implicitlayer as il
from implicitlayer.constrained import _qp, _qp_solve
from implicitlayer.constrained._qp_solve import QuadraticSolver
from implicitlayer.programs._interior_point import interior_point
from implicitlayer.programs._kkt_active import Tolerances
from implicitlayer.programs._qp_cold import LanesProof, cold_lanes
from implicitlayer.programs._qp_exact import TIGHT, exact, factorised, violation

ROUNDING = 1e-9  # of solves with the matrix of a random program, condition below 1e5


def cold(data: Program) -> LanesProof:
    found = cold_lanes(data, F64)
    assert found is not None
    return found


@pytest.mark.parametrize(("n", "e", "m"), [(1, 0, 1), (4, 2, 0), (6, 0, 12), (10, 3, 12), (30, 5, 40)])
def test_what_the_search_proves_are_solutions(n: int, e: int, m: int) -> None:
    data = programs(30, n, e, m, seed=n + e)
    found = cold(data)
    proved = found.proved
    assert int((~proved).sum()) <= 6  # a search that fails falls back in silence, and slowly
    assert float(violation(data, found.at)[proved].max()) <= TIGHT
    exactly = exact(data, interior_point(data), torch.ones(30, dtype=torch.bool)).solution
    for name in ("x", "equality", "inequality"):
        assert relative_error(getattr(found.at, name)[proved], getattr(exactly, name)[proved]) < ROUNDING


@pytest.mark.parametrize(("n", "e", "m"), [(5, 0, 12), (10, 1, 10), (12, 3, 20)])
def test_a_first_guess_of_few_rows_saves_rounds_and_changes_no_answer(n: int, e: int, m: int) -> None:
    data = programs(60, n, e, m, seed=n)
    found, plain = cold(data), cold_lanes(data, F64, torch.zeros(60, m, dtype=torch.bool))
    assert plain is not None
    assert int(found.proved.sum()) >= int(plain.proved.sum())
    assert int(found.at.steps.sum()) < 0.8 * int(plain.at.steps.sum())
    both = found.proved & plain.proved
    assert int(both.sum()) > 50 and relative_error(found.at.x[both], plain.at.x[both]) < ROUNDING
    assert torch.equal(found.held[both], plain.held[both])


def test_the_factors_are_those_of_the_whole_matrix_in_every_lane() -> None:
    n, e, m = 10, 2, 12
    data = tuple(t.reshape(4, 5, *t.shape[1:]) for t in programs(20, n, e, m, seed=4))
    found = cold(data)  # type: ignore[arg-type]
    assert bool(found.proved.all()) and found.held.shape == (4, 5, m)
    assert len({int(count) for count in found.held.sum(-1).flatten()}) > 1  # lanes hold different numbers of rows
    rhs = randn(4, 5, n + e + m, 3, seed=0)
    assert relative_error(found.factors.solve(rhs), factorised(data, found.held).solve(rhs)) < ROUNDING  # type: ignore[arg-type]
    assert found.factors.codes.shape == found.at.codes.shape == (4, 5)


def test_lanes_that_the_search_cannot_solve_are_left_to_the_interior_point() -> None:
    Q, p, A, b, G, h = programs(6, 5, 1, 6, seed=2)
    Q[1] = Q[1] * torch.tensor([1.0, 0, 0, 0, 0], dtype=F64)[:, None] * torch.tensor([1.0, 0, 0, 0, 0], dtype=F64)
    G, h = torch.cat([G, torch.eye(5, dtype=F64).expand(6, 5, 5), -torch.eye(5, dtype=F64).expand(6, 5, 5)], 1), h
    h = torch.cat([h, torch.full((6, 10), 10.0, dtype=F64)], -1)
    G[3, 1], h[3, 1] = G[3, 0], h[3, 0]  # a border that is given twice
    data = Q, p, A, b, G, h
    proof = cold(data)
    assert not bool(proof.proved[1])
    found, _ = QuadraticSolver(None, Tolerances(1e-6, 1e-8), False, "warn")._solved(data, proof, torch.finfo(F64).eps)
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
    for module in (_qp, _qp_solve):
        monkeypatch.setattr(module, "searched", lambda program, dtype, search: None)
    expected = torch.autograd.grad((il.qp(*leaves) ** 3).sum(), leaves)
    for got, want in zip(found, expected, strict=True):
        assert relative_error(got, want) < ROUNDING


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("on_failure", ["warn", "ignore"])
def test_contradicting_equations_are_infeasible_under_every_policy(lanes: int, on_failure: str) -> None:
    A = torch.tensor([[0.0, -3, 2], [1, 0, 3], [2, -6, 10]], dtype=F64)  # row 3 is twice row 1 and row 2
    b, ones = torch.tensor([0.0, 0, 1], dtype=F64), torch.ones(lanes, 3, dtype=F64)
    with pytest.raises(il.InfeasibleError, match="infeasible"):
        il.qp(torch.eye(3, dtype=F64), ones, A, b, on_failure=on_failure)  # type: ignore[arg-type]


def test_what_the_search_calls_solved_satisfies_the_conditions_with_a_nearly_singular_objective() -> None:
    n, lanes = 6, 8
    V = torch.linalg.qr(randn(lanes, n, n, seed=0)).Q
    Q = V * torch.logspace(0, -12, n, dtype=F64) @ V.mT
    _, p, A, b, G, h = programs(lanes, n, 1, 8, seed=1)
    data = (Q + Q.mT) / 2, p, A, b, G, h
    found = cold(data)
    assert not bool((found.proved & (violation(data, found.at) > TIGHT)).any())


def test_overflow_inside_is_no_warning_and_float32_gram_matrices_are_no_refusal() -> None:
    eye, ones = torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)
    assert torch.allclose(il.qp(eye * 1e200, ones * 1e200), -ones)
    for seed in range(20):
        F = randn(4, 2, seed=seed).float()
        box = torch.cat([torch.eye(4), -torch.eye(4)])
        x = il.qp(F @ F.mT, torch.ones(4), G=box, h=torch.ones(8), on_failure="ignore")
        assert bool((x.abs() <= 1 + 1e-5).all())
