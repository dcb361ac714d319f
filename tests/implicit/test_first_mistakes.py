"""What a first user gets wrong is told by the argument, its value, the rule and the remedy, and by who acted."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from references import F64
from torch import Tensor

import implicitlayer as il

ZEROS = torch.zeros(3, dtype=F64)
needs_notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")


def theta() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)


def distance(x: Tensor, t: Tensor) -> Tensor:
    return ((x - t) ** 2).sum()


FACADES: list[Callable[..., Any]] = [il.argmin, il.root, il.fixed_point, il.constrained_argmin]
MODULES: list[Callable[..., Any]] = [il.ArgminLayer, il.RootLayer, il.FixedPointLayer]


@pytest.mark.parametrize("make", [*FACADES, *MODULES])
def test_a_solver_in_the_place_of_the_function_is_told_to_be_swapped(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"=LBFGS\(\.\.\.\) is a solver\. The \w+ comes first, the solver second: il\."):
        make(il.solvers.LBFGS(), distance)


@pytest.mark.parametrize("make", [*FACADES, *MODULES])
@pytest.mark.parametrize(
    ("solver", "remedy"),
    [
        (il.solvers.Newton, r"solver=Newton is a class.*Pass an instance: il.solvers.Newton\(...\)"),
        (torch.optim.Adam, r"solver=Adam is a class.*il.solvers.TorchOptimizer\(torch.optim.Adam, max_steps=..., lr="),
    ],
)
def test_a_class_in_the_place_of_a_solver_is_told_to_be_an_instance(
    make: Callable[..., Any], solver: Any, remedy: str
) -> None:
    with pytest.raises(TypeError, match=remedy):
        make(distance, solver)


def test_a_class_in_the_place_of_the_objective_is_told_to_be_an_instance() -> None:
    with pytest.raises(TypeError, match=r"objective=Linear is a class.*Pass an instance: Linear\(\.\.\.\)"):
        il.argmin(torch.nn.Linear, il.solvers.LBFGS())


WITH_SOLVER: dict[str, Callable[..., Any]] = {
    "argmin": lambda solver, **how: il.argmin(distance, solver, **how),
    "root": lambda solver, **how: il.root(lambda x, t: x - t, solver, **how),
    "fixed_point": lambda solver, **how: il.fixed_point(lambda x, t: 0.5 * (x + t), solver, **how),
    "constrained": lambda solver, **how: il.constrained_argmin(distance, solver, inequality=lambda x, t: -x, **how),
}


@pytest.mark.parametrize("make", WITH_SOLVER.values(), ids=WITH_SOLVER)
def test_a_class_in_the_place_of_a_linear_solver_is_told_to_be_an_instance(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"linear_solver=Minres is a class\. Pass an instance: il\.Minres\(\.\.\.\)"):
        make(lambda f, x, t: t, linear_solver=il.Minres)


@needs_notes
@pytest.mark.parametrize("make", WITH_SOLVER.values(), ids=WITH_SOLVER)
def test_a_solver_with_another_number_of_arguments_is_told_what_it_is_called_with(make: Callable[..., Any]) -> None:
    note = note_of(lambda: make(lambda f, x: x)(ZEROS, theta()))
    assert "called its solver as solver(objective, init, theta[0])" in note
    assert "Write it as solver(objective, init, *theta)" in note


@needs_notes
def test_another_type_error_of_a_solver_gets_no_note() -> None:
    with pytest.raises(TypeError) as caught:
        il.argmin(distance, lambda f, x, t: x + None)(ZEROS, theta())
    assert not hasattr(caught.value, "__notes__")


def test_an_optimizer_of_torch_that_was_made_is_told_to_be_wrapped() -> None:
    optimizer: Any = torch.optim.Adam([theta()])
    with pytest.raises(TypeError, match=r"solver=Adam\(\.\.\.\) was made for one run.*il.solvers.TorchOptimizer"):
        il.argmin(distance, optimizer)


MINIMISERS: list[Any] = [
    il.solvers.LBFGS(),
    il.solvers.NewtonCG(),
    il.solvers.GradientDescent(step_size=0.1, max_steps=5),
    il.solvers.AcceleratedGradient(),
    il.solvers.ProximalGradient(),
    il.solvers.SciPyMinimize(),
    il.solvers.TorchOptimizer(torch.optim.SGD, max_steps=5, lr=0.1),
]
ROOT_SOLVERS: list[Any] = [il.solvers.Newton(), il.solvers.Broyden(), il.solvers.AndersonAcceleration()]


@pytest.mark.parametrize("solver", MINIMISERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("make", [il.root, il.fixed_point, il.RootLayer, il.FixedPointLayer])
def test_a_minimiser_is_refused_where_a_root_is_sought(make: Callable[..., Any], solver: Any) -> None:
    needed = r"(root needs a root\. Pass il.solvers.Newton|fixed_point needs a fixed point\. Pass il.solvers.Anders)"
    with pytest.raises(TypeError, match=rf"looks for a minimum, and il\.{needed}"):
        make(lambda x, t: 0.5 * x - t, solver)


@pytest.mark.parametrize("solver", ROOT_SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("make", [il.argmin, il.ArgminLayer])
def test_a_solver_of_roots_is_refused_where_a_minimum_is_sought(make: Callable[..., Any], solver: Any) -> None:
    with pytest.raises(TypeError, match=r"looks for a (root|fixed point), and il\.argmin needs a minimum\. Pass"):
        make(distance, solver)


SOLVER = il.solvers.LBFGS()
WEIGHT = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0]], dtype=F64)


def note_of(call: Callable[[], Any]) -> str:
    """The note on the error of ``call``, which keeps its own type and words."""
    with pytest.raises((TypeError, RuntimeError)) as info:
        call()
    assert not isinstance(info.value, il.ImplicitLayerError)
    (note,) = info.value.__notes__  # type: ignore[attr-defined]
    return str(note)


@needs_notes
@pytest.mark.parametrize("facade", [il.argmin, il.root, il.fixed_point])
def test_a_function_written_with_theta_first_is_told_the_order(facade: Any) -> None:
    def theta_first(t: Tensor, x: Tensor) -> Tensor:
        return WEIGHT @ t - x

    solver = SOLVER if facade is il.argmin else il.solvers.Newton()
    note = note_of(lambda: facade(theta_first, solver)(ZEROS, torch.ones(5, dtype=F64, requires_grad=True)))
    assert "f(x, theta[0]): x (3,) torch.float64; theta[0] (5,) torch.float64" in note
    assert "unknowns come first, in the structure of init" in note and "layer(init, *theta)" in note
    assert "dtype of init" not in note and "NumPy" not in note and "solver" not in note  # what is right is not blamed


@needs_notes
def test_a_layer_called_with_theta_first_is_told_the_order() -> None:
    layer = il.argmin(lambda x, t: ((WEIGHT @ t - x) ** 2).sum(), SOLVER)
    note = note_of(lambda: layer(torch.ones(5, dtype=F64, requires_grad=True), ZEROS))
    assert "x (5,) torch.float64; theta[0] (3,) torch.float64" in note and "layer(init, *theta)" in note


@needs_notes
def test_a_dict_where_the_objective_wants_a_tensor_is_told() -> None:
    note = note_of(lambda: il.argmin(distance, SOLVER)(ZEROS, {"a": theta()}))
    assert "theta[0] a dict with ['a']" in note


@needs_notes
def test_float32_unknowns_with_float64_data_are_told_by_their_dtypes() -> None:
    layer = il.argmin(lambda x, t: ((torch.eye(3, dtype=F64) @ x - t) ** 2).sum(), SOLVER)
    note = note_of(lambda: layer(ZEROS.float(), theta()))
    assert "Their dtypes differ (torch.float32, torch.float64)" in note and "init.to(data.dtype)" in note


@needs_notes
def test_a_solver_function_in_the_place_of_the_objective_is_told_to_be_second() -> None:
    note = note_of(lambda: il.argmin(lambda f, x, t: t, distance)(ZEROS, theta()))
    assert "does not take 2 arguments. Is it the solver, f(objective, init, *theta)?" in note


@needs_notes
def test_an_objective_in_numpy_is_told_to_be_written_in_torch() -> None:
    note = note_of(lambda: il.argmin(lambda x, t: np.sum((x - t) ** 2), SOLVER)(ZEROS, theta()))
    assert "comes from NumPy" in note and "torch operations" in note


def test_an_error_of_the_users_own_keeps_its_type_and_words() -> None:
    class Mine(Exception):
        pass

    def objective(x: Tensor, t: Tensor) -> Tensor:
        raise Mine("my words")

    with pytest.raises(Mine) as info:
        il.argmin(objective, SOLVER)(ZEROS, theta())
    assert str(info.value) == "my words"


@pytest.mark.parametrize("make", [il.argmin, il.root, il.fixed_point])
def test_none_inside_init_is_told_by_its_place(make: Any) -> None:
    with pytest.raises(TypeError, match=r"init leaf x\['b'\] is None; the unknowns must be tensors. Leave it out"):
        make(lambda x, t: x["a"] - t, lambda f, x, t: x)({"a": ZEROS, "b": None}, theta())


@pytest.mark.parametrize("make", [il.argmin, il.root, il.fixed_point])
def test_more_lane_dimensions_than_init_has_are_told_with_the_most_there_are(make: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_dims=3 counts .*x has shape \(3,\): batch_dims=1 is the most"):
        make(lambda x, t: x - t, lambda f, x, t: x, batch_dims=3)(ZEROS, theta())


def test_a_sum_over_the_lanes_is_told_to_keep_them() -> None:
    message = r"expected shape \(3,\), got \(\)\. With batch_dims=1 the leading dimensions \(3,\) of x enumerate prob"
    with pytest.raises(il.ObjectiveError, match=message):
        il.argmin(distance, SOLVER, batch_dims=1)(ZEROS, theta())


def minimised_by_scipy(f: Any, x: Any, t: Tensor) -> Any:
    optimize = pytest.importorskip("scipy.optimize")
    return optimize.OptimizeResult(x=t.detach().numpy(), success=True)


@pytest.mark.parametrize("init", [ZEROS, {"a": ZEROS}, [ZEROS]], ids=["tensor", "dict", "list"])
def test_a_result_object_of_scipy_is_told_to_be_unpacked(init: Any) -> None:
    def objective(x: Any, t: Tensor) -> Tensor:
        return distance(x["a"] if isinstance(x, dict) else x[0] if isinstance(x, list) else x, t)

    with pytest.raises(il.SolverOutputError, match=r"OptimizeResult.*return \.x of it"):
        il.argmin(objective, minimised_by_scipy)(init, theta())


def test_reports_of_the_gradient_check_use_the_right_article() -> None:
    report = il.testing.check_argmin_gradients(
        lambda x, t: 0.5 * x + t, lambda f, x, t: 2 * t, ZEROS, theta(), kind="fixed_point"
    )
    assert "Gradient check of a fixed point of 3 unknowns" in str(report)


def test_an_objective_that_changes_theta_in_place_is_blamed_and_not_the_solver() -> None:
    embedding = torch.nn.Embedding(4, 3, max_norm=1.0, dtype=F64)
    places = torch.tensor([0, 1])

    def closed_over(x: Tensor, t: Tensor) -> Tensor:
        return distance(x, embedding(places).sum(0) + t)

    def as_theta(x: Tensor, weight: Tensor) -> Tensor:
        return distance(x, torch.nn.functional.embedding(places, weight, max_norm=1.0).sum(0))

    message = r"the objective .* itself changes a theta of shape \(4, 3\) in place.*max_norm"
    with pytest.raises(il.ObjectiveError, match=message):
        il.argmin(closed_over, SOLVER)(ZEROS, theta())
    with pytest.raises(il.ObjectiveError, match=message):
        il.argmin(as_theta, SOLVER)(ZEROS, torch.ones(4, 3, dtype=F64, requires_grad=True))


def test_a_solver_that_changes_theta_in_place_is_blamed_and_not_the_objective() -> None:
    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
        return t.mul_(2.0)

    message = r"the solver changed a theta of shape \(3,\) in place"
    with pytest.raises(il.SolverOutputError, match=message):
        il.argmin(distance, solver)(ZEROS, theta())
    with pytest.raises(il.SolverOutputError, match=message):
        il.argmin(lambda x, t: (x - t) ** 2, solver, batch_dims=1)(ZEROS, theta())
    with pytest.raises(il.SolverOutputError, match=message):  # here it is a part of theta that the solver sees
        torch.vmap(lambda t: il.argmin(lambda x, t: (x - t) ** 2, solver)(ZEROS[0], t))(theta())


def dropped(x: Tensor, t: Tensor) -> Tensor:
    return ((torch.nn.functional.dropout(x, 0.5, True) - t) ** 2).sum()


def noisy(x: Tensor, t: Tensor) -> Tensor:
    return ((x + torch.rand(3, dtype=x.dtype) - t) ** 2).sum()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("objective", [dropped, noisy])
def test_randomness_in_the_objective_is_named(objective: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    t = theta().detach().to(dtype).requires_grad_()
    for answer in (SOLVER, lambda f, x, t: t.detach()):
        with pytest.warns(il.StationarityWarning, match=r"gradient of the objective is random: two eval.*Dropout"):
            il.argmin(objective, answer)(ZEROS.to(dtype), t)
        with pytest.raises(il.StationarityError, match="gradient of the objective is random"):
            il.argmin(objective, answer, on_failure="raise")(ZEROS.to(dtype), t)


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("numpy", [False, True])
def test_small_randomness_is_named_and_not_called_a_changing_hessian(noise: float, numpy: bool) -> None:
    generator = np.random.default_rng(0)
    draw = lambda: torch.from_numpy(generator.normal(size=3)) if numpy else torch.randn(3, dtype=F64)  # noqa: E731
    t = theta().detach().requires_grad_()
    torch.manual_seed(0)
    layer = il.argmin(lambda x, t: ((x - t) ** 2 + (x - t) ** 4 + noise * draw() * x).sum(), lambda f, x, t: t.detach())
    with pytest.warns(il.StationarityWarning, match="gradient of the objective is random"):
        layer(ZEROS, t)


def test_randomness_that_leaves_the_solution_where_it_is_is_named() -> None:
    """The answer is the solution for every draw, and the Hessian another one for each."""
    t = theta().detach().requires_grad_()
    layer = il.argmin(lambda x, t: torch.rand((), dtype=F64) * ((x - t) ** 2).sum(), lambda f, x, t: t.detach())
    with pytest.warns(il.StationarityWarning, match="gradient of the objective is random"):
        layer(ZEROS, t)


def test_drawn_numbers_that_change_nothing_are_no_randomness() -> None:
    def objective(x: Tensor, t: Tensor) -> Tensor:
        torch.rand(3)
        return (torch.nn.functional.dropout(x - t, 0.0) ** 2).sum()

    t = theta().detach().requires_grad_()
    il.argmin(objective, lambda f, x, t: t.detach(), on_failure="raise")(ZEROS, t).sum().backward()


@pytest.mark.parametrize("make", [il.root, il.fixed_point])
def test_randomness_in_a_residual_or_a_map_is_named(make: Any) -> None:
    with pytest.warns(il.StationarityWarning, match="the residual is random"):
        make(lambda x, t: 0.5 * x - t + torch.rand(3, dtype=F64), lambda f, x, t: t)(ZEROS, theta())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_rough_answer_of_a_deterministic_objective_is_not_called_random(dtype: torch.dtype) -> None:
    weight = torch.logspace(0, 8, 3, dtype=dtype)  # badly scaled: rounding is far above eps of the gradient
    t = theta().detach().to(dtype).requires_grad_()
    layer = il.argmin(lambda x, t: (weight * (x - t) ** 2).sum(), lambda f, x, t: t.detach() * 1.01)
    with pytest.warns(il.StationarityWarning, match="answer is not stationary"):
        layer(ZEROS.to(dtype), t)


def test_noise_below_the_tolerance_is_no_alarm() -> None:
    layer = il.argmin(lambda x, t: ((x + 1e-9 * torch.rand(3, dtype=F64) - t) ** 2).sum(), lambda f, x, t: t)
    layer(ZEROS, theta())  # warnings are errors here


def test_randomness_is_told_beside_lanes_that_are_wrong_without_it() -> None:
    noise = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    layer = il.argmin(
        lambda x, t: (x + noise * torch.rand(3, dtype=F64) - t) ** 2,
        lambda f, x, t: t + torch.tensor([0.0, 0.5, 0.0], dtype=F64),
        batch_dims=1,
        on_failure="mask",
    )
    assert layer(ZEROS, theta()).isnan().tolist() == [True, True, False]


CURVATURES = torch.tensor([[-1.0, -2.0, -30.0], [1.0, -2.0, -30.0], [1.0, 2.0, 30.0]], dtype=F64)
AT_MAXIMUM = "at a maximum of the objective"


def indefinite(curvature: Tensor, cotangent: Tensor, **settings: Any) -> str:
    """The error of the gradient at x = t, where the Hessian of every lane is diagonal with ``curvature``."""
    t = torch.ones_like(curvature, requires_grad=True)
    layer = il.argmin(
        lambda x, t: 0.5 * (curvature * (x - t) ** 2).sum(-1),
        lambda f, x, t: t.detach(),
        batch_dims=curvature.ndim - 1,
        **settings,
    )
    with pytest.raises(il.IndefiniteError) as info:
        layer(torch.zeros_like(curvature), t).backward(cotangent)
    return str(info.value)


@pytest.mark.parametrize("settings", [{}, {"linear_solver": il.WarmStart(il.ConjugateGradient())}])
def test_a_maximum_is_called_one_and_a_saddle_is_not(settings: dict[str, Any]) -> None:
    ones = torch.ones(3, dtype=F64)
    assert AT_MAXIMUM in indefinite(CURVATURES[0], ones, **settings)
    assert AT_MAXIMUM not in indefinite(CURVATURES[1], ones, **settings)
    # the cotangent meets negative curvature alone, but there is another direction
    assert AT_MAXIMUM not in indefinite(CURVATURES[1], torch.tensor([0.0, 1.0, 0.0], dtype=F64), **settings)
    assert AT_MAXIMUM in indefinite(CURVATURES[0].float(), ones.float(), **settings)


def test_a_maximum_in_a_batch_is_told_with_its_lane() -> None:
    message = indefinite(CURVATURES, torch.ones(3, 3, dtype=F64))
    assert f"{AT_MAXIMUM} in lane 0 of (3,)" in message


def doubled_in_place(x: Tensor, t: Tensor) -> Tensor:
    x.mul_(2)
    return ((x - t) ** 2).sum()


def theta_in_place(x: Tensor, t: Tensor) -> Tensor:
    t.add_(1)
    return ((x - t) ** 2).sum()


def filled(x: Tensor, t: Tensor) -> Tensor:
    buffer = torch.zeros(3, dtype=F64)
    buffer[0] = x[0]
    buffer += t * x
    return (buffer**2).sum() + ((x - t) ** 2).sum()


@pytest.mark.parametrize("objective", [doubled_in_place, theta_in_place, filled])
@pytest.mark.parametrize("lanes", [False, True])
def test_an_operation_in_place_in_an_objective_is_right_or_refused_with_the_remedy(objective: Any, lanes: bool) -> None:
    if objective is filled and not lanes:  # a buffer of one's own is no trouble
        t = theta().detach().requires_grad_()
        il.argmin(objective, SOLVER, on_failure="ignore")(ZEROS, t).sum().backward()
        return
    loss = lambda t: il.argmin(objective, SOLVER)(ZEROS, t).sum()  # noqa: E731
    run, t = (torch.func.vmap(torch.func.grad(loss)), torch.ones(2, 3, dtype=F64)) if lanes else (loss, theta())
    with pytest.raises(il.ObjectiveError, match=r"in place|out of place"):
        run(t)
