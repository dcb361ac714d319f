"""Ways in which a tensor can enter a problem as theta, and what its gradient must be in each of them."""

# Every role turns a problem into an equivalent one whose inputs have the gradients of the plain theta, or None.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from implicitlayer.base._types import check_one_of
from implicitlayer.testing._families import _Problem

Gradients = list[torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class RoleCase:
    """A problem whose theta plays a role: what to call and what must come out.

    Attributes:
        objective: the function to make the layer of (a residual for a :class:`RootProblem`).
        solver: an exact solver for it.
        init, theta: the arguments of the layer.
        inputs: the tensors to differentiate with respect to; some do not require grad.
        expected: ``expected(cotangent) -> `` one float64 tensor per input, or None, which means "None or zero".
    """

    objective: Callable[..., Any]
    solver: Callable[..., Any]
    init: Any
    theta: tuple[Any, ...]
    inputs: tuple[torch.Tensor, ...]
    expected: Callable[[torch.Tensor], Gradients]


@dataclass(frozen=True, eq=False, repr=False)
class ThetaRole:
    """A way in which the last theta of a problem is given to a layer. ``role(problem)`` is the case to test.

    Attributes:
        name: what it is, such as ``"closed over"``.
    """

    name: str

    def __post_init__(self) -> None:
        check_one_of("name", self.name, tuple(_ROLES))

    def __repr__(self) -> str:
        return f"ThetaRole({self.name!r})"

    @property
    def description(self) -> str:
        """The situation in one sentence."""
        return _ROLES[self.name][0]

    def __call__(self, problem: _Problem) -> RoleCase:
        """The problem in this role; the problem itself is left as it is."""
        return _ROLES[self.name][1](problem)


def roles() -> list[ThetaRole]:
    """Every way in which a theta can be given to a layer, simplest first."""
    return [ThetaRole(name) for name in _ROLES]


def theta_roles() -> st.SearchStrategy[ThetaRole]:
    """Strategy of :func:`roles`, simplest first.

    Leaf, non-leaf, view, ``nn.Parameter``, inside a dict, frozen, closed over (as a leaf, and computed), the same
    tensor twice, also as init; beside an unused tensor, an integer tensor, a bool tensor, a Python number, a string or
    None.
    """
    return st.sampled_from(roles())


def _case(
    problem: _Problem,
    theta: tuple[Any, ...],
    inputs: tuple[torch.Tensor, ...],
    read: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda args: args,
    num_idle: int = 0,
) -> RoleCase:
    """The case with these arguments, from which ``read`` recovers the thetas; the last ``num_idle`` have none."""
    return RoleCase(
        lambda x, *args: problem.function(x, *read(args)),
        lambda function, init, *args: problem.solver(function, init, *read(args)),
        problem.init,
        theta,
        inputs,
        lambda cotangent: [*problem.dense_gradient(cotangent), *[None] * num_idle],
    )


def _last(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[_Problem], RoleCase]:
    """The last theta replaced by a function of a leaf with the same value."""
    return lambda problem: _case(problem, (*problem.theta[:-1], change(problem.theta[-1])), problem.theta)


def _beside(problem: _Problem, *extra: Any) -> RoleCase:
    """Further arguments that the objective does not read."""
    num = len(problem.theta)
    tensors = [e for e in extra if isinstance(e, torch.Tensor) and e.is_floating_point()]
    every = (*problem.theta, *extra)
    return _case(problem, every, (*problem.theta, *tensors), lambda args: args[:num], len(tensors))


def _parameter(problem: _Problem) -> RoleCase:
    theta = (*problem.theta[:-1], torch.nn.Parameter(problem.theta[-1].detach().clone()))
    return _case(problem, theta, theta)


def _in_a_dict(problem: _Problem) -> RoleCase:
    names = [f"t{i}" for i in range(len(problem.theta))]
    tree = {"number": 3, "none": None, "tensors": dict(zip(names, problem.theta, strict=True))}
    return _case(problem, (tree,), problem.theta, lambda args: tuple(args[0]["tensors"][name] for name in names))


def _frozen(problem: _Problem) -> RoleCase:
    theta = (*problem.theta[:-1], problem.theta[-1].detach().clone())
    return replace(_case(problem, theta, theta), expected=lambda v: [*problem.dense_gradient(v)[:-1], None])


def _over(problem: _Problem, last: torch.Tensor) -> RoleCase:
    """The objective closes over ``last``, the solver over its value."""
    case = _case(problem, problem.theta[:-1], problem.theta, lambda args: (*args, last))
    return replace(case, solver=lambda f, init, *args: problem.solver(f, init, *args, last.detach()))


def _twice(problem: _Problem) -> RoleCase:
    *first, last = problem.theta
    return _case(problem, (*first, last, last), problem.theta, lambda args: (*args[:-2], 3 * args[-2] - 2 * args[-1]))


def _also_init(problem: _Problem) -> RoleCase:
    init = problem.init.clone().requires_grad_()
    return replace(_beside(problem, init), init=init)


def _twice_less_once(t: torch.Tensor) -> torch.Tensor:
    return 2 * t - t


_ROLES: dict[str, tuple[str, Callable[[_Problem], RoleCase]]] = {
    "leaf": ("Every theta is a leaf tensor that requires grad.", _last(lambda t: t)),
    "non-leaf": ("The last theta was computed from a leaf.", _last(_twice_less_once)),
    "view": ("The last theta is a view of a leaf.", _last(lambda t: t.reshape(1, *t.shape)[0])),
    "parameter": ("The last theta is an nn.Parameter.", _parameter),
    "in a dict": ("All thetas are leaves of one pytree, which also holds a number and None.", _in_a_dict),
    "frozen": ("The last theta does not require grad.", _frozen),
    "closed over": (
        "The objective closes over the last theta, which is no argument of the layer.",
        lambda p: _over(p, p.theta[-1]),
    ),
    "closed over, computed": (
        "The objective closes over the last theta, which was computed from a leaf.",
        lambda p: _over(p, _twice_less_once(p.theta[-1])),
    ),
    "same tensor twice": (
        "One tensor is given as two thetas, and the objective reads 3 times the one minus 2 times the other.",
        _twice,
    ),
    "also init": ("A theta, unused by the objective, is also the init: it gets no gradient.", _also_init),
    "beside an unused tensor": (
        "A tensor that requires grad is passed, but the objective does not read it.",
        lambda p: _beside(p, torch.ones(2, 3, dtype=p.init.dtype, requires_grad=True)),
    ),
    "beside an integer tensor": (
        "An integer tensor is passed beside the thetas.",
        lambda p: _beside(p, torch.arange(3)),
    ),
    "beside a bool tensor": (
        "A bool tensor is passed beside the thetas.",
        lambda p: _beside(p, torch.tensor([True, False])),
    ),
    "beside Python numbers": ("Python numbers are passed beside the thetas.", lambda p: _beside(p, 3, 0.5, True)),
    "beside a string and None": ("A string and None are passed beside the thetas.", lambda p: _beside(p, "name", None)),
}
