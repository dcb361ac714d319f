"""What users bring: the protocols of objectives, inner solvers and linear solvers, and the base of what they extend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch

OnFailure = Literal["raise", "warn", "ignore", "mask"]
PyTree = Any
Leaves = list[torch.Tensor]
FlatFunction = Callable[[Leaves, Leaves], Any]


def name_of(function: Any) -> str:
    """The name of a function; of another callable the name of its class."""
    return str(getattr(function, "__name__", type(function).__name__))


def check_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError for what is none of the values ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {allowed}.")


class Objective(Protocol):
    """``objective(x, *theta) -> 0-d tensor`` in plain torch code; x and every theta are pytrees."""

    def __call__(self, x: PyTree, /, *theta: PyTree) -> torch.Tensor: ...


@runtime_checkable
class InnerSolver(Protocol):
    """``solver(objective, init, *theta) -> x``: any callable.

    It sees detached data, with grad mode on. A solver whose attribute ``batched`` is true is called once for all
    lanes of a batch: then the objective returns one value per lane, with shape ``lanes``, and every leaf of ``init``
    has the leading dimensions ``lanes``. Any other solver is called once per lane.
    """

    def __call__(self, objective: Objective, init: PyTree, /, *theta: PyTree) -> PyTree: ...


class Extension:
    """A class whose subclasses ``il.testing.extension_checks`` finds by themselves."""

    @classmethod
    def examples(cls, *given: Any) -> Sequence[Any]:
        """The instances that are checked: by default one, made without arguments.

        Args:
            given: what the base class says that every instance is made of, if anything.
        """
        return [cls(*given)]
