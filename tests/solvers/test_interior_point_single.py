"""One program on the CPU has a loop of its own: it is the loop of many, number for number, in all that can happen."""

import pytest
import torch
from references import F64, randn, relative_error
from solvers.test_interior_point import Program, programs

import implicitlayer.programs._interior_point as module
from implicitlayer.programs._interior_point import ProgramStatus, QuadraticSolution, interior_point


def by_lanes(data: Program, monkeypatch: pytest.MonkeyPatch) -> QuadraticSolution:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_iterate", module._iterate_lanes)
        return interior_point(data)


def same(one: QuadraticSolution, other: QuadraticSolution, places: float) -> None:
    assert one.codes.tolist() == other.codes.tolist() and one.steps.tolist() == other.steps.tolist()
    for name in ("x", "equality", "inequality"):
        assert relative_error(getattr(one, name), getattr(other, name)) < places, name


# n = 70 and G of 150 x 70 are beyond what has inverses of factors, and products by NumPy
@pytest.mark.parametrize(("n", "e", "m"), [(1, 0, 1), (4, 0, 0), (4, 2, 0), (6, 0, 12), (10, 3, 20), (70, 7, 150)])
def test_the_steps_are_those_of_many_programs(n: int, e: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        data = programs(1, n, e, m, seed=100 * seed + n + e)
        # rounding of two orders of the same sums, grown by the condition of the last steps: s z reaches 1e-10
        same(interior_point(data), by_lanes(data, monkeypatch), 1e-5)


def test_lanes_without_a_solution_are_told_by_the_same_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    eye, one = torch.eye(2, dtype=F64)[None], torch.ones(1, 2, dtype=F64)
    none = torch.zeros(1, 0, 2, dtype=F64), torch.zeros(1, 0, dtype=F64)
    rows = torch.cat([eye, -eye], 1)
    cases = {
        ProgramStatus.INFEASIBLE: (eye, one, *none, rows, torch.cat([one, -2 * one], -1)),  # x <= 1 and x >= 2
        ProgramStatus.UNBOUNDED: (0 * eye, -one, *none, -eye, one),  # x >= -1 only
        ProgramStatus.NONFINITE: (eye, one * torch.nan, *none, eye, one),
        ProgramStatus.SOLVED: (0 * eye, one, *none, -eye, one),  # a linear program with one vertex
    }
    for status, data in cases.items():
        assert interior_point(data).codes.tolist() == by_lanes(data, monkeypatch).codes.tolist() == [int(status)]


def test_redundant_equations_take_the_factors_that_bear_them(monkeypatch: pytest.MonkeyPatch) -> None:
    Q, p, A, b, G, h = programs(1, 6, 2, 9, seed=5)
    data = Q, p, torch.cat([A, A], 1), torch.cat([b, b], -1), G, h
    found = interior_point(data)
    assert found.codes.tolist() == [0]
    # the multipliers of two equal equations are one of many pairs: x and their sum are compared
    alone = interior_point((Q, p, A, b, G, h))
    pair = found.equality[:, :2] + found.equality[:, 2:]
    assert relative_error(found.x, alone.x) < 1e-6 and relative_error(pair, alone.equality) < 1e-6  # rtol 1e-9
    assert found.steps.tolist() == by_lanes(data, monkeypatch).steps.tolist()


def test_one_program_is_solved_in_other_layouts_too() -> None:
    data = programs(1, 5, 1, 7, seed=8)
    turned = tuple(t.mT.contiguous().mT if t.ndim > 2 else t for t in data)
    padded = tuple(torch.cat([t, randn(*t.shape, seed=0)], -1)[..., : t.shape[-1]] for t in data)  # strides with gaps
    for other in (turned, padded):
        assert relative_error(interior_point(other).x, interior_point(data).x) < 1e-12  # a few roundings


def test_no_step_is_made_after_the_limit() -> None:
    found = interior_point(programs(1, 6, 0, 12, seed=3), max_steps=3)
    assert found.steps.tolist() == [3] and found.codes.tolist() == [int(ProgramStatus.MAX_STEPS_REACHED)]
