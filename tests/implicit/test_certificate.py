"""The error certificate: a rigorous bound is never below the true error, an estimate is close to it."""

# The exact gradient is that of the exact solution (dense Newton, good to about 1e-15) by a dense solve. Both errors of
# Algorithm 2 are made on purpose: x is moved by a known distance, conjugate gradients are stopped early. They are at
# least 1e-8 of the solution here, far above rounding.

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import F64, dense_gradients, newton, randn, smooth_objective, spd_matrix
from torch import Tensor

import implicitlayer as il

# sup of the third derivative of softplus, s (1 - s) (1 - 2s) with s the logistic function, at s = (1 - 1/sqrt 3) / 2
SOFTPLUS_3 = 1 / (6 * 3**0.5)


def moved(distance: float, seed: int) -> Callable[..., Tensor]:
    """A solver whose answer is this far from the solution."""

    def solver(f: Any, init: Tensor, *theta: Tensor) -> Tensor:
        direction = randn(*init.shape, seed=seed)
        return newton(f, init, *theta) + distance * direction / direction.norm()

    return solver


def solve(
    layer: il.ImplicitLayer, n: int, theta: list[Tensor], v: Any
) -> tuple[list[Tensor], Tensor, il.GradientError]:
    """Gradients, x and the certificate; v is a cotangent, or a function of x."""
    with il.diagnostics() as records:
        x = layer(torch.zeros(n, dtype=F64), *theta)
        needed = [t for t in theta if t.requires_grad]
        gradients = torch.autograd.grad(x, needed, v(x.detach()) if callable(v) else v)
    record = records[-1]
    assert isinstance(record, il.BackwardRecord)
    return list(gradients), x.detach(), record.gradient_error


def distance_of(got: list[Tensor], expected: list[Tensor]) -> float:
    return float(torch.cat([(a - b).reshape(-1) for a, b in zip(got, expected, strict=True)]).norm())


class Problem:
    """Softplus losses of W x + c and 1/2 s |x|^2, with its constants for theta = c."""

    def __init__(self, n: int, seed: int, exponent: int) -> None:
        self.n = n
        m = n + seed % 5
        self.weight, self.offset = randn(m, n, seed=seed), randn(m, seed=seed + 1).requires_grad_()
        self.log_strength = torch.tensor(float(exponent), dtype=F64)
        self.theta = [self.weight, self.offset, self.log_strength]
        self.exact = newton(smooth_objective, torch.zeros(n, dtype=F64), *(t.detach() for t in self.theta))
        norm, row = float(torch.linalg.matrix_norm(self.weight, 2)), float(self.weight.norm(dim=1).max())
        # gradient in x: W' s(Wx + c) + s x; Hessian W' diag(s') W + s I; mixed derivative W' diag(s'), s' <= 1/4
        self.constants: dict[str, float] = {
            "strong_convexity": float(self.log_strength.exp()),
            "hessian_lipschitz": SOFTPLUS_3 * row * norm**2,
            "mixed_bound": norm / 4,
            "mixed_lipschitz": SOFTPLUS_3 * row * norm,
        }

    def true_error(self, gradients: list[Tensor], v: Any) -> float:
        v = v(self.exact) if callable(v) else v
        expected = dense_gradients(smooth_objective, self.exact, self.theta, v)
        return distance_of(gradients, [expected[1]])


problems = {
    "n": st.integers(1, 8),
    "seed": st.integers(0, 10_000),
    "exponent": st.integers(-3, 2),
    "log10_distance": st.integers(-8, 0),
    "steps": st.integers(1, 8),
}


@given(**problems, smoothness=st.integers(0, 3))
def test_the_bound_is_never_below_the_true_error(
    n: int, seed: int, exponent: int, log10_distance: int, steps: int, smoothness: int
) -> None:
    problem = Problem(n, seed, exponent)
    constant = randn(n, seed=seed + 2)

    def cotangent(x: Tensor) -> Tensor:  # the gradient of an outer loss: c'x + L/2 |x|^2
        return constant + smoothness * x

    layer = il.argmin(
        smooth_objective,
        moved(10.0**log10_distance, seed + 3),
        linear_solver=il.ConjugateGradient(max_steps=steps),
        stationarity_rtol=None,
        assumptions=il.Assumptions(**problem.constants, cotangent_lipschitz=smoothness),
    )
    gradients, x, error = solve(layer, n, problem.theta, cotangent)
    assert error.rigorous
    assert float(error.distance) >= float((x - problem.exact).norm()) * (1 - 1e-6)
    assert float(error) >= problem.true_error(gradients, cotangent)
    assert float(error.total) == pytest.approx(float(error.inner + error.linear))


@given(**problems)
def test_the_bound_is_at_most_that_of_lemma_3(
    n: int, seed: int, exponent: int, log10_distance: int, steps: int
) -> None:
    """On the proximal problem: (2 lambda rho B / mu^2 + lambda L / mu) delta + delta'."""
    matrix, target, strength = spd_matrix(n, 2, seed), randn(n, seed=seed + 1), 10.0**exponent
    theta = randn(n, seed=seed + 2).requires_grad_()
    outer = 0.7
    constant = randn(n, seed=seed + 4)
    objective = il.proximal(
        lambda phi: 0.5 * phi @ matrix @ phi + torch.cos(phi - target).sum() + 0.5 * (phi**2).sum(), strength
    )  # the Hessian of the loss is A + I - diag(cos): at least A; its Lipschitz constant is that of cos, 1
    mu, rho = strength, 1.0
    layer = il.argmin(
        objective,
        moved(10.0**log10_distance, seed + 3),
        linear_solver=il.ConjugateGradient(max_steps=steps),
        stationarity_rtol=None,
        assumptions=il.Assumptions(mu, hessian_lipschitz=rho, cotangent_lipschitz=outer),
    )
    gradients, x, error = solve(layer, n, [theta], lambda x: constant + outer * x)
    assert error.rigorous  # a proximal objective knows its mixed derivative
    v = constant + outer * x
    delta = float(error.distance)
    # delta': the paper's error of g = lambda u, at most lambda |r| / mu
    lemma = (2 * strength * rho * float(v.norm()) / mu**2 + strength * outer / mu) * delta + float(error.linear)
    # |u| + |r|/mu stands for B/mu: below it for a converged solve; a truncated one has |u| <= B/mu, |r| <= kappa^1/2 B
    if float(error.linear) <= float(v.norm()) * strength / mu:
        assert float(error) <= lemma * (1 + 1e-9)
    exact = newton(objective, torch.zeros(n, dtype=F64), theta.detach())
    expected = dense_gradients(objective, exact, [theta], constant + outer * exact)
    assert float(error) >= distance_of(gradients, expected)


def estimate_ratio(n: int, seed: int, exponent: int, log10_distance: int, steps: int) -> float:
    problem = Problem(n, seed, exponent)
    v = randn(n, seed=seed + 2)
    layer = il.argmin(
        smooth_objective,
        moved(10.0**log10_distance, seed + 3),
        linear_solver=il.ConjugateGradient(max_steps=steps),
        stationarity_rtol=None,
    )
    gradients, _, error = solve(layer, n, problem.theta, v)
    assert not error.rigorous and "estimate" in str(error) and "no assumptions" in error.note
    return float(error) / problem.true_error(gradients, v)


def test_the_estimate_is_within_a_factor_of_ten_in_95_of_100_problems() -> None:
    ratios = []
    for seed in range(120):
        # every combination of distance 1e-8 ... 1, strength e^-3 ... e^2 and 1 ... 8 steps in some order
        ratio = estimate_ratio(
            n=2 + seed % 8, seed=seed, exponent=seed % 6 - 3, log10_distance=-(seed % 9), steps=1 + seed % 7
        )
        ratios.append(ratio)
    within = sum(0.1 <= ratio <= 10 for ratio in ratios)
    assert within >= 0.95 * len(ratios), sorted(ratios)


def test_an_exact_answer_has_an_error_of_rounding_only() -> None:
    problem = Problem(5, 0, 0)
    layer = il.argmin(smooth_objective, newton, linear_solver=il.ConjugateGradient(rtol=1e-14))
    gradients, _, error = solve(layer, 5, problem.theta, randn(5, seed=1))
    assert float(error) <= 1e-13 * float(gradients[0].norm())
    assert float(error.relative) <= 1e-13


def test_missing_constants_make_it_an_estimate_that_names_them() -> None:
    problem = Problem(4, 0, 0)
    v = randn(4, seed=1)
    for given_, missing in (
        ({}, "lacks mixed_bound, hessian_lipschitz, mixed_lipschitz"),
        ({"hessian_lipschitz": 1.0, "mixed_bound": 1.0}, "lacks mixed_lipschitz"),
    ):
        layer = il.argmin(smooth_objective, moved(1e-4, 1), assumptions=il.Assumptions(1.0, **given_))
        _, _, error = solve(layer, 4, problem.theta, v)
        assert not error.rigorous and missing in error.note


def test_a_root_that_is_not_symmetric_is_judged_too() -> None:
    """F = A x + sin(x)/2 - t, A with symmetric part >= 2: strongly monotone with 1.5, Lipschitz constant 1/2."""
    skew = randn(5, 5, seed=0)
    matrix = 2 * torch.eye(5, dtype=F64) + skew - skew.T

    def residual(x: Tensor, t: Tensor) -> Tensor:
        return matrix @ x + 0.5 * torch.sin(x) - t

    def exact(t: Tensor) -> Tensor:
        x = torch.zeros(5, dtype=F64)
        for _ in range(50):
            x = x - torch.linalg.solve(matrix + 0.5 * torch.diag(torch.cos(x)), residual(x, t))
        return x

    t, v = randn(5, seed=1).requires_grad_(), randn(5, seed=2)
    at = exact(t.detach())
    true = torch.linalg.solve((matrix + 0.5 * torch.diag(torch.cos(at))).T, v)
    for assumptions in (None, il.Assumptions(1.5, hessian_lipschitz=0.5, mixed_bound=1.0, mixed_lipschitz=0.0)):
        layer = il.root(residual, lambda f, x, t: exact(t) + 1e-3, stationarity_rtol=None, assumptions=assumptions)
        gradients, _, error = solve(layer, 5, [t], v)
        error_now = distance_of(gradients, [true])
        assert error.rigorous == (assumptions is not None)
        assert float(error) >= 0.999 * error_now
        assert error.rigorous or float(error) <= 1.05 * error_now


def test_lanes_have_errors_of_their_own_also_with_a_shared_theta() -> None:
    problem = Problem(4, 0, 0)
    offsets = torch.stack([problem.offset.detach(), 2 * problem.offset.detach()]).requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    v = randn(2, 4, seed=1)
    layer = il.argmin(smooth_objective, moved(1e-3, 1), stationarity_rtol=None)
    with il.diagnostics() as records:
        x = torch.func.vmap(lambda o: layer(torch.zeros(4, dtype=F64), weight, o, problem.log_strength))(offsets)
        torch.autograd.grad(x, (weight, offsets), v)
    together = records[-1].gradient_error  # type: ignore[union-attr]
    assert together.total.shape == (2,)
    for lane in range(2):
        _, _, alone = solve(layer, 4, [weight, offsets[lane].detach().requires_grad_(), problem.log_strength], v[lane])
        assert float(together.total[lane]) == pytest.approx(float(alone.total), rel=1e-4)


def test_damping_counts_as_an_error_of_the_linear_solve() -> None:
    matrix, b, v = spd_matrix(4, 1, 0), randn(4, seed=1).requires_grad_(), randn(4, seed=2)
    layer = il.argmin(
        lambda x, b: 0.5 * x @ matrix @ x - b @ x, lambda f, x, b: torch.linalg.solve(matrix, b), damping=0.1
    )
    gradients, _, error = solve(layer, 4, [b], v)
    true = distance_of(gradients, [torch.linalg.solve(matrix, v)])
    assert true > 0.01
    assert float(error) == pytest.approx(true, rel=1e-4) and float(error.linear) == pytest.approx(true, rel=1e-4)


def test_a_singular_hessian_has_an_infinite_estimate() -> None:
    layer = il.argmin(
        lambda x, t: 0.5 * (x[0] - t) ** 2 + 0 * x[1],
        lambda f, x, t: torch.stack([t, t * 0]),
        on_failure="ignore",
    )
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    _, _, error = solve(layer, 2, [t], torch.ones(2, dtype=F64))
    assert float(error) == float("inf") and "could not be solved" in error.note


def test_a_record_outside_of_diagnostics_says_how_to_get_it() -> None:
    t = torch.ones(2, dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), lambda f, x, t: t)
    layer(torch.zeros(2, dtype=F64), t).sum().backward()
    assert isinstance(layer.last_record, il.BackwardRecord)
    with pytest.raises(il.NotRecordedError, match=r"with il\.diagnostics\(\) as records"):
        layer.last_record.gradient_error  # noqa: B018
    with il.diagnostics() as records:
        torch.func.jvp(lambda t: layer(torch.zeros(2, dtype=F64), t), (t.detach(),), (torch.ones(2, dtype=F64),))
    with pytest.raises(il.NotRecordedError, match="forward-mode"):
        records[-1].gradient_error  # type: ignore[union-attr]  # noqa: B018


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"strong_convexity": 0.0}, "strong_convexity=0.0 must be positive"),
        ({"strong_convexity": float("inf")}, "strong_convexity=inf must be positive and finite"),
        ({"strong_convexity": float("nan")}, "strong_convexity=nan must be positive"),
        ({"strong_convexity": 1.0, "mixed_bound": -1.0}, "mixed_bound=-1.0 must be non-negative"),
    ],
)
def test_constants_that_make_no_sense_are_an_error(constants: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        il.Assumptions(**constants)


def test_assumptions_of_another_type_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"assumptions must be il\.Assumptions"):
        il.argmin(lambda x: x, lambda f, x: x, assumptions=2.0)  # type: ignore[arg-type]


def test_an_optimizer_step_between_backward_and_reading_is_an_error_and_not_another_number() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), lambda f, x, t: 1.1 * t, on_failure="ignore")
    with il.diagnostics() as records:
        layer(torch.zeros(2, dtype=F64), p).sum().backward()
    torch.optim.SGD([p], lr=0.1).step()
    with pytest.raises(il.NotRecordedError, match="changed in place since the solve"):
        records[1].gradient_error  # type: ignore[union-attr]  # noqa: B018


def test_the_bound_of_all_lanes_together_holds_for_a_theta_that_they_share() -> None:
    t, v = torch.ones(3, dtype=F64, requires_grad=True), torch.ones(8, 3, dtype=F64)

    def short(operator: Any, rhs: Tensor) -> Tensor:
        return 0.9 * rhs  # A = I: a residual of a tenth

    layer = il.argmin(
        lambda x, t: 0.5 * ((x - t) ** 2).sum(-1),
        lambda f, x, t: t.expand(8, 3).clone(),
        batch_dims=1,
        linear_solver=short,
        on_failure="ignore",
        assumptions=il.Assumptions(1.0, hessian_lipschitz=0.0, mixed_bound=1.0, mixed_lipschitz=0.0),
    )
    with il.diagnostics() as records:
        (gradient,) = torch.autograd.grad(layer(torch.zeros(8, 3, dtype=F64), t), t, v)
    error = records[1].gradient_error  # type: ignore[union-attr]
    assert error.rigorous and float(error) >= float((gradient - 8).norm()) > float(error.total.max())
    assert "of all lanes together <=" in str(error)


def test_one_tensor_given_twice_has_the_error_of_the_sum() -> None:
    t = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    for assumptions in (None, il.Assumptions(1.0, hessian_lipschitz=0.0, mixed_bound=2**0.5, mixed_lipschitz=0.0)):
        layer = il.argmin(
            lambda x, a, b: 0.5 * (x * x).sum() - (a + b) @ x,
            lambda f, x, a, b: a + b,
            linear_solver=lambda operator, rhs: 0.9 * rhs,
            on_failure="ignore",
            assumptions=assumptions,
        )
        with il.diagnostics() as records:
            (gradient,) = torch.autograd.grad(layer(torch.zeros(2, dtype=F64), t, t).sum(), t)
        true = float((gradient - 2).norm())
        error = records[1].gradient_error  # type: ignore[union-attr]
        assert float(error) >= true * (1 - 1e-9)
        assert error.rigorous or float(error) <= true * 1.01
