"""Gradient descent: its fixed steps, its stopping test, and many problems at once."""

import itertools
import math
from typing import Any

import pytest
import torch
from references import F64, randn, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import GradientDescent


def half_square(x: Tensor, target: Tensor) -> Tensor:
    """One value per lane; the gradient is x - target."""
    return 0.5 * ((x - target) ** 2).sum(-1)


def test_each_fixed_step_shrinks_the_distance_by_one_minus_the_step_size() -> None:
    target = randn(4, seed=0)
    for steps in (0, 1, 7):
        x = GradientDescent(step_size=0.25, max_steps=steps)(half_square, torch.zeros(4, dtype=F64), target)
        assert torch.allclose(x, (1 - 0.75**steps) * target, rtol=1e-14, atol=1e-16)


def test_fixed_steps_match_an_unrolled_loop_on_a_pytree() -> None:
    matrix = spd_matrix(5, 1, seed=1)

    def objective(x: dict[str, Any], b: Tensor) -> Tensor:
        flat = torch.cat([x["w"].reshape(-1), x["b"][0].reshape(1)])
        return 0.5 * flat @ matrix @ flat - b @ flat + torch.logsumexp(flat, 0)

    b, x = randn(5, seed=2), randn(5, seed=3)
    init = {"w": x[:4].reshape(2, 2).clone(), "b": (x[4].clone(),)}
    got = GradientDescent(step_size=0.3, max_steps=20)(objective, init, b)
    for _ in range(20):
        x = x - 0.3 * (matrix @ x - b + torch.softmax(x, 0))
    assert torch.allclose(torch.cat([got["w"].reshape(-1), got["b"][0].reshape(1)]), x, rtol=1e-13)
    assert torch.equal(init["b"][0], randn(5, seed=3)[4])  # the caller's init is untouched


def test_fixed_steps_report_the_step_limit_as_success() -> None:
    result = GradientDescent(step_size=0.1, max_steps=3).run(half_square, torch.zeros(2, dtype=F64), randn(2, seed=0))
    assert result.status is Status.STEP_LIMIT and result.status.ok and result.num_steps == 3


def test_the_relative_tolerance_is_on_the_gradient_at_init() -> None:
    init, target = torch.zeros(3, dtype=F64), randn(3, seed=4)
    result = GradientDescent(step_size=0.5, max_steps=100, rtol=1e-3).run(half_square, init, target)
    # the gradient halves each step: 2^-10 is the first power below 1e-3
    assert result.status is Status.CONVERGED and result.num_steps == 10
    assert torch.allclose(target - result.value, target / 1024, rtol=1e-12)


def test_the_absolute_tolerance_is_on_the_gradient() -> None:
    target = torch.tensor([3.0, 4.0], dtype=F64)
    result = GradientDescent(step_size=0.5, atol=1.0).run(half_square, torch.zeros(2, dtype=F64), target)
    assert result.num_steps == 3  # norms 5, 2.5, 1.25, 0.625


@pytest.mark.parametrize(
    ("dtype", "scale"), [(F64, 1e-250), (F64, 1e250), (torch.float32, 1e-30), (torch.float32, 1e30)]
)
def test_the_relative_tolerance_survives_any_scale(dtype: torch.dtype, scale: float) -> None:
    """The squares of these gradients are 0 or infinite."""
    target = (scale * randn(3, seed=5)).to(dtype)
    solver = GradientDescent(step_size=0.5, max_steps=100, rtol=1e-4)
    result = solver.run(half_square, torch.zeros(3, dtype=dtype), target)
    assert result.status is Status.CONVERGED and result.num_steps == 14  # 2^-14 < 1e-4
    assert torch.allclose(result.value, (1 - 2.0**-14) * target, rtol=1e-6, atol=0)


def test_the_step_limit_before_the_tolerance_is_not_success() -> None:
    result = GradientDescent(step_size=0.1, max_steps=3, rtol=1e-9).run(
        half_square, torch.zeros(2, dtype=F64), randn(2, seed=0)
    )
    assert result.status is Status.MAX_STEPS_REACHED and not result.status.ok and result.num_steps == 3


def test_a_start_at_the_solution_makes_no_step() -> None:
    target = randn(3, seed=6)
    result = GradientDescent(step_size=0.1, rtol=1e-9).run(half_square, target, target)
    assert result.status is Status.CONVERGED and result.num_steps == 0 and torch.equal(result.value, target)


def quadratics(x: Tensor, matrices: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x * (matrices @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)


def mixed_batch() -> tuple[Tensor, Tensor]:
    return torch.stack([spd_matrix(6, c, seed=7) for c in (0.0, 0.5, 1.0, 2.0)]), randn(4, 6, seed=8)


@pytest.mark.parametrize("settings", [{"max_steps": 15}, {"max_steps": 20000, "rtol": 1e-9}])
def test_batched_equals_looped_with_mixed_conditioning(settings: dict[str, Any]) -> None:
    matrices, b = mixed_batch()
    solver = GradientDescent(step_size=1.0, **settings)
    batched = solver(quadratics, torch.zeros(4, 6, dtype=F64), matrices, b)
    for i in range(4):
        # the same arithmetic, but for the order of sums in the batched product: 1e-16 times 100 (condition)
        single = solver(quadratics, torch.zeros(6, dtype=F64), matrices[i], b[i])
        assert torch.allclose(batched[i], single, rtol=1e-9, atol=1e-12)


def test_a_finished_lane_is_frozen_while_the_others_go_on() -> None:
    target = torch.tensor([[1.0], [1e-3]], dtype=F64)
    result = GradientDescent(step_size=0.5, max_steps=100, atol=1e-2).run(
        half_square, torch.zeros(2, 1, dtype=F64), target
    )
    assert result.num_steps == 7  # 2^-7 < 1e-2
    assert float(result.value[1]) == 0.0 and float(result.value[0]) == 1 - 2.0**-7


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"max_steps": 30}, {"max_steps": 300, "rtol": 1e-9}])
def test_a_lane_in_trouble_changes_no_bit_of_the_others(poison: float, settings: dict[str, Any]) -> None:
    matrices, b = mixed_batch()
    solver = GradientDescent(step_size=1.0, **settings)
    clean = solver(quadratics, torch.zeros(4, 6, dtype=F64), matrices, b)
    b = b.clone()
    b[2, 0] = poison
    result = solver.run(quadratics, torch.zeros(4, 6, dtype=F64), matrices, b)
    assert torch.equal(result.value[[0, 1, 3]], clean[[0, 1, 3]])
    if "rtol" in settings:
        assert not result.status.ok


def test_a_diverging_lane_does_not_hide_behind_converged_ones() -> None:
    def objective(x: Tensor, curvature: Tensor) -> Tensor:
        return 0.5 * curvature * ((x - 1) ** 2).sum(-1)

    curvature = torch.tensor([1.0, 1e3], dtype=F64)  # 1e3 * step 0.5 > 2: diverges
    result = GradientDescent(step_size=0.5, max_steps=2000, rtol=1e-6).run(
        objective, torch.zeros(2, 1, dtype=F64), curvature
    )
    assert not result.status.ok
    assert float(result.value[0]) == pytest.approx(1.0, rel=1e-5)


def test_unused_unknowns_stay_where_they_start() -> None:
    init = {"used": torch.zeros(2, dtype=F64), "unused": randn(3, seed=9)}
    x = GradientDescent(step_size=0.5, max_steps=5)(lambda x: (x["used"] - 1).square().sum(), init)
    assert torch.equal(x["unused"], init["unused"]) and torch.allclose(x["used"], torch.ones(2, dtype=F64))


@pytest.mark.parametrize("shape", [(), (1,), (0,)])
@pytest.mark.parametrize("rtol", [0.0, 1e-12])
def test_small_shapes_are_solved(shape: tuple[int, ...], rtol: float) -> None:
    x = GradientDescent(step_size=1.0, max_steps=3, rtol=rtol)(
        lambda x: 0.5 * ((x - 2) ** 2).sum(), torch.zeros(shape, dtype=F64)
    )
    assert x.shape == shape and torch.equal(x, torch.full(shape, 2.0, dtype=F64))


def test_it_does_not_touch_the_gradients_of_what_the_objective_closes_over() -> None:
    module = torch.nn.Linear(3, 1).double()
    GradientDescent(step_size=0.1, max_steps=3)(lambda x: module(x).square().sum(), torch.ones(3, dtype=F64))
    assert all(p.grad is None for p in module.parameters())


def test_it_works_where_gradients_are_switched_off() -> None:
    with torch.no_grad():
        x = GradientDescent(step_size=1.0, max_steps=1)(
            half_square, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
        )
    assert torch.equal(x, torch.ones(2, dtype=F64)) and not x.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, "step_size=0.0 must be positive"),
        ({"step_size": -1.0}, "step_size=-1.0 must be positive"),
        ({"step_size": math.nan}, "step_size=nan must be positive"),
        ({"step_size": 0.1, "max_steps": -1}, "max_steps=-1 must be non-negative"),
        ({"step_size": 0.1, "rtol": -1e-3}, "rtol=-0.001 must be non-negative"),
        ({"step_size": 0.1, "atol": math.nan}, "atol=nan must be non-negative"),
        (
            {"step_size": 0.1, "line_search": "wolfe"},
            "line_search='wolfe' must be \"armijo\" or None, a fixed step size",
        ),
    ],
)
def test_bad_settings_are_refused_by_name_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientDescent(**settings)


def test_it_says_that_it_takes_all_lanes_at_once() -> None:
    assert GradientDescent(step_size=0.1).batched is True
    assert isinstance(GradientDescent(step_size=0.1), il.solvers.GradientDescent)


# ---------------------------------------------------------------------------- line search; more in test_descent.py


@pytest.mark.parametrize("step_size", [1e-6, 1.0, 1e6])
def test_the_line_search_forgives_any_first_step_size(step_size: float) -> None:
    matrix, b = spd_matrix(6, 1, seed=1), 1e3 * randn(6, seed=2)
    result = GradientDescent(step_size, rtol=1e-8, line_search="armijo").run(
        lambda x: 0.5 * x @ matrix @ x - b @ x, torch.zeros(6, dtype=F64)
    )
    # condition 10: at a fixed best step about 92 steps; 20 doublings more to cross six decades
    assert result.status is Status.CONVERGED and result.num_steps is not None and result.num_steps < 300


def test_a_step_accepted_at_once_is_tried_twice_as_long_the_next_time() -> None:
    points: list[float] = []
    GradientDescent(1e-3, max_steps=4, line_search="armijo", callback=lambda i: points.append(float(i.x)))(
        lambda x: -x + 1e-9 * x**2, torch.tensor(0.0, dtype=F64)
    )
    steps = [after - before for before, after in itertools.pairwise(points)]
    assert steps == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3], rel=1e-6)


def test_a_step_that_leads_up_is_cut_to_the_minimum_along_the_line() -> None:
    # f = 50 x^2 from 1 with a first trial of 1: the parabola through both values has its minimum at step 1/100
    result = GradientDescent(1.0, max_steps=1, line_search="armijo").run(
        lambda x: 50 * x**2, torch.tensor(1.0, dtype=F64)
    )
    assert float(result.value) == pytest.approx(0.0, abs=1e-12)


def test_no_value_ever_grows_under_the_line_search() -> None:
    values: list[float] = []
    GradientDescent(1.0, max_steps=60, line_search="armijo", callback=lambda i: values.append(float(i.value)))(
        lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), torch.tensor([-1.2, 1.0], dtype=F64)
    )
    assert len(values) == 61 and all(after < before for before, after in itertools.pairwise(values))


def test_each_lane_has_its_own_step_size() -> None:
    curvature = torch.tensor([1e-3, 1.0, 1e4], dtype=F64)
    result = GradientDescent(1.0, rtol=1e-10, line_search="armijo").run(
        lambda x: 0.5 * curvature * ((x - 1) ** 2).sum(-1), torch.zeros(3, 2, dtype=F64)
    )
    # one curvature per lane: interpolation finds it in a step or two, doubling needs about ten
    assert result.status is Status.CONVERGED and result.num_steps is not None and result.num_steps < 40
    assert torch.allclose(result.value, torch.ones(3, 2, dtype=F64), rtol=1e-9)
