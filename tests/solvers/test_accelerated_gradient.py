"""Accelerated gradient: its three kinds of momentum and step, its count of steps, and many problems at once."""

import math
from typing import Any

import pytest
import torch
from references import F64, newton, orthogonal, randn, relative_error, smooth_objective, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import AcceleratedGradient, GradientDescent

# spd_matrix(n, c): eigenvalues in [10^-c, 1]. The three kinds: both constants known, no mu, no beta.
KINDS: dict[str, dict[str, Any]] = {
    "known": {"smoothness": 1.0, "strong_convexity": 1e-2},
    "restarts": {"smoothness": 1.0},
    "backtracking": {},
    "backtracking with mu": {"strong_convexity": 1e-2},
}
KINDS_OF = pytest.mark.parametrize("kind", list(KINDS))


def solver(kind: str, **settings: Any) -> AcceleratedGradient:
    return AcceleratedGradient(**{**KINDS[kind], **settings})


def quadratics(x: Tensor, matrices: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x * (matrices @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)


def mixed_batch() -> tuple[Tensor, Tensor]:
    return torch.stack([spd_matrix(6, c, seed=7) for c in (0.0, 0.5, 1.0, 2.0)]), randn(4, 6, seed=8)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


def half_square(x: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((x - target) ** 2).sum(-1)


# ---------------------------------------------------------------------------------------------------------- the answer


@KINDS_OF
def test_it_finds_the_solution_of_a_quadratic(kind: str) -> None:
    matrix, b = spd_matrix(20, 2, seed=1), randn(20, seed=2)
    result = solver(kind, rtol=1e-10, max_steps=5000).run(quadratics, zeros(20), matrix, b)
    expected = torch.linalg.solve(matrix, b)
    assert result.status is Status.CONVERGED
    # the error is at most ||H^-1|| ||g|| <= 100 * 1e-10 ||b||
    assert float((result.value - expected).norm()) <= 1e-8 * float(b.norm())


@KINDS_OF
def test_it_finds_the_minimum_of_a_function_that_is_no_quadratic(kind: str) -> None:
    weight, offset, log_strength = randn(12, 5, seed=3), randn(12, seed=4), torch.tensor(-2.0, dtype=F64)
    mu = math.exp(-2)
    beta = mu + float(torch.linalg.matrix_norm(weight, 2)) ** 2 / 4  # softplus'' <= 1/4
    known = {"smoothness": beta, "strong_convexity": mu}
    constants = {name: known[name] for name in KINDS[kind]}
    result = AcceleratedGradient(**constants, rtol=1e-11, max_steps=5000).run(
        smooth_objective, zeros(5), weight, offset, log_strength
    )
    assert result.status is Status.CONVERGED
    # kappa 1e-11 of the first gradient, kappa below 1e3
    assert relative_error(result.value, newton(smooth_objective, zeros(5), weight, offset, log_strength)) < 1e-8


def test_fixed_steps_with_both_constants_match_an_unrolled_loop_on_a_pytree() -> None:
    matrix = spd_matrix(5, 1, seed=1)

    def objective(x: dict[str, Any], b: Tensor) -> Tensor:
        flat = torch.cat([x["w"].reshape(-1), x["b"][0].reshape(1)])
        return 0.5 * flat @ matrix @ flat - b @ flat + torch.logsumexp(flat, 0)

    b, x = randn(5, seed=2), randn(5, seed=3)
    init = {"w": x[:4].reshape(2, 2).clone(), "b": (x[4].clone(),)}
    result = AcceleratedGradient(2.0, strong_convexity=0.08, max_steps=20).run(objective, init, b)
    momentum, y = (5 - 1) / (5 + 1), x.clone()  # kappa = 25
    for _ in range(20):
        x_new = y - (matrix @ y - b + torch.softmax(y, 0)) / 2
        x, y = x_new, x_new + momentum * (x_new - x)
    got = result.value
    assert torch.allclose(torch.cat([got["w"].reshape(-1), got["b"][0].reshape(1)]), x, rtol=1e-13)
    assert result.status is Status.STEP_LIMIT and result.status.ok and result.num_steps == 20
    assert torch.equal(init["b"][0], randn(5, seed=3)[4])  # the caller's init is untouched


def test_without_strong_convexity_the_momentum_is_nesterovs_sequence_and_restarts_uphill() -> None:
    """On x^2/2 with L = 4 the iteration overshoots; the plain loop below restarts where it does."""
    target, x, y, t = 1.0, 0.0, 0.0, 1.0
    restarts = 0
    for _ in range(40):
        gradient = y - target
        x_new = y - gradient / 4
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        uphill = gradient * (x_new - x) > 0
        momentum, t = (0.0, 1.0) if uphill else ((t - 1) / t_next, t_next)
        restarts += uphill
        x, y = x_new, x_new + momentum * (x_new - x)
    got = AcceleratedGradient(4.0, max_steps=40)(half_square, zeros(1), torch.ones(1, dtype=F64))
    assert restarts >= 1
    assert float(got - 1) == pytest.approx(x - 1, rel=1e-6, abs=1e-15)  # the error shrinks, its digits with it


# ----------------------------------------------------------------------------------------------------------- the count


@pytest.mark.parametrize("log10_cond", [1, 2, 3, 4])
@pytest.mark.parametrize("log10_delta", [-2, -6])
def test_the_steps_of_lemma_2_reach_the_distance(log10_cond: int, log10_delta: int) -> None:
    """Lemma 2 of Rajeswaran et al. 2019: 2 sqrt(kappa) log(2 kappa ||x*|| / delta) gradients from 0."""
    kappa, n, delta = 10.0**log10_cond, 30, 10.0**log10_delta
    eigenvalues = torch.logspace(-log10_cond, 0, n, dtype=F64)
    basis = orthogonal(n, seed=5)
    matrix = (basis * eigenvalues) @ basis.T
    # error components alike in all directions, and all of it in the slowest
    for direction in (basis.sum(1) / math.sqrt(n), basis[:, 0]):
        solution = 10 * direction
        steps = math.floor(2 * math.sqrt(kappa) * math.log(2 * kappa * 10 / delta))
        accelerated = AcceleratedGradient(1.0, strong_convexity=1 / kappa, max_steps=steps)
        x = accelerated(quadratics, zeros(n), matrix, matrix @ solution)
        assert float((x - solution).norm()) <= delta
    if log10_cond >= 3:  # the same number of plain steps does not
        x = GradientDescent(1.0, max_steps=steps)(quadratics, zeros(n), matrix, matrix @ solution)
        assert float((x - solution).norm()) > delta


@KINDS_OF
def test_the_count_of_steps_grows_like_the_root_of_the_condition(kind: str) -> None:
    steps = []
    for log10_cond in (2, 4):
        eigenvalues = torch.logspace(-log10_cond, 0, 50, dtype=F64)
        constants = {"smoothness": 1.0, "strong_convexity": 10.0**-log10_cond}
        result = AcceleratedGradient(**{k: constants[k] for k in KINDS[kind]}, rtol=1e-6, max_steps=20000).run(
            lambda x, e=eigenvalues: 0.5 * (e * (x - 1) ** 2).sum(), zeros(50)
        )
        assert result.status is Status.CONVERGED and result.num_steps is not None
        steps.append(result.num_steps)
    # 100 times the condition: 10 times the steps for its root, up to a logarithm; 100 times for gradient descent
    assert 5 < steps[1] / steps[0] < 20


def test_backtracking_needs_no_scale() -> None:
    """The same problem in other units takes the same path: the first estimate of L is free of units."""
    matrix, b = spd_matrix(8, 1, seed=9), randn(8, seed=10)
    plain = AcceleratedGradient(rtol=1e-6).run(quadratics, b, matrix, b)
    assert plain.status is Status.CONVERGED and plain.num_steps is not None and plain.num_steps < 200
    for scale in (2.0**-60, 2.0**60):
        scaled = AcceleratedGradient(rtol=1e-6).run(quadratics, b, matrix * scale, b * scale)
        assert scaled.num_steps == plain.num_steps and torch.equal(scaled.value, plain.value)


def test_backtracking_follows_a_curvature_that_appears_later() -> None:
    """At init the curvature along the gradient is 1; the direction of curvature 1e4 is found by doubling."""
    curvature = torch.tensor([1.0, 1e4], dtype=F64)
    init = torch.tensor([1.0, 1e-9], dtype=F64)
    result = AcceleratedGradient(rtol=1e-8, max_steps=3000).run(lambda x: 0.5 * (curvature * x * x).sum(), init)
    assert result.status is Status.CONVERGED and float(result.value.norm()) < 1e-7


def test_backtracking_leaves_a_point_where_the_objective_is_infinite() -> None:
    """-log x + x is infinite for x <= 0: a step that lands there is shortened."""
    x = AcceleratedGradient(rtol=1e-10)(
        lambda x: torch.where(x > 0, x - x.clamp_min(1e-300).log(), math.inf).sum(), torch.tensor([0.01], dtype=F64)
    )
    assert float(x) == pytest.approx(1.0, abs=1e-7)  # |g at init| = 99, curvature 1 at the solution


# ---------------------------------------------------------------------------------------------------- tolerance, status


def test_the_absolute_tolerance_bounds_the_distance() -> None:
    """||x - x*|| <= ||g|| / mu: atol = mu delta."""
    matrix, b = spd_matrix(10, 2, seed=11), randn(10, seed=12)
    result = solver("known", atol=1e-2 * 1e-5).run(quadratics, zeros(10), matrix, b)
    gradient = matrix @ result.value - b
    assert result.status is Status.CONVERGED and float(gradient.norm()) <= 1e-7 * (1 + 1e-6)
    assert float((result.value - torch.linalg.solve(matrix, b)).norm()) <= 1e-5


@KINDS_OF
@pytest.mark.parametrize(
    ("dtype", "scale"), [(F64, 1e-120), (F64, 1e120), (torch.float32, 1e-15), (torch.float32, 1e15)]
)
def test_the_relative_tolerance_survives_any_scale(kind: str, dtype: torch.dtype, scale: float) -> None:
    """The squares of squares of these numbers are 0 or infinite; the objective itself is not."""
    target = (scale * randn(3, seed=5)).to(dtype)
    result = solver(kind, rtol=1e-4).run(half_square, torch.zeros(3, dtype=dtype), target)
    assert result.status is Status.CONVERGED
    assert float(((result.value - target) / scale).norm()) <= 1.01e-4 * float((target / scale).norm())


@KINDS_OF
def test_the_step_limit_before_the_tolerance_is_not_success(kind: str) -> None:
    matrix, b = spd_matrix(6, 2, seed=13), randn(6, seed=14)
    result = solver(kind, max_steps=3, rtol=1e-9).run(quadratics, zeros(6), matrix, b)
    assert result.status is Status.MAX_STEPS_REACHED and not result.status.ok and result.num_steps == 3


@KINDS_OF
def test_a_start_at_the_solution_makes_no_step(kind: str) -> None:
    target = randn(3, seed=6)
    result = solver(kind, rtol=1e-9).run(half_square, target, target)
    assert result.status is Status.CONVERGED and result.num_steps == 0 and torch.equal(result.value, target)
    assert torch.equal(solver(kind, max_steps=5)(half_square, target, target), target)


# --------------------------------------------------------------------------------------------------------------- lanes


@KINDS_OF
@pytest.mark.parametrize("settings", [{"max_steps": 15}, {"max_steps": 20000, "rtol": 1e-9}])
def test_batched_equals_looped_with_mixed_conditioning(kind: str, settings: dict[str, Any]) -> None:
    matrices, b = mixed_batch()
    batched = solver(kind, **settings)(quadratics, zeros(4, 6), matrices, b)
    for i in range(4):
        single = solver(kind, **settings)(quadratics, zeros(6), matrices[i], b[i])
        # The same arithmetic but for the order of sums. With a tolerance, rounding may move a restart, and both are
        # within kappa rtol = 1e-7 (relative to b) of the solution; for fixed steps no decision is that close.
        assert torch.allclose(batched[i], single, rtol=0, atol=1e-6 if "rtol" in settings else 1e-9)


@KINDS_OF
def test_a_finished_lane_is_frozen_while_the_others_go_on(kind: str) -> None:
    matrices, b = mixed_batch()
    early = solver(kind, rtol=1e-6).run(quadratics, zeros(6), matrices[0], b[0])
    both = solver(kind, rtol=1e-6).run(quadratics, zeros(2, 6), matrices[[0, 3]], b[[0, 3]])
    assert early.num_steps is not None and both.num_steps is not None and both.num_steps > early.num_steps
    # Lane 0 is the identity times x: its arithmetic is exact up to the last bit of the product.
    assert torch.allclose(both.value[0], early.value, rtol=1e-12, atol=1e-15)


@KINDS_OF
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"max_steps": 30}, {"max_steps": 300, "rtol": 1e-9}])
def test_a_lane_in_trouble_changes_no_bit_of_the_others(kind: str, poison: float, settings: dict[str, Any]) -> None:
    matrices, b = mixed_batch()
    clean = solver(kind, **settings)(quadratics, zeros(4, 6), matrices, b)
    b = b.clone()
    b[2, 0] = poison
    result = solver(kind, **settings).run(quadratics, zeros(4, 6), matrices, b)
    assert torch.equal(result.value[[0, 1, 3]], clean[[0, 1, 3]])
    if "rtol" in settings:
        assert not result.status.ok


def test_a_diverging_lane_does_not_hide_behind_converged_ones() -> None:
    curvature = torch.tensor([1.0, 1e3], dtype=F64)  # 1e3 is above the smoothness that was promised
    result = AcceleratedGradient(2.0, strong_convexity=1.0, max_steps=2000, rtol=1e-6).run(
        lambda x: 0.5 * curvature * ((x - 1) ** 2).sum(-1), zeros(2, 1)
    )
    assert not result.status.ok
    assert float(result.value[0]) == pytest.approx(1.0, rel=1e-5)


def test_backtracking_finds_a_step_for_each_lane() -> None:
    """Curvatures 1 and 1e6: one step for both would leave the first where it is."""
    curvature = torch.tensor([1.0, 1e6], dtype=F64)
    result = AcceleratedGradient(rtol=1e-6, max_steps=100).run(
        lambda x: 0.5 * curvature * ((x - 1) ** 2).sum(-1), zeros(2, 1)
    )
    assert result.status is Status.CONVERGED and torch.allclose(result.value, torch.ones(2, 1, dtype=F64), atol=1e-6)


def test_backtracking_makes_no_step_longer_than_one_over_mu() -> None:
    """mu = 10 where the curvature is 1: too large, but x = 1 - 1/10 is what it says. A shorter L means m < 0."""
    x = AcceleratedGradient(strong_convexity=10.0, max_steps=1)(half_square, torch.ones(1, dtype=F64), zeros(1))
    assert float(x) == pytest.approx(0.9, rel=1e-12)


def test_backtracking_spends_no_evaluation_on_a_lane_that_has_arrived() -> None:
    """Lane 1 is within atol at init; its L is 1e30 times smaller than the first guess, and must not be searched for."""
    curvature, target = torch.tensor([1.0, 1e-90], dtype=F64), torch.tensor([[2.0], [2e30]], dtype=F64)
    counts = []
    for num_lanes in (1, 2):
        calls = 0

        def objective(x: Tensor, n: int = num_lanes) -> Tensor:
            nonlocal calls
            calls += 1
            return 0.5 * curvature[:n] * ((x - target[:n]) ** 2).sum(-1)

        result = AcceleratedGradient(atol=1e-3).run(objective, zeros(num_lanes, 1))
        assert result.status is Status.CONVERGED
        counts.append(calls)
    assert counts[0] == counts[1]


def test_a_layer_runs_it_once_for_all_lanes_under_vmap() -> None:
    layer = il.argmin(lambda x, t: (x.exp() - t * x).sum(), AcceleratedGradient(rtol=1e-12, max_steps=2000))
    t = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    gradients = torch.func.vmap(torch.func.grad(lambda t: layer(zeros(2), t).sum()))(t)
    assert relative_error(gradients, 1 / t) < 1e-9  # x = log t


# --------------------------------------------------------------------------------------------------------- surroundings


@KINDS_OF
def test_unused_unknowns_stay_where_they_start(kind: str) -> None:
    init = {"used": zeros(2), "unused": randn(3, seed=9)}
    x = solver(kind, max_steps=400)(lambda x: 0.5 * (x["used"] - 1).square().sum(), init)
    assert torch.equal(x["unused"], init["unused"])
    assert torch.allclose(x["used"], torch.ones(2, dtype=F64))


@KINDS_OF
@pytest.mark.parametrize("shape", [(), (1,), (0,)])
@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_small_shapes_are_solved(kind: str, shape: tuple[int, ...], rtol: float) -> None:
    x = solver(kind, max_steps=400, rtol=rtol)(lambda x: 0.5 * ((x - 2) ** 2).sum(), zeros(*shape))
    # momentum of kappa = 100 on an objective of kappa = 1: 400 steps of rate sqrt(1 - 1/10), and sqrt(0.9)^400 < 1e-9
    assert x.shape == shape and torch.allclose(x, torch.full(shape, 2.0, dtype=F64), rtol=1e-8)


@KINDS_OF
def test_it_does_not_touch_the_gradients_of_what_the_objective_closes_over(kind: str) -> None:
    module = torch.nn.Linear(3, 1).double()
    solver(kind, max_steps=3)(lambda x: module(x).square().sum(), torch.ones(3, dtype=F64))
    assert all(p.grad is None for p in module.parameters())


@KINDS_OF
def test_it_works_where_gradients_are_switched_off(kind: str) -> None:
    with torch.no_grad():
        x = solver(kind, max_steps=400)(half_square, zeros(2), torch.ones(2, dtype=F64))
    assert torch.allclose(x, torch.ones(2, dtype=F64)) and not x.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smoothness": 0.0}, "smoothness=0.0 must be positive and finite. Leave it out where it is not known"),
        ({"smoothness": math.inf}, "smoothness=inf must be positive and finite"),
        ({"smoothness": math.nan}, "smoothness=nan must be positive and finite"),
        ({"strong_convexity": -1.0}, "strong_convexity=-1.0 must be positive and finite"),
        ({"smoothness": 1.0, "strong_convexity": 2.0}, "strong_convexity=2.0 must be at most smoothness=1.0"),
        ({"max_steps": -1}, "max_steps=-1 must be non-negative"),
        ({"rtol": -1e-3}, "rtol=-0.001 must be non-negative"),
        ({"atol": math.nan}, "atol=nan must be non-negative"),
    ],
)
def test_bad_settings_are_refused_by_name_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AcceleratedGradient(**settings)


def test_it_says_that_it_takes_all_lanes_at_once() -> None:
    assert AcceleratedGradient().batched is True
    assert isinstance(AcceleratedGradient(1.0), il.solvers.AcceleratedGradient)


def test_the_callback_sees_every_gradient_up_to_the_answer_and_changes_nothing() -> None:
    curvature = torch.tensor([1.0, 100.0], dtype=torch.float64)
    seen: list[il.solvers.Iteration] = []
    for settings in ({"smoothness": 100.0, "strong_convexity": 1.0}, {}):
        plain = il.solvers.AcceleratedGradient(rtol=1e-10, **settings)  # type: ignore[arg-type]
        watched = il.solvers.AcceleratedGradient(rtol=1e-10, callback=seen.append, **settings)  # type: ignore[arg-type]
        init = torch.zeros(2, dtype=torch.float64)
        result = watched.run(lambda x: (0.5 * curvature * (x - 3) ** 2).sum(), init)
        assert torch.equal(result.value, plain(lambda x: (0.5 * curvature * (x - 3) ** 2).sum(), init))
        assert [i.step for i in seen] == list(range((result.num_steps or 0) + 1))
        assert torch.equal(seen[0].x, init) and torch.equal(seen[-1].x, result.value)
        assert float(seen[-1].gradient_norm) == float((curvature * (result.value - 3)).norm())
        seen.clear()
