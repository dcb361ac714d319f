"""A single program takes short ways through ``il.qp``; they lead where the long ones lead."""

from typing import Any

import numpy as np
import pytest
import torch
from references import F64, randn, relative_error
from solvers.test_interior_point import Program, programs

import implicitlayer as il
from implicitlayer.constrained import _qp, _qp_solve
from implicitlayer.constrained._qp import _Products, _scalar
from implicitlayer.programs._interior_point import QuadraticSolution, interior_point
from implicitlayer.programs._qp_exact import TIGHT, conditions, exact, factorised, violation
from implicitlayer.programs._qp_schur import SchurRows
from implicitlayer.programs._qp_single import SingleProof, exact_cold, exact_near
from implicitlayer.programs._qp_terms import SingleProgram

ROUNDING = 1e-9  # of solves with the matrix of a random program, condition below 1e5


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize(("n", "e", "m"), [(1, 0, 1), (4, 2, 0), (6, 0, 12), (10, 3, 12), (30, 5, 40), (70, 7, 90)])
def test_the_exact_solution_is_that_of_many_programs(n: int, e: int, m: int, cold: bool) -> None:
    data = programs(1, n, e, m, seed=n + e)
    answer = interior_point(data)
    proof, many = single(data, None if cold else answer), exact(data, answer, torch.tensor([True]))
    assert proof is not None
    one = proof.exact()
    assert bool((one.error <= TIGHT).all()) and bool((one.held == many.held).all())
    # its own error is the violation that the long way measures, up to rounding
    assert float((one.error - violation(data, one.solution)).abs()) < 1e-14
    for name in ("x", "equality", "inequality"):
        assert relative_error(getattr(one.solution, name), getattr(many.solution, name)) < ROUNDING
    rhs = randn(1, n + e + m, 2, seed=0)
    assert one.factors is not None
    assert relative_error(one.factors.solve(rhs), factorised(data, many.held).solve(rhs)) < ROUNDING


def single(data: Program, answer: QuadraticSolution | None) -> SingleProof | None:
    """The exact solution next to the answer, or from a cold start."""
    program = SingleProgram(data)
    return exact_cold(program) if answer is None else exact_near(program, answer)


def test_what_is_not_proved_is_left_to_the_long_way() -> None:
    data = programs(1, 6, 0, 12, seed=1)
    far = interior_point(data, max_steps=0)  # the start of the search: no active set can be told from it
    found = single(data, far)
    assert found is None or bool((violation(data, found.exact().solution) <= TIGHT).all())
    Q, p, A, b, G, h = data
    impossible = Q, p, A, b, torch.cat([G, -G], 1), torch.cat([h, -h - 1], -1)  # G x <= h and G x >= h + 1
    assert single(impossible, interior_point(impossible)) is None and single(impossible, None) is None
    flat = Q * torch.eye(6, dtype=F64)[0], p, A, b, G, h  # no curvature in five of six directions
    assert single(flat, None) is None
    twice = Q, p, torch.ones(1, 2, 6, dtype=F64), torch.ones(1, 2, dtype=F64), G, h  # one equation, given twice
    assert single(twice, None) is None


def test_a_cold_start_proves_most_random_programs() -> None:
    # what fails falls back in silence, and slowly: nobody would notice
    for n, e, m in ((30, 5, 40), (10, 0, 20)):
        found = [single(programs(1, n, e, m, seed=seed), None) for seed in range(40)]
        assert sum(one is not None for one in found) >= 32


def test_scales_of_the_data_do_not_matter_to_a_cold_start() -> None:
    Q, p, A, b, G, h = programs(1, 10, 2, 10, seed=3)
    plain = single((Q, p, A, b, G, h), None)
    assert plain is not None
    for length, cost, row in ((1e-9, 1.0, 1e7), (1e6, 1e-12, 1e-5), (1.0, 1e100, 1.0)):
        scaled = single((Q * cost, p * cost * length, A * row, b * row * length, G * row, h * row * length), None)
        assert scaled is not None and bool((scaled.held == plain.held).all())
        assert relative_error(scaled.solution()[0] / length, plain.solution()[0]) < ROUNDING


@pytest.mark.parametrize("hold_kinks", [False, True])
@pytest.mark.parametrize("eps", [torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps])
def test_the_active_set_is_what_many_programs_say(eps: float, hold_kinks: bool) -> None:
    for data in (*(programs(1, n, e, m, seed=7) for n, e, m in ((3, 0, 2), (4, 2, 0), (10, 3, 12))), *degenerate()):
        dtype = torch.float64 if eps < 1e-10 else torch.float32
        found = single(data, None)
        assert found is not None
        at = found.exact().solution
        one, held = found.terms.active_set(eps, 1e-8, hold_kinks)
        many, also_held = conditions(data, at.x, dtype).active_set(at.equality, at.inequality, 1e-8, hold_kinks)
        assert torch.equal(held, also_held) and one.kinks_known == many.kinks_known
        for name in ("active", "kinks", "num_active", "num_kinks", "independent"):
            got, want = getattr(one, name), getattr(many, name)
            assert got.shape == want.shape and got.dtype == want.dtype and torch.equal(got, want), name
        for name in ("tolerance", "violation", "relative_violation", "equality", "inequality", "stationarity"):
            got, want = getattr(one, name), getattr(many, name)
            assert got.shape == want.shape and got.dtype == want.dtype
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-14), name  # sums in another order


def degenerate() -> list[Program]:
    """A border touched without a force, a row of zeros, a border given twice, a solution at zero."""
    Q, none, zero = torch.eye(2, dtype=F64)[None], torch.zeros(1, 0, 2, dtype=F64), torch.zeros(1, 0, dtype=F64)

    def program(p: list[float], G: list[list[float]], h: list[float]) -> Program:
        return Q, torch.tensor([p], dtype=F64), none, zero, torch.tensor([G], dtype=F64), torch.tensor([h], dtype=F64)

    return [
        program([-1.0, -2.0], [[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0]),
        program([-1.0, -2.0], [[0.0, 0.0], [0.0, 1.0]], [1.0, 1.0]),
        program([-1.0, -2.0], [[1.0, 0.0], [1.0, 0.0]], [1.0, 1.0]),
        program([0.0, 0.0], [[1.0, 1.0], [1.0, 0.0]], [0.0, 1.0]),
    ]


def test_rows_that_depend_on_each_other_have_no_factors() -> None:
    Q, rows = np.eye(3), np.array([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    data = *(Q, np.ones(3)), rows[:0], np.ones(0), rows, np.ones(3)
    system = SchurRows(SingleProgram(tuple(torch.from_numpy(array) for array in data)))  # type: ignore[arg-type]
    assert system.hold(np.array([True, True, False])) is None
    assert system.hold(np.array([True, False, True])) is not None


def test_gradients_are_those_of_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (programs(1, 8, 2, 14, seed=2), tuple(t[0] for t in programs(1, 8, 0, 14, seed=4))):
        expected = gradients(data, monkeypatch)
        for got, want in zip(gradients(data), expected, strict=True):
            assert got.shape == want.shape and relative_error(got, want) < ROUNDING


def gradients(data: Program, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[torch.Tensor, ...]:
    """Of a scalar of x and all multipliers, in all data; with ``monkeypatch`` by the long ways of every kind."""
    leaves = [t.clone().requires_grad_() for t in data]
    if monkeypatch is None:
        return torch.autograd.grad(scalar_of(leaves), leaves)
    with monkeypatch.context() as patch:
        patch.setattr(_qp_solve.QuadraticSolver, "_single", lambda self, data, proof, eps: None)
        for module in (_qp, _qp_solve):
            patch.setattr(module, "searched", lambda program, dtype, search: None)
        # a graph of the gradient is asked for: that of torch.func, not what is written out
        return torch.autograd.grad(scalar_of(leaves), leaves, create_graph=True)


def scalar_of(leaves: list[torch.Tensor]) -> torch.Tensor:
    x, found = il.qp(*leaves, return_multipliers=True)
    value: torch.Tensor = (x**3).sum() + (found.equality**2).sum() + (found.inequality**2).sum()
    return value


def test_the_products_written_out_are_those_of_autograd_with_shared_data_too() -> None:
    lanes, n, e, m = 3, 4, 2, 5
    shapes: list[tuple[int, ...]] = [(lanes, n, n), (1, n), (1, e, n), (lanes, e), (lanes, m, n), (1, m)]
    data = [randn(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]
    held = (randn(lanes, m, seed=9) > 0).double()
    z = [randn(lanes, n, seed=6), randn(lanes, e, seed=7), randn(lanes, m, seed=8), held]
    z = [leaf.requires_grad_() for leaf in z]
    u = [randn(*leaf.shape, seed=10 + k) for k, leaf in enumerate(z)]
    F = torch.autograd.grad(_scalar(unknowns(z), *data).sum(), z, create_graph=True)
    at = _Products([leaf.detach() for leaf in z], [leaf.detach() for leaf in data], value=[], outputs=[])
    for products, inputs in ((at.pull(u), z), (at.pull_theta(u, [True] * len(data)), data)):
        expected = torch.autograd.grad(F, inputs, u, retain_graph=True, materialize_grads=True)
        for got, want in zip(products, expected, strict=True):
            assert got is not None
            assert got.shape == want.shape and relative_error(got, want) < 1e-13  # sums of a dozen products


def unknowns(z: list[torch.Tensor]) -> Any:
    from implicitlayer.constrained._kkt_lagrangian import Unknowns

    return Unknowns(*z)


def test_a_shared_argument_of_one_program_keeps_its_shape() -> None:
    Q, p, A, b, G, h = (t[0] for t in programs(1, 5, 1, 6, seed=11))
    p = p[None].requires_grad_()
    (gradient,) = torch.autograd.grad(il.qp(Q, p, A, b, G, h).sum(), p)
    assert gradient.shape == (1, 5)


def test_one_program_in_float32_has_float32_gradients() -> None:
    leaves = [t.float().requires_grad_() for t in programs(1, 5, 1, 6, seed=12)]
    found = torch.autograd.grad(il.qp(*leaves).sum(), leaves)
    exactly = [t.detach().double().requires_grad_() for t in leaves]
    for got, want in zip(found, torch.autograd.grad(il.qp(*exactly).sum(), exactly), strict=True):
        assert got.dtype == torch.float32 and relative_error(got.to(F64), want) < 1e-3  # eps 6e-8, condition 1e4
