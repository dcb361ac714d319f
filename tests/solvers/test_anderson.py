"""Anderson acceleration: the answer, what its memory is worth, lanes, and layers on top."""

from typing import Any

import pytest
import torch
from linear_systems import Operations
from references import F64, orthogonal, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import AndersonAcceleration


def linear(x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1) + b


def slow_map(n: int, rate: float, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues in [0, rate]: the plain iteration loses a factor of ``rate`` per step."""
    return rate * spd_matrix(n, 2, seed=seed), randn(n, seed=seed + 1)


def test_a_linear_map_is_solved_in_as_many_steps_as_it_has_eigenvalues() -> None:
    basis = orthogonal(8, seed=1)
    matrix = (basis * torch.tensor([0.9, 0.5, -0.7, 0.2] * 2, dtype=F64)) @ basis.T
    b = randn(8, seed=2)
    result = AndersonAcceleration(memory=6, rtol=1e-10).run(linear, torch.zeros(8, dtype=F64), matrix, b)
    assert result.status is Status.CONVERGED
    assert result.num_steps is not None
    assert result.num_steps <= 8  # GMRES needs 4; a few more for rounding and the last mixing step
    expected = torch.linalg.solve(torch.eye(8, dtype=F64) - matrix, b)
    torch.testing.assert_close(result.value, expected, rtol=0, atol=1e-8)  # ||(I - M)^-1|| = 10


def test_memory_saves_steps_and_memory_zero_is_the_plain_iteration() -> None:
    matrix, b = slow_map(10, 0.99, seed=3)
    zeros = torch.zeros(10, dtype=F64)
    plain = AndersonAcceleration(memory=0, rtol=0.0, max_steps=3)(linear, zeros, matrix, b)
    x = zeros
    for _ in range(3):
        x = linear(x, matrix, b)
    torch.testing.assert_close(plain, x, rtol=0, atol=1e-14)
    steps = [
        AndersonAcceleration(memory=m, rtol=1e-6, max_steps=5000).run(linear, zeros, matrix, b).num_steps
        for m in (0, 5)
    ]
    assert 5 * steps[1] < steps[0]  # type: ignore[operator]


def test_an_expanding_map_has_its_fixed_point_found() -> None:
    # slope -3: the plain iteration diverges
    result = AndersonAcceleration().run(lambda x: 4 - 3 * x, torch.zeros(1, dtype=F64))
    assert result.status is Status.CONVERGED
    assert result.value.item() == pytest.approx(1.0, abs=1e-11)


def test_mixing_damps_the_plain_step() -> None:
    x = AndersonAcceleration(memory=0, mixing=0.25, rtol=0.0, max_steps=1)(
        lambda x: x / 2 + 4, torch.zeros(1, dtype=F64)
    )
    assert x.item() == 1.0


def test_lanes_do_not_see_each_other() -> None:
    cases = [slow_map(6, rate, seed=10 + i) for i, rate in enumerate((0.1, 0.9, 0.99))]
    matrices, b = torch.stack([m for m, _ in cases]), torch.stack([c for _, c in cases])
    solver = AndersonAcceleration(batch_dims=1, rtol=1e-11)
    together = solver(linear, torch.zeros(3, 6, dtype=F64), matrices, b)
    for lane in range(3):
        alone = AndersonAcceleration(rtol=1e-11)(linear, torch.zeros(6, dtype=F64), matrices[lane], b[lane])
        torch.testing.assert_close(together[lane], alone, rtol=0, atol=1e-7)  # ||(I - M)^-1|| = 100
    b_nan = b.clone()
    b_nan[1] = float("nan")
    broken = solver(linear, torch.zeros(3, 6, dtype=F64), matrices, b_nan)
    torch.testing.assert_close(broken[[0, 2]], together[[0, 2]], rtol=0, atol=1e-13)


def test_a_pytree_and_the_callback() -> None:
    seen: list[il.solvers.Iteration] = []
    init = {"a": torch.zeros(2, dtype=F64), "b": torch.ones((), dtype=F64)}
    solver = AndersonAcceleration(callback=seen.append)
    x = solver(lambda x: {"a": 0.5 * x["a"] + 1, "b": torch.cos(x["b"])}, init)
    torch.testing.assert_close(x["a"], torch.full((2,), 2.0, dtype=F64), rtol=0, atol=1e-11)
    assert float(x["b"]) == pytest.approx(0.7390851332151607, abs=1e-11)
    assert [i.step for i in seen] == list(range(len(seen)))
    assert float(seen[-1].gradient_norm) <= 1e-12 * float(seen[0].gradient_norm)


def test_a_deep_equilibrium_layer_gets_its_gradient_under_vmap() -> None:
    w = 0.3 * randn(4, 4, seed=20)
    layer = il.fixed_point(lambda x, t: torch.tanh(w @ x + t), AndersonAcceleration(rtol=1e-13))
    t = randn(3, 4, seed=21)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda t: layer(torch.zeros(4, dtype=F64), t)))(t)
    for lane in range(3):
        x = layer(torch.zeros(4, dtype=F64), t[lane])
        slope = torch.diag(1 - x**2)  # tanh' at the solution
        expected = torch.linalg.solve(torch.eye(4, dtype=F64) - slope @ w, slope)
        torch.testing.assert_close(jacobians[lane], expected, rtol=0, atol=1e-9)


def test_too_few_steps_are_told() -> None:
    matrix, b = slow_map(10, 0.99, seed=3)
    result = AndersonAcceleration(max_steps=2).run(linear, torch.zeros(10, dtype=F64), matrix, b)
    assert (result.status, result.num_steps) == (Status.MAX_STEPS_REACHED, 2)
    nan = AndersonAcceleration().run(lambda x: x * float("nan"), torch.ones(1, dtype=F64))
    assert nan.status is Status.NONFINITE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": -1}, r"memory=-1 must be non-negative"),
        ({"mixing": 0.0}, r"mixing=0\.0 must be above 0 and at most 1"),
        ({"mixing": 1.5}, r"mixing=1\.5 must be above 0 and at most 1"),
        ({"rtol": -1.0}, r"rtol=-1\.0 must be non-negative"),
        ({"max_steps": -1}, r"max_steps=-1 must be non-negative"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AndersonAcceleration(**settings)


def test_leaves_without_the_lanes_are_refused() -> None:
    init = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    with pytest.raises(il.ObjectiveError, match=r"with batch_dims=1 every leaf of init needs the same 1 leading dim"):
        AndersonAcceleration(batch_dims=1)(lambda x: x, init)
    with pytest.raises(il.ObjectiveError, match="one equation per unknown"):
        AndersonAcceleration()(lambda x: x[:1], torch.zeros(2))


def test_a_default_tolerance_below_the_rounding_of_float32_is_no_reason_to_go_on() -> None:
    matrix = 0.4 * torch.eye(6) + 0.05 * torch.ones(6, 6)
    result = il.solvers.AndersonAcceleration().run(lambda x: torch.tanh(matrix @ x) + 1, torch.zeros(6))
    assert result.status is il.Status.CONVERGED and result.num_steps is not None and result.num_steps < 50


def test_a_step_makes_few_operations_while_no_lane_stops() -> None:
    matrix, u = randn(4, 12, 12, seed=1) / 4, randn(4, 12, seed=2)
    made = []
    for steps in (6, 9):  # with a full memory
        with Operations() as counted:
            solver = il.solvers.AndersonAcceleration(rtol=0.0, max_steps=steps, batch_dims=1)
            assert solver.run(linear, torch.zeros_like(u), matrix, u).num_steps == steps
        made.append(counted.number)
    # counted at the dispatcher, with those of the map; with a mask for each lane and vector it were 100
    assert made[1] - made[0] <= 3 * 80


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accelerated_too(dtype: torch.dtype) -> None:
    start = torch.ones(3, dtype=dtype)
    x = il.solvers.AndersonAcceleration()(lambda x: 0.9 * torch.cos(x), start)
    right = il.solvers.AndersonAcceleration()(lambda x: 0.9 * torch.cos(x), start.double())
    assert x.dtype is dtype and relative_error(x.double(), right) < 4 * torch.finfo(dtype).eps
