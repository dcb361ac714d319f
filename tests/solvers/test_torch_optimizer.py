"""Any torch.optim optimizer as an inner solver."""

import math
from typing import Any

import pytest
import torch
from references import F64, randn, spd_matrix
from torch import Tensor

from implicitlayer import Status
from implicitlayer.solvers import TorchOptimizer


def quadratic(x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    return 0.5 * x @ matrix @ x - b @ x


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {"lr": 0.05}),
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
        (torch.optim.Rprop, {}),
        (torch.optim.LBFGS, {"max_iter": 3}),
    ],
)
def test_it_makes_the_steps_of_a_hand_written_loop(optimizer: Any, settings: dict[str, Any]) -> None:
    matrix, b = spd_matrix(5, 1, seed=1), randn(5, seed=2)
    got = TorchOptimizer(optimizer, max_steps=12, **settings)(quadratic, torch.zeros(5, dtype=F64), matrix, b)
    x = torch.zeros(5, dtype=F64, requires_grad=True)
    loop = optimizer([x], **settings)

    def closure() -> Tensor:
        loop.zero_grad()
        value = quadratic(x, matrix, b)
        value.backward()
        return value

    for _ in range(12):
        loop.step(closure)
    assert torch.equal(got, x.detach()) and not got.requires_grad


def test_lbfgs_reaches_the_dense_solution_of_a_quadratic() -> None:
    matrix, b = spd_matrix(8, 1, seed=3), randn(8, seed=4)
    solver = TorchOptimizer(
        torch.optim.LBFGS, max_steps=30, rtol=1e-6, line_search_fn="strong_wolfe", tolerance_change=0.0
    )
    result = solver.run(quadratic, torch.zeros(8, dtype=F64), matrix, b)
    assert result.status is Status.CONVERGED and result.num_steps is not None and result.num_steps < 30
    # gradient 1e-6 |b| over the smallest eigenvalue 0.1
    assert float((result.value - torch.linalg.solve(matrix, b)).norm()) <= 1e-5 * float(b.norm())


def test_fixed_steps_are_success_and_a_missed_tolerance_is_not() -> None:
    matrix, b, init = spd_matrix(4, 1, seed=5), randn(4, seed=6), torch.zeros(4, dtype=F64)
    fixed = TorchOptimizer(torch.optim.SGD, max_steps=5, lr=0.1).run(quadratic, init, matrix, b)
    missed = TorchOptimizer(torch.optim.SGD, max_steps=5, rtol=1e-9, lr=0.1).run(quadratic, init, matrix, b)
    assert fixed.status is Status.STEP_LIMIT and fixed.num_steps == 5
    assert missed.status is Status.MAX_STEPS_REACHED and missed.num_steps == 5
    assert torch.equal(fixed.value, missed.value)


def test_a_tolerance_reached_by_the_last_step_counts_as_reached() -> None:
    # gradient x - 1 halves per step: after 3 steps it is 1/8 of the first
    solver = TorchOptimizer(torch.optim.SGD, max_steps=3, rtol=0.2, lr=0.5)
    result = solver.run(lambda x: 0.5 * ((x - 1) ** 2).sum(), torch.zeros(2, dtype=F64))
    assert result.status is Status.CONVERGED and result.num_steps == 3


def test_the_absolute_tolerance_is_on_the_gradient_norm() -> None:
    solver = TorchOptimizer(torch.optim.SGD, max_steps=50, atol=1.0, lr=0.5)
    target = torch.tensor([3.0, 4.0], dtype=F64)
    result = solver.run(lambda x: 0.5 * ((x - target) ** 2).sum(), torch.zeros(2, dtype=F64))
    assert result.num_steps == 3 and result.status is Status.CONVERGED  # norms 5, 2.5, 1.25, 0.625


@pytest.mark.parametrize(
    ("dtype", "scale"), [(F64, 1e-250), (F64, 1e250), (torch.float32, 1e-30), (torch.float32, 1e30)]
)
def test_the_relative_tolerance_survives_any_scale(dtype: torch.dtype, scale: float) -> None:
    """The squares of these gradients are 0 or infinite."""
    target = (scale * randn(3, seed=5)).to(dtype)
    solver = TorchOptimizer(torch.optim.SGD, max_steps=100, rtol=1e-4, lr=0.5)
    result = solver.run(lambda x: 0.5 * ((x - target) ** 2).sum(), torch.zeros(3, dtype=dtype))
    assert result.status is Status.CONVERGED and result.num_steps == 14  # 2^-14 < 1e-4


def test_a_diverged_solve_is_never_called_converged() -> None:
    solver = TorchOptimizer(torch.optim.SGD, max_steps=3000, rtol=1e-4, lr=3.0)
    result = solver.run(lambda x: 0.5 * ((x - 1) ** 2).sum(), torch.zeros(3, dtype=F64))
    assert result.status is not None and not result.status.ok


def test_pytrees_come_back_in_their_structure_and_init_is_untouched() -> None:
    init = {"w": torch.zeros(2, 2, dtype=F64), "b": [torch.tensor(1.0, dtype=F64)]}
    before = {"w": init["w"].clone(), "b": [init["b"][0].clone()]}
    x = TorchOptimizer(torch.optim.SGD, max_steps=1, lr=1.0)(
        lambda x: 0.5 * ((x["w"] - 3) ** 2).sum() + 0.5 * (x["b"][0] - 2) ** 2, init
    )
    assert torch.equal(x["w"], torch.full((2, 2), 3.0, dtype=F64)) and float(x["b"][0]) == 2.0
    assert torch.equal(init["w"], before["w"]) and torch.equal(init["b"][0], before["b"][0])


def test_every_solve_starts_from_a_fresh_optimizer() -> None:
    solver = TorchOptimizer(torch.optim.Adam, max_steps=5, lr=0.1)
    matrix, b = spd_matrix(3, 1, seed=7), randn(3, seed=8)
    first = solver(quadratic, torch.zeros(3, dtype=F64), matrix, b)
    assert torch.equal(first, solver(quadratic, torch.zeros(3, dtype=F64), matrix, b))


def test_it_does_not_fill_the_gradients_of_what_the_objective_closes_over() -> None:
    module = torch.nn.Linear(3, 1).double()
    for optimizer in (torch.optim.Adam, torch.optim.LBFGS):
        TorchOptimizer(optimizer, max_steps=2)(lambda x: module(x).square().sum(), torch.ones(3, dtype=F64))
    assert all(p.grad is None for p in module.parameters())


def test_it_works_where_gradients_are_switched_off() -> None:
    with torch.no_grad():
        x = TorchOptimizer(torch.optim.SGD, max_steps=1, lr=1.0)(
            lambda x: 0.5 * ((x - 2) ** 2).sum(), torch.zeros(2, dtype=F64)
        )
    assert torch.equal(x, torch.full((2,), 2.0, dtype=F64))


def test_a_function_of_the_parameters_is_an_optimizer_too() -> None:
    solver = TorchOptimizer(lambda params: torch.optim.SGD(params, lr=1.0), max_steps=1)
    x = solver(lambda x: 0.5 * ((x - 2) ** 2).sum(), torch.zeros(2, dtype=F64))
    assert torch.equal(x, torch.full((2,), 2.0, dtype=F64))
    assert not solver.batched  # nothing is known about its update


@pytest.mark.parametrize(
    "optimizer", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop"]
)
def test_entrywise_optimizers_give_each_lane_what_it_gets_alone(optimizer: str) -> None:
    kind = getattr(torch.optim, optimizer)
    solver = TorchOptimizer(kind, max_steps=10, **({"lr": 0.1} if optimizer == "SGD" else {}))
    assert solver.batched
    target = torch.tensor([[1.0, -2.0], [1e3, 0.0], [0.0, 1e-3]], dtype=F64)
    curvature = torch.tensor([1.0, 0.1, 3.0], dtype=F64)

    def objective(x: Tensor, target: Tensor, curvature: Tensor) -> Tensor:
        return 0.5 * curvature * ((x - target) ** 2).sum(-1)

    batched = solver(objective, torch.zeros(3, 2, dtype=F64), target, curvature)
    for i in range(3):
        single = solver(objective, torch.zeros(2, dtype=F64), target[i], curvature[i])
        assert torch.allclose(batched[i], single, rtol=1e-13, atol=1e-15)


def test_optimizers_that_mix_entries_or_stop_on_the_sum_are_not_batched() -> None:
    assert not TorchOptimizer(torch.optim.LBFGS, max_steps=3).batched
    assert not TorchOptimizer(torch.optim.Adam, max_steps=3, rtol=1e-3).batched

    class Adam(torch.optim.Adam):  # the name alone proves nothing
        pass

    assert not TorchOptimizer(Adam, max_steps=3).batched


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "max_steps=-1 must be non-negative"),
        ({"max_steps": 1, "rtol": -1.0}, "rtol=-1.0 must be non-negative"),
        ({"max_steps": 1, "atol": math.nan}, "atol=nan must be non-negative"),
    ],
)
def test_bad_settings_are_refused_by_name_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchOptimizer(torch.optim.SGD, **settings)


def test_an_optimizer_that_was_already_made_is_refused() -> None:
    made = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a class or function, got SGD\. Pass it uncalled\."):
        TorchOptimizer(made, max_steps=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"rtol": 1e-4}])
def test_a_solve_that_ended_in_nan_says_so(settings: dict[str, Any]) -> None:
    # the error grows by -2 per step: beyond 1e308 after 1024 of them, and Inf - Inf is NaN
    solver = TorchOptimizer(torch.optim.SGD, max_steps=1100, lr=3.0, **settings)
    result = solver.run(lambda x: 0.5 * ((x - 1) ** 2).sum(), torch.zeros(3, dtype=F64))
    assert result.status is Status.NONFINITE
    assert not result.value.isfinite().any()
