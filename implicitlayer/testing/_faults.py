"""Solvers that misbehave, each with what a layer must do about it: an error, a warning, or right gradients."""

# The expectations are the table of docs: no silent wrong number. What only looks odd (NumPy, another dtype, in-place
# work on init, a kept graph) must give the right gradient; what is wrong must be said by name.

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from implicitlayer._errors import NonFiniteError, SolverOutputError, StationarityWarning
from implicitlayer.base._tree import flatten, tree_map, unflatten

__all__ = ["Fault", "SolverFailedError", "faults", "faulty_solvers"]

Solver = Callable[..., Any]


class SolverFailedError(Exception):
    """What the fault ``"raises"`` raises; a layer must let it through as it is.

    Example:
        >>> import implicitlayer as il, torch
        >>> from implicitlayer import testing
        >>> layer = il.argmin(lambda x: (x**2).sum(), testing.Fault("raises", lambda f, x: x))
        >>> try:
        ...     layer(torch.ones(2))
        ... except testing.SolverFailedError as error:
        ...     print(error)
        this solver always fails
    """


@dataclass(frozen=True, eq=False, repr=False)
class Fault:
    """A solver made faulty; call it as any solver.

    Attributes:
        name: what goes wrong, such as ``"returns NaN"``.
        solver: the right solver that it spoils.
        raises: the exception that a layer must raise at the call; None where it must not raise.
        warns: the warning that it must give; None where it must be silent.
        error: relative error of the answer where the gradient must be right, 0 or the rounding of a shorter dtype.

    Raises:
        ValueError: an unknown name; the message lists them.

    Example:
        >>> import implicitlayer as il, torch
        >>> from implicitlayer import testing
        >>> fault = testing.Fault("returns NaN", lambda objective, init, t: t.clone())
        >>> fault.raises.__name__, fault.warns, fault.must
        ('NonFiniteError', None, 'raise NonFiniteError')
        >>> layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(), fault)
        >>> with fault.expected():
        ...     layer(torch.zeros(2), torch.ones(2))
    """

    name: str
    solver: Solver

    def __post_init__(self) -> None:
        if self.name not in _FAULTS:
            raise ValueError(f"name={self.name!r} must be one of {tuple(_FAULTS)}.")
        if not callable(self.solver):
            raise ValueError(f"solver={self.solver!r} must be callable: solver(objective, init, *theta) -> x.")

    def __repr__(self) -> str:
        return f"Fault({self.name!r}, {getattr(self.solver, '__qualname__', self.solver)})"

    def __call__(self, objective: Callable[..., Any], init: Any, *theta: Any) -> Any:
        return _FAULTS[self.name][0](self.solver, objective, init, *theta)

    @property
    def raises(self) -> type[Exception] | None:
        """The exception that a layer must raise at the call."""
        outcome = _FAULTS[self.name][1]
        return outcome if outcome is not None and not issubclass(outcome, Warning) else None

    @property
    def warns(self) -> type[Warning] | None:
        """The warning that a layer must give at the call."""
        outcome = _FAULTS[self.name][1]
        return outcome if outcome is not None and issubclass(outcome, Warning) else None

    @property
    def error(self) -> float:
        """Relative error of the answer: 2^-24 where it went through float32, else 0; read where nothing is raised."""
        return 2.0**-24 if "float32" in self.name else 0.0

    @property
    def must(self) -> str:
        """What the layer must do, in words."""
        if self.raises:
            return f"raise {self.raises.__name__}"
        return f"warn {self.warns.__name__}" if self.warns else "give the right gradient"

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Context around the call of a layer that checks :attr:`must`, all but the gradient.

        Raises:
            AssertionError: the layer raised or warned something else, or kept silent.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:
                if self.raises is None or not isinstance(error, self.raises):
                    said = f"raised {type(error).__name__}: {error}"
                    raise AssertionError(f"{self!r}: the layer must {self.must}, but {said}") from error
                return
        if self.raises is not None:
            raise AssertionError(f"{self!r}: the layer must {self.must}, but it raised nothing.")
        kinds = {w.category for w in caught}
        wanted = {self.warns} if self.warns else set()
        if kinds != wanted:
            names = sorted(kind.__name__ for kind in kinds)
            raise AssertionError(f"{self!r}: the layer must {self.must}, but its warnings were {names}.")


def faults(solver: Solver) -> list[Fault]:
    """Every fault, around a right solver.

    Args:
        solver: ``solver(objective, init, *theta) -> x``, right to rounding. Its ``init`` must have an entry at least,
            must not be the solution, and must be float32 or float64.

    Returns:
        The faults, those that a layer must refuse first.

    Raises:
        ValueError: the solver is not callable.

    Example:
        >>> from implicitlayer import testing
        >>> [fault.name for fault in testing.faults(lambda objective, init: init)][:3]
        ['raises', 'returns NaN', 'returns Inf']
    """
    return [Fault(name, solver) for name in _FAULTS]


def faulty_solvers(solver: Solver) -> st.SearchStrategy[Fault]:
    """Strategy of solvers that misbehave, see :func:`faults`.

    Raises; NaN; Inf; wrong shape; a shape that would broadcast; wrong structure; no tensor at all; complex; changes
    theta in place; returns init; stops early; and what must do no harm: other dtype, NumPy array, odd memory
    layout, theta itself, init changed in place, a kept graph, inference mode.

    Args:
        solver: a right solver, as in :func:`faults`.

    Returns:
        Strategy of :class:`Fault`.

    Raises:
        hypothesis.errors.InvalidArgument: the solver is not callable.

    Example:
        >>> import implicitlayer as il, torch
        >>> from hypothesis import given
        >>> from implicitlayer import testing
        >>> problem = testing.quadratic_problem(3, log10_cond=1)
        >>> @given(testing.faulty_solvers(problem.solver))
        ... def no_fault_is_silent(fault):
        ...     with fault.expected():
        ...         il.argmin(problem.objective, fault)(problem.init, *problem.theta)
        >>> no_fault_is_silent()
    """
    if not callable(solver):
        raise InvalidArgument(f"solver={solver!r} must be callable: solver(objective, init, *theta) -> x.")
    return st.sampled_from(faults(solver))


# ------------------------------------------------------------------------------------------------------------- faults


def _raises(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    raise SolverFailedError("this solver always fails")


def _poisoned(value: float) -> Solver:
    def spoiled(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
        leaves, spec = flatten(tree_map(torch.clone, solver(objective, init, *theta)))
        largest = max(leaves, key=torch.numel)
        largest.reshape(-1)[largest.numel() // 2] = value  # one entry of many
        return unflatten(leaves, spec)

    return spoiled


def _each_leaf(change: Callable[[torch.Tensor], Any]) -> Solver:
    return lambda solver, objective, init, *theta: tree_map(change, solver(objective, init, *theta))


def _other_structure(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    return {"answer": solver(objective, init, *theta)}


def _with_a_note(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    return solver(objective, init, *theta), "converged"


def _nothing(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    return None


def _init(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    return init


def _halfway(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    return tree_map(lambda start, x: start + 0.5 * (x - start), init, solver(objective, init, *theta))


def _spoils_theta(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    answer = tree_map(torch.clone, solver(objective, init, *theta))
    for leaf in flatten(theta)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            leaf.mul_(2)
    return answer


def _theta_itself(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    """A theta leaf that holds the answer, in place of the answer: where the solution is a theta, as in |x - t|^2."""
    thetas = [leaf for leaf in flatten(theta)[0] if isinstance(leaf, torch.Tensor)]

    def own(x: torch.Tensor) -> torch.Tensor:
        same = [t for t in thetas if t.dtype == x.dtype and t.shape == x.shape and torch.equal(t, x)]
        return same[0] if same else x

    return tree_map(own, solver(objective, init, *theta))


def _in_place(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    answer = solver(objective, init, *theta)
    tree_map(lambda start, x: start.copy_(x), init, answer)
    return init


def _keeps_its_graph(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    """An answer whose graph leads to theta with a derivative that is wrong by far."""
    thetas = [leaf for leaf in flatten(theta)[0] if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    answer = solver(objective, init, *theta)
    with torch.enable_grad():
        touched = sum((t.requires_grad_().sum() * 0.0 for t in thetas), torch.zeros(()))
        slope = sum((1e3 * (t - t.detach()).sum() for t in thetas), touched)
        return tree_map(lambda x: x + slope.to(x.dtype), answer)


def _other_dtype(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.float64 else x.double()


def _odd_layout(x: torch.Tensor) -> torch.Tensor:
    storage = torch.full((2 * x.numel() + 3,), torch.nan, dtype=x.dtype)
    view = storage[3::2].view(x.shape)
    view.copy_(x)
    return view


def _in_inference_mode(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    answer = solver(objective, init, *theta)
    with torch.inference_mode():
        return tree_map(torch.clone, answer)


_FAULTS: dict[str, tuple[Solver, type[Exception] | None]] = {
    "raises": (_raises, SolverFailedError),
    "returns NaN": (_poisoned(float("nan")), NonFiniteError),
    "returns Inf": (_poisoned(float("inf")), NonFiniteError),
    "returns a wrong shape": (_each_leaf(lambda x: torch.cat([x.reshape(-1), x.reshape(-1)[:1]])), SolverOutputError),
    "returns a shape that would broadcast": (_each_leaf(lambda x: x.detach()[None]), SolverOutputError),
    "returns one number for all entries": (_each_leaf(lambda x: x.detach().mean()[None, None]), SolverOutputError),
    "returns another structure": (_other_structure, SolverOutputError),
    "returns a tuple with a note": (_with_a_note, SolverOutputError),
    "returns None": (_nothing, SolverOutputError),
    "returns a list of numbers": (_each_leaf(lambda x: [*x.detach().reshape(-1).tolist(), 0.0]), SolverOutputError),
    "returns complex numbers": (_each_leaf(lambda x: x.detach() + 0j), SolverOutputError),
    "changes theta in place": (_spoils_theta, SolverOutputError),
    "returns init": (_init, StationarityWarning),
    "stops early": (_halfway, StationarityWarning),
    "returns another dtype (float32 for float64)": (_each_leaf(_other_dtype), None),
    "returns a NumPy array": (_each_leaf(lambda x: x.detach().numpy()), None),
    "returns a NumPy array of float32": (_each_leaf(lambda x: x.detach().float().numpy()), None),
    "returns an odd memory layout": (_each_leaf(_odd_layout), None),
    "returns theta itself": (_theta_itself, None),
    "works in place on init": (_in_place, None),
    "keeps its graph": (_keeps_its_graph, None),
    "works in inference mode": (_in_inference_mode, None),
}
