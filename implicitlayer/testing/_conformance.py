"""Conformance checks: of users' own solvers, as a pytest decorator or one by one, and of what extends a base class."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from implicitlayer._errors import extra
from implicitlayer.base._solution import RecordingSolver
from implicitlayer.base._types import Extension
from implicitlayer.linear._operator import LinearSolver
from implicitlayer.meta._method import MetaMethod
from implicitlayer.sets._term import ProximalTerm
from implicitlayer.testing._claims import InnerClaim, LinearClaim, claim_of, inner, linear
from implicitlayer.testing._extension_checks import METHOD_CHECKS, TaskLossOfChecks, term_checks
from implicitlayer.testing._inner_checks import inner_checks
from implicitlayer.testing._linear_checks import linear_checks

Claim = LinearClaim | InnerClaim


def solver_checks(
    solver: Any, kind: Literal["linear", "inner"] | None = None, **claims: Any
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The conformance checks of one solver as pairs (name, check); ``check()`` raises AssertionError with the numbers.

    A check that the solver does not claim to support is left out.

    Args:
        solver: a solver, or the claim that :func:`linear` or :func:`inner` makes of one. A bare solver is taken as
            they take it by default; its kind is told from its class or the number of its arguments.
        kind: which of the two it is, where that cannot be told.
        claims: for a bare solver with a ``kind``: the keyword arguments of :func:`linear` or :func:`inner`.

    Raises:
        TypeError: no solver, or one whose kind cannot be told.
        ValueError: an unknown kind; claims without a kind.
    """
    if kind not in (None, "linear", "inner"):
        raise ValueError(f"kind={kind!r} must be 'linear', 'inner' or None.")
    if claims and kind is None:
        raise ValueError(f"{sorted(claims)} need kind='linear' or kind='inner'. Or use il.testing.linear and .inner.")
    if kind is not None and isinstance(solver, (LinearClaim, InnerClaim)):
        raise ValueError("kind must be left out for what il.testing.linear or il.testing.inner has made.")
    claim = claim_of(solver) if kind is None else (linear if kind == "linear" else inner)(solver, **claims)
    return ((name, functools.partial(check, claim)) for name, check in _checks(claim))


def parametrize_with_solver_checks(solvers: Sequence[Any]) -> Callable[[Callable[..., Any]], Any]:
    """A pytest decorator: one test per solver and check, with ids such as ``Minres-solves_random_systems``.

    The test has the arguments ``solver`` (the claim) and ``check``, and calls ``check(solver)``.

    Args:
        solvers: solvers, or claims made by :func:`linear` and :func:`inner`.

    Raises:
        ImportError: pytest is missing; ``pip install "implicitlayer[testing]"``.
        TypeError: no solver, or one whose kind cannot be told.
        ValueError: no solvers at all.

    Example:
        >>> import implicitlayer as il
        >>> from implicitlayer.testing import linear, parametrize_with_solver_checks
        >>> @parametrize_with_solver_checks([il.Minres(), linear(il.Gmres(), rtol=1e-8)])
        ... def test_my_solvers(solver, check):
        ...     check(solver)
    """
    with extra("testing", "parametrize_with_solver_checks needs pytest"):
        import pytest
    claims = [claim_of(solver) for solver in solvers]
    if not claims:
        raise ValueError("solvers must hold one solver at least: a test without a case is never run.")
    cases = [
        pytest.param(claim, check, id=f"{claim.name}-{name}") for claim in claims for name, check in _checks(claim)
    ]
    return pytest.mark.parametrize(("solver", "check"), cases)


def _checks(claim: Claim) -> Iterator[tuple[str, Callable[[Any], None]]]:
    checks: Iterator[Callable[[Any], None]]
    checks = linear_checks(claim) if isinstance(claim, LinearClaim) else inner_checks(claim)
    return ((check.__name__.removeprefix("check_"), check) for check in checks)


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
        or getattr(kind, "finds", None) in ("root", "fixed point")
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
