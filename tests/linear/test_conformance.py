"""Every linear solver of the package passes the conformance checks of il.testing for what it claims."""

from collections.abc import Callable
from typing import Any

from solver_claims import LINEAR

from implicitlayer import testing


@testing.parametrize_with_solver_checks(LINEAR)
def test_the_linear_solvers_of_the_package_conform(solver: Any, check: Callable[[Any], None]) -> None:
    check(solver)
