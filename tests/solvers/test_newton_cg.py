"""NewtonCG: its directions, its curvature, and what it does where that is negative."""

import itertools
import math
from typing import Any

import pytest
import torch
from inner_problems import Counted
from references import F64, dense_hessian, newton, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import NewtonCG
from implicitlayer.solvers._leaves import Problem


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


def quadratic(x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    return 0.5 * x @ matrix @ x - b @ x


def conjugate_gradients(matrix: Tensor, b: Tensor, steps: int) -> Tensor:
    """The textbook method, from zero."""
    d, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(steps):
        alpha = (r @ r) / (p @ matrix @ p)
        d, r_new = d + alpha * p, r - alpha * (matrix @ p)
        p, r = r_new + (r_new @ r_new) / (r @ r) * p, r_new
    return d


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_step_on_a_quadratic_is_that_many_steps_of_conjugate_gradients(steps: int, damping: float) -> None:
    matrix, b = spd_matrix(8, 1, seed=1), randn(8, seed=2)
    x = NewtonCG(max_steps=1, cg_steps=steps, damping=damping)(quadratic, zeros(8), matrix, b)
    damped = matrix + damping * torch.eye(8, dtype=F64)
    assert relative_error(x, conjugate_gradients(damped, b, steps)) < 1e-12


def test_damping_is_in_units_of_curvature_whatever_the_size_of_the_gradient() -> None:
    for scale in (1e-6, 1.0, 1e6):
        matrix, b = spd_matrix(4, 1, seed=3), scale * randn(4, seed=4)
        x = NewtonCG(max_steps=1, cg_steps=4, damping=2.0)(quadratic, zeros(4), matrix, b)
        # conjugate gradients end after 4 steps: a well-conditioned solve
        assert relative_error(x, torch.linalg.solve(matrix + 2 * torch.eye(4, dtype=F64), b)) < 1e-10


def test_products_are_counted_by_cg_steps() -> None:
    curvature = torch.linspace(1, 9, 12, dtype=F64)
    for num in (1, 5):
        counted = Counted(lambda x: (0.5 * curvature * x * x - x).sum())
        NewtonCG(max_steps=3, cg_steps=num)(counted, zeros(12))
        assert counted.num_products == 3 * num


@pytest.mark.parametrize("line_search", ["armijo", "wolfe"])
def test_convergence_is_superlinear(line_search: Any) -> None:
    norms: list[float] = []
    solver = NewtonCG(rtol=1e-13, line_search=line_search, callback=lambda i: norms.append(float(i.gradient_norm)))
    matrix = spd_matrix(6, 1, seed=5)
    b = matrix @ randn(6, seed=6)
    result = solver.run(lambda x: quadratic(x, matrix, b) + (x**4).sum(), zeros(6))
    assert result.status is Status.CONVERGED
    ratios = [after / before for before, after in itertools.pairwise(norms)]
    assert ratios[-1] < 1e-3 and ratios[-1] < 0.1 * ratios[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("problem", ["least squares", "logistic"])
def test_without_a_tolerance_it_ends_soon_after_rounding_is_all_that_is_left(
    problem: str, seed: int, dtype: torch.dtype
) -> None:
    A, b = randn(40, 20, seed=seed).to(dtype), randn(40, seed=seed + 9).to(dtype)
    functions = {
        "least squares": lambda x: ((A @ x - b) ** 2).sum() + (x**2).sum(),
        "logistic": lambda x: torch.nn.functional.softplus(A @ x * b.sign()).sum() + 0.1 * (x**2).sum(),
    }
    norms: list[float] = []
    result = NewtonCG(callback=lambda at: norms.append(float(at.gradient_norm))).run(
        functions[problem], torch.zeros(20, dtype=dtype)
    )
    assert result.status is Status.STAGNATED
    # each of 40 + 20 terms of an entry of the gradient is rounded a few times, by eps of what it is at most
    size = float((A.abs().mT @ (A.abs() @ result.value.abs() + b.abs() + 1) + result.value.abs()).norm())
    least = 60 * torch.finfo(dtype).eps * size
    assert norms[-1] <= least
    # that is a bound: what rounding really leaves is the smallest norm met, to a few halvings
    first = next(k for k, norm in enumerate(norms) if norm <= min(least, 8 * min(norms)))
    assert len(norms) - 1 - first <= 6  # two that still halve it, at most, three that do not, and the last search


def test_at_negative_curvature_the_first_direction_is_the_scaled_gradient() -> None:
    """f = x^2 y-ish saddle: at g'Hg < 0 the step is -g g'g / |g'Hg|, if the search takes it as it is."""
    matrix = torch.diag(torch.tensor([-1.0, -2.0], dtype=F64))
    b = torch.tensor([1.0, 0.5], dtype=F64)
    x = NewtonCG(max_steps=1)(quadratic, zeros(2), matrix, b)
    assert torch.allclose(x, b * (b @ b) / (b @ matrix @ b).abs(), rtol=1e-12)


def test_later_negative_curvature_keeps_what_was_found_before() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, -2.0], dtype=F64))
    b = torch.tensor([1.0, 1.0, 0.5], dtype=F64)
    first = b * (b @ b) / (b @ matrix @ b)  # positive curvature along b
    r = b - matrix @ first
    p = r + (r @ r) / (b @ b) * b
    assert float(b @ matrix @ b) > 0 > float(p @ matrix @ p)
    assert torch.allclose(NewtonCG(max_steps=1)(quadratic, zeros(3), matrix, b), first, rtol=1e-12)


@pytest.mark.parametrize("line_search", ["armijo", "wolfe"])
def test_it_leaves_a_saddle_for_a_minimum(line_search: Any) -> None:
    result = NewtonCG(rtol=1e-10, line_search=line_search).run(
        lambda x: (0.25 * x**4 - 0.5 * x**2).sum(), torch.tensor([0.1, -1e-3, 0.5], dtype=F64)
    )
    assert result.status is Status.CONVERGED
    assert torch.allclose(result.value, torch.tensor([1.0, -1.0, 1.0], dtype=F64), atol=1e-9)


def test_an_objective_without_curvature_is_descended() -> None:
    result = NewtonCG(max_steps=2).run(lambda x: x @ torch.tensor([3.0, 4.0], dtype=F64), zeros(2))
    assert result.status is Status.STEP_LIMIT  # steps of length 1: the products are zero, not an error
    assert torch.allclose(result.value, torch.tensor([-1.2, -1.6], dtype=F64), rtol=1e-12)


# ------------------------------------------------------------------------------------------------------- Gauss-Newton


def residuals(x: Any, data: Tensor) -> dict[str, Tensor]:
    return {"fit": torch.tanh(data @ x["w"]) + x["b"], "size": 0.3 * x["w"] ** 2}


def tree(seed: int) -> dict[str, Tensor]:
    return {"w": randn(3, seed=seed), "b": randn(1, seed=seed + 1).reshape(())}


def test_gauss_newton_products_are_those_of_the_dense_matrix() -> None:
    data, x = randn(6, 3, seed=7), tree(8)
    objective = il.least_squares(residuals)
    problem = Problem(objective, x, (data,), "gauss_newton")

    def stacked(flat: Tensor) -> Tensor:
        parts = residuals({"b": flat[0], "w": flat[1:]}, data)
        return torch.cat([parts["fit"], parts["size"]])

    order = list(x)  # the order of leaves in a tree
    flat = torch.cat([x["b"].reshape(1), x["w"]])
    jacobian = torch.autograd.functional.jacobian(stacked, flat)
    u = randn(4, seed=9)
    by_order = u if order[0] == "b" else torch.cat([u[1:], u[:1]])
    assert problem.product is not None
    got = problem.product(by_order) * problem.scale  # products are in the problem's unit
    expected = jacobian.T @ (jacobian @ u)
    expected = expected if order[0] == "b" else torch.cat([expected[1:], expected[:1]])
    assert relative_error(got, expected) < 1e-12


def test_gauss_newton_solves_linear_least_squares_in_one_step() -> None:
    data, target = randn(9, 4, seed=10), randn(9, seed=11)
    solver = NewtonCG(max_steps=1, cg_steps=4, curvature="gauss_newton")
    x = solver(il.least_squares(lambda x: data @ x - target), zeros(4))
    assert relative_error(x, torch.linalg.lstsq(data, target.unsqueeze(-1)).solution.squeeze(-1)) < 1e-10


def test_gauss_newton_descends_where_the_hessian_is_indefinite() -> None:
    data = randn(10, 3, seed=12)
    target = torch.sin(data @ torch.tensor([1.0, -0.5, 0.3], dtype=F64))
    objective = il.least_squares(lambda x: torch.sin(data @ x) - target)
    init = torch.tensor([0.17, -0.99, 0.11], dtype=F64)
    assert float(torch.linalg.eigvalsh(dense_hessian(objective, init, ())).min()) < 0
    result = NewtonCG(rtol=1e-10, curvature="gauss_newton").run(objective, init)
    assert result.status is Status.CONVERGED
    # the residuals vanish, so the matrix is the Hessian there, with smallest eigenvalue 1.3
    assert torch.allclose(result.value, torch.tensor([1.0, -0.5, 0.3], dtype=F64), atol=1e-7)


def test_gauss_newton_of_a_batch_equals_a_loop() -> None:
    data, targets = randn(8, 3, seed=13), randn(4, 8, seed=14)
    objective = il.composite(
        lambda y, t: torch.nn.functional.softplus(-t * y).sum(-1), lambda x, t: torch.tanh(x @ data.T) + x.sum(-1, True)
    )
    solver = NewtonCG(max_steps=3, curvature="gauss_newton", damping=0.1)
    batched = solver(objective, zeros(4, 3), targets)
    for i in range(4):
        assert torch.allclose(batched[i], solver(objective, zeros(3), targets[i]), rtol=1e-9, atol=1e-12)


def test_gauss_newton_of_a_proximal_objective_includes_the_penalty() -> None:
    data, target, theta = randn(9, 4, seed=15), randn(9, seed=16), randn(4, seed=17)
    objective = il.proximal(il.least_squares(lambda x: data @ x - target), 3.0)
    x = NewtonCG(max_steps=1, cg_steps=4, curvature="gauss_newton")(objective, zeros(4), theta)
    expected = torch.linalg.solve(data.T @ data + 3 * torch.eye(4, dtype=F64), data.T @ target + 3 * theta)
    assert relative_error(x, expected) < 1e-9


def test_gauss_newton_works_inside_a_layer() -> None:
    data, target = randn(9, 3, seed=18), randn(9, seed=19).requires_grad_()

    def objective_of(x: Tensor, target: Tensor) -> Tensor:
        return data @ x + 0.1 * torch.sin(data @ x) - target

    objective = il.least_squares(objective_of)
    x = il.argmin(objective, NewtonCG(rtol=1e-11, curvature="gauss_newton"))(zeros(3), target)
    expected = newton(objective, zeros(3), target.detach())
    assert relative_error(x, expected) < 1e-8


def test_gauss_newton_of_an_objective_that_does_not_tell_its_model_is_refused() -> None:
    for objective in (lambda x: (x * x).sum(), il.proximal(lambda x: (x * x).sum(), 1.0)):
        with pytest.raises(
            il.ObjectiveError, match=r'"gauss_newton" needs an objective .* With any other, use curvature'
        ):
            NewtonCG(curvature="gauss_newton")(objective, zeros(2), zeros(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cg_steps": 0}, "cg_steps=0 must be at least 1. For no product use GradientDescent."),
        ({"damping": -1.0}, "damping=-1.0 must be non-negative and finite"),
        ({"damping": math.inf}, "damping=inf must be non-negative and finite"),
        ({"curvature": "fisher"}, 'curvature=\'fisher\' must be "hessian" or "gauss_newton"'),
        ({"line_search": "none"}, 'line_search=\'none\' must be "armijo" or "wolfe"'),
        ({"max_steps": -1}, "max_steps=-1 must be non-negative"),
        ({"rtol": math.nan}, "rtol=nan must be non-negative"),
    ],
)
def test_bad_settings_are_refused_by_name_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NewtonCG(**settings)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_few_unknowns_take_whole_newton_steps(dtype: torch.dtype) -> None:
    """One step is -(H + damping)^-1 g, here by a dense solve, whatever the units of the unknowns."""
    matrix, b = spd_matrix(12, 3, seed=7).to(dtype), randn(12, seed=8).to(dtype)
    damping = 0.3
    expected = torch.linalg.solve(matrix.double() + damping * torch.eye(12, dtype=F64), b.double())
    x = NewtonCG(max_steps=1, damping=damping)(quadratic, torch.zeros(12, dtype=dtype), matrix, b)
    assert relative_error(x.double(), expected) < 1e3 * 100 * torch.finfo(dtype).eps  # condition 1e3
    units = 10.0 ** torch.linspace(-6, 6, 12, dtype=F64)
    y = NewtonCG(max_steps=1)(lambda y: quadratic(units * y, matrix.double(), b.double()), torch.zeros(12, dtype=F64))
    assert relative_error(units * y, torch.linalg.solve(matrix.double(), b.double())) < 1e-10


def test_lanes_with_negative_curvature_keep_to_conjugate_gradients() -> None:
    """Beside a definite lane an indefinite one moves as it does when it is alone, by -g g'g / |g'Hg|."""
    matrices = torch.stack([spd_matrix(3, 1, seed=9), torch.diag(torch.tensor([-1.0, -2.0, -3.0], dtype=F64))])
    b = randn(2, 3, seed=10)
    x = NewtonCG(max_steps=1)(
        lambda x: 0.5 * torch.einsum("bi,bij,bj->b", x, matrices, x) - (b * x).sum(-1), zeros(2, 3)
    )
    assert relative_error(x[0], torch.linalg.solve(matrices[0], b[0])) < 1e-12
    length = (b[1] @ b[1]) / (b[1] @ matrices[1] @ b[1]).abs()
    assert relative_error(x[1], length * b[1]) < 1e-12


def test_a_singular_hessian_is_not_factorised() -> None:
    A = randn(3, 8, seed=11)  # a rank of 3 in 8 unknowns, whose products a factor could only divide by rounding
    x = NewtonCG(rtol=1e-10)(lambda x: ((A @ x - 1) ** 2).sum(), zeros(8))
    assert relative_error(x, torch.linalg.pinv(A) @ torch.ones(3, dtype=F64)) < 1e-8  # the shortest, from zero


@pytest.mark.parametrize(("shape", "data"), [((33,), 1), ((103, 20), 1), ((4,), 2**20 + 1)])
def test_many_unknowns_or_data_make_no_matrix(shape: tuple[int, ...], data: int) -> None:
    curvature = torch.where(torch.arange(shape[-1]) % 2 == 0, 1.0, 3.0).double()
    b = torch.arange(1.0, shape[-1] + 1, dtype=F64)
    counted = Counted(lambda x: (0.5 * curvature * x * x - b * x).sum(-1))
    NewtonCG(max_steps=1)(lambda x, _: counted(x), zeros(*shape), zeros(data))
    assert counted.num_products == 2  # one by one, as many as there are curvatures
    counted = Counted(lambda x: (0.5 * x * curvature[:4] * x - x).sum())
    NewtonCG(max_steps=1)(counted, zeros(4))
    assert counted.num_products == 1  # side by side


def test_a_product_that_vmap_cannot_follow_is_made_once_for_every_column() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (x,) = ctx.saved_tensors
            return Square.apply(x) * 3 * grads[0]

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.from_numpy(x.detach().numpy() ** 2)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (x,) = ctx.saved_tensors
            return torch.from_numpy(2 * x.detach().numpy() * grads[0].numpy())

    t = randn(5, seed=12)
    x = NewtonCG(rtol=1e-10)(lambda x: (Cube.apply(x + 3) + (x + 3) ** 2 - 20 * (x + 3) - t * x).sum(), zeros(5))
    # 3 y^2 + 2 y = 20 + t, y = x + 3
    assert relative_error(x + 3, (-1 + (1 + 3 * (20 + t)).sqrt()) / 3) < 1e-9
