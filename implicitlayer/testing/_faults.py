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

from implicitlayer._errors import NonFiniteError, SolverOutputError, StationarityWarning
from implicitlayer.base._tree import flatten, tree_map, unflatten
from implicitlayer.base._types import check_one_of
from implicitlayer.testing._strategies import checked

Solver = Callable[..., Any]


class SolverFailedError(Exception):
    """What the fault ``"raises"`` raises; a layer must let it through as it is."""


@dataclass(frozen=True, eq=False, repr=False)
class Fault:
    """A solver made faulty; call it as any solver.

    Attributes:
        name: what goes wrong, such as ``"returns NaN"``.
        solver: the right solver that it spoils.

    Raises:
        ValueError: an unknown name; the message lists them.

    Example:
        >>> import implicitlayer as il, torch
        >>> fault = il.testing.Fault("returns NaN", lambda objective, init, t: t.clone())
        >>> fault.raises.__name__, fault.warns, fault.must
        ('NonFiniteError', None, 'raise NonFiniteError')
        >>> layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(), fault)
        >>> with fault.expected():
        ...     layer(torch.zeros(2), torch.ones(2))
    """

    name: str
    solver: Solver

    def __post_init__(self) -> None:
        check_one_of("name", self.name, tuple(_FAULTS))
        _check_solver(self.solver)

    def __repr__(self) -> str:
        return f"Fault({self.name!r}, {getattr(self.solver, '__qualname__', self.solver)})"

    def __call__(self, objective: Callable[..., Any], init: Any, *theta: Any) -> Any:
        return _FAULTS[self.name][0](self.solver, objective, init, *theta)

    @property
    def raises(self) -> type[Exception] | None:
        """The exception that a layer must raise at the call; None where it must not raise."""
        outcome = _FAULTS[self.name][1]
        return outcome if outcome is not None and not issubclass(outcome, Warning) else None

    @property
    def warns(self) -> type[Warning] | None:
        """The warning that a layer must give at the call; None where it must be silent."""
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
        """Context around a layer's call: AssertionError where it does not what it :attr:`must` (but the gradient)."""
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
        if kinds != ({self.warns} if self.warns else set()):
            names = sorted(kind.__name__ for kind in kinds)
            raise AssertionError(f"{self!r}: the layer must {self.must}, but its warnings were {names}.")


def faults(solver: Solver) -> list[Fault]:
    """Every fault, those that a layer must refuse first.

    Args:
        solver: ``solver(objective, init, *theta) -> x``, right to rounding. Its ``init`` must have an entry at least,
            must not be the solution, and must be float32 or float64.
    """
    return [Fault(name, solver) for name in _FAULTS]


def faulty_solvers(solver: Solver) -> st.SearchStrategy[Fault]:
    """Strategy of the solvers of :func:`faults`, made of a right one.

    Raises; NaN; Inf; wrong shape; a shape that would broadcast; wrong structure; no tensor at all; complex; changes
    theta in place; returns init; stops early; and what must do no harm: other dtype, NumPy array, odd memory
    layout, theta itself, init changed in place, a kept graph, inference mode.
    """
    checked(_check_solver, solver)
    return st.sampled_from(faults(solver))


def _check_solver(solver: Any) -> None:
    if not callable(solver):
        raise ValueError(f"solver={solver!r} must be callable: solver(objective, init, *theta) -> x.")


def _raises(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    raise SolverFailedError("this solver always fails")


def _answer(change: Callable[[Any, Any, tuple[Any, ...]], Any]) -> Solver:
    """A solver whose answer is changed: ``change(answer, init, theta)``."""
    return lambda solver, objective, init, *theta: change(solver(objective, init, *theta), init, theta)


def _each_leaf(change: Callable[[torch.Tensor], Any]) -> Solver:
    return _answer(lambda answer, init, theta: tree_map(change, answer))


def _poisoned(value: float) -> Solver:
    def spoiled(answer: Any, init: Any, theta: tuple[Any, ...]) -> Any:
        leaves, spec = flatten(tree_map(torch.clone, answer))
        largest = max(leaves, key=torch.numel)
        largest.reshape(-1)[largest.numel() // 2] = value  # one entry of many
        return unflatten(leaves, spec)

    return _answer(spoiled)


def _floating(theta: tuple[Any, ...]) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(theta)[0] if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _spoils_theta(solver: Solver, objective: Any, init: Any, *theta: Any) -> Any:
    answer = tree_map(torch.clone, solver(objective, init, *theta))
    for leaf in _floating(theta):
        leaf.mul_(2)
    return answer


def _theta_itself(answer: Any, init: Any, theta: tuple[Any, ...]) -> Any:
    """A theta leaf that holds the answer, in place of the answer: where the solution is a theta, as in |x - t|^2."""

    def own(x: torch.Tensor) -> torch.Tensor:
        same = [t for t in _floating(theta) if t.dtype == x.dtype and t.shape == x.shape and torch.equal(t, x)]
        return same[0] if same else x

    return tree_map(own, answer)


def _in_place(answer: Any, init: Any, theta: tuple[Any, ...]) -> Any:
    tree_map(lambda start, x: start.copy_(x), init, answer)
    return init


def _keeps_its_graph(answer: Any, init: Any, theta: tuple[Any, ...]) -> Any:
    """An answer whose graph leads to theta with a derivative that is wrong by far."""
    with torch.enable_grad():
        touched = sum((t.requires_grad_().sum() * 0.0 for t in _floating(theta)), torch.zeros(()))
        slope = sum((1e3 * (t - t.detach()).sum() for t in _floating(theta)), touched)
        return tree_map(lambda x: x + slope.to(x.dtype), answer)


def _odd_layout(x: torch.Tensor) -> torch.Tensor:
    view = torch.full((2 * x.numel() + 3,), torch.nan, dtype=x.dtype)[3::2].view(x.shape)
    view.copy_(x)
    return view


def _in_inference_mode(answer: Any, init: Any, theta: tuple[Any, ...]) -> Any:
    with torch.inference_mode():
        return tree_map(torch.clone, answer)


_FAULTS: dict[str, tuple[Solver, type[Exception] | None]] = {
    "raises": (_raises, SolverFailedError),
    "returns NaN": (_poisoned(float("nan")), NonFiniteError),
    "returns Inf": (_poisoned(float("inf")), NonFiniteError),
    "returns a wrong shape": (_each_leaf(lambda x: torch.cat([x.reshape(-1), x.reshape(-1)[:1]])), SolverOutputError),
    "returns a shape that would broadcast": (_each_leaf(lambda x: x.detach()[None]), SolverOutputError),
    "returns one number for all entries": (_each_leaf(lambda x: x.detach().mean()[None, None]), SolverOutputError),
    "returns another structure": (_answer(lambda answer, *_: {"answer": answer}), SolverOutputError),
    "returns a tuple with a note": (_answer(lambda answer, *_: (answer, "converged")), SolverOutputError),
    "returns None": (lambda *_: None, SolverOutputError),
    "returns a list of numbers": (_each_leaf(lambda x: [*x.detach().reshape(-1).tolist(), 0.0]), SolverOutputError),
    "returns complex numbers": (_each_leaf(lambda x: x.detach() + 0j), SolverOutputError),
    "changes theta in place": (_spoils_theta, SolverOutputError),
    "returns init": (lambda solver, objective, init, *theta: init, StationarityWarning),
    "stops early": (
        _answer(lambda answer, init, _: tree_map(lambda start, x: start + 0.5 * (x - start), init, answer)),
        StationarityWarning,
    ),
    "returns another dtype (float32 for float64)": (
        _each_leaf(lambda x: x.float() if x.dtype == torch.float64 else x.double()),
        None,
    ),
    "returns a NumPy array": (_each_leaf(lambda x: x.detach().numpy()), None),
    "returns a NumPy array of float32": (_each_leaf(lambda x: x.detach().float().numpy()), None),
    "returns an odd memory layout": (_each_leaf(_odd_layout), None),
    "returns theta itself": (_answer(_theta_itself), None),
    "works in place on init": (_answer(_in_place), None),
    "keeps its graph": (_answer(_keeps_its_graph), None),
    "works in inference mode": (_answer(_in_inference_mode), None),
}
