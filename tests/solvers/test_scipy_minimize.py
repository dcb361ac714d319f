"""scipy.optimize.minimize as an inner solver."""

import sys
from typing import Any

import pytest
import torch
from references import F64, newton, randn, smooth_objective
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import SciPyMinimize

# Gradients near 1e-9 (or function values near eps) with curvature >= 1 put x within about 1e-8 ... 1e-7 of the minimum.
METHODS: dict[str, dict[str, Any]] = {
    "Nelder-Mead": {"options": {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 5000, "maxfev": 5000}},
    "Powell": {"options": {"xtol": 1e-10, "ftol": 1e-15}},
    "CG": {"options": {"gtol": 1e-9}},
    "BFGS": {"options": {"gtol": 1e-8}},
    "Newton-CG": {"options": {"xtol": 1e-10}},
    "L-BFGS-B": {"options": {"ftol": 0.0, "gtol": 1e-9}},
    "TNC": {"options": {"ftol": 0.0, "gtol": 1e-9, "xtol": 0.0, "maxfun": 1000}},
    "SLSQP": {"options": {"ftol": 1e-17}},
    "trust-ncg": {"options": {"gtol": 1e-9}},
    "trust-krylov": {"options": {"gtol": 1e-9}},
    "trust-constr": {"options": {"gtol": 1e-9, "xtol": 1e-12}},
}


def problem() -> tuple[Tensor, ...]:
    return randn(6, 3, seed=1), randn(6, seed=2), torch.tensor(0.2, dtype=F64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")  # trust-constr's own remark at the solution
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # trust-krylov of SciPy 1.17
def test_every_method_finds_the_minimum_that_newton_finds(method: str) -> None:
    theta = problem()
    result = SciPyMinimize(method, **METHODS[method]).run(smooth_objective, torch.zeros(3, dtype=F64), *theta)
    expected = newton(smooth_objective, torch.zeros(3, dtype=F64), *theta)
    # derivative-free methods compare function values: sqrt(eps) = 1.5e-8 of accuracy in x, a few times over
    assert torch.allclose(result.value, expected, rtol=0, atol=2e-7 if method in ("Nelder-Mead", "Powell") else 3e-8)
    assert result.num_steps is not None and result.num_steps > 0


@pytest.mark.parametrize("method", ["dogleg", "trust-exact"])
def test_methods_that_need_the_full_hessian_get_it_from_the_caller(method: str) -> None:
    theta = problem()

    def hessian(x: Any) -> Any:
        return torch.autograd.functional.hessian(lambda x: smooth_objective(x, *theta), torch.from_numpy(x)).numpy()

    solver = SciPyMinimize(method, options={"gtol": 1e-9}, hess=hessian)
    x = solver(smooth_objective, torch.zeros(3, dtype=F64), *theta)
    assert torch.allclose(x, newton(smooth_objective, torch.zeros(3, dtype=F64), *theta), rtol=0, atol=3e-8)


def test_the_record_is_scipys_own() -> None:
    result = SciPyMinimize("BFGS", tol=1e-8).run(smooth_objective, torch.zeros(3, dtype=F64), *problem())
    assert result.status is Status.CONVERGED and result.message == result.aux.message
    assert result.num_steps == result.aux.nit and torch.equal(result.value, torch.from_numpy(result.aux.x))
    stopped = SciPyMinimize("BFGS", options={"maxiter": 1}).run(smooth_objective, torch.zeros(3, dtype=F64), *problem())
    assert stopped.status is not None and not stopped.status.ok and stopped.num_steps == 1


def test_pytrees_and_matrices_come_back_in_their_shapes() -> None:
    init = {"w": torch.zeros(2, 2, dtype=F64), "b": (torch.tensor(0.0, dtype=F64), torch.zeros(0, dtype=F64))}
    target = randn(2, 2, seed=3)
    x = SciPyMinimize("BFGS", tol=1e-10)(
        lambda x, t: ((x["w"] - t) ** 2).sum() + (x["b"][0] - x["w"].sum()) ** 2, init, target
    )
    assert torch.allclose(x["w"], target, atol=1e-8) and x["b"][1].shape == (0,)
    assert float(x["b"][0]) == pytest.approx(float(target.sum()), abs=1e-8)
    assert not x["w"].requires_grad


def test_float32_unknowns_are_solved_in_double_and_cast_back() -> None:
    x = SciPyMinimize("BFGS")(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2))
    assert x.dtype == torch.float32 and torch.allclose(x, torch.full((2,), 3.0), atol=1e-5)


def test_bounds_and_callbacks_reach_scipy() -> None:
    seen: list[float] = []
    solver = SciPyMinimize("L-BFGS-B", bounds=[(0.0, 1.0)] * 2, callback=lambda i: seen.append(float(i.x[0])))
    x = solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=F64))
    assert x.tolist() == [1.0, 1.0] and seen


@pytest.mark.parametrize("bend", [0.0, 2.0])
def test_products_with_the_hessian_are_zero_in_unknowns_that_are_linear(bend: float) -> None:
    from scipy.optimize import minimize

    def objective(x: dict[str, Tensor]) -> Tensor:
        value = x["a"][0] - 2 * x["a"][1] + x["b"].sum()
        return value + bend / 2 * ((x["b"] - 3) ** 2).sum() if bend else value

    box = [(0.0, 1.0), (0.0, 1.0), (-5.0, 5.0)]
    init = {"a": torch.full((2,), 0.5, dtype=F64), "b": torch.zeros(1, dtype=F64)}
    x = SciPyMinimize("trust-constr", bounds=box)(objective, init)
    # the same method with the derivatives written out: it makes the same steps, up to rounding
    expected = minimize(
        lambda x: (x[0] - 2 * x[1] + x[2] + bend / 2 * (x[2] - 3) ** 2, [1.0, -2.0, 1.0 + bend * (x[2] - 3)]),
        [0.5, 0.5, 0.0],
        method="trust-constr",
        jac=True,
        hessp=lambda x, p: [0.0, 0.0, bend * p[2]],
        bounds=box,
    )
    assert torch.cat([x["a"], x["b"]]).sub(torch.from_numpy(expected.x)).abs().max() < 1e-9


def test_it_works_where_gradients_are_switched_off_and_leaves_module_gradients_alone() -> None:
    module = torch.nn.Linear(2, 1).double()
    with torch.no_grad():
        x = SciPyMinimize("BFGS")(lambda x: ((x - 3) ** 2).sum() + 0 * module(x).sum(), torch.zeros(2, dtype=F64))
    assert torch.allclose(x, torch.full((2,), 3.0, dtype=F64), atol=1e-5)
    assert all(p.grad is None for p in module.parameters())


def test_a_method_that_scipy_does_not_know_is_scipys_own_error() -> None:
    with pytest.raises(ValueError, match="Unknown solver nonsense"):
        SciPyMinimize("nonsense")(lambda x: (x**2).sum(), torch.ones(2, dtype=F64))


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"SciPyMinimize needs SciPy.*pip install 'implicitlayer\[scipy\]'"):
        SciPyMinimize()(lambda x: (x**2).sum(), torch.ones(2, dtype=F64))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # SciPy's own arithmetic with NaN
@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "Nelder-Mead"])
def test_nan_at_the_start_is_never_called_converged(method: str) -> None:
    result = SciPyMinimize(method).run(lambda x: x.log().sum(), torch.full((2,), -1.0, dtype=F64))
    assert result.status is Status.NONFINITE


def test_nan_in_the_gradient_at_the_start_is_never_called_converged() -> None:
    result = SciPyMinimize("L-BFGS-B").run(lambda x: x.square().sum().sqrt() + x.sum(), torch.zeros(2, dtype=F64))
    assert result.status is Status.NONFINITE


def test_an_objective_that_is_not_finite_somewhere_on_the_way_may_converge() -> None:
    # -log x - log(1 - x / 3) is NaN outside of (0, 3); its minimum is 1.5
    result = SciPyMinimize("Nelder-Mead", tol=1e-9).run(
        lambda x: -(x.log() + (1 - x / 3).log()).sum(), torch.full((1,), 0.1, dtype=F64)
    )
    assert result.status is Status.CONVERGED
    assert float(result.value) == pytest.approx(1.5, abs=1e-6)


def test_a_line_search_that_finds_no_lower_point_has_stagnated() -> None:
    # the gradient that autograd sees has the wrong sign, so that no step along it goes down
    result = SciPyMinimize("BFGS").run(
        lambda x: ((x.detach() ** 2) - x + x.detach()).sum(), torch.full((2,), 1.0, dtype=F64)
    )
    assert result.message == "Desired error not necessarily achieved due to precision loss."
    assert result.status is Status.STAGNATED


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "Nelder-Mead", "trust-constr"])
def test_no_unknowns_are_solved_at_once(method: str) -> None:
    layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(-1), il.solvers.SciPyMinimize(method), batch_dims=1)
    t = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    x = layer(torch.zeros(0, 3, dtype=torch.float64), t)
    (g,) = torch.autograd.grad(x.sum(), t)
    assert x.shape == g.shape == (0, 3) and layer.records[0].solver_status is il.Status.CONVERGED
