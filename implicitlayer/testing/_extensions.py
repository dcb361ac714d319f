"""The subclasses of the public base classes are found, and put to the checks of their kind."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from implicitlayer.base._extension import Extension
from implicitlayer.base._solution import RecordingSolver
from implicitlayer.linear._operator import LinearSolver
from implicitlayer.meta._method import MetaMethod
from implicitlayer.sets._term import ProximalTerm
from implicitlayer.testing._conformance import solver_checks
from implicitlayer.testing._method_checks import METHOD_CHECKS, TaskLossOfChecks
from implicitlayer.testing._set_checks import term_checks

PACKAGE = "implicitlayer"


def extensions(base: type[Extension], module: str | None = None) -> list[type[Extension]]:
    """The classes below ``base`` that are there to be used: neither abstract nor private.

    Args:
        base: ``il.LinearSolver``, ``il.RecordingSolver``, ``il.sets.ConvexSet`` or ``il.meta.MetaMethod``, or a class
            below one of them; TypeError for another.
        module: of classes of this module, or of modules inside it, only; default all but the package's own.
    """
    if not (inspect.isclass(base) and issubclass(base, Extension)):
        raise TypeError(
            f"base={base!r} must be il.LinearSolver, il.RecordingSolver, il.sets.ConvexSet or il.meta.MetaMethod, or a "
            "class below one of them."
        )
    found: dict[type[Extension], None] = {}
    waiting = [base]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        found[kind] = None
    return sorted((kind for kind in found if _counts(kind, module)), key=lambda kind: kind.__qualname__)


def extension_checks(
    base: type[Extension] | Extension, module: str | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The conformance checks of everything that extends ``base``, as pairs (name, check).

    A new linear solver, inner solver, set or meta-learning method is found by its class, once its module is imported.
    An inner solver that finds roots has no checks here: make a minimiser of it, and ask :func:`solver_checks`.

    Args:
        base, module: as in :func:`extensions`. A class by itself is asked for like a base; an instance is checked as
            it is.

    Yields:
        Pairs such as ``"Line-the_projection_is_the_nearest_point"`` and a function that raises AssertionError.

    Raises:
        TypeError: no such base; a class that cannot be made without arguments and has no ``examples``.

    Example:
        >>> import implicitlayer as il
        >>> checks = dict(il.testing.extension_checks(il.sets.NonNegative, "implicitlayer"))
        >>> checks["NonNegative-the_projection_is_the_nearest_point"]()
    """
    if isinstance(base, Extension):
        yield from ((f"{type(base).__name__}-{check}", function) for check, function in _checks_of(base))
        return
    for kind in extensions(base, module):
        given = [TaskLossOfChecks()] if issubclass(kind, MetaMethod) else []
        try:
            examples = list(kind.examples(*given))
        except TypeError as error:
            raise TypeError(
                f"{kind.__qualname__} could not be made for its checks ({error}). Give it a classmethod examples() "
                "that returns a list of instances."
            ) from error
        for number, example in enumerate(examples):
            name = kind.__qualname__.rpartition(".<locals>.")[2] + (f"[{number}]" if len(examples) > 1 else "")
            yield from ((f"{name}-{check}", function) for check, function in _checks_of(example))


def _checks_of(example: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    if isinstance(example, LinearSolver | RecordingSolver):
        return solver_checks(example)
    checks = term_checks(example) if isinstance(example, ProximalTerm) else METHOD_CHECKS
    return ((check.__name__.removeprefix("check_"), functools.partial(check, example)) for check in checks)


def _counts(kind: type[Extension], module: str | None) -> bool:
    name = kind.__module__
    if (
        inspect.isabstract(kind)
        or Extension in kind.__bases__
        or kind.__name__.startswith("_")
        or getattr(kind, "finds", None) == "root"
    ):
        return False
    own = name == PACKAGE or name.startswith(f"{PACKAGE}.")
    if module is None:
        return not own
    if name != module and not name.startswith(f"{module}."):
        return False
    # of the package's own, those that users see
    rooms = [PACKAGE, *(f"{PACKAGE}.{room}" for room in ("solvers", "sets", "meta"))]
    return not own or any(getattr(sys.modules[room], kind.__name__, None) is kind for room in rooms)
