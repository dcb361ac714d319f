"""What the layer promises when things go wrong: solvers, answers, Hessians and scales. One test per situation."""

# Rows 1-14; rows 15-19 are in test_reliability_theta.py, rows 20-28 in test_reliability_graph.py.

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, newton, orthogonal, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import testing


def quadratic(x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    return 0.5 * x @ matrix @ x - b @ x


def quadratic_layer(matrix: Tensor, **settings: Any) -> il.ImplicitLayer:
    """x = A^-1 b, so the gradient in b is A^-1 v."""
    return il.argmin(
        lambda x, b: quadratic(x, matrix, b), lambda f, x, b: torch.linalg.lstsq(matrix, b).solution, **settings
    )


def tracking(solver: Any = None, **settings: Any) -> il.ImplicitLayer:
    """argmin of 1/2 |x - t|^2: x = t."""
    return il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), solver or (lambda f, x, t: t.clone()), **settings)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


def test_row_01_solver_raises() -> None:
    class Refusal(Exception):
        pass

    original = Refusal("no feasible point")

    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
        raise original

    for call in (
        lambda: tracking(solver)(zeros(3), leaf(3)),
        lambda: torch.func.vmap(tracking(solver))(zeros(2, 3), randn(2, 3, seed=0)),
    ):
        with pytest.raises(Refusal, match="no feasible point") as caught:
            call()
        assert caught.value is original


# The first five rows in short, by the list of il.testing; the tests below look at messages, policies and numbers.
FAULTS = [fault for fault in testing.faults(lambda f, x, t: t.clone()) if fault.raises or fault.warns]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_row_01_to_05_what_is_no_answer_is_said_by_name(fault: testing.Fault) -> None:
    with fault.expected():
        tracking(fault)(zeros(3), leaf(3))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_failure", ["raise", "warn", "ignore"])
def test_row_02_solver_returns_nan_or_inf(poison: float, on_failure: Any) -> None:
    layer = il.argmin(
        lambda x, t: ((x["a"] - t) ** 2).sum() + ((x["b"][0] - t) ** 2).sum(),
        lambda f, x, t: {"a": t.clone(), "b": [t * poison]},
        on_failure=on_failure,
    )
    for t in (leaf(3), randn(3, seed=0)):
        with pytest.raises(il.NonFiniteError, match=r"NaN or Inf in x\['b'\]\[0\]"):
            layer({"a": zeros(3), "b": [zeros(3)]}, t)


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 3), (), (4,), (0,)])
def test_row_03_wrong_shape_also_one_that_would_broadcast(shape: tuple[int, ...]) -> None:
    pattern = rf"x with shape \({', '.join(map(str, shape))},?\), but init has shape \(3,\)"
    with pytest.raises(il.SolverOutputError, match=pattern):
        tracking(lambda f, x, t: zeros(*shape))(zeros(3), leaf(3))


def test_row_03_wrong_structure() -> None:
    with pytest.raises(il.SolverOutputError, match=r"structure of init: expected leaves \['x'\], got \[\"x\['a'\]\"\]"):
        tracking(lambda f, x, t: {"a": t})(zeros(3), leaf(3))
    layer = il.argmin(lambda x: (x["a"] ** 2).sum(), lambda f, x: {"b": x["a"]})
    with pytest.raises(il.SolverOutputError, match=r"expected leaves \[\"x\['a'\]\"\], got \[\"x\['b'\]\"\]"):
        layer({"a": zeros(3)})
    with pytest.raises(il.SolverOutputError, match="NoneType for x"):
        tracking(lambda f, x, t: None)(zeros(3), leaf(3))


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.numpy().copy(),
        lambda t: t.float(),
        lambda t: t.numpy().astype(np.float32),
        lambda t: t.long().numpy(),
    ],
    ids=["NumPy", "float32", "NumPy float32", "NumPy integers"],
)
def test_row_04_wrong_dtype_or_numpy_is_cast(convert: Any) -> None:
    t = torch.tensor([1.0, -2.0, 8.0], dtype=F64, requires_grad=True)  # exact in all of these
    x = tracking(lambda f, x, t: convert(t))(zeros(3), t)
    assert x.dtype == F64 and torch.equal(x, t)
    (gradient,) = torch.autograd.grad(x.sum(), t)
    assert torch.allclose(gradient, torch.ones(3, dtype=F64), rtol=1e-14)


@pytest.mark.parametrize("answer", ["text", [1.0, 2.0, 3.0], object()])
def test_row_04_what_is_no_array_is_an_error(answer: Any) -> None:
    with pytest.raises(il.SolverOutputError, match=r"the solver (returned|must return)"):
        tracking(lambda f, x, t: answer)(zeros(3), leaf(3))


def test_row_04_wrong_device_is_an_error() -> None:
    with pytest.raises(il.SolverOutputError, match="returned x on meta, but init is on cpu"):
        tracking(lambda f, x, t: t.to("meta"))(zeros(3), leaf(3))


def test_row_05_answer_not_stationary_warns_with_its_numbers() -> None:
    target = torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True)
    solver = lambda f, x, t: 0.9 * t  # noqa: E731  the gradient is -0.1 t: norm 0.5, and so is the distance
    with pytest.warns(il.StationarityWarning, match=r"norm 0\.5 there, and the solution is at least about 0\.5 away"):
        tracking(solver)(zeros(2), target)
    with pytest.raises(il.StationarityError, match="not stationary"):
        tracking(solver, on_failure="raise")(zeros(2), target)
    tracking(solver, on_failure="ignore")(zeros(2), target)
    tracking(solver, stationarity_rtol=None)(zeros(2), target)
    layer = tracking(solver, on_failure="ignore")
    layer(zeros(2), target)
    record = layer.records[0]
    assert isinstance(record, il.ForwardRecord)
    assert record.stationarity_norm is not None and float(record.stationarity_norm) == pytest.approx(0.5)


def test_row_05_the_estimated_distance_is_never_above_the_true_one_on_quadratics() -> None:
    for seed in range(30):
        matrix, b = spd_matrix(6, 3, seed=seed), leaf(6, seed=seed + 50)
        exact = torch.linalg.solve(matrix, b.detach())
        off = exact + 0.1 * randn(6, seed=seed + 100)
        layer = il.argmin(lambda x, b, m=matrix: quadratic(x, m, b), lambda f, x, b, off=off: off, on_failure="ignore")
        layer(zeros(6), b)
        record = layer.records[0]
        assert isinstance(record, il.ForwardRecord) and record.estimated_distance is not None
        assert 0 < float(record.estimated_distance) <= float((off - exact).norm()) * (1 + 1e-12)


def test_row_05_polish_takes_newton_steps() -> None:
    t = torch.tensor([2.0, 5.0], dtype=F64, requires_grad=True)
    for polish, error in ((1, 1e-4), (2, 1e-8), (3, 1e-14)):  # an error of 1e-2 is squared each time
        layer = il.argmin(lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: t.log() + 1e-2, polish=polish)
        x = layer(zeros(2), t)
        assert float((x - t.log()).detach().norm()) < error
        (gradient,) = torch.autograd.grad(x.sum(), t)
        assert relative_error(gradient, 1 / t.detach()) < max(2 * error, 1e-9)
        record = layer.records[0]
        assert isinstance(record, il.ForwardRecord) and record.num_polish_steps == polish


def test_row_06_negative_curvature_is_an_error_that_names_the_ways_out() -> None:
    t = leaf(2)
    saddle = il.argmin(
        lambda x, t: 0.5 * (x[0] ** 2 - 2 * x[1] ** 2) - (t * x).sum(), lambda f, x, t: t / torch.tensor([1.0, -2.0])
    )
    x = saddle(zeros(2), t)
    with pytest.raises(il.IndefiniteError, match=r"p'Ap/p'p = -2 <= 0.*damping.*Minres.*Gauss-Newton"):
        torch.autograd.grad(x[1], t)
    ignored = il.argmin(saddle.function, saddle.solver, on_failure="ignore")
    (gradient,) = torch.autograd.grad(ignored(zeros(2), t)[1], t)
    assert bool(gradient.isfinite().all()) and float(gradient.norm()) <= 1.0  # the answer of zero steps, no explosion


def test_row_07_a_saddle_that_is_declared_indefinite_is_right() -> None:
    """Lagrangian of 1/2 |x - t|^2 subject to c'x = 1: its stationary point has x = t - c (c't - 1) / c'c."""
    c, t, v = randn(4, seed=1), leaf(4, seed=2), randn(4, seed=3)

    def lagrangian(x: Any, t: Tensor) -> Tensor:
        return 0.5 * ((x["x"] - t) ** 2).sum() + x["multiplier"] * (c @ x["x"] - 1)

    def solver(f: Any, x: Any, t: Tensor) -> Any:
        multiplier = (c @ t - 1) / (c @ c)
        return {"x": t - multiplier * c, "multiplier": multiplier}

    init = {"x": zeros(4), "multiplier": zeros()}
    (gradient,) = torch.autograd.grad(il.argmin(lagrangian, solver, linear_solver=il.Minres())(init, t)["x"], t, v)
    assert relative_error(gradient, v - c * (c @ v) / (c @ c)) < 1e-8  # rtol 1e-10, condition below 10
    with pytest.raises(il.LinearSolveError):
        torch.autograd.grad(il.argmin(lagrangian, solver)(init, t)["multiplier"], t)


def test_row_08_singular_hessian_with_the_cotangent_in_its_range_is_right() -> None:
    basis = orthogonal(6, seed=1)[:, :4]
    matrix = (basis * torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64)) @ basis.T
    b = (matrix @ randn(6, seed=2)).requires_grad_()
    v = basis @ randn(4, seed=3)
    (gradient,) = torch.autograd.grad(quadratic_layer(matrix)(zeros(6), b), b, v)
    assert relative_error(gradient, torch.linalg.pinv(matrix) @ v) < 1e-9  # rtol 1e-10, condition 8


@pytest.mark.parametrize("seed", range(10))
def test_row_09_singular_hessian_with_the_cotangent_outside_its_range_is_no_silent_number(seed: int) -> None:
    basis = orthogonal(6, seed=seed)[:, :4]
    matrix = (basis * torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64)) @ basis.T
    b = (matrix @ randn(6, seed=seed + 20)).requires_grad_()
    x = quadratic_layer(matrix)(zeros(6), b)
    with pytest.raises(il.LinearSolveError) as caught:
        torch.autograd.grad(x, b, randn(6, seed=seed + 40))
    assert isinstance(caught.value.solution, il.LinearSolution)


def test_row_10_max_steps_before_the_tolerance_warns_with_residual_rtol_and_steps() -> None:
    matrix, b = spd_matrix(30, 1, seed=4), leaf(30, seed=5)
    layer = quadratic_layer(matrix, linear_solver=il.ConjugateGradient(rtol=1e-10, max_steps=4))
    with pytest.warns(il.ConvergenceWarning, match=r"after 4 steps \(true relative residual \d.*, rtol 1\.0e-10\)"):
        (gradient,) = torch.autograd.grad(layer(zeros(30), b).sum(), b)
    assert bool(gradient.isfinite().all())
    record = layer.records[-1]
    assert isinstance(record, il.BackwardRecord) and record.status is il.Status.MAX_STEPS_REACHED
    true = (torch.ones(30, dtype=F64) - matrix @ gradient).norm() / math.sqrt(30)
    assert float(record.solution.relative_residual) == pytest.approx(float(true), rel=1e-9)
    strict = quadratic_layer(matrix, linear_solver=layer.linear_solver, on_failure="raise")
    with pytest.raises(il.NotConvergedError):
        torch.autograd.grad(strict(zeros(30), b).sum(), b)


def test_row_10_a_residual_that_did_not_fall_is_an_error() -> None:
    # v is 1 along curvature 1 and 0.01 along curvature 1e8: the first step, of length 1e-4, turns 0.01 into -100
    b, v = leaf(2, seed=6), torch.tensor([1.0, 0.01], dtype=F64)
    matrix = torch.diag(torch.tensor([1.0, 1e8], dtype=F64))
    for on_failure in ("warn", "raise"):
        layer = quadratic_layer(
            matrix, linear_solver=il.ConjugateGradient(rtol=1e-10, max_steps=1), on_failure=on_failure
        )
        with pytest.raises(il.NotConvergedError, match="did not fall below"):
            torch.autograd.grad(layer(zeros(2), b), b, v)


def test_row_10_a_fixed_number_of_steps_is_a_choice_and_no_failure() -> None:
    matrix, b = spd_matrix(30, 3, seed=4), leaf(30, seed=5)
    layer = quadratic_layer(matrix, linear_solver=il.ConjugateGradient(max_steps=4), on_failure="raise")
    torch.autograd.grad(layer(zeros(30), b).sum(), b)
    assert isinstance(layer.records[-1], il.BackwardRecord) and layer.records[-1].status is il.Status.STEP_LIMIT


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 7), (torch.float32, 9), (F64, 15), (F64, 17)])
def test_row_11_condition_beyond_the_precision_is_right_or_reported(dtype: torch.dtype, exponent: int) -> None:
    rtol = 1e-5 if dtype is torch.float32 else 1e-10
    for seed in range(10):
        matrix = spd_matrix(20, exponent, seed=seed).to(dtype)
        b = randn(20, seed=seed + 50).to(dtype).requires_grad_()
        layer = il.argmin(
            lambda x, b, m=matrix: quadratic(x, m, b), lambda f, x, b: torch.zeros_like(b), stationarity_rtol=None
        )
        x = layer(torch.zeros(20, dtype=dtype), b)
        v = randn(20, seed=seed + 100).to(dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                (gradient,) = torch.autograd.grad(x, b, v)
            except il.LinearSolveError:
                continue
        residual = float((matrix.double() @ gradient.double() - v.double()).norm() / v.double().norm())
        assert residual <= 10 * rtol or any(w.category is il.ConvergenceWarning for w in caught)


def test_row_12_nan_or_inf_from_a_hessian_vector_product_is_an_error_naming_the_product() -> None:
    t = torch.zeros(2, dtype=F64, requires_grad=True)
    # |x - t|^(3/2) has a gradient but no curvature at its minimum
    layer = il.argmin(lambda x, t: ((x - t).abs() ** 1.5).sum(), lambda f, x, t: t.clone(), stationarity_rtol=None)
    for on_failure in ("raise", "warn", "ignore"):
        layer.on_failure = on_failure
        with pytest.raises(il.NonFiniteError, match="NaN or Inf in a Hessian-vector product"):
            torch.autograd.grad(layer(zeros(2), t).sum(), t)


def test_row_12_nan_in_theta_is_an_error() -> None:
    t = torch.tensor([1.0, math.nan], dtype=F64, requires_grad=True)
    with pytest.raises(il.NonFiniteError, match=r"gradient of the objective holds NaN.*Check theta"):
        tracking(lambda f, x, t: torch.ones_like(t))(zeros(2), t)
    with pytest.raises(il.NonFiniteError):
        tracking()(zeros(2), t)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_row_12_nan_in_the_cotangent_is_an_error(poison: float) -> None:
    t = leaf(2)
    with pytest.raises(il.NonFiniteError, match=r"right-hand side of the backward solve \(the cotangent"):
        torch.autograd.grad((tracking()(zeros(2), t) * torch.tensor([1.0, poison])).sum(), t)


def test_row_13_zero_cotangent_is_exactly_zero_without_a_product() -> None:
    matrix, b = spd_matrix(4, 1, seed=7), leaf(4, seed=8)
    layer = quadratic_layer(matrix)
    (gradient,) = torch.autograd.grad(0 * layer(zeros(4), b).sum(), b)
    assert torch.equal(gradient, zeros(4))
    record = layer.records[-1]
    assert isinstance(record, il.BackwardRecord) and record.solution.num_steps == 0
    assert float(record.solution.smallest_curvature) == math.inf  # no product was made
    assert torch.autograd.gradcheck(lambda b: 0 * layer(zeros(4), b), (b,))


def test_row_13_outputs_without_cotangent_need_none() -> None:
    a, b = leaf(2, seed=1), leaf(3, seed=2)
    layer = il.argmin(
        lambda x, a, b: 0.5 * ((x["a"] - a) ** 2).sum() + 0.5 * ((x["b"] - b) ** 2).sum(),
        lambda f, x, a, b: {"a": a.clone(), "b": b.clone()},
    )
    x = layer({"a": zeros(2), "b": zeros(3)}, a, b)
    gradients = torch.autograd.grad(x["a"].sum(), (a, b))
    assert torch.equal(gradients[0], torch.ones(2, dtype=F64)) and torch.equal(gradients[1], zeros(3))
    x = layer({"a": zeros(2), "b": zeros(3)}, a, b)
    num_records = len(layer.records)
    assert torch.autograd.grad(a.sum(), (a, b), allow_unused=True)[1] is None and len(layer.records) == num_records


SCALES = [(F64, 2.0**e) for e in (-664, -40, 40, 664)] + [(torch.float32, 2.0**e) for e in (-83, -40, 40, 83)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_row_14_a_scaled_cotangent_changes_no_bit(dtype: torch.dtype, scale: float) -> None:
    """Powers of two round nothing: 2^83 = 1e25, 2^664 = 1e200."""
    matrix, b, v = spd_matrix(6, 1, seed=9).to(dtype), leaf(6, seed=10).detach().to(dtype), randn(6, seed=11).to(dtype)
    b.requires_grad_()
    x = quadratic_layer(matrix)(torch.zeros(6, dtype=dtype), b)
    (plain,) = torch.autograd.grad(x, b, v, retain_graph=True)
    (scaled,) = torch.autograd.grad(x, b, v * scale)
    assert torch.equal(scaled, plain * scale)


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_row_14_a_scaled_objective_has_the_same_gradient(dtype: torch.dtype, scale: float) -> None:
    b, v = randn(6, seed=10).to(dtype).requires_grad_(), randn(6, seed=11).to(dtype)
    matrix = spd_matrix(6, 1, seed=9).to(dtype)

    def gradient(factor: float) -> Tensor:
        layer = il.argmin(
            lambda x, b: factor * quadratic(x, matrix, b),
            lambda f, x, b: newton(lambda x, b: quadratic(x, matrix, b), x, b),
        )
        return torch.autograd.grad(layer(torch.zeros(6, dtype=dtype), b), b, v)[0]

    assert (
        relative_error(gradient(scale).double(), gradient(1.0).double()) < 20 * torch.finfo(dtype).eps
    )  # condition 10


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_row_14_a_scaled_objective_does_not_hide_a_wrong_answer(dtype: torch.dtype, scale: float) -> None:
    layer = il.argmin(lambda x, t: scale * 0.5 * ((x - t) ** 2).sum(), lambda f, x, t: 0.5 * t)
    with pytest.warns(il.StationarityWarning, match="5.0e-01 of its size|1.0e\\+00 of its size"):
        layer(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype, requires_grad=True))
