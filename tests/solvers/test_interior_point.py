"""The interior-point method: right on random programs, on every scale, and a certificate where there is no solution."""

import pytest
import torch
from references import F64, randn, relative_error

from implicitlayer.programs._interior_point import ProgramStatus, interior_point
from implicitlayer.solvers import InteriorPoint

optimize = pytest.importorskip("scipy.optimize")

Program = tuple[torch.Tensor, ...]


def programs(lanes: int, n: int, e: int, m: int, seed: int, rank: int | None = None) -> Program:
    """Random feasible programs; with ``rank`` Q is singular and a box keeps x bounded."""
    root = randn(lanes, n, n if rank is None else rank, seed=seed)
    inside = randn(lanes, n, 1, seed=seed + 1)
    A, G = randn(lanes, e, n, seed=seed + 2), randn(lanes, m, n, seed=seed + 3)
    h = (G @ inside)[..., 0] + randn(lanes, m, seed=seed + 4).abs()
    if rank is not None:
        eye = torch.eye(n, dtype=F64).expand(lanes, n, n)
        G, h = torch.cat([G, eye, -eye], -2), torch.cat([h, torch.full((lanes, 2 * n), 10.0, dtype=F64)], -1)
    Q = root @ root.mT / n + (0.1 if rank is None else 0.0) * torch.eye(n, dtype=F64)
    return Q, randn(lanes, n, seed=seed + 5), A, (A @ inside)[..., 0], G, h


def violations(data: Program, solution: object) -> float:
    """The conditions of optimality, written down again: the largest violation (all data are of size 1 to 10)."""
    Q, p, A, b, G, h = data
    x, y, z = (getattr(solution, name)[..., None] for name in ("x", "equality", "inequality"))
    slack = h - (G @ x)[..., 0]
    parts = [(Q @ x + A.mT @ y + G.mT @ z)[..., 0] + p, (A @ x)[..., 0] - b, slack.clamp(max=0), z[..., 0].clamp(max=0)]
    parts.append(slack * z[..., 0])
    return max(float(part.abs().max()) for part in parts if part.numel())


@pytest.mark.parametrize(("n", "e", "m"), [(1, 0, 1), (4, 0, 0), (4, 2, 0), (6, 0, 12), (10, 3, 20)])
def test_the_conditions_of_optimality_hold_in_every_lane(n: int, e: int, m: int) -> None:
    data = programs(32, n, e, m, seed=10 * n + e)
    solution = interior_point(data)
    assert solution.codes.tolist() == [0] * 32
    assert violations(data, solution) < 1e-6  # rtol 1e-9 of terms of size up to about 100


def test_singular_programs_have_the_value_that_slsqp_finds() -> None:
    data = programs(4, 5, 1, 4, seed=3, rank=2)
    solution = interior_point(data)
    assert bool((solution.codes == 0).all())
    for lane in range(4):
        Q, p, A, b, G, h = (t[lane].numpy() for t in data)
        value = lambda x, Q=Q, p=p: 0.5 * x @ Q @ x + p @ x  # noqa: E731
        constraints = [
            {"type": "eq", "fun": lambda x, A=A, b=b: A @ x - b},
            {"type": "ineq", "fun": lambda x, G=G, h=h: h - G @ x},
        ]
        found = optimize.minimize(value, p * 0, constraints=constraints, method="SLSQP", options={"ftol": 1e-12})
        # SLSQP stops at differences of 1e-12 in the value, from gradients by differences (1e-8 relative)
        assert found.success and value(solution.x[lane].numpy()) == pytest.approx(found.fun, rel=1e-6, abs=1e-7)


def test_a_linear_program_has_the_solution_of_highs() -> None:
    _, p, A, b, G, h = programs(3, 6, 2, 5, seed=5, rank=0)
    solution = interior_point((torch.zeros(3, 6, 6, dtype=F64), p, A, b, G, h))
    for lane in range(3):
        found = optimize.linprog(*(t[lane].numpy() for t in (p, G, h, A, b)), bounds=(None, None))
        assert float(p[lane] @ solution.x[lane]) == pytest.approx(found.fun, rel=1e-8)


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_no_scale_of_the_data_matters(unit: float) -> None:
    Q, p, A, b, G, h = programs(8, 5, 1, 8, seed=7)
    plain = interior_point((Q, p, A, b, G, h))
    scaled = interior_point((3 * Q / unit**2, 3 * p / unit, 7 * A / unit, 7 * b, 0.1 * G / unit, 0.1 * h))
    assert bool((scaled.codes == 0).all())
    assert relative_error(scaled.x / unit, plain.x) < 1e-6  # both to 1e-9, times condition numbers up to about 1e2


def test_programs_that_once_made_the_method_cycle_are_solved() -> None:
    # with the full second-order term, 4 of these 512 lanes run in circles
    torch.manual_seed(0)
    root = torch.randn(512, 10, 10, dtype=F64)
    p, G, inside = (torch.randn(512, *shape, dtype=F64) for shape in ((10,), (10, 10), (10, 1)))
    h = (G @ inside)[..., 0] + torch.rand(512, 10, dtype=F64)
    none = torch.zeros(512, 0, 10, dtype=F64), torch.zeros(512, 0, dtype=F64)
    solution = interior_point((root @ root.mT / 10, p, *none, G, h))
    assert float(solution.error.max()) < 1e-6


def test_infeasible_lanes_are_certified_and_the_others_solved() -> None:
    Q, p, A, b, G, h = programs(6, 5, 1, 6, seed=9)
    G, h = torch.cat([G, -G[:, :1]], 1), torch.cat([h, -h[:, :1] + 1], 1)
    h[::2, -1] -= 2  # g'x <= h and g'x >= h + 1
    codes = interior_point((Q, p, A, b, G, h)).codes.tolist()
    assert codes == [int(ProgramStatus.INFEASIBLE), 0] * 3


def test_contradicting_equations_are_infeasible_and_repeated_ones_are_not() -> None:
    Q, p, A, b, G, h = programs(4, 5, 2, 3, seed=11)
    A, b = torch.cat([A, A[:, :1]], 1), torch.cat([b, b[:, :1]], 1)
    assert interior_point((Q, p, A, b, G, h)).codes.tolist() == [0] * 4
    b[1, -1] += 1e-2
    assert interior_point((Q, p, A, b, G, h)).codes.tolist() == [0, int(ProgramStatus.INFEASIBLE), 0, 0]


def test_unbounded_lanes_are_those_where_highs_finds_a_falling_direction() -> None:
    n = 6
    root = randn(12, n, 2, seed=13)
    Q, p, G = root @ root.mT, randn(12, n, seed=14), randn(12, 7, n, seed=15)
    none = torch.zeros(12, 0, n, dtype=F64), torch.zeros(12, 0, dtype=F64)
    codes = interior_point((Q, p, *none, G, torch.ones(12, 7, dtype=F64))).codes
    falling = []
    for cost, cone, flat in zip(p.numpy(), G.numpy(), Q.numpy(), strict=True):
        falling.append(optimize.linprog(cost, cone, [0] * 7, flat, [0] * n, bounds=(-1, 1)).fun < -1e-8)
    assert len(set(falling)) == 2  # some of either kind
    assert (codes == int(ProgramStatus.UNBOUNDED)).tolist() == falling


def test_a_strictly_convex_lane_is_never_unbounded_whatever_its_borders_say() -> None:
    # borders at 1e-9 of the minimiser of the objective, which is x = (1, 0) or, in the last lane, does not exist
    Q, p = torch.eye(2, dtype=F64).repeat(3, 1, 1), torch.tensor([-1.0, 0.0], dtype=F64).expand(3, 2)
    Q[2, 0, 0] = 0
    G, h = torch.tensor([[0.0, 1.0]], dtype=F64).expand(3, 1, 2), torch.full((3, 1), 1e-9, dtype=F64)
    none = torch.zeros(3, 0, 2, dtype=F64), torch.zeros(3, 0, dtype=F64)
    solution = interior_point((Q, p, *none, G, h))
    assert solution.codes.tolist() == [0, 0, int(ProgramStatus.UNBOUNDED)]
    assert torch.allclose(solution.x[:2], torch.tensor([1.0, 0.0], dtype=F64), atol=1e-7)  # rtol 1e-9


def test_a_bad_lane_leaves_the_others_untouched() -> None:
    data = programs(3, 4, 1, 5, seed=17)
    plain = interior_point(data)
    data[5][1, 0] = torch.nan
    broken = interior_point(data)
    assert broken.codes.tolist() == [0, int(ProgramStatus.NONFINITE), 0]
    assert torch.equal(broken.x[::2], plain.x[::2])


def test_statuses_say_what_to_do() -> None:
    assert all(status.help.endswith(".") for status in ProgramStatus)


@pytest.mark.parametrize("setting", [{"rtol": 0.0}, {"max_steps": 0}])
def test_settings_that_are_not_positive_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be positive\."):
        InteriorPoint(**setting)  # type: ignore[arg-type]


def test_a_step_limit_is_told() -> None:
    solution = InteriorPoint(max_steps=2)(*programs(2, 5, 1, 8, seed=19))
    assert solution.codes.tolist() == [int(ProgramStatus.MAX_STEPS_REACHED)] * 2 and int(solution.steps.max()) == 2
