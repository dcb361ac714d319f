"""What an objective closes over and needs no gradient: of the call in a first derivative, watched in others."""

import numpy as np
import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il

START = torch.zeros(3, dtype=F64)


def ridge(matrix: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return torch.linalg.solve(matrix.T @ matrix + a * torch.eye(3, dtype=F64), matrix.T @ b)


def test_a_closure_over_the_data_of_a_loop_is_that_of_each_call_and_never_that_of_the_last() -> None:
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    data = [(randn(n, 3, seed=n), randn(n, seed=n + 1)) for n in (4, 5, 6)]
    closing, passing = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
    for matrix, b in data:
        late = il.argmin(
            lambda x, a: ((matrix @ x - b) ** 2).sum() + a * (x**2).sum(),  # noqa: B023  the mistake under test
            lambda f, x, a, matrix=matrix, b=b: ridge(matrix, b, a),
        )
        closing = closing + (late(START, a) ** 2).sum()
        layer = il.argmin(
            lambda x, a, m, b: ((m @ x - b) ** 2).sum() + a * (x**2).sum(), lambda f, x, a, m, b: ridge(m, b, a)
        )
        passing = passing + (layer(START, a, matrix, b) ** 2).sum()
    with pytest.raises(il.ClosureError, match="was replaced by another one"):
        torch.autograd.grad(closing, a, create_graph=True)  # derivatives that can be differentiated run it again
    explicit = sum((ridge(m, b, a) ** 2).sum() for m, b in data)
    # systems of condition below 100, solved at rtol 1e-10
    expected = torch.autograd.grad(explicit, a)
    torch.testing.assert_close(torch.autograd.grad(passing, a), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(torch.autograd.grad(closing, a), expected, rtol=1e-8, atol=0)


def test_a_closed_over_tensor_that_was_changed_in_place_is_refused() -> None:
    a, matrix = torch.tensor(0.5, dtype=F64, requires_grad=True), torch.eye(3, dtype=F64)
    layer = il.argmin(
        lambda x, a: ((matrix @ x - 1) ** 2).sum() + a * (x**2).sum(),
        lambda f, x, a: torch.ones(3, dtype=F64) / (1 + a),
    )
    x = layer(START, a)
    (gradient,) = torch.autograd.grad(x.sum(), a, retain_graph=True)
    assert abs(gradient.item() + 3 / 1.5**2) < 1e-12  # d/da of 3 / (1 + a)
    matrix.mul_(5)
    with pytest.raises(il.ClosureError, match="was changed in place"):
        torch.autograd.grad(x.sum(), a)


def test_tensors_that_the_objective_makes_anew_are_no_constants() -> None:
    array = torch.ones(3, dtype=F64).numpy()
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    layer = il.argmin(
        lambda x, a: ((torch.from_numpy(array) * x - 1) ** 2).sum() + a * (x**2).sum(),
        lambda f, x, a: torch.ones(3, dtype=F64) / (1 + a),
    )
    (gradient,) = torch.autograd.grad(layer(START, a).sum(), a)
    assert abs(gradient.item() + 3 / 1.5**2) < 1e-12


def test_a_matrix_that_is_not_symmetric_is_transposed_in_reverse_without_being_told() -> None:
    matrix = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=F64, requires_grad=True)
    ones = torch.ones(2, dtype=F64)
    for solver in (il.Gmres(), il.Dense(), il.Bicgstab()):
        (got,) = torch.autograd.grad(il.linear_solve(matrix, ones, solver).sum(), matrix)
        (expected,) = torch.autograd.grad(torch.linalg.solve(matrix, ones).sum(), matrix)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_a_number_that_changed_since_the_call_is_that_of_the_call_or_an_error_in_backward() -> None:
    numbers = {"strength": 1.0}

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return ((x - t) ** 2).sum() + numbers["strength"] * (x**2).sum()

    layer = il.argmin(objective, lambda f, x, t: t / (1 + numbers["strength"]))
    t = torch.ones(3, dtype=F64, requires_grad=True)
    x = layer(torch.zeros(3, dtype=F64), t)
    numbers["strength"] = 9.0
    with pytest.raises(il.ClosureError, match="the objective has changed: at the solution its gradient"):
        torch.autograd.grad(x.sum(), t, create_graph=True)
    # the gradient of the call, x = t / 2
    x = layer(torch.zeros(3, dtype=F64), t)
    numbers["strength"] = 1.0
    x.sum().backward()
    assert t.grad is not None and torch.allclose(t.grad, torch.full((3,), 0.1, dtype=F64), rtol=1e-12)


def test_an_array_that_was_written_to_since_the_call_is_an_error_in_backward() -> None:
    # torch does not see what NumPy writes: a graph of the call would be half of that call
    for as_tensor in (torch.from_numpy, torch.as_tensor):
        array = np.ones(3)
        layer = il.argmin(
            lambda x, t, a=array, read=as_tensor: (read(a) * (x - t) ** 2).sum() + (x**2).sum(),
            lambda f, x, t, a=array: t * torch.tensor(a / (1 + a)),
        )
        t = torch.ones(3, dtype=F64, requires_grad=True)
        x = layer(torch.zeros(3, dtype=F64), t)
        array *= 3
        with pytest.raises(il.ClosureError, match="the objective has changed: at the solution its gradient"):
            x.sum().backward()


def test_a_number_that_changed_is_found_in_roots_and_under_vmap() -> None:
    numbers = {"shift": 0.0}
    layer = il.root(lambda x, a: x**3 - a - numbers["shift"], lambda r, x, a: (a + numbers["shift"]) ** (1 / 3))
    a = torch.tensor([1.0, 8.0], dtype=F64, requires_grad=True)
    x = torch.func.vmap(lambda a: layer(torch.ones((), dtype=F64), a))(a)
    numbers["shift"] = 1.0
    with pytest.raises(il.ClosureError, match="the objective has changed"):
        torch.autograd.grad(x.sum(), a, create_graph=True)
    # the gradient of the call: x = a^(1/3)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), a)[0], a.detach() ** (-2 / 3) / 3, rtol=1e-12, atol=0)


def test_an_objective_that_draws_random_numbers_is_not_passed_over() -> None:
    """A solver that converges on a mask of its own: backward draws another one."""

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return (torch.nn.functional.dropout(x - t, 0.5) ** 2).sum() + (x**2).sum()

    layer = il.argmin(objective, il.solvers.GradientDescent(step_size=0.1, max_steps=200), on_failure="raise")
    t = torch.ones(20, dtype=F64, requires_grad=True)
    with pytest.raises((il.ClosureError, il.StationarityError)):
        layer(torch.zeros(20, dtype=F64), t).sum().backward()


def test_rounding_between_call_and_backward_is_no_change() -> None:
    """An exact solver leaves a gradient of zero or rounding; under vmap it is rounded otherwise."""
    weight = torch.randn(40, 6, dtype=F64)
    layer = il.argmin(
        lambda x, b: ((weight @ x - b) ** 2).sum(), lambda f, x, b: torch.linalg.lstsq(weight, b).solution
    )
    b = torch.randn(5, 40, dtype=F64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda b: layer(torch.zeros(6, dtype=F64), b)))(b)
    assert torch.allclose(jacobians, torch.linalg.pinv(weight).expand(5, 6, 40), atol=1e-9)


@pytest.mark.parametrize("by_vmap", [False, True])
def test_a_change_in_a_small_lane_does_not_hide_behind_a_large_one(by_vmap: bool) -> None:
    factors = np.array([1.0, 1.0])
    if by_vmap:
        single = il.argmin(
            lambda x, t, k: 0.5 * ((x - t * factors[0] * k) ** 2).sum(), lambda f, x, t, k: t * factors[0] * k
        )
        t = torch.tensor([[1e4], [1.0]], dtype=F64, requires_grad=True)
        keep = torch.tensor([0.0, 1.0], dtype=F64)  # the large lane stays at zero curvature of the change
        x = torch.func.vmap(lambda t, k: single(torch.zeros(1, dtype=F64), t, k))(t, keep)
        factors[0] = 1.01
    else:
        layer = il.argmin(
            lambda x, t: 0.5 * ((x - t * torch.from_numpy(factors.copy())[:, None]) ** 2).sum(-1),
            lambda f, x, t: t * torch.from_numpy(factors.copy())[:, None],
            batch_dims=1,
        )
        t = torch.tensor([[1e4], [1.0]], dtype=F64, requires_grad=True)
        x = layer(torch.zeros(2, 1, dtype=F64), t)
        factors[1] = 5.0
    with pytest.raises(il.ClosureError, match=r"has changed in lane 1 of \(2,\)"):
        torch.autograd.grad(x.sum(), t, create_graph=True)


def test_an_exact_answer_of_zero_from_a_start_at_zero_is_no_false_alarm() -> None:
    """What is left of F is rounding, large beside eps: the data are of size 1e3 and cancel."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        y = 1e3 * torch.randn(200, dtype=F64, generator=generator)
        y = (y - y.mean()).requires_grad_()
        layer = il.argmin(
            lambda x, y: 0.5 * ((y - x) ** 2).mean(), lambda f, x, y: torch.zeros_like(x), on_failure="raise"
        )
        (gradient,) = torch.autograd.grad(layer(torch.zeros((), dtype=F64), y), y)
        assert torch.allclose(gradient, torch.full_like(y, 1 / 200), rtol=1e-9)
    off = il.argmin(
        lambda x, y: 0.5 * ((y - x) ** 2).mean(), lambda f, x, y: torch.full_like(x, 1e-8), on_failure="raise"
    )
    with pytest.raises(il.StationarityError):  # an answer that is off by far less than the data is still seen
        off(torch.zeros((), dtype=F64), y)


def test_a_numpy_array_given_as_theta_is_that_of_the_call_whatever_becomes_of_it() -> None:
    """x = a t, so that dx/dt = a; and of t^2: d2x/dt2 = 2 a."""
    a = np.array([1.0, 2.0, 3.0])
    layer = il.argmin(
        lambda x, t, a: ((x - torch.from_numpy(a) * t**2) ** 2).sum(), lambda f, x, t, a: torch.from_numpy(a) * t**2
    )
    t = torch.ones(3, dtype=F64, requires_grad=True)
    x = layer(torch.zeros(3, dtype=F64), t, a)
    a *= 1.0005
    (g,) = torch.autograd.grad(x.sum(), t, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), t)
    assert torch.allclose(g, torch.tensor([2.0, 4.0, 6.0], dtype=F64), rtol=1e-9) and torch.allclose(g, h, rtol=1e-9)
