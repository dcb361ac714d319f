"""What LBFGS, NewtonCG and GradientDescent with a line search promise alike: answers, statuses, batches, gradients."""

import math
from typing import Any

import pytest
import torch
from references import F64, dense_gradients, newton, randn, relative_error, smooth_objective, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import LBFGS, GradientDescent, NewtonCG

MAKERS: dict[str, Any] = {
    "lbfgs": LBFGS,
    "lbfgs, pairs": lambda **settings: LBFGS(memory=10, **settings),
    "newton": NewtonCG,
    "newton, wolfe": lambda **settings: NewtonCG(line_search="wolfe", **settings),
    "newton, 5 products": lambda **settings: NewtonCG(cg_steps=5, **settings),
    "gradient descent": lambda **settings: GradientDescent(1.0, line_search="armijo", **settings),
}
ALL = pytest.mark.parametrize("kind", MAKERS)


def make(kind: str, **settings: Any) -> Any:
    return MAKERS[kind](**{"max_steps": 3000, **settings})


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


def half_square(x: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((x - target) ** 2).sum(-1)


def quadratics(x: Tensor, matrices: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x * (matrices @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)


def mixed_batch(log10_conditions: tuple[float, ...] = (0.0, 0.3, 0.6, 1.0)) -> tuple[Tensor, Tensor]:
    lanes = len(log10_conditions)
    return torch.stack([spd_matrix(6, c, seed=7) for c in log10_conditions]), randn(lanes, 6, seed=8)


def barrier(x: Tensor, t: Tensor) -> Tensor:
    """x = 1 / t, entry by entry; undefined (NaN) where x <= 0."""
    return (t * x - torch.log(x)).sum(-1)


# ---------------------------------------------------------------------------------------------------------- the answer


@ALL
def test_it_finds_the_dense_solution_of_a_quadratic(kind: str) -> None:
    matrix, b = spd_matrix(20, 1, seed=1), randn(20, seed=2)
    result = make(kind, rtol=1e-10).run(quadratics, zeros(20), matrix, b)
    assert result.status is Status.CONVERGED
    # ||H^-1|| rtol ||b|| = 10 * 1e-10 ||b||, and ||x|| >= ||b||
    assert relative_error(result.value, torch.linalg.solve(matrix, b)) < 1e-9


@ALL
def test_it_finds_the_minimum_that_dense_newton_finds(kind: str) -> None:
    theta = randn(12, 5, seed=3), randn(12, seed=4), torch.tensor(-2.0, dtype=F64)
    result = make(kind, rtol=1e-10).run(smooth_objective, zeros(5), *theta)
    assert result.status is Status.CONVERGED
    # condition below 1e3 times rtol
    assert relative_error(result.value, newton(smooth_objective, zeros(5), *theta)) < 1e-7


@ALL
def test_it_turns_back_where_the_objective_is_undefined(kind: str) -> None:
    t = torch.tensor([0.4, 1.0, 4.0], dtype=F64)
    result = make(kind, rtol=1e-10).run(barrier, torch.full((3,), 0.5, dtype=F64), t)
    assert result.status is Status.CONVERGED
    # curvature t^2 >= 0.16, first gradient about 3: an error of at most 1e-10 * 3 / 0.16
    assert torch.allclose(result.value, 1 / t, rtol=0, atol=2e-9)


@ALL
def test_pytrees_come_back_in_their_structure_and_init_is_untouched(kind: str) -> None:
    matrix, b = spd_matrix(5, 1, seed=5), randn(5, seed=6)

    def objective(x: dict[str, Any]) -> Tensor:
        flat = torch.cat([x["w"].reshape(-1), x["b"][0].reshape(1)])
        return 0.5 * flat @ matrix @ flat - b @ flat

    init = {"w": randn(2, 2, seed=7), "b": (torch.tensor(0.5, dtype=F64), zeros(0)), "unused": randn(3, seed=8)}
    before = [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(init)]
    x = make(kind, rtol=1e-11)(objective, init)
    flat = torch.cat([x["w"].reshape(-1), x["b"][0].reshape(1)])
    assert relative_error(flat, torch.linalg.solve(matrix, b)) < 1e-9  # condition 10 times rtol
    assert x["b"][1].shape == (0,) and torch.equal(x["unused"], init["unused"])
    assert all(torch.equal(a, b) for a, b in zip(before, torch.utils._pytree.tree_leaves(init), strict=True))
    assert not x["w"].requires_grad


@ALL
def test_leaves_keep_their_own_dtypes(kind: str) -> None:
    init = {"a": torch.zeros(2), "b": zeros(2)}
    x = make(kind, rtol=1e-5)(lambda x: ((x["a"] - 3) ** 2).sum().double() + ((x["b"] - 4) ** 2).sum(), init)
    assert x["a"].dtype == torch.float32 and x["b"].dtype == F64
    assert torch.allclose(x["a"], torch.full((2,), 3.0), atol=1e-4)
    assert torch.allclose(x["b"], torch.full((2,), 4.0, dtype=F64), atol=1e-4)


@ALL
@pytest.mark.parametrize("shape", [(), (1,), (0,)])
def test_small_shapes_are_solved(kind: str, shape: tuple[int, ...]) -> None:
    result = make(kind, rtol=1e-12).run(lambda x: 0.5 * ((x - 2) ** 2).sum(), torch.zeros(shape, dtype=F64))
    assert result.status is Status.CONVERGED
    assert torch.allclose(result.value, torch.full(shape, 2.0, dtype=F64), rtol=1e-11)


@ALL
def test_float32_reaches_a_float32_tolerance(kind: str) -> None:
    theta = randn(12, 5, seed=3), randn(12, seed=4), torch.tensor(-1.0, dtype=F64)
    result = make(kind, rtol=1e-5).run(smooth_objective, torch.zeros(5), *(t.float() for t in theta))
    assert result.status is Status.CONVERGED and result.value.dtype == torch.float32
    # condition below 1e2 times rtol
    assert relative_error(result.value.double(), newton(smooth_objective, zeros(5), *theta)) < 1e-3


@ALL
@pytest.mark.parametrize(
    ("dtype", "scale"), [(F64, 1e-250), (F64, 1e140), (torch.float32, 1e-30), (torch.float32, 1e15)]
)
def test_the_relative_tolerance_survives_any_scale(kind: str, dtype: torch.dtype, scale: float) -> None:
    """Squares of these gradients are 0 or infinite, and the values themselves are 0 or nearly infinite."""
    target = (scale * randn(3, seed=5)).to(dtype)
    result = make(kind, rtol=1e-4).run(half_square, torch.zeros(3, dtype=dtype), target)
    assert result.status is Status.CONVERGED
    assert relative_error(result.value.double() / scale, target.double() / scale) < 2e-4


# ------------------------------------------------------------------------------------------------- limits and statuses


@ALL
def test_a_start_at_the_solution_makes_no_step(kind: str) -> None:
    target = randn(3, seed=6)
    for settings in ({"rtol": 1e-9}, {"atol": 1e-9}):
        result = make(kind, **settings).run(half_square, target, target)
        assert result.status is Status.CONVERGED and result.num_steps == 0 and torch.equal(result.value, target)


@ALL
def test_fixed_steps_are_success_and_a_missed_tolerance_is_not(kind: str) -> None:
    theta = randn(12, 5, seed=3), randn(12, seed=4), torch.tensor(-2.0, dtype=F64)
    fixed = make(kind, max_steps=2).run(smooth_objective, zeros(5), *theta)
    missed = make(kind, max_steps=2, rtol=1e-14).run(smooth_objective, zeros(5), *theta)
    none = make(kind, max_steps=0).run(smooth_objective, zeros(5), *theta)
    assert fixed.status is Status.STEP_LIMIT and fixed.status.ok and fixed.num_steps == 2
    assert missed.status is Status.MAX_STEPS_REACHED and not missed.status.ok and missed.num_steps == 2
    assert torch.equal(fixed.value, missed.value)
    assert none.status is Status.STEP_LIMIT and torch.equal(none.value, zeros(5))


@ALL
def test_the_absolute_tolerance_is_on_the_gradient(kind: str) -> None:
    matrix, b = spd_matrix(6, 2, seed=1), 1e3 * randn(6, seed=2)
    result = make(kind, atol=1e-2).run(quadratics, zeros(6), matrix, b)
    assert result.status is Status.CONVERGED and float((matrix @ result.value - b).norm()) <= 1e-2
    again = make(kind, atol=1e-2, max_steps=result.num_steps - 1).run(quadratics, zeros(6), matrix, b)
    assert float((matrix @ again.value - b).norm()) > 1e-2  # not a step too many


@ALL
def test_a_gradient_that_does_not_belong_to_the_values_is_no_success(kind: str) -> None:
    result = make(kind, rtol=1e-6).run(lambda x: (x - 2 * x.detach()).sum(), torch.ones(3, dtype=F64))
    assert result.status is Status.STAGNATED and not result.status.ok
    assert result.message.startswith("The line search found no lower point: the gradient does not belong to the values")


@ALL
def test_a_start_that_is_not_finite_is_reported(kind: str) -> None:
    for bad in (math.nan, math.inf):
        result = make(kind, rtol=1e-6).run(half_square, zeros(2), torch.tensor([1.0, bad], dtype=F64))
        assert result.status is Status.NONFINITE and result.num_steps == 0
        assert result.message == "The objective or its gradient is not finite at init."
        assert torch.equal(result.value, zeros(2))


@ALL
def test_an_objective_without_a_minimum_ends_at_the_limit(kind: str) -> None:
    result = make(kind, max_steps=4, rtol=1e-6).run(lambda x: -x.sum() + 0 * (x * x).sum(), zeros(2))
    assert not result.status.ok and bool((result.value > 0).all())


@ALL
def test_an_objective_of_several_values_is_refused(kind: str) -> None:
    with pytest.raises(il.ObjectiveError, match=r"returned shape \(3,\) for leaves of shapes \[\(2, 4\)\]\. Sum or"):
        make(kind)(lambda x: x.sum() + zeros(3), zeros(2, 4))


@ALL
def test_it_leaves_module_gradients_alone_and_works_where_gradients_are_off(kind: str) -> None:
    module = torch.nn.Linear(3, 1).double()
    with torch.no_grad():
        x = make(kind, max_steps=3)(lambda x: module(x).square().sum() + half_square(x, 1.0), torch.zeros(3, dtype=F64))
    assert all(p.grad is None for p in module.parameters()) and not x.requires_grad


# -------------------------------------------------------------------------------------------------------- many problems


@ALL
@pytest.mark.parametrize("settings", [{"max_steps": 2}, {"rtol": 1e-9}])
def test_batched_equals_looped_with_mixed_conditioning(kind: str, settings: dict[str, Any]) -> None:
    # Two steps from here leave residuals of 4e-11 (Newton) and more, so every lane has a step left to make. At
    # rounding, which a lane of condition 1 reaches in its first step, chance would say whether the next one stalls.
    matrices, b = mixed_batch((0.3, 0.6, 0.8, 1.0))
    solver = make(kind, **settings)
    batched = solver.run(quadratics, zeros(4, 6), matrices, b)
    singles = [solver.run(quadratics, zeros(6), matrices[i], b[i]) for i in range(4)]
    # with a tolerance both are within 10 rtol of the solution; without, a few steps spread rounding errors little
    atol = 2e-8 if "rtol" in settings else 1e-10
    for i in range(4):
        assert torch.allclose(batched.value[i], singles[i].value, rtol=0, atol=atol * float(b[i].norm()))
    assert batched.status is (Status.CONVERGED if "rtol" in settings else Status.STEP_LIMIT)
    assert all(single.status is batched.status for single in singles)
    if "rtol" not in settings:
        assert batched.num_steps == max(single.num_steps for single in singles)


@ALL
def test_lanes_of_two_dimensions_equal_lanes_of_one(kind: str) -> None:
    matrices, b = mixed_batch()
    solver = make(kind, max_steps=5)
    flat = solver(quadratics, zeros(4, 6), matrices, b)
    square = solver(quadratics, zeros(2, 2, 6), matrices.reshape(2, 2, 6, 6), b.reshape(2, 2, 6))
    assert torch.allclose(square.reshape(4, 6), flat, rtol=1e-10, atol=1e-12)


@ALL
@pytest.mark.parametrize(("poison", "settings"), [(math.nan, {"max_steps": 6}), (math.inf, {"rtol": 1e-9})])
def test_a_lane_in_trouble_changes_no_bit_of_the_others(kind: str, poison: float, settings: dict[str, Any]) -> None:
    matrices, b = mixed_batch()
    solver = make(kind, **settings)
    clean = solver(quadratics, zeros(4, 6), matrices, b)
    b = b.clone()
    b[2, 0] = poison
    result = solver.run(quadratics, zeros(4, 6), matrices, b)
    assert torch.equal(result.value[[0, 1, 3]], clean[[0, 1, 3]]) and torch.equal(result.value[2], zeros(6))
    assert result.status is Status.NONFINITE and "in lane 2 of (4,)" in result.message


@ALL
def test_a_lane_that_meets_nan_on_its_way_changes_no_bit_of_the_others(kind: str) -> None:
    t = torch.tensor([[1.0, 2.0], [0.5, 6.0], [3.0, 1.0]], dtype=F64)
    solver = make(kind, rtol=1e-9)
    init = torch.full((3, 2), 0.4, dtype=F64)
    seen = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        value = barrier(x, t)
        seen.append(value.detach().isfinite())
        return value

    result = solver.run(watched, init, t)
    other = solver(barrier, init, torch.stack([t[0], t[0], t[2]]))
    if kind != "newton, 5 products":
        assert not bool(torch.stack(seen)[:, 1].all())  # the trouble did happen
    assert result.status is Status.CONVERGED and torch.equal(result.value[[0, 2]], other[[0, 2]])


@ALL
def test_a_finished_lane_is_frozen_while_the_others_go_on(kind: str) -> None:
    matrices, b = mixed_batch()
    b = torch.cat([1e-7 * b[:1], b[1:]])
    result = make(kind, atol=1e-6).run(quadratics, zeros(4, 6), matrices, b)
    assert torch.equal(result.value[0], zeros(6))  # its first gradient was below the tolerance
    assert float((quadratics_gradient(result.value, matrices, b)).norm(dim=-1).max()) <= 1e-6
    longer = make(kind, atol=1e-6).run(quadratics, zeros(4, 6), matrices[[0, 1, 2, 2]], b)
    assert torch.equal(longer.value[:3], result.value[:3])  # however long the last lane goes on


def quadratics_gradient(x: Tensor, matrices: Tensor, b: Tensor) -> Tensor:
    return (matrices @ x.unsqueeze(-1)).squeeze(-1) - b


@ALL
def test_a_finished_lane_is_evaluated_at_its_answer_only(kind: str) -> None:
    matrices, b = mixed_batch()
    points: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        points.append(x.detach()[0].clone())
        harder = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=F64)
        return quadratics(x, matrices, b) + harder * (x**4).sum(-1)

    answer = make(kind, rtol=1e-8)(watched, zeros(4, 6))[0]  # lane 0 has condition 1: it is the first to end
    arrived = next(i for i, point in enumerate(points) if torch.equal(point, answer))
    assert arrived < len(points) - 1 and all(torch.equal(point, answer) for point in points[arrived:])


@ALL
def test_a_stalled_lane_does_not_hide_behind_converged_ones(kind: str) -> None:
    wrong = torch.tensor([0.0, 1.0], dtype=F64)

    def objective(x: Tensor) -> Tensor:
        return half_square(x, 1.0) - 2 * wrong * half_square(x.detach(), 1.0)

    result = make(kind, rtol=1e-8).run(objective, zeros(2, 3))
    assert result.status is Status.STAGNATED and "in lane 1 of (2,)" in result.message
    assert torch.allclose(result.value[0], torch.ones(3, dtype=F64), atol=1e-7)


@ALL
@pytest.mark.parametrize("settings", [{"max_steps": 4}, {"rtol": 1e-7}])
def test_asking_rarely_who_is_running_changes_no_bit(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an accelerator does, where every question is a host synchronisation."""
    matrices, b = mixed_batch()
    expected = make(kind, **settings).run(quadratics, zeros(4, 6), matrices, b)
    for name in ("_descent", "_lbfgs", "_newton_cg"):
        monkeypatch.setattr(f"implicitlayer.solvers.{name}.rounds_between_syncs", lambda x: 8)
    result = make(kind, **settings).run(quadratics, zeros(4, 6), matrices, b)
    assert torch.equal(result.value, expected.value)
    assert (result.status, result.num_steps) == (expected.status, expected.num_steps)


# ------------------------------------------------------------------------------------------------------ through a layer


@ALL
def test_the_gradient_through_a_layer_is_the_dense_one(kind: str) -> None:
    theta = [randn(12, 4, seed=3), randn(12, seed=4), torch.tensor(-1.0, dtype=F64)]
    points = [t.clone().requires_grad_() for t in theta]
    layer = il.argmin(smooth_objective, make(kind, rtol=1e-11))
    v = randn(4, seed=9)
    got = torch.autograd.grad(layer(zeros(4), *points) @ v, points)
    x = newton(smooth_objective, zeros(4), *theta)
    for mine, exact in zip(got, dense_gradients(smooth_objective, x, theta, v), strict=True):
        # the inner error, 1e-11 times a condition below 1e2, and the linear solve's 1e-10 times that
        assert relative_error(mine, exact) < 1e-7


@ALL
def test_vmap_of_grad_is_one_batched_solve(kind: str) -> None:
    calls = []

    def objective(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x.shape)
        return (torch.exp(x) - t * x).sum()

    layer = il.argmin(objective, make(kind, rtol=1e-12))
    t = torch.tensor([[1.0, 2.0], [3.0, 40.0], [0.2, 5.0]], dtype=F64)
    gradients = torch.func.vmap(torch.func.grad(lambda t: layer(zeros(2), t).sum()))(t)
    assert torch.allclose(gradients, 1 / t, rtol=1e-8)  # x = log t
    looped = torch.stack([torch.func.grad(lambda t: layer(zeros(2), t).sum())(row) for row in t])
    assert torch.allclose(gradients, looped, rtol=1e-8)


@ALL
def test_batch_dims_give_each_lane_its_gradient(kind: str) -> None:
    matrices, b = mixed_batch()
    b.requires_grad_()
    v = randn(4, 6, seed=10)
    x = il.argmin(quadratics, make(kind, rtol=1e-11), batch_dims=1)(zeros(4, 6), matrices, b)
    (gradient,) = torch.autograd.grad((v * x).sum(), b)
    expected = torch.stack([torch.linalg.solve(m, w) for m, w in zip(matrices, v, strict=True)])
    assert relative_error(gradient, expected) < 1e-8  # the linear solve's 1e-10 times a condition of 10


@ALL
def test_a_proximal_objective_is_searched_as_a_whole(kind: str) -> None:
    """phi = (A + s I)^-1 (b + s theta), and d phi / d theta = s (A + s I)^-1."""
    matrix, b, theta = spd_matrix(5, 1, seed=11), randn(5, seed=12), randn(5, seed=13).requires_grad_()
    layer = il.argmin(il.proximal(lambda phi: quadratics(phi, matrix, b), 2.0), make(kind, rtol=1e-11))
    phi = layer(theta.detach(), theta)
    (gradient,) = torch.autograd.grad(phi.sum(), theta)
    full = matrix + 2 * torch.eye(5, dtype=F64)
    assert relative_error(phi, torch.linalg.solve(full, b + 2 * theta)) < 1e-9
    assert relative_error(gradient, 2 * torch.linalg.solve(full, torch.ones(5, dtype=F64))) < 1e-9


@ALL
def test_it_says_that_it_takes_all_lanes_at_once_and_can_be_compared(kind: str) -> None:
    assert make(kind).batched is True and make(kind) == make(kind) and hash(make(kind)) == hash(make(kind))
