"""What solvers say of unknowns, step counts and objectives that they cannot use."""

from typing import Any

import pytest
import torch
from references import F64

import implicitlayer as il
from implicitlayer.sets import Box
from implicitlayer.solvers import (
    LBFGS,
    GradientDescent,
    NewtonCG,
    ProjectedGradient,
    ProximalGradient,
    SciPyMinimize,
    TorchOptimizer,
)

SOLVERS = {
    "SciPyMinimize": SciPyMinimize(),
    "TorchOptimizer": TorchOptimizer(torch.optim.SGD, max_steps=3, lr=0.1),
    "torch's LBFGS": TorchOptimizer(torch.optim.LBFGS, max_steps=3),
    "ProjectedGradient": ProjectedGradient(Box(0.0, 1.0), max_steps=3),
    "LBFGS": LBFGS(max_steps=3),
    "NewtonCG": NewtonCG(max_steps=3),
    "GradientDescent by Armijo's rule": GradientDescent(1.0, max_steps=3, line_search="armijo"),
}
EACH = pytest.mark.parametrize("name", list(SOLVERS))


@EACH
def test_an_objective_that_autograd_cannot_see_through_is_named(name: str) -> None:
    with pytest.raises(
        il.ObjectiveError, match="does not depend on x in a way autograd can see: its value has no graph"
    ):
        SOLVERS[name](lambda x: (x.detach() ** 2).sum(), torch.ones(2, dtype=F64))


@EACH
def test_an_objective_that_returns_a_number_is_named(name: str) -> None:
    with pytest.raises(il.ObjectiveError, match=r"must return a real floating tensor, got float\. Write it in torch"):
        SOLVERS[name](lambda x: 3.0, torch.ones(2, dtype=F64))


@EACH
@pytest.mark.parametrize(
    ("init", "kind"), [(torch.zeros(2, dtype=torch.int64), "torch.int64"), ([0.0, 0.0], "float"), (1.0, "float")]
)
def test_unknowns_that_are_no_floating_tensors_are_named(name: str, init: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"init holds {kind}; the unknowns must be real floating tensors"):
        SOLVERS[name](lambda x: (x**2).sum(), init)


def test_scipy_sees_one_problem_at_a_time() -> None:
    with pytest.raises(il.ObjectiveError, match=r"must return a 0-d tensor: .* got values of shape \(2,\)"):
        SciPyMinimize()(lambda x: x**2, torch.ones(2, dtype=F64))


@pytest.mark.parametrize("max_steps", [2.5, 3.0, True])
def test_a_count_of_steps_is_an_integer(max_steps: Any) -> None:
    for make in (
        lambda: ProximalGradient(il.L1(1.0), max_steps=max_steps),
        lambda: ProjectedGradient(Box(), max_steps=max_steps),
        lambda: TorchOptimizer(torch.optim.SGD, max_steps=max_steps),
    ):
        with pytest.raises(TypeError, match=rf"max_steps={max_steps} must be an integer: it counts steps"):
            make()
