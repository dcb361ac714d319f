"""Memory layouts and kinds of tensors: strided, transposed, expanded, with an offset, parameters, mixed dtypes."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, orthogonal, randn, relative_error
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

import implicitlayer as il

# Views of 3 x 4 values in some storage, none of them plain.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda s: s.reshape(-1)[: 3 * 4 * 2 : 2].view(3, 4),
    "transposed": lambda s: s.reshape(-1)[:12].view(4, 3).T,
    "expanded": lambda s: s.reshape(-1)[:4].expand(3, 4),
    "broadcast rows": lambda s: s.reshape(-1)[:3, None].expand(3, 4),
    "offset": lambda s: s.reshape(-1)[7:19].view(3, 4),
    "flipped": lambda s: s.reshape(-1)[:12].view(3, 4).flip(0),
}


def storage() -> Tensor:
    return randn(30, seed=1).abs() + 0.5


def cube_root(init: Tensor, a: Tensor, t: Tensor) -> Tensor:
    layer = il.argmin(
        lambda x, a, t: (a * x**4 / 4 - t * x).sum(),
        lambda f, x, a, t: (t / a) ** (1 / 3),
        linear_solver=il.ConjugateGradient(rtol=1e-13),
    )
    return layer(init, a, t)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout_of_theta_and_init(layout: str) -> None:
    view, other = LAYOUTS[layout], randn(3, 4, seed=2).abs() + 0.5

    def outer(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda s: (
            (function(view(s), other, view(s)) ** 2 * other).sum() + (function(view(s), view(s), other) ** 3).sum()
        )

    def explicit(init: Tensor, a: Tensor, t: Tensor) -> Tensor:
        return (t / a) ** (1 / 3)

    s, tangent = storage(), randn(30, seed=3)
    leaf = s.clone().requires_grad_()
    expected = grad(outer(explicit))(s)
    assert relative_error(torch.autograd.grad(outer(cube_root)(leaf), leaf)[0], expected) < 1e-10
    assert relative_error(grad(outer(cube_root))(s), expected) < 1e-10
    _, pushed = jvp(outer(cube_root), (s,), (tangent,))
    assert float(pushed) == pytest.approx(float(expected @ tangent), rel=1e-9)
    lanes = torch.stack([s, 2 * s], dim=1)  # lanes in the last dimension
    got = vmap(grad(outer(cube_root)), in_dims=1)(lanes)
    assert relative_error(got, torch.stack([expected, grad(outer(explicit))(2 * s)])) < 1e-10
    _, second = jvp(grad(outer(cube_root)), (s,), (tangent,))
    assert relative_error(second, jvp(grad(outer(explicit)), (s,), (tangent,))[1]) < 1e-8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cotangent_of_any_layout_is_right(layout: str) -> None:
    a, t = randn(3, 4, seed=4).abs() + 0.5, (randn(3, 4, seed=5).abs() + 0.5).requires_grad_()
    v = LAYOUTS[layout](storage())
    (got,) = torch.autograd.grad(cube_root(torch.ones(3, 4, dtype=F64), a, t), t, v)
    (expected,) = torch.autograd.grad((t / a) ** (1 / 3), t, v)
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_solver_may_answer_in_any_layout(layout: str) -> None:
    answer = LAYOUTS[layout](storage())
    t = (answer**2).detach().clone().requires_grad_()
    x = il.argmin(lambda x, t: ((x**2 - t) ** 2).sum(), lambda f, x, t: answer)(torch.ones(3, 4, dtype=F64), t)
    (gradient,) = torch.autograd.grad(x.sum(), t)
    assert torch.equal(x, answer) and relative_error(gradient, 0.5 / answer) < 1e-8  # condition below 100
    x.detach().mul_(2)  # the answer is a copy, with memory of its own for every entry
    assert torch.equal(answer, LAYOUTS[layout](storage()))


def log_layer(t: Any) -> Tensor:
    return il.argmin(lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: t.log())(torch.zeros_like(t), t)


def test_parameters_are_thetas() -> None:
    parameter = torch.nn.Parameter(torch.full((2,), 2.0, dtype=F64))
    log_layer(parameter).sum().backward()
    assert parameter.grad is not None and torch.allclose(parameter.grad, torch.full((2,), 0.5, dtype=F64))


def test_a_theta_made_in_inference_mode_is_plain_data() -> None:
    with torch.inference_mode():
        made = torch.full((2,), 2.0, dtype=F64)
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, m, s: (x.exp() - m * s * x).sum(), lambda f, x, m, s: (m * s).log())
    x = layer(torch.zeros(2, dtype=F64), made, scale)
    (gradient,) = torch.autograd.grad(x.sum(), scale)
    assert float(gradient) == pytest.approx(2 / 3, rel=1e-10)
    with torch.inference_mode():
        assert torch.equal(layer(torch.zeros(2, dtype=F64), made, scale), x)


def test_an_init_that_requires_a_gradient_gets_none() -> None:
    init, t = torch.zeros(2, dtype=F64, requires_grad=True), torch.tensor([1.0, 2.0], dtype=F64)
    layer = il.argmin(lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: t.log())
    x = layer(init, t)
    assert not x.requires_grad or torch.autograd.grad(x.sum(), init, allow_unused=True)[0] is None
    assert torch.equal(jacfwd(lambda i: layer(i, t))(init.detach()), torch.zeros(2, 2, dtype=F64))


def test_mixed_dtypes_of_unknowns_get_gradients_of_their_own_dtype() -> None:
    t = {"a": torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True), "b": torch.tensor([3.0], requires_grad=True)}
    layer = il.argmin(
        lambda x, t: 0.5 * ((x["a"] - t["a"] ** 2) ** 2).sum() + 0.5 * ((x["b"] - t["b"] ** 2) ** 2).sum(),
        lambda f, x, t: {"a": t["a"] ** 2, "b": t["b"] ** 2},
    )
    x = layer({"a": torch.zeros(2, dtype=F64), "b": torch.zeros(1)}, t)
    assert x["a"].dtype == F64 and x["b"].dtype == torch.float32
    (x["a"].sum() + x["b"].sum()).backward()
    assert t["a"].grad is not None and torch.allclose(t["a"].grad, 2 * t["a"].detach(), rtol=1e-6)
    assert t["b"].grad is not None and torch.allclose(t["b"].grad, 2 * t["b"].detach(), rtol=1e-5)


def short_model(x: torch.Tensor, t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Float64 unknowns, and a model that works in the dtype of its weight."""
    return torch.tanh(weight @ x.to(weight.dtype)).sum().double() + 1.5 * ((x - t) ** 2).sum()


def of_two_leaves(x: Any, t: Any) -> torch.Tensor:
    both = 0.3 * x["a"].sum() * x["b"].sum() + torch.cosh(x["a"] - t["a"]).sum() + (x["a"] ** 2).sum()
    return both + 0.5 * ((x["b"] - t["b"]) ** 2).sum()


@pytest.mark.parametrize("linear_solver", [il.ConjugateGradient(), il.Minres(), il.Gmres(), il.Bicgstab(), il.Dense()])
@pytest.mark.parametrize("solver", [il.solvers.LBFGS(), il.solvers.NewtonCG()])
def test_two_precisions_in_one_problem_are_no_alarm_and_cost_the_rounding_of_the_shorter(
    solver: Any, linear_solver: Any
) -> None:
    """The same problem in float64 alone is the reference; both stop at an x right to 1e-4."""
    settings: dict[str, Any] = {"linear_solver": linear_solver, "on_failure": "raise"}

    def slope(short: torch.dtype, **how: Any) -> list[torch.Tensor]:
        t = randn(3, seed=1).requires_grad_()
        weight = randn(8, 3, seed=2).float().to(short)
        x = il.argmin(lambda x, t: short_model(x, t, weight), solver, **how)(torch.zeros(3, dtype=F64), t)
        a, b = (randn(2, seed=3).float().to(short).requires_grad_(), randn(1, seed=4).requires_grad_())
        init = {"a": torch.zeros(2, dtype=short), "b": torch.zeros(1, dtype=F64)}
        y = il.argmin(of_two_leaves, solver, **how)(init, {"a": a, "b": b})
        of_y = torch.autograd.grad(y["a"].sum().double() - 2 * y["b"].sum(), (a, b))
        return [torch.autograd.grad(x.sum(), t)[0], *of_y]

    for got, right in zip(slope(torch.float32, **settings), slope(F64), strict=True):
        assert relative_error(got.double(), right) < 1e-3


def test_a_tolerance_asked_for_and_a_flat_direction_are_told_in_two_precisions_too() -> None:
    flat = torch.logspace(0, -5, 12)

    def operator(u: torch.Tensor) -> torch.Tensor:
        turned = orthogonal(12, seed=1).float()
        return (turned @ (flat * (turned.mT @ u.float()))).double()

    with pytest.warns(il.ConvergenceWarning, match="or a part of it works in a shorter one"):
        il.linear_solve(operator, operator(randn(12, seed=2)))  # small residual; u may be off by 1e-3
    for solver in (il.ConjugateGradient(rtol=1e-12), il.ConjugateGradient(atol=1e-12)):
        with pytest.warns(il.ConvergenceWarning, match="or a part of it works in a shorter one"):
            il.linear_solve(lambda u: 2 * u.float().double() + u / 3, randn(12, seed=2), solver)


EVERY_SOLVER = [il.ConjugateGradient(), il.Minres(), il.Gmres(), il.Bicgstab(), il.Dense(), il.NormalEquations()]
EVERY_SOLVER += [il.WarmStart(il.Minres())]


@pytest.mark.parametrize("decay", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("linear_solver", EVERY_SOLVER, ids=lambda solver: type(solver).__name__)
def test_a_float32_model_with_little_weight_decay_is_right_or_told(linear_solver: Any, decay: float) -> None:
    """Weights where 3 outputs of 20 see something: condition 4 / decay, and the rounding of products times that."""
    seen = orthogonal(20, seed=1)[:, :3]
    model = (torch.tensor([1.0, 1.5, 2.0], dtype=F64) * seen).mT.float()
    hessian = model.double().mT @ model.double() + decay * torch.eye(20, dtype=F64)

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * ((model @ x.float()) ** 2).sum().double() + 0.5 * decay * (x**2).sum() - t @ x

    def solver(_: Any, __: Tensor, t: Tensor) -> Tensor:
        return torch.linalg.solve(hessian, t)

    layer = il.argmin(objective, solver, linear_solver=linear_solver, stationarity_rtol=None)
    t = randn(20, seed=2).requires_grad_()
    x = layer(torch.zeros(20, dtype=F64), t)
    v = seen @ (seen.mT @ randn(20, seed=3))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", il.ConvergenceWarning)
        (got,) = torch.autograd.grad(x, t, v)
    error = relative_error(got, torch.linalg.solve(hessian, v))
    assert told or error < 1e-3  # told from 3e-4 on, by an estimate
    assert not told or error > 1e-5, "a false alarm"


class Nameless:
    """A pytree node whose parts have no names: torch does not ask for them."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


torch.utils._pytree.register_pytree_node(
    Nameless, lambda node: ([node.first, node.second], None), lambda parts, _: Nameless(*parts)
)


def test_unknowns_may_be_nodes_without_names_and_must_come_back_as_such() -> None:
    t = randn(3, seed=1).requires_grad_()
    init = Nameless(torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64))

    def objective(x: Any, t: Tensor) -> Tensor:
        return ((x.first - t) ** 2).sum() + ((x.second - 2 * t) ** 2).sum()

    x = il.argmin(objective, lambda f, x, t: Nameless(t, 2 * t))(init, t)
    (g,) = torch.autograd.grad((x.first * x.second).sum(), t)  # of 2 t^2
    assert torch.allclose(g, 4 * t)
    for other in ((t, 2 * t), Nameless((t,), 2 * t), Nameless(2 * t[:2], t)):
        with pytest.raises(il.SolverOutputError, match=r"structure|x\[0\]"):
            il.argmin(objective, lambda f, x, t, other=other: other)(init, t)


SHORT_SOLVERS = [il.ConjugateGradient(), il.Minres(), il.Gmres(), il.Bicgstab(), il.Dense(), il.NormalEquations()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear_solver", SHORT_SOLVERS)
def test_gradients_in_half_precision_are_right_to_a_few_roundings(linear_solver: Any, dtype: torch.dtype) -> None:
    """Hessian 1 to 4, so that the rounding of products, eps, becomes 4 eps; as much again for the rest."""

    def slope(dtype: torch.dtype) -> Tensor:
        t = torch.tensor([0.5, -1.0, 1.25]).to(dtype).requires_grad_()
        layer = il.argmin(
            lambda x, t: (torch.cosh(x - t) + 0.5 * (t * x) ** 2).sum() + 0.1 * x.prod(),
            il.solvers.LBFGS(),
            linear_solver=linear_solver,
        )
        x = layer(torch.zeros(3, dtype=dtype), t)
        return torch.autograd.grad(x @ torch.tensor([1.0, 2.0, 3.0]).to(dtype), t)[0]

    assert relative_error(slope(dtype).double(), slope(F64)) < 8 * torch.finfo(dtype).eps
