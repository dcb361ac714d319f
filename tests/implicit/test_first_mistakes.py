"""What a first user gets wrong is told by the argument, its value, the rule and the remedy, and by who acted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64
from torch import Tensor

import implicitlayer as il

ZEROS = torch.zeros(3, dtype=F64)


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
    with pytest.raises(
        TypeError, match=r"looks for a minimum, and il\.\w+ needs a root\. Pass il\.solvers\.Newton\(\)"
    ):
        make(lambda x, t: 0.5 * x - t, solver)


@pytest.mark.parametrize("solver", ROOT_SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("make", [il.argmin, il.ArgminLayer])
def test_a_solver_of_roots_is_refused_where_a_minimum_is_sought(make: Callable[..., Any], solver: Any) -> None:
    with pytest.raises(TypeError, match=r"looks for a root, and il\.argmin needs a minimum\. Pass il\.solvers\.LBFGS"):
        make(distance, solver)
