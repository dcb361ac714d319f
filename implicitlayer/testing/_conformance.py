"""Conformance checks for users' own solvers: as a pytest decorator, or one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from implicitlayer.testing._claims import InnerClaim, LinearClaim, claim_of, inner, linear
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

    Example:
        >>> import implicitlayer as il
        >>> names = []
        >>> for name, check in il.testing.solver_checks(il.Dense()):
        ...     check()
        ...     names.append(name)
        >>> names[:2], "batch_equals_loop" in names
        (['shape_and_dtype', 'solves_random_systems'], True)
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
    try:
        import pytest
    except ImportError as error:
        raise ImportError(
            'parametrize_with_solver_checks needs pytest: pip install "implicitlayer[testing]".'
        ) from error
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
