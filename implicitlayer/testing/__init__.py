"""Property tests for differentiable layers and for solvers: Hypothesis strategies, references, conformance checks.

Needs the extra: ``pip install "implicitlayer[testing]"``.
"""

from implicitlayer._errors import extra as _extra

with _extra("testing", "il.testing needs Hypothesis"):
    import hypothesis as _hypothesis  # noqa: F401

from implicitlayer.testing._arrays import (
    general_matrix,
    indefinite_matrix,
    normal_tensor,
    singular_matrix,
    spd_matrix,
)
from implicitlayer.testing._check import check_argmin_gradients
from implicitlayer.testing._claims import InnerClaim, LinearClaim, inner, linear
from implicitlayer.testing._conformance import (
    extension_checks,
    extensions,
    parametrize_with_solver_checks,
    solver_checks,
)
from implicitlayer.testing._families import (
    ArgminProblem,
    RootProblem,
    nonconvex_problem,
    quadratic_problem,
    root_problem,
    smooth_convex_problem,
)
from implicitlayer.testing._faults import Fault, SolverFailedError, faults, faulty_solvers
from implicitlayer.testing._properties import (
    check_adjoint,
    check_batch_equals_loop,
    check_dict_order,
    check_linear_in_cotangent,
    check_repeatable,
    check_rotated_unknowns,
    check_scaled_objective,
)
from implicitlayer.testing._report import GradientCheckError, GradientReport, GradientRow
from implicitlayer.testing._roles import RoleCase, ThetaRole, roles, theta_roles
from implicitlayer.testing._strategies import (
    Pair,
    cotangent,
    cotangents,
    general_matrices,
    indefinite_matrices,
    layouts,
    nonconvex_problems,
    pytrees,
    quadratic_problems,
    relayout,
    root_problems,
    singular_matrices,
    smooth_convex_problems,
    spd_matrices,
)

__all__ = [
    "ArgminProblem", "Fault", "GradientCheckError", "GradientReport", "GradientRow", "InnerClaim", "LinearClaim",
    "Pair", "RoleCase", "RootProblem", "SolverFailedError", "ThetaRole", "check_adjoint",
    "check_argmin_gradients", "check_batch_equals_loop", "check_dict_order", "check_linear_in_cotangent",
    "check_repeatable", "check_rotated_unknowns", "check_scaled_objective", "cotangent", "cotangents",
    "extension_checks", "extensions", "faults", "faulty_solvers", "general_matrices", "general_matrix",
    "indefinite_matrices", "indefinite_matrix", "inner", "layouts", "linear", "nonconvex_problem",
    "nonconvex_problems", "normal_tensor", "parametrize_with_solver_checks", "pytrees", "quadratic_problem",
    "quadratic_problems", "relayout", "roles", "root_problem", "root_problems", "singular_matrices",
    "singular_matrix", "smooth_convex_problem", "smooth_convex_problems", "solver_checks", "spd_matrices",
    "spd_matrix", "theta_roles",
]  # fmt: skip
