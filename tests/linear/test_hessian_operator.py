"""il.hvp and il.hessian_operator against dense Hessians: pytrees, damping, Gauss-Newton, derivatives, refusals."""

# Products are exact: agreement to rounding (1e-13). Systems have condition below 20, solved at rtol 1e-13: 1e-11.

import re
from typing import Any

import pytest
import torch
from references import F64, dense_hessian, randn, relative_error, smooth_objective
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import implicitlayer as il

N = 4
EXACT, SOLVED = 1e-13, 1e-11
CG = il.ConjugateGradient(rtol=1e-13)
THETA = (randn(6, N, seed=1), randn(6, seed=2), torch.tensor(-0.5, dtype=F64))
X, U, MIXING = randn(N, seed=3), randn(N, seed=4), randn(5, N, seed=5)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Outputs [5], nonlinear in x: its curvature is what Gauss-Newton leaves out."""
    return torch.sin(MIXING @ x + t) + 0.3 * x.sum() ** 2


def misfit(y: Tensor, t: Tensor) -> Tensor:
    """Convex in y, not quadratic."""
    return torch.cosh(y).sum()


def dense_gauss_newton(x: Tensor, t: Tensor) -> Tensor:
    """J' (d^2 loss / dy^2) J, built from rows of autograd."""
    x = x.detach().requires_grad_()
    y = model(x, t)
    jacobian = torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0] for value in y])
    return jacobian.T @ dense_hessian(lambda y: misfit(y, t), y, ()) @ jacobian


def test_products_are_those_of_the_dense_hessian() -> None:
    dense = dense_hessian(smooth_objective, X, THETA)
    assert relative_error(il.hvp(smooth_objective, X, U, *THETA), dense @ U) < EXACT
    assert relative_error(il.hessian_operator(smooth_objective, X, *THETA)(U), dense @ U) < EXACT
    damped = il.hessian_operator(smooth_objective, X, *THETA, damping=0.7)
    assert relative_error(damped(U), dense @ U + 0.7 * U) < EXACT


def test_products_are_differentiable_in_everything() -> None:
    """In u, x and every theta, first and second order, against a Hessian differentiated by finite differences."""
    args = [t.clone().requires_grad_() for t in (X, U, *THETA)]
    run = lambda x, u, *theta: il.hvp(smooth_objective, x, u, *theta)  # noqa: E731
    # eps = 1e-6 on exact products of size 1 to 10: rounding 1e-15 / 1e-6, truncation 1e-12
    assert torch.autograd.gradcheck(run, args, atol=1e-7, rtol=0, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, args, atol=1e-6, rtol=0)


def test_vectors_of_all_lanes_give_the_hessian_itself() -> None:
    dense, eye = dense_hessian(smooth_objective, X, THETA), torch.eye(N, dtype=F64)
    assert relative_error(vmap(lambda u: il.hvp(smooth_objective, X, u, *THETA))(eye), dense) < EXACT
    assert relative_error(vmap(il.hessian_operator(smooth_objective, X, *THETA), in_dims=1)(2 * eye), 2 * dense) < EXACT


def tree_objective(x: dict[str, Any], t: Tensor) -> Tensor:
    flat = torch.cat([x["a"].reshape(1), x["b"][0].reshape(-1)])
    return smooth_objective(flat, THETA[0], THETA[1], t)


def test_pytrees_couple_through_the_whole_hessian() -> None:
    tree = lambda v: {"a": v[0], "b": [v[1:].reshape(1, 3)]}  # noqa: E731
    dense = dense_hessian(smooth_objective, X, THETA)
    product = il.hvp(tree_objective, tree(X), tree(U), THETA[2])
    assert product["a"].shape == () and product["b"][0].shape == (1, 3)
    assert relative_error(torch.cat([product["a"].reshape(1), product["b"][0][0]]), dense @ U) < EXACT
    operator = il.hessian_operator(tree_objective, tree(X), THETA[2])
    solution = il.linear_solve(operator, tree(U), CG)
    got = torch.cat([solution["a"].reshape(1), solution["b"][0][0]])
    assert relative_error(got, torch.linalg.solve(dense, U)) < SOLVED


def test_gauss_newton_products_leave_out_the_curvature_of_the_model() -> None:
    t = torch.tensor(0.3, dtype=F64)
    objective = il.composite(misfit, model)
    gauss_newton = il.hessian_operator(objective, X, t, curvature="gauss_newton", damping=0.1)
    assert relative_error(gauss_newton(U), dense_gauss_newton(X, t) @ U + 0.1 * U) < EXACT
    full = dense_hessian(objective, X, (t,))
    assert relative_error(il.hessian_operator(objective, X, t)(U), full @ U) < EXACT
    assert relative_error(gauss_newton(U), full @ U + 0.1 * U) > 1e-2


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_solutions_are_differentiable_in_the_point_and_in_theta(curvature: Any) -> None:
    t = torch.tensor(0.3, dtype=F64)
    objective = il.composite(misfit, model)

    def solved(x: Tensor, t: Tensor, b: Tensor) -> Tensor:
        operator = il.hessian_operator(objective, x, t, curvature=curvature, damping=20.0)
        solution: Tensor = il.linear_solve(operator, b, CG)
        return solution

    args = [v.clone().requires_grad_() for v in (X, t, U)]
    # solutions of size 0.1, good to 1e-13: differences at eps = 1e-6 are good to 1e-7
    assert torch.autograd.gradcheck(solved, args, atol=1e-7, rtol=0, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solved, args, atol=1e-6, rtol=0)
    dense = dense_gauss_newton(X, t) if curvature == "gauss_newton" else dense_hessian(objective, X, (t,))
    expected = torch.linalg.solve(dense + 20 * torch.eye(N, dtype=F64), U)
    assert relative_error(solved(X, t, U), expected) < SOLVED
    lanes = torch.stack([X, 2 * X])
    for transform in (jacrev, jacfwd):
        got = vmap(transform(solved), in_dims=(0, None, None))(lanes, t, U)
        looped = torch.stack([transform(solved)(lane, t, U) for lane in lanes])
        assert relative_error(got, looped) < SOLVED


def test_tensors_that_the_objective_closes_over_are_differentiated() -> None:
    weight, offset, log_strength = THETA

    def closing(weight: Tensor) -> Tensor:
        operator = il.hessian_operator(lambda x: smooth_objective(x, weight, offset, log_strength), X)
        return (il.linear_solve(operator, U, CG) ** 2).sum() + (operator(U) ** 2).sum()

    def explicit(weight: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(weight @ X + offset)
        dense = (weight.T * (sigmoid * (1 - sigmoid))) @ weight + log_strength.exp() * torch.eye(N, dtype=F64)
        return (torch.linalg.solve(dense, U) ** 2).sum() + ((dense @ U) ** 2).sum()

    assert relative_error(grad(closing)(weight), grad(explicit)(weight)) < SOLVED
    leaf = weight.clone().requires_grad_()
    assert relative_error(torch.autograd.grad(closing(leaf), leaf)[0], grad(explicit)(weight)) < SOLVED
    got, expected = (jvp(f, (weight,), (weight,))[1] for f in (closing, explicit))
    assert relative_error(got, expected) < SOLVED


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("use", ["product", "solve"])
def test_a_vector_of_another_structure_is_an_error_with_both_structures(use: str) -> None:
    operator = il.hessian_operator(lambda x: (x["a"] ** 2).sum(), {"a": torch.ones(2, dtype=F64)})
    wrong = {"b": torch.ones(2, dtype=F64)}
    name = "the vector" if use == "product" else "rhs"
    with pytest.raises(ValueError, match=rf"{name} must have the structure of x: expected .*'a'.*got .*'b'"):
        operator(wrong) if use == "product" else il.linear_solve(operator, wrong)


@pytest.mark.parametrize("use", ["product", "solve"])
def test_a_vector_of_another_shape_is_an_error_and_never_broadcast(use: str) -> None:
    operator = il.hessian_operator(lambda x: (x**4).sum(), torch.ones(3, dtype=F64))
    for shape in ((1,), (), (2, 3), (1, 3)):
        vector = torch.ones(shape, dtype=F64)
        with pytest.raises(ValueError, match=rf"expected .*\(3,\).*got .*{re.escape(str(shape))}"):
            operator(vector) if use == "product" else il.linear_solve(operator, vector)


def test_an_objective_that_is_no_scalar_is_an_error() -> None:
    with pytest.raises(il.ObjectiveError, match=r"must return a 0-d tensor: expected shape \(\), got \(4,\)"):
        il.hvp(lambda x: x**2, X, U)
    with pytest.raises(il.ObjectiveError, match="floating tensor, got tuple"):
        il.hvp(lambda x: (x.sum(), 1), X, U)


def test_gauss_newton_of_an_objective_without_parts_is_an_error_that_shows_the_way() -> None:
    operator = il.hessian_operator(smooth_objective, X, *THETA, curvature="gauss_newton")
    with pytest.raises(il.ObjectiveError, match=r"il\.least_squares\(residuals\) or il\.composite\(loss, model\)"):
        operator(U)
