"""What roots and fixed points take and refuse: pytrees, closed-over tensors, wrong shapes, unfinished solvers."""

# Accuracy: linear solves at the default rtol of 1e-10, all systems here have condition below 5: errors below 1e-9.

import itertools
import warnings
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor

import implicitlayer as il

MATRIX = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.5, 0.0, 2.0]], dtype=F64)  # not symmetric
INVERSE = torch.linalg.inv(MATRIX)
ZEROS = torch.zeros(3, dtype=F64)


def linear(x: Tensor, t: Tensor) -> Tensor:
    return MATRIX @ x - t


def exact(function: Any, x: Tensor, t: Tensor) -> Tensor:
    return INVERSE @ t


def tree(vector: Tensor) -> dict[str, Any]:
    return {"scalar": vector[0], "rest": (vector[1:].reshape(1, 2), vector.new_zeros(0))}


def vector(tree: dict[str, Any]) -> Tensor:
    return torch.cat([tree["scalar"].reshape(1), tree["rest"][0].reshape(2)])


@pytest.mark.parametrize("kind", ["root", "fixed_point"])
def test_pytrees_of_unknowns_and_theta_couple_through_the_whole_jacobian(kind: str) -> None:
    """x in three leaves (one 0-d, one empty), t in two; the reference is the dense inverse of the whole matrix."""
    theta = {"a": randn(1, seed=1).requires_grad_(), "b": [randn(2, seed=2).requires_grad_(), "a word"]}

    def residual(x: dict[str, Any], theta: dict[str, Any]) -> dict[str, Any]:
        return tree(MATRIX @ vector(x) - torch.cat([theta["a"], theta["b"][0]]))

    def step(x: dict[str, Any], theta: dict[str, Any]) -> dict[str, Any]:
        return tree(vector(x) - 0.3 * vector(residual(x, theta)))

    def solver(f: Any, x: dict[str, Any], theta: dict[str, Any]) -> dict[str, Any]:
        answer = tree(INVERSE @ torch.cat([theta["a"], theta["b"][0]]))
        return dict(reversed(answer.items()))  # the order of keys does not matter

    implicit = il.root(residual, solver) if kind == "root" else il.fixed_point(step, solver)
    x = implicit(tree(ZEROS), theta)
    assert list(x) == ["scalar", "rest"] and x["scalar"].shape == () and x["rest"][0].shape == (1, 2)
    v = randn(3, seed=3)
    got = torch.autograd.grad(vector(x) @ v, [theta["a"], theta["b"][0]])
    assert relative_error(torch.cat(got), INVERSE.T @ v) < 1e-9


def test_tensors_and_modules_that_the_residual_closes_over_get_their_gradients() -> None:
    net, t, v = torch.nn.Linear(3, 3, bias=False).double(), randn(3, seed=2).requires_grad_(), randn(3, seed=3)
    x = il.root(lambda x: 3 * x + net(x) - t, lambda f, x: torch.linalg.solve(3 * torch.eye(3) + net.weight, t))(ZEROS)
    got = torch.autograd.grad(x, (net.weight, t), v)
    closed = torch.linalg.solve(3 * torch.eye(3, dtype=F64) + net.weight, t)
    for g, e in zip(got, torch.autograd.grad(closed, (net.weight, t), v), strict=True):
        assert relative_error(g, e) < 1e-9


WRONG = {
    "a sum": (lambda r: r.sum(), r"expected shapes \[\(3,\)\], got \[\(\)\]"),
    "one equation too few": (lambda r: r[:2], r"expected shapes \[\(3,\)\], got \[\(2,\)\]"),
    "a shape that would broadcast": (lambda r: r[None], r"expected shapes \[\(3,\)\], got \[\(1, 3\)\]"),
    "a pair": (lambda r: (r, r), r"expected shapes \[\(3,\)\], got \[\(3,\), \(3,\)\]"),
    "another structure": (lambda r: {"x": r}, "in the structure of x"),
    "a number": (lambda r: 1.0, r"got \['float'\]"),
    "complex numbers": (lambda r: r + 1j * r, "which is real, got a complex one"),
}


@pytest.mark.parametrize("kind", ["root", "fixed_point"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_residual_that_is_not_one_equation_per_unknown_is_an_error_with_both_shapes(wrong: str, kind: str) -> None:
    change, message = WRONG[wrong]
    make: Any = il.root if kind == "root" else il.fixed_point
    implicit = make(lambda x, t: change(linear(x, t)), exact)
    with pytest.raises(il.ObjectiveError, match="one equation per unknown") as caught:
        implicit(ZEROS, randn(3, seed=1).requires_grad_()).sum().backward()
    assert caught.match(message)


def early(function: Any, x: Tensor, t: Tensor) -> Tensor:
    return INVERSE @ t + 0.1


def cubic(x: Tensor, t: Tensor) -> Tensor:
    return x**3 - t


def rough(function: Any, x: Tensor, t: Tensor) -> Tensor:
    return t ** (1 / 3) + 0.01


def test_an_answer_that_is_no_root_warns_with_the_norm_of_the_residual_and_the_distance() -> None:
    """2 x = t missed by 0.1 in every entry: ||F|| = 0.2 sqrt 3 = 0.346, and the distance 0.1 sqrt 3 = 0.173."""
    t = torch.ones(3, dtype=F64, requires_grad=True)
    double = lambda x, t: 2 * x - t  # noqa: E731
    off = lambda f, x, t: t / 2 + 0.1  # noqa: E731
    with pytest.warns(il.StationarityWarning, match=r"the residual has norm 0\.346.*about 0\.173 away"):
        il.root(double, off)(ZEROS, t)
    with pytest.warns(il.StationarityWarning, match=r"the residual has norm 0\.173.*about 0\.173 away"):
        il.fixed_point(lambda x, t: t / 2, off)(ZEROS, t)  # x - T(x): not doubled
    with pytest.raises(il.StationarityError, match="is not stationary"):
        il.root(double, off, on_failure="raise")(ZEROS, t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        il.root(double, off, on_failure="ignore")(ZEROS, t)
        il.root(double, off, stationarity_rtol=None)(ZEROS, t)
        il.root(double, off)(ZEROS, t.detach())  # nothing can be differentiated, so nothing is checked


@pytest.mark.parametrize("kind", ["root", "fixed_point"])
def test_polish_makes_newton_steps_with_the_jacobian_itself(kind: str) -> None:
    """One Newton step solves a linear system; with J' for J it would land 0.1 away."""
    t = randn(3, seed=4).requires_grad_()
    make: Any = il.root if kind == "root" else il.fixed_point
    function = linear if kind == "root" else (lambda x, t: x - 0.3 * linear(x, t))
    implicit = make(function, early, polish=1)
    x = implicit(ZEROS, t)
    assert relative_error(x, INVERSE @ t) < 1e-10 and implicit.records[0].num_polish_steps == 1


def test_polish_squares_the_error_of_a_nonlinear_root_at_every_step() -> None:
    t = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    errors = []
    for k in range(4):
        x = il.root(cubic, rough, polish=k, on_failure="ignore")(torch.ones_like(t), t)
        errors.append(float((x - t ** (1 / 3)).detach().norm()))
    # Newton on x^3 = t: e' = e^2 / x to first order, x >= 1
    for before, after in itertools.pairwise(errors):
        assert after <= 1.1 * before**2 + 1e-14
    assert errors[3] < 1e-14 < errors[0]


def test_a_singular_jacobian_is_an_error_in_both_modes() -> None:
    singular = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=F64)
    implicit = il.root(lambda x, t: singular @ x - t, lambda f, x, t: t[0].expand(2) / 2)
    init, t = torch.zeros(2, dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    with pytest.raises(il.SingularError):  # (1, 0) is not in the range of J', which (1, 1) spans
        implicit(init, t.clone().requires_grad_())[0].backward()
    with pytest.raises(il.SingularError):  # (0, 1) is not in the range of J, which (1, 0) spans
        torch.func.jvp(lambda t: implicit(init, t), (t,), (torch.tensor([0.0, 1.0], dtype=F64),))


def test_conjugate_gradients_on_a_rotation_are_an_error_not_a_number() -> None:
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    implicit = il.root(
        lambda x, t: rotation @ x - t, lambda f, x, t: rotation.T @ t, linear_solver=il.ConjugateGradient()
    )
    with pytest.raises(il.LinearSolveError):  # p'Rp = 0 for every p
        implicit(torch.zeros(2, dtype=F64), randn(2, seed=1).requires_grad_()).sum().backward()


def test_integer_and_bool_theta_pass_through_and_an_unused_theta_gets_zero() -> None:
    t, unused = randn(3, seed=1).requires_grad_(), randn(2, seed=2).requires_grad_()
    order = torch.tensor([2, 0, 1])
    implicit = il.root(lambda x, t, order, unused: linear(x, t[order]), lambda f, x, t, order, u: INVERSE @ t[order])
    by_t, by_unused = torch.autograd.grad(implicit(ZEROS, t, order, unused)[0], (t, unused), materialize_grads=True)
    expected = torch.zeros(3, dtype=F64)
    expected[order] = INVERSE[0]
    assert relative_error(by_t, expected) < 1e-9 and not by_unused.any()
