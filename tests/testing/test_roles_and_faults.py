"""Roles of theta and faulty solvers: layers do what il.testing expects, and what they must not do is noticed."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, find, given, settings
from references import F64
from torch import Tensor

import implicitlayer as il
from implicitlayer import testing

QUICK = settings(derandomize=True, database=None, max_examples=500, phases=[Phase.generate, Phase.shrink])

# --------------------------------------------------------------------------------------------------------------- roles

ROLES = [
    "leaf",
    "non-leaf",
    "view",
    "parameter",
    "in a dict",
    "frozen",
    "closed over",
    "closed over, computed",
    "same tensor twice",
    "also init",
    "beside an unused tensor",
    "beside an integer tensor",
    "beside a bool tensor",
    "beside Python numbers",
    "beside a string and None",
]


def check_role(case: testing.RoleCase, layer: Callable[..., Tensor], v: Tensor) -> None:
    x = layer(case.init, *case.theta)
    inputs = [t for t in case.inputs if t.requires_grad]
    got = iter(torch.autograd.grad(x, inputs, v, allow_unused=True))
    right = case.expected(v)
    assert len(right) == len(case.inputs)
    size = max(float(r.norm()) for r in right if r is not None)
    for tensor, expected in zip(case.inputs, right, strict=True):
        gradient = next(got) if tensor.requires_grad else None
        if expected is None:
            assert gradient is None or not gradient.any()
        else:  # linear solves to 1e-10 (up to ten times that) at a condition of 20
            assert gradient is not None and float((gradient - expected).norm()) <= 1e-7 * size


@pytest.mark.parametrize("role", testing.roles(), ids=lambda role: role.name)
def test_layers_are_right_in_every_role_of_theta(role: testing.ThetaRole) -> None:
    v = testing.normal_tensor((3,), seed=1)
    for make in (testing.quadratic_problem, testing.smooth_convex_problem):
        case = role(make(3, log10_cond=1, seed=2))
        check_role(case, il.argmin(case.objective, case.solver), v)
    case = role(testing.root_problem(3, log10_cond=1, seed=2))
    check_role(case, il.root(case.objective, case.solver), v)


def test_every_role_is_listed_and_drawn_and_says_what_it_is() -> None:
    assert [role.name for role in testing.roles()] == ROLES
    for name in ROLES:
        role = find(testing.theta_roles(), lambda role, name=name: role.name == name, settings=QUICK)
        assert repr(role) == f"ThetaRole({name!r})" and role.description.endswith(".")
    assert find(testing.theta_roles(), lambda role: True, settings=QUICK).name == "leaf"
    with pytest.raises(ValueError, match=r"name='leaves' must be one of \('leaf', 'non-leaf'"):
        testing.ThetaRole("leaves")


def test_a_role_notices_a_wrong_gradient() -> None:
    """The expectations are not idle: a layer that forgets what it closes over fails the role."""
    case = testing.ThetaRole("closed over")(testing.quadratic_problem(2, log10_cond=1))

    def forgetful(init: Tensor, *theta: Tensor) -> Tensor:
        return case.solver(case.objective, init, *theta) + 0 * sum(t.sum() for t in theta)

    with pytest.raises(AssertionError):
        check_role(case, forgetful, torch.ones(2, dtype=F64))


# -------------------------------------------------------------------------------------------------------------- faults


def tracking(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * ((x - t) ** 2).sum() + ((x - t) ** 4).sum()


def all_faults() -> list[str]:
    return [fault.name for fault in testing.faults(lambda objective, init: init)]


@pytest.mark.parametrize("name", all_faults())
def test_layers_do_about_every_fault_what_they_must(name: str) -> None:
    problem, v = testing.smooth_convex_problem(3, log10_cond=1, seed=3), testing.normal_tensor((3,), seed=4)
    fault = testing.Fault(name, problem.solver)
    before = problem.init.clone()
    with fault.expected():
        x = il.argmin(problem.objective, fault)(problem.init, *problem.theta)
    assert torch.equal(problem.init, before)  # the caller's init is never touched
    if fault.raises or fault.warns:
        return
    right = problem.dense_gradient(v)
    size = max(float(r.norm()) for r in right)
    # CG to 1e-9 at a condition of 20; an answer off by 2^-24 |x| moves the Hessian by rho times that, over mu = 0.05
    tolerance = 1e-7 + 100 * fault.error * max(1, float(x.detach().norm()))
    for g, r in zip(torch.autograd.grad(x, problem.theta, v), right, strict=True):
        assert float((g - r).norm()) <= tolerance * size


@pytest.mark.parametrize("name", ["returns theta itself", "works in place on init", "keeps its graph"])
def test_where_the_solution_is_theta_the_gradient_is_counted_once(name: str) -> None:
    t = testing.normal_tensor((3,), seed=5).requires_grad_()
    fault = testing.Fault(name, lambda objective, init, t: t.clone())
    if name == "returns theta itself":
        assert fault(tracking, torch.zeros(3, dtype=F64), t) is t
    with fault.expected():
        x = il.argmin(tracking, fault)(torch.zeros(3, dtype=F64), t)
    (gradient,) = torch.autograd.grad(x.sum(), t)
    assert torch.allclose(gradient, torch.ones(3, dtype=F64), rtol=1e-9)


@given(testing.faulty_solvers(lambda objective, init, t: {"x": t["x"].clone()}))
def test_faults_work_on_pytrees(fault: testing.Fault) -> None:
    init, t = {"x": torch.zeros(2, dtype=F64)}, {"x": torch.ones(2, dtype=F64, requires_grad=True)}
    with fault.expected():
        il.argmin(lambda x, t: tracking(x["x"], t["x"]), fault)(init, t)


def test_a_fault_that_is_met_by_silence_or_by_something_else_is_reported() -> None:
    solver = lambda objective, init: init  # noqa: E731
    with (
        pytest.raises(AssertionError, match=r"must raise NonFiniteError, but it raised nothing"),
        testing.Fault("returns NaN", solver).expected(),
    ):
        pass
    with (
        pytest.raises(AssertionError, match=r"must raise NonFiniteError, but raised ZeroDivisionError: oh"),
        testing.Fault("returns NaN", solver).expected(),
    ):
        raise ZeroDivisionError("oh")
    with (
        pytest.raises(AssertionError, match=r"must warn StationarityWarning, but its warnings were \[\]"),
        testing.Fault("returns init", solver).expected(),
    ):
        pass
    with (
        pytest.raises(AssertionError, match=r"must give the right gradient, but raised ValueError: no"),
        testing.Fault("returns a NumPy array", solver).expected(),
    ):
        raise ValueError("no")


def test_faults_are_refused_by_unknown_name_or_without_a_solver() -> None:
    with pytest.raises(ValueError, match=r"name='returns nan' must be one of \('raises', 'returns NaN'"):
        testing.Fault("returns nan", lambda f, x: x)
    with pytest.raises(ValueError, match=r"solver=3 must be callable"):
        testing.Fault("raises", 3)  # type: ignore[arg-type]


def test_a_fault_prints_its_name_and_its_outcome() -> None:
    fault = testing.Fault("stops early", tracking)
    assert repr(fault) == "Fault('stops early', tracking)" and fault.must == "warn StationarityWarning"
    assert fault.warns is il.StationarityWarning and fault.raises is None and fault.error == 0
    assert testing.Fault("returns a NumPy array of float32", tracking).error == 2.0**-24
