"""Every method of SciPy and pytorch-minimize, and the optimizers of torch, as black boxes: the gradient of each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn, smooth_objective
from torch import Tensor

import implicitlayer as il
from implicitlayer.testing import check_argmin_gradients

STRENGTH, ZEROS = torch.tensor(0.5, dtype=F64), torch.zeros(3, dtype=F64)
A, B = randn(8, 3, seed=1), randn(8, seed=2)


def ridge(x: Tensor, strength: Tensor) -> Tensor:
    return ((A @ x - B) ** 2).sum() + strength * (x**2).sum()


def closed_form(strength: Tensor) -> Tensor:
    return torch.linalg.solve(A.T @ A + strength * torch.eye(3, dtype=F64), A.T @ B)


# dx/dstrength = -2 H^-1 x is linear in x here: it inherits the relative error of x, and that of x is at most
# (gradient at the end) / (smallest curvature, above 1), or a few times sqrt(eps) where only values are compared. TNC is
# given gradients, but with ftol = 0 it ends at the first step whose two values are equal, whatever gtol says.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "Nelder-Mead": ({"xatol": 1e-9, "fatol": 1e-15, "maxiter": 5000, "maxfev": 5000}, 2e-7),
    "Powell": ({"xtol": 1e-10, "ftol": 1e-15}, 2e-7),
    "COBYLA": ({"tol": 1e-9, "maxiter": 5000}, 2e-7),
    "COBYQA": ({"final_tr_radius": 1e-9}, 2e-7),
    "CG": ({"gtol": 1e-9}, 1e-8),
    "BFGS": ({"gtol": 1e-9}, 1e-8),
    "L-BFGS-B": ({"ftol": 0.0, "gtol": 1e-9}, 1e-8),
    "TNC": ({"ftol": 0.0, "gtol": 1e-9, "xtol": 0.0, "maxfun": 1000}, 2e-7),
    "SLSQP": ({"ftol": 1e-17}, 2e-7),
    "Newton-CG": ({"xtol": 1e-10}, 1e-8),
    # these compare values, which know no gradient below about sqrt(eps); the last Newton step goes far beyond gtol
    "trust-ncg": ({"gtol": 1e-7}, 1e-8),
    "trust-krylov": ({"gtol": 1e-7}, 1e-8),
    "trust-constr": ({"gtol": 1e-9, "xtol": 1e-12}, 1e-8),
}


def relative_error(layer: Callable[..., Tensor]) -> float:
    found = torch.func.jacrev(lambda strength: layer(ZEROS, strength))(STRENGTH)
    expected = torch.func.jacrev(closed_form)(STRENGTH)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")  # trust-constr's own remark at the solution
# trust-krylov divides 0 by 0 where it stands on the solution already, on some runs, and is right all the same
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_every_method_of_scipy_minimize_has_the_gradient_of_the_closed_form(method: str) -> None:
    pytest.importorskip("scipy")
    options, allowed = METHODS[method]
    assert relative_error(il.argmin(ridge, il.solvers.SciPyMinimize(method, options=options))) < allowed


@pytest.mark.parametrize("method", ["dogleg", "trust-exact"])
def test_methods_that_take_the_whole_hessian_do_too(method: str) -> None:
    pytest.importorskip("scipy")

    def hessian(x: Any) -> Any:
        return torch.func.hessian(ridge)(torch.from_numpy(x), STRENGTH).numpy()

    solver = il.solvers.SciPyMinimize(method, options={"gtol": 1e-9}, hess=hessian)
    assert relative_error(il.argmin(ridge, solver)) < 1e-8


@pytest.mark.parametrize("name", ["Nelder-Mead", "COBYQA"])
def test_polish_takes_a_loose_search_to_rounding(name: str) -> None:
    pytest.importorskip("scipy")
    solver = il.solvers.SciPyMinimize(name, tol=1e-3)
    # x is off by about 1e-3, and so is the gradient; the problem is quadratic: one Newton step is the solution
    assert relative_error(il.argmin(ridge, solver, stationarity_rtol=0.1)) > 1e-6
    assert relative_error(il.argmin(ridge, solver, polish=1)) < 1e-9


# The root of sinh(x) + x / 2 = t, coupled through a matrix, by every method that solves small dense systems.
COUPLING = torch.eye(3, dtype=F64) + 0.1 * randn(3, 3, seed=3)
RIGHT = torch.tensor([0.5, -1.0, 2.0], dtype=F64)


def equations(x: Tensor, t: Tensor) -> Tensor:
    return torch.sinh(x) + 0.5 * COUPLING @ x - t


@pytest.mark.parametrize("method", ["hybr", "lm", "broyden1", "broyden2", "anderson", "krylov", "df-sane"])
def test_every_method_of_scipy_root_has_the_gradient_of_the_inverse_function(method: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")

    def solver(residual: Callable[..., Tensor], init: Tensor, t: Tensor) -> Any:
        result = optimize.root(
            lambda x: residual(torch.from_numpy(x), t).numpy(), init.numpy(), method=method, tol=1e-10
        )
        assert result.success, result.message
        return result.x

    layer = il.root(equations, solver)
    x = layer(ZEROS, RIGHT)
    found = torch.func.jacrev(lambda t: layer(ZEROS, t))(RIGHT)
    expected = torch.linalg.inv(torch.diag(torch.cosh(x)) + 0.5 * COUPLING)
    # the closed form is taken at the answer itself, so that only the linear solve (rtol 1e-10) is between them
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert float(equations(x, RIGHT).norm()) < 1e-8


@pytest.mark.parametrize("method", ["lm", "trf", "dogbox"])
def test_every_method_of_scipy_least_squares_has_the_gradient_of_its_own_differences(method: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    times = torch.linspace(0, 3, 6, dtype=F64)
    data = 2 * torch.exp(-0.7 * times) + 0.1 * randn(6, seed=4)

    def residuals(x: Tensor, data: Tensor) -> Tensor:
        return x[0] * torch.exp(-x[1] * times) - data

    def solver(objective: Any, init: Tensor, data: Tensor) -> Any:
        fun = lambda x: residuals(torch.from_numpy(x), data).numpy()  # noqa: E731
        return optimize.least_squares(fun, init.numpy(), method=method, xtol=1e-14, ftol=1e-14, gtol=1e-14).x

    init = torch.ones(2, dtype=F64)
    report = check_argmin_gradients(il.least_squares(residuals), solver, init, data, modes=("vjp",), polish=1)
    assert report.verdict == "passed", str(report)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.02, "momentum": 0.5},
    "Adam": {"lr": 0.1},
    "AdamW": {"lr": 0.1, "weight_decay": 0.0},
    "RMSprop": {"lr": 0.01},
    "Adagrad": {"lr": 0.5},
    "Rprop": {"lr": 0.1},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch_with_polish_have_the_gradient_of_the_closed_form(name: str) -> None:
    optimizer = getattr(torch.optim, name)
    solver = il.solvers.TorchOptimizer(optimizer, max_steps=150, **OPTIMIZERS[name])
    # two Newton steps on a quadratic: rounding, whatever the optimizer left
    assert relative_error(il.argmin(ridge, solver, polish=2)) < 1e-9


TORCHMIN = ["newton-exact", "newton-cg", "bfgs", "l-bfgs", "cg", "trust-ncg", "trust-exact", "dogleg"]


@pytest.mark.parametrize("method", TORCHMIN)
def test_methods_of_pytorch_minimize_with_polish_have_the_gradient_of_their_own_differences(method: str) -> None:
    torchmin = pytest.importorskip("torchmin")

    weight, offset, strength = randn(6, 3, seed=1), randn(6, seed=2), torch.tensor(0.2, dtype=F64)

    def objective(x: Tensor, strength: Tensor) -> Tensor:
        return smooth_objective(x, weight, offset, strength)

    def solver(objective: Callable[..., Tensor], init: Tensor, strength: Tensor) -> Tensor:
        result: Tensor = torchmin.minimize(lambda x: objective(x, strength), init, method=method, tol=1e-9).x
        return result

    report = check_argmin_gradients(objective, solver, ZEROS, strength, modes=("vjp",), polish=3)
    assert report.verdict == "passed", str(report)


def test_an_objective_that_is_not_the_solvers_own_is_told() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")

    def solver(objective: Any, init: Tensor, alpha: Tensor) -> Any:
        return linear_model.Ridge(alpha=alpha.item(), fit_intercept=False).fit(A.numpy(), B.numpy()).coef_

    def with_a_mean(x: Tensor, alpha: Tensor) -> Tensor:
        return ((A @ x - B) ** 2).mean() + alpha * (x**2).sum()

    assert relative_error(il.argmin(ridge, solver, on_failure="raise")) < 1e-8
    with pytest.warns(il.StationarityWarning, match="the solver's answer is not stationary"):
        il.argmin(with_a_mean, solver)(ZEROS, STRENGTH.clone().requires_grad_())
