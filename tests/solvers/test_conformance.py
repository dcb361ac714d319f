"""Every inner solver of the package passes the conformance checks of il.testing for what it claims."""

from collections.abc import Callable
from typing import Any

from solver_claims import INNER

from implicitlayer import testing


@testing.parametrize_with_solver_checks(INNER)
def test_the_inner_solvers_of_the_package_conform(solver: Any, check: Callable[[Any], None]) -> None:
    check(solver)
