"""Proximal and projected gradient: the answer, its tests of stopping and of L, and many problems at once."""

from typing import Any

import pytest
import torch
from references import F64, orthogonal, randn, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status, testing
from implicitlayer.sets import Box, NonNegative, Simplex
from implicitlayer.solvers import ProjectedGradient, ProximalGradient

KINDS: dict[str, dict[str, Any]] = {
    "accelerated": {},
    "plain": {"accelerated": False},
    "known step": {"step_size": 1.0},  # eigenvalues of spd_matrix are at most 1
}
KINDS_OF = pytest.mark.parametrize("kind", list(KINDS))


def quadratics(x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x * (matrix @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)


@KINDS_OF
def test_the_answer_satisfies_the_optimality_conditions_of_the_lasso(kind: str) -> None:
    matrix, b = spd_matrix(12, 1.5, seed=1), randn(12, seed=2)
    solver = ProximalGradient(il.L1(0.5), rtol=1e-11, max_steps=20_000, **KINDS[kind])
    result = solver.run(quadratics, torch.zeros(12, dtype=F64), matrix, b)
    assert result.status is Status.CONVERGED
    x = result.value
    slope = matrix @ x - b
    assert 0 < int((x == 0).sum()) < 12
    # the prox-gradient norm is below 1e-11 ||b||: so far from -0.5 sign(x), or from the interval [-0.5, 0.5]
    assert float((slope + 0.5 * x.sign())[x != 0].abs().max()) <= 1e-9
    assert float(slope[x == 0].abs().max()) <= 0.5 + 1e-9


@KINDS_OF
def test_a_separable_problem_over_a_simplex_has_its_closed_form(kind: str) -> None:
    y = torch.tensor([1.0, 0.5, -1.0], dtype=F64)
    solver = ProximalGradient(Simplex(1.0), rtol=1e-13, **KINDS[kind])
    x = solver(lambda x: 0.5 * ((x - y) ** 2).sum(), torch.zeros(3, dtype=F64))
    torch.testing.assert_close(x, torch.tensor([0.75, 0.25, 0.0], dtype=F64), rtol=0, atol=1e-12)


def test_momentum_saves_steps_on_an_ill_conditioned_problem() -> None:
    matrix, b = spd_matrix(20, 2.5, seed=3), randn(20, seed=4)
    start = torch.zeros(20, dtype=F64)
    steps = []
    for accelerated in (True, False):
        solver = ProximalGradient(NonNegative(), accelerated=accelerated, rtol=1e-8, max_steps=5000)
        result = solver.run(quadratics, start, matrix, b)
        assert result.status is Status.CONVERGED
        assert result.num_steps is not None
        steps.append(result.num_steps)
    assert 3 * steps[0] < steps[1]  # sqrt(300) against 300, up to logarithms and restarts


def test_every_lane_of_a_batch_is_solved_as_if_alone() -> None:
    basis = orthogonal(6, seed=5)
    matrices = torch.stack(
        [basis @ torch.diag(10 ** torch.linspace(-c, 0, 6, dtype=F64)) @ basis.T for c in (0.0, 1.0, 2.0)]
    )
    scale = torch.tensor([1.0, 1e-6, 1e6], dtype=F64)
    b = randn(3, 6, seed=6) * scale[:, None]
    solver = ProjectedGradient(NonNegative(), rtol=1e-11, max_steps=20_000)
    together = solver(quadratics, torch.zeros(3, 6, dtype=F64), matrices, b)
    for lane in range(3):
        alone = solver(quadratics, torch.zeros(6, dtype=F64), matrices[lane], b[lane])
        # each within kappa 1e-11 of the solution, relative to b / smallest eigenvalue
        torch.testing.assert_close(together[lane], alone, rtol=0, atol=1e-7 * float(scale[lane]))


def test_a_pytree_and_a_term_of_theta() -> None:
    def objective(x: dict[str, Tensor], t: Tensor) -> Tensor:
        return 0.5 * ((x["a"] - 3) ** 2).sum() + 0.5 * (x["b"] - t) ** 2

    solver = ProximalGradient(lambda t: {"a": il.L1(t), "b": Box(upper=0.5)}, rtol=1e-13)
    init = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros((), dtype=F64)}
    x = solver(objective, init, torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(x["a"], torch.full((2,), 2.0, dtype=F64), rtol=0, atol=1e-12)
    assert float(x["b"]) == 0.5


def test_without_a_tolerance_it_makes_exactly_the_steps_that_were_asked_for() -> None:
    y = torch.tensor([4.0], dtype=F64)
    solver = ProximalGradient(Box(-9.0, 9.0), accelerated=False, step_size=0.5, max_steps=3)
    result = solver.run(lambda x: 0.5 * ((x - y) ** 2).sum(), torch.zeros(1, dtype=F64))
    assert (result.status, result.num_steps, result.value.item()) == (Status.STEP_LIMIT, 3, 3.5)


@pytest.mark.parametrize("accelerated", [False, True])
def test_without_a_tolerance_it_ends_where_a_step_moves_nothing(accelerated: bool) -> None:
    """Later steps would all be zero: a projection onto a box is found by the first, and lanes that go on still do."""
    y = torch.tensor([4.0, -4.0, 0.5], dtype=F64)
    solver = ProximalGradient(Box(-1.0, 1.0), accelerated=accelerated)
    result = solver.run(lambda x: 0.5 * ((x - y) ** 2).sum(), torch.zeros(3, dtype=F64))
    assert result.value.tolist() == [1.0, -1.0, 0.5]
    assert (result.status, result.num_steps) == (Status.STEP_LIMIT, 2)

    scales = torch.tensor([[1.0, 1.0], [1.0, 30.0]], dtype=F64)  # the second lane is not done in two steps
    layer = il.argmin(
        lambda x, t: 0.5 * (scales * (x - t) ** 2).sum(-1),
        ProximalGradient(accelerated=accelerated),
        constraint=Box(-1.0, 1.0),
        batch_dims=1,
    )
    assert torch.allclose(layer(torch.zeros(2, 2, dtype=F64), y[1:].expand(2, 2)), y[1:].clamp(-1, 1), rtol=1e-12)


def test_statuses_of_too_few_steps_and_of_nan() -> None:
    matrix, b = spd_matrix(5, 2, seed=7), randn(5, seed=8)
    solver = ProximalGradient(NonNegative(), rtol=1e-12, max_steps=2)
    assert solver.run(quadratics, torch.zeros(5, dtype=F64), matrix, b).status is Status.MAX_STEPS_REACHED
    result = solver.run(quadratics, torch.zeros(5, dtype=F64), matrix, b * float("nan"))
    assert not result.value.isfinite().all()


def test_the_caller_sees_every_step_and_keeps_the_start() -> None:
    seen: list[il.solvers.Iteration] = []
    y, init = torch.tensor([4.0], dtype=F64), torch.zeros(1, dtype=F64)
    solver = ProximalGradient(Box(upper=1.0), max_steps=2, callback=seen.append)
    solver(lambda x: 0.5 * ((x - y) ** 2).sum(), init)
    assert [i.step for i in seen] == [1, 2]
    assert seen[0].value.item() == 8.0
    assert seen[1].x.item() == 1.0
    assert init.item() == 0.0


def test_curvature_that_grows_along_the_way_is_found_by_backtracking() -> None:
    # f'' = exp(x): 1 at the start, 20 at the solution x = 3
    solver = ProximalGradient(Box(upper=3.0), rtol=1e-12, max_steps=500)
    result = solver.run(lambda x: (torch.exp(x) - 100 * x).sum(), torch.zeros(2, dtype=F64))
    assert result.status is Status.CONVERGED
    assert result.value.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ProximalGradient(il.L1(1.0), step_size=0.0), ValueError, r"step_size=0\.0 must be positive and fin"),
        (lambda: ProximalGradient(il.L1(1.0), max_steps=-1), ValueError, r"max_steps=-1 must be non-negative"),
        (lambda: ProjectedGradient(Box(), rtol=-1.0), ValueError, r"rtol=-1\.0 must be non-negative"),
        (lambda: ProximalGradient(3.0), TypeError, "regularizer must be a set or regulariser"),
        (
            lambda: ProjectedGradient()(lambda x: x.sum(), torch.zeros(1)),
            ValueError,
            r"ProjectedGradient\(\) without a set or regulariser takes that of the layer .* there is none",
        ),
    ],
)
def test_wrong_arguments_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_solver_with_a_term_of_its_own_serves_any_layer_lane_by_lane() -> None:
    t = torch.tensor([[0.3, 2.0], [-4.0, 0.1]], dtype=F64)
    own = ProximalGradient(il.L1(0.5), rtol=1e-13)
    layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), own, regularizer=il.L1(0.5))
    assert not own.batched
    slopes = torch.func.vmap(torch.func.grad(lambda t: layer(torch.zeros(2, dtype=F64), t).sum()))(t)
    torch.testing.assert_close(slopes, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64), rtol=0, atol=1e-14)


# Without bounds it is a solver of smooth problems, and has to pass what every solver does.
@testing.parametrize_with_solver_checks([ProximalGradient(Box(), rtol=1e-10, max_steps=5000)])
def test_without_bounds_it_conforms_to_the_solver_protocol(solver: Any, check: Any) -> None:
    check(solver)


@pytest.mark.parametrize("settings", [{}, {"rtol": 1e-9}])
def test_steps_that_are_too_long_end_as_nonfinite_and_never_as_a_step_limit(settings: dict[str, Any]) -> None:
    solver = ProximalGradient(il.L1(0.1), step_size=1e3, max_steps=900, **settings)
    result = solver.run(lambda x: 0.5 * ((x - 3) ** 2).sum(), torch.zeros(2, dtype=F64))
    assert result.status is Status.NONFINITE
    assert not result.value.isfinite().all()


def test_nan_in_theta_is_nonfinite_and_not_a_zero_of_the_lasso() -> None:
    t = torch.tensor([1.0, float("nan"), 3.0], dtype=F64)
    result = ProximalGradient(il.L1(0.5), rtol=1e-9).run(
        lambda x, t: 0.5 * ((x - t) ** 2).sum(), torch.zeros(3, dtype=F64), t
    )
    assert result.status is Status.NONFINITE
    assert result.value[1].isnan()
