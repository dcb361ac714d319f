"""LevenbergMarquardt: certified fits, SciPy's counts, many problems at once, ranks, gradients."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from nist_fits import FITS
from references import F64, randn, relative_error
from scipy import optimize
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import LevenbergMarquardt, _levenberg_marquardt

Function = Callable[[Tensor], Tensor]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", FITS)
def test_fits_agree_with_the_certified_parameters_to_eight_digits(name: str, start: int) -> None:
    fit = FITS[name]
    # without a tolerance it goes on until rounding stops it
    result = LevenbergMarquardt(max_steps=1000).run(il.least_squares(fit.residuals), numbers(*fit.starts[start]))
    assert result.status is Status.STAGNATED
    certified = numbers(*fit.certified)
    assert float(((result.value - certified) / certified).abs().max()) < 1e-8


# ------------------------------------------- the test functions of More, Garbow and Hillstrom (ACM TOMS 7, 1981)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x: Tensor) -> Tensor:
    return torch.stack([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


def beale(x: Tensor) -> Tensor:
    return torch.stack([c - x[0] * (1 - x[1] ** k) for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))])


def helical_valley(x: Tensor) -> Tensor:
    angle = torch.atan2(x[1], x[0]) / (2 * math.pi)
    return torch.stack([10 * (x[2] - 10 * angle), 10 * (torch.hypot(x[0], x[1]) - 1), x[2]])


def box_3d(x: Tensor) -> Tensor:
    t = torch.arange(1, 11, dtype=x.dtype) / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def powell_singular(x: Tensor) -> Tensor:
    pairs = [x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2]
    return torch.stack(pairs)


def brown_dennis(x: Tensor) -> Tensor:
    t = torch.arange(1, 21, dtype=x.dtype) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


def wood(x: Tensor) -> Tensor:
    a, b = 10 * (x[1] - x[0] ** 2), 90**0.5 * (x[3] - x[2] ** 2)
    return torch.stack([a, 1 - x[0], b, 1 - x[2], 10**0.5 * (x[1] + x[3] - 2), (x[1] - x[3]) / 10**0.5])


def jennrich_sampson(x: Tensor) -> Tensor:
    i = torch.arange(1, 11, dtype=x.dtype)
    return 2 + 2 * i - torch.exp(i * x[0]) - torch.exp(i * x[1])


PROBLEMS: dict[str, tuple[Function, Tensor]] = {
    "rosenbrock": (rosenbrock, numbers(-1.2, 1.0)),
    "freudenstein-roth": (freudenstein_roth, numbers(0.5, -2.0)),
    "beale": (beale, numbers(1.0, 1.0)),
    "helical valley": (helical_valley, numbers(-1.0, 0.0, 0.0)),
    "box 3d": (box_3d, numbers(0.0, 10.0, 20.0)),
    "powell singular": (powell_singular, numbers(3.0, -1.0, 0.0, 1.0)),
    "brown-dennis": (brown_dennis, numbers(25.0, 5.0, -5.0, -1.0)),
    "wood": (wood, numbers(-3.0, -1.0, -3.0, -1.0)),
    "jennrich-sampson": (jennrich_sampson, numbers(0.3, 0.4)),
    **{f"{name} {k}": (f.residuals, numbers(*f.starts[k])) for name, f in FITS.items() for k in (0, 1)},
}
del PROBLEMS["MGH09 0"]  # hundreds of evaluations by every method
RTOL = 1e-8  # of the gradient at the start


def scipy_count(name: str, method: str) -> int | None:
    """Residuals that SciPy evaluates up to the first point with ||g|| <= RTOL ||g at init||; None if it finds none."""
    function, init = PROBLEMS[name]
    evaluations: list[bool] = []

    def with_jacobian(x: np.ndarray) -> tuple[Tensor, Tensor]:
        point = torch.from_numpy(np.array(x))
        return function(point), torch.autograd.functional.jacobian(function, point)

    f, jacobian = with_jacobian(init.numpy())
    tolerance = RTOL * float((jacobian.T @ f).norm())

    def counted(x: np.ndarray) -> np.ndarray:
        f, jacobian = with_jacobian(x)
        evaluations.append(float((jacobian.T @ f).norm()) <= tolerance)
        return np.nan_to_num(f.numpy(), nan=1e100, posinf=1e100, neginf=-1e100)

    least = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
    scipy_jacobian = lambda x: np.nan_to_num(with_jacobian(x)[1].numpy())  # noqa: E731
    with np.errstate(all="ignore"):
        try:
            optimize.least_squares(counted, init.numpy(), scipy_jacobian, method=method, x_scale="jac", **least)
        except (ValueError, np.linalg.LinAlgError):  # trf may overflow
            return None
    return evaluations.index(True) + 1 if True in evaluations else None


def own_count(name: str) -> int | None:
    function, init = PROBLEMS[name]
    count = [0]

    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        return function(x)

    result = LevenbergMarquardt(max_steps=1000, rtol=RTOL).run(il.least_squares(counted), init)
    return count[0] if result.status is Status.CONVERGED else None


@pytest.mark.parametrize("method", ["lm", "trf"])
def test_it_solves_what_scipy_solves_with_at_most_a_fifth_more_evaluations(method: str) -> None:
    own = {name: own_count(name) for name in PROBLEMS}
    theirs = {name: scipy_count(name, method) for name in PROBLEMS}
    assert not [name for name in PROBLEMS if theirs[name] is not None and own[name] is None]
    logs = [math.log(own[name] / theirs[name]) for name in PROBLEMS if own[name] and theirs[name]]  # type: ignore[operator]
    assert len(logs) >= len(PROBLEMS) - 4  # trf stops early on some
    assert math.exp(sum(logs) / len(logs)) < 1.2


# ---------------------------------------------------------------------------------------------------- many at once


def decay(x: Tensor, y: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * torch.linspace(0, 4, 12, dtype=x.dtype)) - y


def curves(*pairs: tuple[float, float]) -> Tensor:
    zero = torch.zeros(12, dtype=F64)
    return torch.stack([decay(numbers(*pair), zero) for pair in pairs])


def test_the_batched_fits_equal_those_of_a_loop() -> None:
    targets = curves((2.0, 0.5), (1.0, 3.0), (-4.0, 0.1), (1e6, 1.0)) + 1e-3 * randn(4, 12, seed=1)
    layer = il.argmin(il.least_squares(decay), LevenbergMarquardt(rtol=1e-10))
    batched = torch.func.vmap(lambda y: layer(numbers(1.0, 1.0), y))(targets)
    loop = torch.stack([layer(numbers(1.0, 1.0), y) for y in targets])
    # both have the gradient at 1e-10 of the first one
    assert relative_error(batched, loop) < 1e-9


def test_a_lane_that_is_done_costs_no_trials_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The damping is searched for where a step is too long; a lane that is done costs nothing beside another."""
    trials: list[int] = []

    def counted(R: Tensor, q: Tensor, par: Tensor) -> tuple[Tensor, Tensor]:
        trials.append(len(par))
        return solved(R, q, par)

    solved = _levenberg_marquardt._solved
    monkeypatch.setattr(_levenberg_marquardt, "_solved", counted)
    targets = curves((1.1, 1.05), (-4.0, 0.1)) + 1e-3 * randn(2, 12, seed=1)  # the first needs three steps, all short
    layer = il.argmin(il.least_squares(decay), LevenbergMarquardt(rtol=1e-6))
    torch.func.vmap(lambda y: layer(numbers(1.0, 1.0), y))(targets)
    batched = sum(trials)
    trials.clear()
    for y in targets:
        layer(numbers(1.0, 1.0), y)
    assert 0 < batched == sum(trials)  # not so where lanes that are done are searched for as well


def test_a_lane_that_breaks_leaves_the_bits_of_the_others() -> None:
    objective = il.composite(
        lambda f, y: 0.5 * (f * f).sum(-1), lambda x, y: x[:, :1] * torch.exp(-x[:, 1:] * torch.arange(12.0)) - y
    )
    targets, init = curves((2.0, 0.5), (1.0, 3.0), (3.0, 0.2)), torch.ones(3, 2, dtype=F64)
    whole = LevenbergMarquardt(max_steps=50)(objective, init, targets)
    broken = targets.clone()
    broken[1, 3] = torch.nan
    result = LevenbergMarquardt(max_steps=50).run(objective, init, broken)
    assert result.status is Status.NONFINITE and "in lane 1 of (3,)" in result.message
    assert torch.equal(result.value[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("form", ["one tensor", "a dict"])
@pytest.mark.parametrize("solver", [LevenbergMarquardt(rtol=1e-12), il.solvers.LBFGS(rtol=1e-12)])
def test_a_layer_of_many_problems_takes_least_squares_as_it_is(solver: Any, form: str, curvature: Any) -> None:
    """Straight lines: each has the fit and the derivative of its own pseudo-inverse (A'A)^-1 A', and no other's."""
    A, scale = randn(3, 7, 2, seed=1), torch.arange(1.0, 4.0, dtype=F64)[:, None]

    def residuals(x: Tensor, y: Tensor) -> Any:
        r = (A @ x[..., None])[..., 0] - y
        return r if form == "one tensor" else {"first": r[..., :3], "rest": r[..., 3:].unflatten(-1, (2, 2))}

    y = randn(3, 7, seed=2) * scale
    layer = il.argmin(il.least_squares(residuals), solver, batch_dims=1, curvature=curvature)
    x = layer(torch.zeros(3, 2, dtype=F64), y.requires_grad_())
    inverse, v = torch.linalg.pinv(A), randn(3, 2, seed=3)
    (g,) = torch.autograd.grad(x, y, v)
    assert relative_error(x, (inverse @ y[..., None])[..., 0]) < 1e-9
    assert relative_error(g, (inverse.mT @ v[..., None])[..., 0]) < 1e-9


def test_least_squares_inside_of_another_objective_says_its_problems_itself() -> None:
    """1/2 |x - y|^2 + s/2 |x - c|^2 for each of three: x = (y + s c) / (1 + s)."""
    loss = il.least_squares(lambda x, y: x - y, batch_dims=1)
    layer = il.argmin(il.proximal(loss, 0.5), il.solvers.LBFGS(rtol=1e-12), batch_dims=1)
    c, y = randn(3, 2, seed=1), randn(3, 2, seed=2)
    assert relative_error(layer(torch.zeros(3, 2, dtype=F64), c, y), (y + 0.5 * c) / 1.5) < 1e-9
    assert loss(c, y).shape == (3,) and il.least_squares(lambda x, y: x - y)(c, y).shape == ()


def test_pytrees_and_zero_dimensional_unknowns_are_fitted() -> None:
    time = torch.linspace(0, 1, 8, dtype=F64)
    init = {"rate": torch.tensor(1.0, dtype=F64), "height": torch.ones(2, dtype=F64)}

    def residuals(x: Any, y: Tensor) -> dict[str, Tensor]:
        both = x["height"][:, None] * torch.exp(-x["rate"] * time)
        return {"first": both[0] - y[0], "second": both[1] - y[1]}

    y = torch.stack([2 * torch.exp(-3 * time), 5 * torch.exp(-3 * time)])
    x = LevenbergMarquardt(rtol=1e-12)(il.least_squares(residuals), init, y)
    assert torch.allclose(x["rate"], numbers(3.0)[0], rtol=1e-9)
    assert torch.allclose(x["height"], numbers(2.0, 5.0), rtol=1e-9)


# ---------------------------------------------------------------------------------------- ranks, scales, precisions


def test_a_rank_deficient_jacobian_gets_the_shortest_step() -> None:
    """Linear residuals: one step from 0 is the least-squares solution of smallest norm, in units of the columns."""
    left, right = randn(9, 2, seed=2), randn(2, 4, seed=3)
    matrix, b = left @ right, randn(9, seed=4)
    lengths = matrix.norm(dim=0)
    shortest = torch.linalg.pinv(matrix / lengths, rtol=1e-10) @ b / lengths
    result = LevenbergMarquardt(rtol=1e-10).run(il.least_squares(lambda x: matrix @ x - b), torch.zeros(4, dtype=F64))
    assert result.status is Status.CONVERGED and result.num_steps == 1
    assert relative_error(result.value, shortest) < 1e-10


def test_fewer_residuals_than_unknowns_are_solved() -> None:
    result = LevenbergMarquardt(rtol=1e-12).run(
        il.least_squares(lambda x: (x**2).sum().reshape(1) - 3.0), numbers(1.0, 2.0, -1.0)
    )
    assert result.status is Status.CONVERGED
    assert abs(float((result.value**2).sum()) - 3) < 1e-9


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_units_of_residuals_and_unknowns_do_not_matter(scale: float) -> None:
    def scaled(x: Tensor, y: Tensor) -> Tensor:
        return scale * decay(torch.stack([x[0] * scale, x[1]]), y)

    (y,) = curves((2.0, 0.5))
    x = LevenbergMarquardt(rtol=1e-10)(il.least_squares(scaled), numbers(1 / scale, 1.0), y)
    assert torch.allclose(x * numbers(scale, 1.0), numbers(2.0, 0.5), rtol=1e-8)


def test_float32_is_accurate_to_its_rounding() -> None:
    y = (curves((2.0, 0.5))[0] + 0.01 * randn(12, seed=5)).float()
    exact = LevenbergMarquardt()(il.least_squares(decay), numbers(1.0, 1.0), y.double())
    result = LevenbergMarquardt().run(il.least_squares(decay), torch.ones(2), y)
    assert result.value.dtype == torch.float32 and result.status is Status.STAGNATED
    assert relative_error(result.value.double(), exact) < 1e-5  # 100 eps: the Jacobian's condition is 3


def test_a_trial_where_the_residuals_overflow_only_shortens_the_step() -> None:
    result = LevenbergMarquardt(rtol=1e-10).run(
        il.least_squares(lambda x: torch.stack([torch.exp(x[0] ** 2) - 2, 1e-4 * x[0]])), numbers(1e-3)
    )
    assert result.status is Status.CONVERGED
    assert abs(float(result.value) - math.sqrt(math.log(2))) < 1e-6


# ------------------------------------------------------------------------------------------------------ in a layer


def test_the_gradient_of_a_fit_agrees_with_finite_differences() -> None:
    (y,) = curves((2.0, 0.5))
    y = y + 0.1 * randn(12, seed=6)  # residuals that do not vanish: the full Hessian counts
    solver = LevenbergMarquardt(rtol=1e-13)
    layer = il.argmin(il.least_squares(decay), solver)
    fit = partial(layer, numbers(1.0, 1.0))
    assert torch.autograd.gradcheck(fit, y.requires_grad_(), eps=1e-5, atol=1e-7)  # eps^2, and 1e-12 / eps
    assert torch.autograd.gradgradcheck(fit, y, eps=1e-5, atol=1e-6)
    lanes = torch.stack([y.detach(), 2 * y.detach()])
    batched = torch.func.vmap(torch.func.jacrev(fit))(lanes)
    for lane, jacobian in zip(lanes, batched, strict=True):
        assert relative_error(jacobian, torch.func.jacrev(fit)(lane)) < 1e-8


def test_a_layer_records_how_it_ended() -> None:
    layer = il.argmin(il.least_squares(decay), LevenbergMarquardt(rtol=1e-10))
    layer(numbers(1.0, 1.0), curves((2.0, 0.5))[0])
    record = layer.records[0]
    assert record.solver_status is Status.CONVERGED and 3 < record.num_steps < 20


def test_the_callback_sees_every_step_and_the_objective() -> None:
    seen: list[il.solvers.Iteration] = []
    (y,) = curves((2.0, 0.5))
    objective = il.least_squares(decay)
    result = LevenbergMarquardt(rtol=1e-10, callback=seen.append).run(objective, numbers(1.0, 1.0), y)
    assert [iteration.step for iteration in seen] == list(range(result.num_steps + 1))
    for iteration in seen:
        gradient = torch.func.grad(lambda x: objective(x, y))(iteration.x)
        assert torch.allclose(iteration.value, objective(iteration.x, y), rtol=1e-10, atol=1e-25)
        assert torch.allclose(iteration.gradient_norm, gradient.norm(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (
            lambda x: (x * x).sum(),
            r"LevenbergMarquardt needs an objective that says what its model is.*use il.solvers.LBFGS\(\)",
        ),
        (
            il.composite(lambda f: (f * f).sum(), lambda x: x),
            r"half the sum of squares .* is 2.5, where the objective is 5. Make it by il.least_squares",
        ),
        (il.least_squares(lambda x: x.detach() - 1), "does not depend on x in a way autograd can see"),
    ],
)
def test_objectives_that_are_no_sums_of_squares_are_refused(objective: Any, words: str) -> None:
    with pytest.raises(il.ObjectiveError, match=words):
        LevenbergMarquardt()(objective, numbers(1.0, 2.0))


def test_a_loss_that_is_half_the_squares_at_init_only_is_refused_on_the_way() -> None:
    """Huber's loss is half the squares of residuals up to 10: 4.4 at init, but 48 after the first step."""
    huber = il.composite(lambda f: torch.nn.functional.huber_loss(f, 0 * f, reduction="sum", delta=10.0), rosenbrock)
    with pytest.raises(il.ObjectiveError, match="half the sum of squares of what the model returns"):
        LevenbergMarquardt()(huber, numbers(-1.2, 1.0))


def test_a_proximal_term_is_one_more_residual() -> None:
    """As the error says: sqrt(strength) * (x - theta)."""
    data, target, theta = randn(9, 3, seed=7), randn(9, seed=8), randn(3, seed=9)
    with pytest.raises(il.ObjectiveError, match=r"one more of them, sqrt\(strength\) \* \(x - theta\)"):
        il.argmin(il.proximal(il.least_squares(lambda x: data @ x - target), 2.0), LevenbergMarquardt())(theta, theta)
    residuals = il.least_squares(lambda x: torch.cat([data @ x - target, 2**0.5 * (x - theta)]))
    expected = torch.linalg.solve(data.T @ data + 2 * torch.eye(3, dtype=F64), data.T @ target + 2 * theta)
    assert relative_error(LevenbergMarquardt(rtol=1e-12)(residuals, theta), expected) < 1e-10
