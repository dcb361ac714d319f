"""``il.from_cvxpy``: the same numbers as programs written by hand, CVXPY's own solutions, and finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor

import implicitlayer as il
from implicitlayer.constrained._qp import program_solution

cp = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
if "OSQP" not in cp.installed_solvers():
    pytest.skip("osqp is not installed", allow_module_level=True)
# what CVXPY says of its own solvers, none of which is used here
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:cvxpy", "ignore::DeprecationWarning:cvxpy")


def simplex() -> tuple[Any, Any, Any]:
    x, p = cp.Variable(4), cp.Parameter(4)
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) - p @ x), [cp.sum(x) == 1, x >= 0]), p, x


def test_a_projection_equals_the_one_written_by_hand() -> None:
    problem, p, x = simplex()
    layer = il.from_cvxpy(problem, parameters=[p], variables=[x])
    value = torch.tensor([0.2, 0.9, -0.5, 0.8], dtype=F64, requires_grad=True)
    eye, ones = torch.eye(4, dtype=F64), torch.ones(1, 4, dtype=F64)
    (solution,) = layer(value)
    expected = il.qp(eye, -value, ones, ones[0, :1], -eye, torch.zeros(4, dtype=F64))
    assert torch.allclose(solution, expected, rtol=0, atol=1e-12)
    weights = randn(4, seed=1)
    found = torch.autograd.grad(solution @ weights, value)[0]
    assert torch.allclose(found, torch.autograd.grad(expected @ weights, value)[0], rtol=0, atol=1e-12)


def everything() -> tuple[Any, list[Any], list[Any], list[Tensor]]:
    """Several parameters and variables, matrices, signs, an absolute value, a maximum, a variable with an attribute."""
    x, M, w = cp.Variable(3), cp.Variable((2, 3)), cp.Variable(2, nonneg=True)
    F, g, s, C = cp.Parameter((4, 3)), cp.Parameter(4), cp.Parameter(nonneg=True), cp.Parameter((2, 3))
    cost = cp.sum_squares(F @ x - g) + s * cp.norm1(x) + cp.sum_squares(M - C) + 0.5 * cp.sum_squares(w - 1)
    cost += 0.3 * cp.max(M[0] + x)
    problem = cp.Problem(cp.Maximize(-cost), [cp.sum(M) + cp.sum(x) <= 1, w <= 0.8, cp.sum(w) >= 0.5])
    values = [randn(4, 3, seed=2), randn(4, seed=3), torch.tensor(0.3, dtype=F64), randn(2, 3, seed=4)]
    return problem, [F, g, s, C], [M, x, w], values


def test_solutions_are_those_of_cvxpy_in_the_shapes_of_its_variables() -> None:
    problem, parameters, variables, values = everything()
    layer = il.from_cvxpy(problem, parameters, variables)
    found = layer(*values)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value.numpy()
    problem.solve(solver=cp.OSQP, eps_abs=1e-10, eps_rel=1e-10, polishing=True, max_iter=100_000)
    for variable, x in zip(variables, found, strict=True):
        assert x.shape == variable.shape
        assert np.abs(x.numpy() - variable.value).max() < 1e-7  # OSQP's tolerances, and the condition of the program


def test_derivatives_agree_with_finite_differences_to_second_order() -> None:
    problem, parameters, variables, values = everything()
    layer = il.from_cvxpy(problem, parameters, variables)
    inputs = [value.clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(layer, inputs, eps=1e-6, atol=1e-7)
    # of the fit alone: the second derivatives of all inputs are many
    assert torch.autograd.gradgradcheck(lambda g, s: layer(values[0], g, s, values[3])[1], inputs[1:3], atol=1e-6)


def test_batches_and_vmap_equal_a_loop_and_a_shared_parameter_sums_its_gradient() -> None:
    problem, parameters, variables, values = everything()
    layer = il.from_cvxpy(problem, parameters, variables)
    gs = randn(5, 4, seed=5)
    shared = values[0].clone().requires_grad_()
    batched = layer(shared, gs, values[2], values[3])
    loop = [layer(shared, g, values[2], values[3]) for g in gs]
    mapped = torch.func.vmap(lambda g: layer(values[0], g, values[2], values[3]))(gs)
    for k, part in enumerate(batched):
        expected = torch.stack([one[k] for one in loop])
        assert relative_error(part.detach(), expected.detach()) < 1e-9
        assert relative_error(mapped[k], expected.detach()) < 1e-9
    whole = torch.autograd.grad(sum(part.square().sum() for part in batched), shared)[0]
    parts = sum(torch.autograd.grad(sum(x.square().sum() for x in one), shared)[0] for one in loop)
    assert relative_error(whole, parts) < 1e-9


def test_a_large_program_keeps_its_sparse_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 400
    x, p, bound = cp.Variable(n), cp.Parameter(n), cp.Parameter()
    difference = cp.sum_squares(x[1:] - x[:-1])
    problem = cp.Problem(cp.Minimize(difference + cp.sum_squares(x - p)), [x <= bound, cp.sum(x) == 1])
    layer = il.from_cvxpy(problem, [p, bound], [x])
    made = []

    def watched(given: dict[str, Any], *args: Any) -> Any:
        made.append(given["Q"].layout)
        return program_solution(given, *args)

    monkeypatch.setattr("implicitlayer.constrained._from_cvxpy.program_solution", watched)
    inputs = [randn(n, seed=6).requires_grad_(), torch.tensor(0.5, dtype=F64, requires_grad=True)]
    (sparse,) = layer(*inputs)
    (dense,) = layer(inputs[0][None], inputs[1][None])  # a batch of one
    assert made == [torch.sparse_coo, torch.strided]
    assert relative_error(sparse.detach(), dense[0].detach()) < 1e-9
    weights = randn(n, seed=7)
    pairs = [torch.autograd.grad((x * weights).sum(), inputs) for x in (sparse, dense)]
    for found, expected in zip(*pairs, strict=True):
        assert relative_error(found, expected) < 1e-8


def test_a_variable_without_dimensions_and_an_empty_batch_keep_their_shapes() -> None:
    x, p = cp.Variable(), cp.Parameter(nonneg=True)
    layer = il.from_cvxpy(cp.Problem(cp.Minimize(p * cp.square(x) - x)), parameters=[p], variables=[x])
    value = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (solution,) = layer(value)
    solution.backward()  # x = 1 / (2 p), dx/dp = -1 / (2 p^2)
    assert solution.shape == ()
    torch.testing.assert_close(solution.detach(), torch.tensor(0.25, dtype=F64))
    torch.testing.assert_close(value.grad, torch.tensor(-0.125, dtype=F64))
    problem, q, y = simplex()
    assert il.from_cvxpy(problem, parameters=[q], variables=[y])(torch.ones(0, 4, dtype=F64))[0].shape == (0, 4)


def test_float32_and_a_problem_without_parameters_work() -> None:
    problem, p, x = simplex()
    (found,) = il.from_cvxpy(problem, [p], [x])(torch.tensor([0.2, 0.9, -0.5, 0.8]))
    assert found.dtype == torch.float32 and torch.allclose(found, torch.tensor([0.0, 0.55, 0.0, 0.45]), atol=1e-6)
    y = cp.Variable(2)
    (found,) = il.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(y - 3)), [y <= 1]), [], [y])()
    assert torch.allclose(found, torch.ones(2, dtype=F64))


def test_a_program_without_a_solution_is_told_as_by_qp() -> None:
    x, b = cp.Variable(2), cp.Parameter()
    layer = il.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= 1, cp.sum(x) <= b]), [b], [x])
    with pytest.raises(il.InfeasibleError, match="in lane 1 of"):
        layer(torch.tensor([3.0, 1.0], dtype=F64))
    masked = il.from_cvxpy(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= 1, cp.sum(x) <= b]), [b], [x], on_failure="mask"
    )
    (found,) = masked(torch.tensor([3.0, 1.0], dtype=F64))
    assert torch.allclose(found[0], torch.ones(2, dtype=F64)) and bool(found[1].isnan().all())


def refused(kind: str) -> tuple[Any, list[Any], list[Any]]:
    x, p, P = cp.Variable(2), cp.Parameter(2), cp.Parameter((2, 2), PSD=True)
    plain = cp.Problem(cp.Minimize(cp.sum_squares(x - p)))
    return {
        "power": (cp.Problem(cp.Minimize(cp.sum(cp.power(x - p, 2.7, approx=False)))), [p], [x]),
        "dpp": (cp.Problem(cp.Minimize(cp.sum_squares(cp.multiply(p, p) - x) + cp.quad_form(x, np.eye(2)))), [p], [x]),
        "dcp": (cp.Problem(cp.Maximize(cp.sum_squares(x - p))), [p], [x]),
        "integer": (cp.Problem(cp.Minimize(cp.sum_squares(cp.Variable(2, integer=True) - p + x))), [p], [x]),
        "attribute": (cp.Problem(cp.Minimize(cp.sum_squares(P @ x - p))), [p, P], [x]),
        "missing": (plain, [], [x]),
        "unknown": (plain, [p], [cp.Variable(2)]),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("power", r"needs power cones, which have no derivative here.*approx=True"),
        ("dpp", r"is_dpp\(\) is False.*a product of two parameters one parameter of its own"),
        ("dcp", r"is_dcp\(\) is False"),
        ("integer", "has integer or boolean variables"),
        ("attribute", r"attributes \['PSD'\], of which only signs are known here"),
        ("missing", r"of the problem are missing: the layer needs the value of each"),
        ("unknown", r"the problem has no variable \['var\d+'\]: its variables are"),
    ],
)
def test_problems_that_are_no_such_layer_are_refused_by_name(kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        il.from_cvxpy(*refused(kind))


@pytest.mark.parametrize("attribute", ["complex", "imag", "hermitian"])
def test_complex_variables_are_refused_and_two_real_ones_in_their_place_are_right(attribute: str) -> None:
    """The remedy of the message gives the numbers of CVXPY, by Clarabel good to 1e-8 of a strongly convex problem."""
    z, p = cp.Variable((2, 2), **{attribute: True}), cp.Parameter(2)
    re, im = cp.Variable((2, 2)), cp.Variable((2, 2))
    target = np.array([[1.0, 2.0 + 1.0j], [0.5 - 1.0j, 2.0]])
    cost = cp.sum_squares(z - target) + cp.sum_squares(cp.imag(z)[0] - p) + cp.sum_squares(cp.real(z)[1] + p)
    with pytest.raises(
        ValueError, match=r"variables=\['var\d+'\] are complex, .* re == cp.real\(x\) and im == cp.imag"
    ):
        il.from_cvxpy(cp.Problem(cp.Minimize(cost)), [p], [z])
    problem = cp.Problem(cp.Minimize(cost), [re == cp.real(z), im == cp.imag(z)])
    value = torch.tensor([0.3, -0.7], dtype=F64)
    found = il.from_cvxpy(problem, [p], [re, im])(value)
    p.value = value.numpy()
    problem.solve(solver="CLARABEL")
    for part, expected in zip(found, (z.value.real, z.value.imag), strict=True):
        assert torch.allclose(part, torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_parameters_twice_integers_and_batches_that_do_not_fit_are_refused() -> None:
    x, p, q = cp.Variable(2), cp.Parameter(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p - q)))
    with pytest.raises(ValueError, match="are given twice: the layer takes one value of each"):
        il.from_cvxpy(problem, parameters=[p, p, q], variables=[x])
    layer, ones = il.from_cvxpy(problem, parameters=[p, q], variables=[x]), torch.ones(3, 2, dtype=F64)
    with pytest.raises(TypeError, match=r"must be a real floating tensor, got torch\.int64"):
        layer(ones[0].long(), ones[0])
    with pytest.raises(ValueError, match=r"the batch dimensions do not fit together: .*\(3,\).*\(2,\)"):
        layer(ones, ones[:2])


def test_values_that_do_not_fit_are_refused() -> None:
    x, p, s = cp.Variable(2), cp.Parameter(2), cp.Parameter(nonneg=True)
    layer = il.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x - p) + s * cp.norm1(x))), [p, s], [x])
    one, two = torch.tensor(1.0, dtype=F64), torch.ones(2, dtype=F64)
    with pytest.raises(ValueError, match=r"has 2 parameters, got 1 values"):
        layer(two)
    with pytest.raises(ValueError, match=r"must end in its shape \(2,\), .* got \(3,\)"):
        layer(torch.ones(3, dtype=F64), one)
    with pytest.raises(ValueError, match=r"against its attribute nonneg=True.*softplus"):
        layer(two, -one)
    with pytest.raises(TypeError, match="must be a real floating tensor, got list"):
        layer([1.0, 1.0], one)
    with pytest.raises(TypeError, match=r"settings \['return_multipliers'\] must be among"):
        il.from_cvxpy(*refused("missing")[:1], [], [], return_multipliers=True)
