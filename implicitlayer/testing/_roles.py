"""Ways in which a tensor can enter a problem as theta, and what its gradient must be in each of them."""

# Every role turns a problem into an equivalent one whose inputs have the gradients of the plain theta, or None.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from implicitlayer.testing._problems import _Problem

__all__ = ["RoleCase", "ThetaRole", "roles", "theta_roles"]

Gradients = list[torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class RoleCase:
    """A problem whose theta plays a role: what to call and what must come out.

    Attributes:
        objective: the function to make the layer of (a residual for a :class:`RootProblem`).
        solver: an exact solver for it.
        init: the starting point.
        theta: the arguments of the layer.
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
    """A way in which the last theta of a problem is given to a layer; ``role(problem)`` is the case to test.

    Attributes:
        name: what it is, such as ``"closed over"``.
        description: the situation in one sentence.

    Example:
        >>> import implicitlayer as il, torch
        >>> from implicitlayer import testing
        >>> case = testing.ThetaRole("frozen")(testing.quadratic_problem(2))
        >>> x = il.argmin(case.objective, case.solver)(case.init, *case.theta)
        >>> [t.requires_grad for t in case.inputs], case.expected(torch.ones(2))[1] is None
        ([True, False], True)
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in _ROLES:
            raise ValueError(f"name={self.name!r} must be one of {tuple(_ROLES)}.")

    def __repr__(self) -> str:
        return f"ThetaRole({self.name!r})"

    @property
    def description(self) -> str:
        """The situation in one sentence."""
        return (_ROLES[self.name].__doc__ or "").strip()

    def __call__(self, problem: _Problem) -> RoleCase:
        """The problem in this role; the problem itself is left as it is."""
        return _ROLES[self.name](problem)


def roles() -> list[ThetaRole]:
    """Every way in which a theta can be given to a layer, simplest first.

    Returns:
        The roles, those that :func:`theta_roles` draws from.

    Example:
        >>> from implicitlayer import testing
        >>> [role.name for role in testing.roles()][:3]
        ['leaf', 'non-leaf', 'view']
    """
    return [ThetaRole(name) for name in _ROLES]


def theta_roles() -> st.SearchStrategy[ThetaRole]:
    """Strategy of the ways in which a theta can be given to a layer, simplest first.

    Leaf, non-leaf, view, ``nn.Parameter``, inside a dict, frozen, closed over (as a leaf, and computed), the same
    tensor twice, also as init; beside an unused tensor, an integer tensor, a bool tensor, a Python number, a string or
    None.

    Returns:
        Strategy of :class:`ThetaRole`.

    Example:
        >>> import implicitlayer as il, torch
        >>> from hypothesis import given
        >>> from implicitlayer import testing
        >>> v = torch.ones(2, dtype=torch.float64)
        >>> @given(testing.theta_roles())
        ... def gradients_are_right_in_every_role(role):
        ...     case = role(testing.quadratic_problem(2, log10_cond=1))
        ...     x = il.argmin(case.objective, case.solver)(case.init, *case.theta)
        ...     inputs = [t for t in case.inputs if t.requires_grad]
        ...     got = iter(torch.autograd.grad(x, inputs, v, allow_unused=True))
        ...     for tensor, right in zip(case.inputs, case.expected(v)):
        ...         gradient = next(got) if tensor.requires_grad else None
        ...         if right is None:
        ...             assert gradient is None or not gradient.any()
        ...         else:
        ...             assert torch.allclose(gradient, right, rtol=1e-8)
        >>> gradients_are_right_in_every_role()
    """
    return st.sampled_from(roles())


# -------------------------------------------------------------------------------------------------------------- roles


def _case(
    problem: _Problem,
    theta: tuple[Any, ...],
    inputs: tuple[torch.Tensor, ...],
    read: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    extra: Gradients | None = None,
    init: Any = None,
) -> RoleCase:
    """The case with these arguments, from which ``read`` recovers the thetas of the problem."""
    return RoleCase(
        lambda x, *args: problem.function(x, *read(args)),
        lambda function, init, *args: problem.solver(function, init, *read(args)),
        problem.init if init is None else init,
        theta,
        inputs,
        lambda cotangent: [*problem.dense_gradient(cotangent), *(extra or [])],
    )


def _last(problem: _Problem, change: Callable[[torch.Tensor], torch.Tensor]) -> RoleCase:
    """The last theta replaced by a function of a leaf with the same value."""
    *first, last = problem.theta
    return _case(problem, (*first, change(last)), problem.theta, lambda args: args)


def _beside(problem: _Problem, *extra: Any) -> RoleCase:
    """Further arguments that the objective does not read."""
    num = len(problem.theta)
    tensors = tuple(e for e in extra if isinstance(e, torch.Tensor) and e.is_floating_point())
    return _case(
        problem, (*problem.theta, *extra), (*problem.theta, *tensors), lambda args: args[:num], [None] * len(tensors)
    )


def _leaf(problem: _Problem) -> RoleCase:
    """Every theta is a leaf tensor that requires grad."""
    return _last(problem, lambda t: t)


def _non_leaf(problem: _Problem) -> RoleCase:
    """The last theta was computed from a leaf."""
    return _last(problem, lambda t: 2 * t - t)


def _view(problem: _Problem) -> RoleCase:
    """The last theta is a view of a leaf."""
    return _last(problem, lambda t: t.reshape(1, *t.shape)[0])


def _parameter(problem: _Problem) -> RoleCase:
    """The last theta is an nn.Parameter."""
    *first, last = problem.theta
    theta = (*first, torch.nn.Parameter(last.detach().clone()))
    return _case(problem, theta, theta, lambda args: args)


def _in_a_dict(problem: _Problem) -> RoleCase:
    """All thetas are leaves of one pytree, which also holds a number and None."""
    names = [f"t{i}" for i in range(len(problem.theta))]
    tree = {"number": 3, "none": None, "tensors": dict(zip(names, problem.theta, strict=True))}
    return _case(problem, (tree,), problem.theta, lambda args: tuple(args[0]["tensors"][name] for name in names))


def _frozen(problem: _Problem) -> RoleCase:
    """The last theta does not require grad."""
    *first, last = problem.theta
    theta = (*first, last.detach().clone())
    case = _case(problem, theta, theta, lambda args: args)
    return RoleCase(
        case.objective, case.solver, case.init, theta, theta, lambda v: [*problem.dense_gradient(v)[:-1], None]
    )


def _closed_over(problem: _Problem) -> RoleCase:
    """The objective closes over the last theta, which is no argument of the layer."""
    return _over(problem, problem.theta[-1])


def _closed_over_computed(problem: _Problem) -> RoleCase:
    """The objective closes over the last theta, which was computed from a leaf."""
    return _over(problem, 2 * problem.theta[-1] - problem.theta[-1])


def _over(problem: _Problem, last: torch.Tensor) -> RoleCase:
    first = problem.theta[:-1]
    return RoleCase(
        lambda x, *args: problem.function(x, *args, last),
        lambda function, init, *args: problem.solver(function, init, *args, last.detach()),
        problem.init,
        tuple(first),
        problem.theta,
        lambda v: list(problem.dense_gradient(v)),
    )


def _twice(problem: _Problem) -> RoleCase:
    """One tensor is given as two thetas, and the objective reads 3 times the one minus 2 times the other."""
    *first, last = problem.theta
    return _case(problem, (*first, last, last), problem.theta, lambda args: (*args[:-2], 3 * args[-2] - 2 * args[-1]))


def _also_init(problem: _Problem) -> RoleCase:
    """A theta, unused by the objective, is also the init: it gets no gradient."""
    init = problem.init.clone().requires_grad_()
    num = len(problem.theta)
    theta = (*problem.theta, init)
    return _case(problem, theta, theta, lambda args: args[:num], [None], init=init)


def _unused(problem: _Problem) -> RoleCase:
    """A tensor that requires grad is passed, but the objective does not read it."""
    return _beside(problem, torch.ones(2, 3, dtype=problem.init.dtype, requires_grad=True))


def _integer(problem: _Problem) -> RoleCase:
    """An integer tensor is passed beside the thetas."""
    return _beside(problem, torch.arange(3))


def _boolean(problem: _Problem) -> RoleCase:
    """A bool tensor is passed beside the thetas."""
    return _beside(problem, torch.tensor([True, False]))


def _number(problem: _Problem) -> RoleCase:
    """Python numbers are passed beside the thetas."""
    return _beside(problem, 3, 0.5, True)


def _other_object(problem: _Problem) -> RoleCase:
    """A string and None are passed beside the thetas."""
    return _beside(problem, "name", None)


_ROLES: dict[str, Callable[[_Problem], RoleCase]] = {
    "leaf": _leaf,
    "non-leaf": _non_leaf,
    "view": _view,
    "parameter": _parameter,
    "in a dict": _in_a_dict,
    "frozen": _frozen,
    "closed over": _closed_over,
    "closed over, computed": _closed_over_computed,
    "same tensor twice": _twice,
    "also init": _also_init,
    "beside an unused tensor": _unused,
    "beside an integer tensor": _integer,
    "beside a bool tensor": _boolean,
    "beside Python numbers": _number,
    "beside a string and None": _other_object,
}
